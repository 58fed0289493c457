"""The GPU suite keeps to its time, survives whatever its parts do, and leaves what it has measured."""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_block_step, bench_colocated, bench_target, bench_train_step, harness, run_gpu_suite
from benchmarks.gpu_suite import compare_training, kernel_tests, runner
from benchmarks.gpu_suite.parts import DEVICE, JSON, PARTS, SuitePart
from benchmarks.gpu_suite.runner import Suite, missing_packages, run_suite, time_limit_s
from benchmarks.gpu_suite.summary import lines_of, problems_of
from benchmarks.harness import Place, measured
from benchmarks.kernels import bench_anchored_attention, bench_token_loss
from engine.config.recipe import load_config
from tests.waiting import wait_until

WRITES = "import json, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(json.dumps({'lines': [sys.argv[2]]}))"
ON_CPU = Place(torch.device("cpu"), torch.float32)


def part(name: str, code: str, *arguments: str, weight: float = 1.0, needs: tuple[str, ...] = ()) -> SuitePart:
    command = ("-c", code, *arguments)
    return SuitePart(name, f"runs {name}", command, command, weight, needs)


def writing(name: str) -> SuitePart:
    return part(name, WRITES, JSON, f"{name} was here")


def run(folder: Path, *parts: SuitePart, seconds: float = 60.0) -> tuple[int, dict[str, dict]]:
    """Run a suite of these parts; returns its exit status and the recorded parts by name."""
    status = run_suite(parts, Suite(folder, "cpu", tiny=True, seconds=seconds))
    record = json.loads((folder / "suite.json").read_text())
    return status, {result["name"]: result for result in record["parts"]}


def test_parts_run_in_order_and_their_results_are_kept(tmp_path, capsys):
    status, results = run(tmp_path / "new" / "folder", writing("first"), writing("second"))
    assert status == 0
    assert list(results) == ["first", "second"]
    assert {result["status"] for result in results.values()} == {"passed"}
    assert results["second"]["results"] == {"lines": ["second was here"]}
    assert "second was here" in capsys.readouterr().out


def test_a_failing_part_is_named_and_the_next_still_runs(tmp_path, capsys):
    crash = part("crash", "import os, sys; print('the reason', flush=True); os._exit(3)")
    status, results = run(tmp_path, crash, writing("after"))
    assert status == 1
    assert results["crash"]["status"] == "failed" and "3" in results["crash"]["reason"]
    assert "the reason" in results["crash"]["log_tail"]
    assert results["after"]["status"] == "passed"
    assert "the reason" in capsys.readouterr().out
    assert "the reason" in (tmp_path / "suite.log").read_text()


def test_a_part_that_hangs_is_ended_with_its_children_and_keeps_what_it_wrote(tmp_path, monkeypatch):
    child_file = tmp_path / "child"
    hangs = (
        "import json, pathlib, subprocess, sys, time; child = subprocess.Popen(['sleep', '600']);"
        "pathlib.Path(sys.argv[1]).write_text(json.dumps({'lines': ['half of it']}));"
        "pathlib.Path(sys.argv[2]).write_text(str(child.pid)); time.sleep(600)"
    )
    watch = runner._watch

    def watch_once_written(process, *arguments):
        """Begin the time of the part when it has written its files."""
        wait_until(lambda: child_file.exists() and child_file.read_text(), can_happen=lambda: process.poll() is None)
        watch(process, *arguments)

    monkeypatch.setattr(runner, "_watch", watch_once_written)
    started_s = time.monotonic()
    status, results = run(tmp_path, part("hangs", hangs, JSON, str(child_file)), seconds=2.0)
    assert time.monotonic() - started_s < 90
    assert status == 1
    assert results["hangs"]["status"] == "out of time"
    assert results["hangs"]["results"] == {"lines": ["half of it"]}
    child = int(child_file.read_text())
    wait_until(lambda: not is_alive(child), 30)  # the runner waits only for the end of its parent


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_the_results_so_far(tmp_path, number):
    waiting = threading.Thread(target=interrupt_when_running, args=(tmp_path / "suite.json", "second", number))
    waiting.start()
    handler = signal.getsignal(number)
    status, results = run(tmp_path, writing("first"), part("second", "import time; time.sleep(60)"), writing("third"))
    waiting.join()
    assert status == 128 + number
    assert [result["status"] for result in results.values()] == ["passed", "interrupted", "not reached"]
    assert signal.getsignal(number) == handler


