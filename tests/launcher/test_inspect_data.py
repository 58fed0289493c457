import json
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.distributed import launch

ROOT = Path(__file__).resolve().parents[2]


def inspect(*arguments) -> subprocess.CompletedProcess:
    return launch(["launcher/inspect_data.py", *map(str, arguments)])


def test_it_shows_samples_figures_and_a_page(tiny_target, tiny_corpus, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    sources = [
        f"target.path={tiny_target}",
        "target.aux_layers=[0,1,3]",
        f"data.train={tiny_corpus.train}",
        f"data.held_out={tiny_corpus.held_out}",
        "data.max_tokens=40",
    ]
    options = ["--samples", 2, "--html", tmp_path / "a" / "page.html", "--json", tmp_path / "b" / "facts.json"]
    options += ["--samples_json", tmp_path / "c" / "samples.json"]
    done = inspect(*sources, "draft.vocab_size=48", *options)
    assert done.returncode == 0, done.stderr
    assert "document 0: " in done.stdout and "<assistant>" in done.stdout and "positions with loss by TTT step" in done.stdout
    facts = json.loads((tmp_path / "b" / "facts.json").read_text())
    assert f"{facts['tokens']:,} tokens in {facts['documents']:,} documents" in done.stdout
    assert 0 < facts["loss_position_share"] < facts["assistant_token_share"] < 1
    samples = json.loads((tmp_path / "c" / "samples.json").read_text(encoding="utf-8"))
    assert len(samples) == facts["documents"] and samples[0]["place"] == f"{tiny_corpus.train}:1"
    assert [segment["assistant"] for segment in samples[0]["segments"]] == [False, True]
    assert "<svg" in (tmp_path / "a" / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.trian=a.jsonl", "did you mean 'data.train'?"),
        ("data.train=no_such.jsonl", "inspect_data.py: command line: data.train = no_such.jsonl: no such file"),
        ("data.template=qwen33", "did you mean 'qwen3'?"),
        ("target.store=no_such_store", "no_such_store"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(override, words):
    done = inspect(override)
    assert done.returncode != 0
    assert words in done.stderr and "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


ASKED = {"role": "user", "content": "w1"}
SAID = {"role": "assistant", "content": "w2"}
BAD_DATA = {
    "not JSON": b'{"conversations": [{"role": "user"',
    "not UTF-8": b'{"conversations": [{"role": "user", "content": "caf\xe9"}]}',
    "not a conversation": ["hello"],
    "unknown role": {"conversations": [{"role": "alien", "content": "w1"}, SAID]},
    "empty turn": {"conversations": [{"role": "user", "content": "  "}, SAID]},
    "no assistant turn": {"conversations": [ASKED]},
    "has images": {"conversations": [ASKED, SAID], "images": ["cat.png"]},
    "content is not text": {"conversations": [ASKED, SAID | {"content": 7}]},
    "cannot be rendered": {"conversations": [ASKED, SAID], "tools": [{"name": "search"}]},
    "too long": {"conversations": [ASKED, SAID | {"content": "w3 " * 60}]},
}


def test_ten_kinds_of_bad_data_are_each_named_by_line(tiny_target, tiny_corpus, tmp_path):
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in BAD_DATA.values()]
    path = tmp_path / "chat.jsonl"
    path.write_bytes(b"\n".join([json.dumps({"conversations": [ASKED, SAID]}).encode(), *lines]) + b"\n")
    template = "{{ raise_exception('no tools') if tools }}" + AutoTokenizer.from_pretrained(tiny_target).chat_template
    (tmp_path / "mine.jinja").write_text(template)
    options = [f"target.path={tiny_target}", "target.aux_layers=[0,1,3]", "data.max_tokens=40"]
    options += [f"data.train={path}", f"data.held_out={tiny_corpus.held_out}"]
    done = inspect(*options, "draft.vocab_size=48", f"data.template={tmp_path / 'mine.jinja'}", "--bad", tmp_path / "bad.txt")
    assert done.returncode == 0, done.stderr
    listed = (tmp_path / "bad.txt").read_text().splitlines()
    for number, (reason, line) in enumerate(zip(list(BAD_DATA)[:-1], listed, strict=True), start=2):
        assert line.startswith(f"{path}:{number}: {reason}: ")
        assert f"1 {reason}: {path}:{number}: " in done.stdout
    assert f"too long: {path}:11 (" in done.stdout
    path.write_bytes(b"\n".join(lines[:3]) + b"\n")
    done = inspect(*options, "draft.vocab_size=48", "--bad", tmp_path / "all_bad.txt")
    assert done.returncode != 0 and "no conversation with an assistant token" in done.stderr
    assert len((tmp_path / "all_bad.txt").read_text().splitlines()) == 3
