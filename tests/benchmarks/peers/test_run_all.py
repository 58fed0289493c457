"""The table over all parts has a row for every comparison."""

import json
import sys
from pathlib import Path

from benchmarks.peers import run_all
from benchmarks.peers.run_all import BLOCK, DISK, EAGLE3, FIRST_DRAFT

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
RECORDED = {
    EAGLE3: "peers_cpu.json",
    BLOCK: "block_peers_cpu.json",
    DISK: "peers_disk_bytes.json",
    FIRST_DRAFT: "first_draft.json",
}


def test_figures_that_are_there_are_shown_in_one_table(tmp_path, monkeypatch, capsys):
    for part, name in RECORDED.items():
        (tmp_path / f"{part}.json").write_text((RESULTS / name).read_text())
    started = []
    monkeypatch.setattr(run_all.subprocess, "run", lambda words, **options: started.append(words))
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--folder", str(tmp_path)])
    run_all.main()
    assert started == []
    printed = capsys.readouterr().out
    cases = json.loads((RESULTS / RECORDED[EAGLE3]).read_text())
    assert printed.count("EAGLE-3 step") == len(cases)
    assert printed.count("blocks of 8") == printed.count("blocks of 7") == 2
    assert printed.count("bytes per token") == 5 and "first draft" in printed


def test_a_part_without_figures_is_measured_with_its_own_script(tmp_path, monkeypatch):
    def measure(words: list[str], **options) -> None:
        path = Path(words[-1])
        path.write_text((RESULTS / RECORDED[DISK]).read_text())
        started.append(Path(words[1]).name)

    started: list[str] = []
    monkeypatch.setattr(run_all.subprocess, "run", measure)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--folder", str(tmp_path / "new"), "--part", DISK])
    run_all.main()
    assert started == ["bench_disk_bytes.py"]
    run_all.main()
    assert started == ["bench_disk_bytes.py"], "its figures are there now"