def interrupt_when_running(file: Path, name: str, number: int) -> None:
    """Send this process a signal once the suite's record says that a part runs."""
    for _ in range(600):
        time.sleep(0.05)
        try:
            parts = json.loads(file.read_text())["parts"]
        except (OSError, ValueError):
            continue
        if any(result["name"] == name and result["status"] == "running" for result in parts):
            break
    os.kill(os.getpid(), number)


def test_missing_packages_skip_a_part_and_are_named(tmp_path):
    lacking = part("lacking", "raise SystemExit(1)", needs=("no_such_package_at_all",))
    status, results = run(tmp_path, lacking, writing("after"))
    assert status == 0
    assert results["lacking"]["status"] == "skipped" and "no_such_package_at_all" in results["lacking"]["reason"]
    on_gpu_alone = replace(writing("x"), needs_on_gpu=("no_such_package_at_all",))
    assert missing_packages(on_gpu_alone, "cpu") == []
    assert missing_packages(on_gpu_alone, "cuda") == ["no_such_package_at_all"]


def test_time_that_a_part_leaves_passes_on_to_the_later_ones():
    first, second, third = (part(name, "", weight=weight) for name, weight in (("a", 1.0), ("b", 2.0), ("c", 1.0)))
    assert time_limit_s(first, [first, second, third], 100.0) == 25.0
    assert time_limit_s(second, [second, third], 96.0) == 64.0
    assert time_limit_s(third, [third], 40.0) == 40.0
    assert time_limit_s(third, [third], -1.0) == 0.0


def test_a_row_with_an_error_fails_a_benchmark_that_ended_normally(tmp_path):
    rows = {"rows": [{"shape": "s", "provider": "p", "error": "out of memory"}]}
    assert problems_of(rows) == ["s, p: out of memory"] and lines_of("step", rows) == ["s, p: out of memory"]
    code = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
    status, results = run(tmp_path, part("step", code, JSON, json.dumps(rows)))
    assert status == 1 and results["step"]["status"] == "failed" and "out of memory" in results["step"]["reason"]


def test_the_parts_name_shapes_and_providers_that_exist(monkeypatch):
    benchmarks = {"step": bench_train_step, "target": bench_target, "overlap": bench_colocated}
    benchmarks |= {"block_step": bench_block_step, "block_attention": bench_anchored_attention, "token_loss": bench_token_loss}
    named = {part.name: part for part in PARTS}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, module in benchmarks.items():
        assert named[name].command[1] == module.__name__
        for device, words in (("cuda", named[name].command), ("cpu", named[name].tiny)):
            arguments = [word.replace(DEVICE, device).replace(JSON, "results.json") for word in words[2:]]
            monkeypatch.setattr(sys, "argv", [name, *arguments])
            options = harness._parse(module.BENCHMARK)
            assert options.shapes and options.providers


def test_tiny_shapes_of_the_benchmarks_are_measured_and_profiled(monkeypatch):
    monkeypatch.setitem(harness.PRODUCT_SIZE, "cpu", 256)
    monkeypatch.setattr(harness, "COPIED_BYTES", 1 << 20)
    cases = [(bench_train_step, "cpu-tiny-0.3", ["compacted"]), (bench_colocated, "cpu-tiny-0.5", ["serial", "run ahead"])]
    for module, shape, providers in cases:
        (figures,) = measured(module.BENCHMARK, [shape], providers, ON_CPU, repeat=1, profile=3)
        assert problems_of(figures) == []
        for row in figures["rows"]:
            assert row["tokens/s"] > 0 and row["over_floor"] > 1
            assert len(row["kernels"]) == 3
            assert sum(kernel["share"] for kernel in row["kernels"]) <= 1.0 + 1e-9
        json.dumps(figures, allow_nan=False)


