"""The command measures servers that run, starts and ends its own, and explains what fails."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.config.tree_shape import TreeShape
from engine.serving.draft_kinds import EAGLE3
from launcher.benchmark_serving import context_length, main, parse_arguments, servers_of, shapes_of
from tests.serving.fake_server import CHUNK, left_running, program, serving

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "serving" / "draft"  # of an earlier version, for SGLang only
TARGET = ROOT / "launcher" / "embedded" / "target"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    turns = [[{"role": "user", "content": f"What is {index}?"}, {"role": "assistant", "content": "x"}] for index in range(3)]
    path.write_text("".join(json.dumps({"conversations": turn}) + "\n" for turn in turns), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def draft(tmp_path_factory) -> Path:
    """A draft that both servers run as the engine does."""
    folder = tmp_path_factory.mktemp("served") / "draft"
    shutil.copytree(GOLDEN, folder)
    config = json.loads((folder / "config.json").read_text())
    config["eagle_aux_hidden_state_layer_ids"] = [2, 4, 5]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def words(data: Path, server: str, *options: object) -> list[str]:
    common = ["--server", server, "--target", TARGET, "--data", data, "--max_new_tokens", 1 + 2 * CHUNK, "--repeats", 2]
    return [str(word) for word in (*common, *options)]


def benchmark(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_serving.py", *arguments])
    main()


def refused(monkeypatch, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        benchmark(monkeypatch, *arguments)
    return str(caught.value.code)


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_running_servers_are_compared(server, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "a-long-key")
    with serving(drafts=False) as plain, serving() as drafting:
        options = ("--url", drafting.url, "--plain_url", plain.url, "--batch", 2, 1)
        benchmark(monkeypatch, *words(data, server, *options, "--json", tmp_path / "new" / "out.json"))
        assert drafting.authorizations == {"Bearer a-long-key"}
        key = "prompt" if server == "vllm" else "input_ids"
        assert {tuple(one[key]) for one in drafting.requests} == {tuple(one[key]) for one in plain.requests}
    written = json.loads((tmp_path / "new" / "out.json").read_text())
    assert written["complete"] is True and written["num_prompts"] == {"chat": 3}
    assert set(written["versions"]) == {"no draft", "draft"}
    cells = written["cells"]
    assert [(one["setting"], one["batch"]) for one in cells] == [("no draft", 1), ("no draft", 2), ("draft", 1), ("draft", 2)]
    for one in cells:
        assert one["num_tokens"] == [21, 21] and one["mismatches"] == 0
        assert len(one["tokens_per_s"]) == len(one["requests_per_s"]) == 2
        assert set(one["latency_s"]) == set(one["first_token_s"]) == {"p50", "p90", "p99"}
    assert [one["acceptance"] and one["acceptance"]["length"] for one in cells] == [None, None, CHUNK, CHUNK]
    assert cells[2]["speed_up"]["low"] <= cells[2]["speed_up"]["ratio"]
    assert "Latency in milliseconds" in capsys.readouterr().out


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_sampled_replies_are_measured_and_not_compared(server, data, tmp_path, monkeypatch, capsys):
    with serving(drafts=False) as plain, serving() as drafting:
        options = ("--url", drafting.url, "--plain_url", plain.url, "--batch", 1, "--temperature", 0.7, "--top_p", 0.9)
        benchmark(monkeypatch, *words(data, server, *options, "--json", tmp_path / "out.json"))
        settings = [one if server == "vllm" else one["sampling_params"] for one in drafting.requests]
    assert {(one["temperature"], one["top_p"], one["top_k"]) for one in settings} == {(0.7, 0.9, -1)}
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["sampling"] == {"temperature": 0.7, "top_k": None, "top_p": 0.9}
    assert [one["mismatches"] for one in written["cells"]] == [None, None]
    assert written["cells"][1]["speed_up"]["ratio"] > 0
    assert "sampled replies, temperature 0.7" in capsys.readouterr().out


def test_servers_are_started_per_shape_and_ended(draft, data, tmp_path, monkeypatch, capsys):
    options = ("--python", program(tmp_path), "--draft", draft, "--batch", 1, "--num_steps", 3, 2, "--topk", 2)
    outputs = ("--num_draft_tokens", 4, "--html", tmp_path / "page.html", "--logs", tmp_path / "logs")
    benchmark(monkeypatch, *words(data, "sglang", *options, *outputs, "--json", tmp_path / "out.json", "--", "--tp", 1))
    assert left_running(tmp_path) == []
    commands = [json.loads(line) for line in (tmp_path / "commands").read_text().splitlines()]
    assert ["--speculative-num-steps" in command for command in commands] == [False, True, True]
    assert all(command[-2:] == ["--tp", "1"] and str(TARGET) in command for command in commands)
    written = json.loads((tmp_path / "out.json").read_text())
    trees = [one["shape"] for one in written["cells"]]
    assert trees == [None, *({"num_steps": steps, "topk": 2, "num_draft_tokens": 4} for steps in (2, 3))]
    assert "<svg" in (tmp_path / "page.html").read_text()
    assert len(list((tmp_path / "logs").iterdir())) == 3
    assert "SGLang" in capsys.readouterr().out


def test_a_block_drafter_is_measured_with_whole_blocks(data, tmp_path):
    config = {"architectures": ["DFlashDraftModel"], "block_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    line = words(data, "sglang", "--draft", tmp_path)
    plain, drafting = servers_of(parse_arguments(line))
    assert plain.shape is None and drafting.shape == TreeShape(15, rule="sglang") and drafting.kind.sglang_algorithm == "DFLASH"
    assert [one.shape for one in servers_of(parse_arguments([*line, "--num_steps", "15"]))] == [None, drafting.shape]
    for sizes in (["--num_steps", "3", "15"], ["--topk", "2", "--num_draft_tokens", "8"]):
        with pytest.raises(ValueError, match="whole blocks, of 15 tokens"):
            servers_of(parse_arguments([*line, *sizes]))


def test_a_crash_keeps_what_was_measured_and_shows_the_servers_output(draft, data, tmp_path, monkeypatch):
    with serving(drafts=False) as plain, serving() as drafting:
        drafting.fault = "500"
        options = ("--url", drafting.url, "--plain_url", plain.url, "--batch", 1, "--json", tmp_path / "out.json")
        message = refused(monkeypatch, *words(data, "vllm", *options))
    assert message.startswith("benchmark_serving.py: ") and "message of 500" in message
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["complete"] is False and len(written["cells"]) == 1
    started = ("--python", program(tmp_path, "crash"), "--draft", draft, "--batch", 1)
    message = refused(monkeypatch, *words(data, "vllm", *started))
    assert "ended during the measurement (exit code 3)" in message and message.endswith("28\n29")
    assert "EngineDeadError: no memory\n..." in message and "the engine core died" not in message
    message = refused(monkeypatch, *words(data, "vllm", "--python", program(tmp_path, "dies"), "--draft", draft))
    assert "ended while starting" in message and "no such model" in message
    assert left_running(tmp_path) == []


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGTERM, "ended by SIGTERM"), (signal.SIGINT, "stopped by hand")])
def test_a_signal_ends_the_servers(number, ending, draft, data, tmp_path, monkeypatch):
    def send() -> None:
        while not (tmp_path / "commands").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    options = ("--python", program(tmp_path, "hangs"), "--draft", draft, "--timeout_s", 60)
    assert refused(monkeypatch, *words(data, "vllm", *options)).endswith(ending)
    assert len((tmp_path / "pids").read_text().split()) == 1 and left_running(tmp_path) == []


@pytest.mark.parametrize(
    ("server", "options", "fact"),
    [
        ("vllm", ["--draft", str(GOLDEN), "--topk", "2"], "vLLM drafts chains only, found --topk 2"),
        ("sglang", ["--draft", str(GOLDEN), "--topk", "2"], "--num_draft_tokens is missing"),
        ("sglang", ["--draft", str(GOLDEN), "--num_draft_tokens", "4"], "--num_draft_tokens has no effect on chains"),
        ("vllm", ["--draft", str(GOLDEN)], "without which vLLM captures other layers; export the draft again"),
        ("vllm", ["--draft", str(GOLDEN), "--top_p", "0.9"], "add --temperature"),
        ("vllm", [], "--draft FOLDER"),
        ("vllm", ["--draft", "/no/such"], "no such folder"),
        ("vllm", ["--draft", str(ROOT)], "has no config.json"),
        ("vllm", ["--draft", str(TARGET)], "no draft method for architectures=['LlamaForCausalLM']"),
        ("vllm", ["--plain_url", "http://x"], "--plain_url needs --url"),
        ("vllm", ["--url", "x"], "--url x: expected the address"),
        ("vllm", ["--url", "http://x", "--num_steps", "3"], "--num_steps has no effect on a running server"),
        ("vllm", ["--url", "http://x", "--", "--tp", "2"], "(server arguments) has no effect"),
        ("vllm", ["--url", "http://127.0.0.1:1", "--json", str(ROOT)], "is a folder"),
    ],
)
def test_options_that_contradict_each_other_are_refused(server, options, fact, data, monkeypatch):
    assert fact in refused(monkeypatch, *words(data, server, *options))


def test_the_limit_of_a_server_is_found_among_its_arguments():
    assert context_length(["--tp", "2"]) is None and context_length(["--max-model-len", "auto"]) is None
    assert context_length(["--max-model-len", "4096"]) == context_length(["--context-length=4096"]) == 4096


def test_options_have_sglangs_meanings():
    arguments = parse_arguments(["--server", "sglang", "--target", "t", "--data", "d", "--num_steps", "3", "--", "--topk", "9"])
    assert arguments.server_arguments == ["--topk", "9"]
    shapes = shapes_of(arguments, EAGLE3)
    assert [(shape.num_steps, shape.topk, shape.num_nodes) for shape in shapes] == [(3, 1, 3)]
