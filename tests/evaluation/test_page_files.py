"""Checkpoints, drafts and warnings are those in the folder, judged without reading large files."""

import json
import os
import re
from pathlib import Path

import pytest

from engine.evaluation.page_files import MOST_ROWS, files_section, warnings_section
from engine.evaluation.run_record import RunRecord


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run that has ended, with a complete checkpoint of 2 MiB of step 4."""
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "metrics.jsonl").write_text('{"step": 8}\n')
    (tmp_path / "summary.json").write_text("{}")
    make_checkpoint(tmp_path, 4)
    return tmp_path


def make_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / "checkpoints" / f"step_{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "a.pt").write_bytes(bytes(2**21))
    (checkpoint / "complete.json").write_text(json.dumps({"files": {"a.pt": {"num_bytes": 2**21, "sha256": "?"}}}))
    return checkpoint


def rows(folder: Path) -> dict[str, list[str]]:
    run = RunRecord.read(folder)
    found = re.findall(r"<tr>(.*?)</tr>", files_section(run, [run]).split("<tbody>")[1])
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in found]
    return {name: rest for name, *rest in cells}


def test_a_checkpoint_is_judged_by_the_names_and_sizes_of_its_files(folder):
    ended_s = (folder / "summary.json").stat().st_mtime
    os.utime(folder / "checkpoints" / "step_4" / "complete.json", (ended_s - 90, ended_s - 90))
    (make_checkpoint(folder, 5) / "complete.json").unlink()
    (make_checkpoint(folder, 6) / "a.pt").write_bytes(b"x")
    (make_checkpoint(folder, 7) / "a.pt").unlink()
    (make_checkpoint(folder, 20) / "complete.json").write_text('{"files": [<')
    (folder / "checkpoints" / "other").mkdir()
    found = rows(folder)
    assert list(found) == [f"checkpoints/step_{step}" for step in (20, 7, 6, 5, 4)]
    assert found["checkpoints/step_4"] == ["4", "2.00 MiB", "90 s before the end", "complete"]
    states = [found[f"checkpoints/step_{step}"][-1] for step in (5, 6, 7, 20)]
    assert states == [
        "not complete: no complete.json",
        "a.pt has 1 bytes instead of 2,097,152",
        "a.pt is missing",
        "complete.json is damaged",
    ]


def test_drafts_have_the_steps_of_their_evaluations(folder):
    (folder / "draft").mkdir()
    os.utime(folder / "draft", (0, 0))
    (folder / "summary.json").rename(folder / "kept.json")
    assert rows(folder)["draft"][2].endswith("before the last logged step")
    (folder / "kept.json").rename(folder / "summary.json")
    assert rows(folder)["draft"][2].endswith("before the end")
    assert rows(folder)["draft"][0] == "8" and rows(folder)["draft"][-1] == "no weights"
    (folder / "draft" / "model.safetensors").write_bytes(b"x")
    (folder / "draft_last").mkdir()
    lines = [{"step": 2, "is_kept": True}, {"step": 4, "is_kept": True}, {"step": 6}]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = rows(folder)
    assert (found["draft"][0], found["draft_last"][0], found["draft"][-1]) == ("4", "6", "complete")


def test_a_draft_that_is_replaced_meanwhile_costs_only_its_row(folder, monkeypatch):
    (folder / "draft").mkdir()
    (folder / "draft" / "model.safetensors").symlink_to(folder / "gone")  # in the list of names, and not there
    assert list(rows(folder)) == ["checkpoints/step_4"]


def test_equal_warnings_of_several_ranks_are_one_entry(folder):
    lines = [{"step": 3, "name": "throttling", "rank": rank, "count": 2 + rank, "text": f"at {rank}"} for rank in range(8)]
    (folder / "warnings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = RunRecord.read(folder)
    shown = warnings_section(run, [run])
    assert re.findall(r"<li>(.*?)</li>", shown) == ["step 3: at 0 (throttling, up to 9 times, on 8 ranks)"]


def test_only_the_bad_steps_that_are_shown_are_read(folder, monkeypatch):
    (folder / "bad_steps").mkdir()
    for step in range(MOST_ROWS + 10):
        (folder / "bad_steps" / f"step_{step}_rank_0.json").write_text("{}")
    run = RunRecord.read(folder)
    read: list[str] = []
    monkeypatch.setattr("engine.evaluation.page_files._bad_step_text", lambda place: read.append(str(place)) or "bad")
    shown = warnings_section(run, [run])
    assert len(read) == MOST_ROWS and f"{MOST_ROWS + 10} lists" in shown


def test_warnings_and_bad_steps_are_listed_in_order(folder):
    (folder / "bad_steps").mkdir()
    bad = {"step": 12, "rank": 3, "reason": "the loss is <nan>", "documents": [{}]}
    (folder / "bad_steps" / "step_12_rank_3.json").write_text(json.dumps(bad))
    (folder / "bad_steps" / "step_9_rank_0.json").write_text("[")
    lines = [{"step": step, "name": "spike", "text": f"<b>{step}"} for step in range(1, MOST_ROWS + 3)]
    lines.append({"step": None, "text": "no step"})
    (folder / "warnings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = RunRecord.read(folder)
    items = re.findall(r"<li>(.*?)</li>", warnings_section(run, [run]))
    assert items[:2] == [
        "step 9, the list cannot be read (bad_steps/step_9_rank_0.json)",
        "step 12, rank 3: the loss is &lt;nan&gt;; 1 document (bad_steps/step_12_rank_3.json)",
    ]
    assert len(items) == 2 + MOST_ROWS and items[2].startswith("step 4:") and items[-1] == "no step"
    assert items[-2] == f"step {MOST_ROWS + 2}: &lt;b&gt;{MOST_ROWS + 2} (spike)"