def test_running_ahead_computes_the_losses_of_the_serial_order():
    torch.manual_seed(0)
    tensors = bench_colocated.prepare(bench_colocated.BENCHMARK.shapes["cpu-tiny-0.5"], ON_CPU)
    serial = bench_colocated.setup(0, tensors)()
    ahead = bench_colocated.setup(1, tensors)()
    assert len(serial) == bench_colocated.NUM_MICRO_BATCHES and len(set(map(float, serial))) > 1
    assert list(map(float, serial)) == list(map(float, ahead))


def test_losses_are_compared_step_by_step_within_a_tolerance():
    steps = [{"step": step, "loss": loss, "tokens_per_s": 10.0} for step, loss in ((1, 4.0), (2, 2.0))]
    close = [step | {"loss": 1.01 * step["loss"]} for step in steps]
    assert compare_training.compare(steps, steps, 0.0)["equal"]
    assert compare_training.compare(close, steps, 0.02)["equal"]
    assert not compare_training.compare(close, steps, 0.005)["equal"]
    assert not compare_training.compare(steps[:1], steps, 1.0)["equal"], "a step is missing"
    assert not compare_training.compare([], [], 1.0)["equal"], "nothing was compared"
    lost = [steps[0], steps[1] | {"loss": None}]
    assert not compare_training.compare(lost, steps, 1.0)["equal"], "a loss is not a number"


def test_compared_runs_use_options_that_exist(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(compare_training.subprocess, "Popen", lambda command, **_: commands.append(command))
    compare_training.start(tmp_path, steps=2, look_ahead=1, on_gpu=False)
    (command,) = commands
    config = load_config(None, [word for word in command if "=" in word])
    assert config.max_steps == 2 and config.overlap.look_ahead == 1 and config.evaluation.num_prompts == 0


def test_outcomes_of_test_files_are_counted_and_a_crash_is_one(tmp_path):
    (tmp_path / "test_mixed.py").write_text(
        "import pytest\n\ndef test_good():\n    pass\n\ndef test_bad():\n    assert 1 == 2\n\n"
        "@pytest.mark.skip\ndef test_left_out():\n    pass\n"
    )
    (tmp_path / "test_crash.py").write_text("import os\n\ndef test_crash():\n    os._exit(9)\n")
    files = [str(tmp_path / name) for name in ("test_mixed.py", "test_crash.py")]
    mixed, crash = kernel_tests.run_files(files, "not gpu", 2, tmp_path / "results.json")
    assert (mixed.passed, mixed.failed, mixed.skipped) == (1, 1, 1)
    assert "test_bad" in mixed.problems[0]
    assert crash.status == 9 and crash.problems
    assert len(json.loads((tmp_path / "results.json").read_text())["files"]) == 2


def test_files_with_gpu_tests_are_found_those_of_kernels_first():
    files = kernel_tests.files_with_gpu_tests()
    assert "tests/kernels/test_ancestor_attention.py" in files and "tests/models/eagle3/test_unroll.py" in files
    assert files.index("tests/kernels/test_row_loss.py") < files.index("tests/models/eagle3/test_unroll.py")
    assert not any(file.startswith("tests/benchmarks/") for file in files)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--device", "cpu"], "--tiny"),
        (["--parts", "stpe", "--device", "cpu", "--tiny"], "stpe"),
        (["--minutes", "0", "--device", "cpu", "--tiny"], "--minutes"),
        (["--device", "cuda"], "no GPU"),
        (["--json", __file__, "--device", "cpu", "--tiny"], "is a file"),
    ],
)
def test_wrong_options_end_with_one_line(words, problem, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["run_gpu_suite.py", *words])
    with pytest.raises(SystemExit) as ended:
        run_gpu_suite.main()
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err


def test_a_part_is_given_the_checkout_to_import_from():
    paths = runner._environment()["PYTHONPATH"].split(os.pathsep)
    assert paths[0] == str(runner.ROOT)
