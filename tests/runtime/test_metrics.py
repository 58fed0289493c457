import errno
import json
import os
from pathlib import Path

import pytest
import torch

from engine.batch import DraftOutput
from engine.host import files
from engine.host.files import WriteError
from engine.overlap.step_clock import PARTS
from engine.parallel.mesh import World
from engine.runtime.metrics import MetricsFile, StepMetrics

ALONE = World(rank=0, size=1, local_rank=0, local_size=1)
CPU = torch.device("cpu")


class Sum:
    """A pending sum over ranks that is there at once."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    def wait(self) -> torch.Tensor:
        return self._values


class TwinWorld:
    """Two ranks that saw the same."""

    def start_sum(self, values: torch.Tensor) -> Sum:
        return Sum(values * 2)


def read(metrics: StepMetrics, world, loss_divisor: int) -> dict:
    return metrics.values(metrics.start_read(world).wait(), loss_divisor)


def output(
    loss: list[float], loss_rows: list[int], allowed: list[int], correct: list[int], accepted: list[float]
) -> DraftOutput:
    counts = [torch.tensor(column) for column in (loss_rows, allowed, correct)]
    loss_S = torch.tensor(loss, requires_grad=True)
    return DraftOutput(loss_S.sum(), loss_S, *counts, torch.tensor(accepted))


FIRST = output([2.0, 4.0], [3, 1], [4, 2], [2, 1], [3.0, 1.0])
SECOND = output([1.0, 0.0], [5, 3], [6, 3], [3, 0], [4.5, 1.5])


@pytest.mark.parametrize("world, ranks", [(ALONE, 1), (TwinWorld(), 2)])
def test_metrics_are_ratios_of_sums_over_micro_batches_and_ranks(world, ranks):
    metrics = StepMetrics(2, [1.0, 0.5], CPU)
    metrics.add(FIRST, num_tokens=30)
    metrics.add(SECOND, num_tokens=12)
    values = read(metrics, world, loss_divisor=4)
    assert values["loss_per_step"] == [ranks * 0.75, ranks * 1.0]
    assert values["loss"] == ranks * 1.25
    assert values["accuracy_per_step"] == [0.5, 0.2]
    assert values["acceptance_rate_per_step"] == [0.75, 0.5]
    assert values["simulated_acceptance_length"] == 1 + 0.75 + 0.75 * 0.5
    assert values["loss_row_share"] == 12 / 15
    assert values["tokens"] == ranks * 42


def test_reading_starts_anew():
    metrics = StepMetrics(2, [1.0, 0.5], CPU)
    metrics.add(FIRST, num_tokens=30)
    first = metrics.start_read(ALONE)
    metrics.add(SECOND, num_tokens=12)
    again = StepMetrics(2, [1.0, 0.5], CPU)
    again.add(SECOND, num_tokens=12)
    assert read(metrics, ALONE, loss_divisor=1) == read(again, ALONE, loss_divisor=1)
    assert metrics.values(first.wait(), loss_divisor=1)["tokens"] == 30, "later counts do not reach an earlier read"


def test_a_share_of_one_rank_is_not_taken_for_that_of_all():
    class Lopsided:
        """The other rank had allowed rows, none of them with loss."""

        def start_sum(self, values: torch.Tensor) -> Sum:
            other_rank = torch.zeros_like(values)
            other_rank[4:6] = 5.0
            return Sum(values + other_rank)

    metrics = StepMetrics(2, [1.0, 1.0], CPU)
    metrics.add(FIRST, num_tokens=30)
    assert read(metrics, Lopsided(), loss_divisor=1)["loss_row_share"] == 4 / 16


def test_steps_without_rows_count_as_nothing_accepted():
    metrics = StepMetrics(3, [1.0, 1.0, 1.0], CPU)
    metrics.add(output([1.0, 0.0, 0.0], [1, 0, 0], [2, 0, 0], [1, 0, 0], [1.0, 0.0, 0.0]), num_tokens=9)
    values = read(metrics, ALONE, loss_divisor=1)
    assert values["accuracy_per_step"] == [0.5, 0.0, 0.0]
    assert values["simulated_acceptance_length"] == 1.5


def test_seconds_are_means_over_steps_and_ranks():
    metrics = StepMetrics(2, [1.0, 0.5], CPU)
    metrics.add(FIRST, num_tokens=30)
    seconds = {part: float(place) for place, part in enumerate(PARTS)}
    metrics.measure(seconds)
    sums = metrics.start_read(TwinWorld()).wait()
    assert metrics.seconds(sums, divisor=2 * 4) == {part: second / 4 for part, second in seconds.items()}
    assert metrics.values(sums, loss_divisor=1)["tokens"] == 60


def test_measurements_are_summed_and_unknown_if_they_are_so_on_one_rank():
    metrics = StepMetrics(2, [1.0, 0.5], CPU)
    metrics.measure({"joules": 3.0, "peak_s": 0.5})
    metrics.measure({"joules": 4.0, "peak_s": None})
    sums = metrics.start_read(TwinWorld()).wait()
    assert metrics.on_host(sums) == {"joules": 14.0, "peak_s": None}
    assert metrics.on_host(metrics.start_read(TwinWorld()).wait()) == {"joules": 0.0, "peak_s": 0.0}


def test_what_is_not_logged_goes_on_from_a_checkpoint_also_of_an_earlier_version():
    metrics = StepMetrics(2, [1.0, 0.5], CPU)
    metrics.add(FIRST, num_tokens=30)
    metrics.measure({"joules": 3.0, "data": 2.0})
    state = metrics.state()
    earlier = torch.cat([state[:12], torch.zeros(len(PARTS))])  # had no joules, and zeros for the parts
    for sums, joules, data_s in ((state, 4.0, 2.0), (earlier, 1.0, 0.0)):
        resumed = StepMetrics(2, [1.0, 0.5], CPU)
        resumed.restore(sums)
        resumed.add(SECOND, num_tokens=12)
        resumed.measure({"joules": 1.0})
        read = resumed.start_read(ALONE).wait()
        assert resumed.values(read, 1)["tokens"] == 42
        assert resumed.on_host(read)["joules"] == joules and resumed.seconds(read, 1)["data"] == data_s


def test_counting_keeps_no_graph_alive():
    metrics = StepMetrics(2, [1.0, 1.0], CPU)
    metrics.add(FIRST, num_tokens=30)
    assert not metrics.sums.requires_grad


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.fixture
def written(tmp_path) -> Path:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, first_step=0)
    for step in (2, 4, 6):
        file.write({"step": step, "loss": 0.1})
        assert steps(path)[-1] == step
    return path


@pytest.mark.parametrize("first_step, kept", [(0, []), (1, []), (4, [2, 4]), (5, [2, 4]), (6, [2, 4, 6]), (9, [2, 4, 6])])
def test_a_resumed_run_goes_on_behind_the_steps_of_its_checkpoint(written, first_step, kept):
    MetricsFile(written, first_step).write({"step": first_step + 1})
    assert steps(written) == [*kept, first_step + 1]


def test_a_resumed_run_may_have_no_file_yet(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl", first_step=3).write({"step": 4})
    assert steps(tmp_path / "metrics.jsonl") == [4]


@pytest.mark.parametrize("left", range(1, 24))
def test_a_line_that_a_kill_cut_short_is_dropped(written, left):
    text = written.read_text()
    last = text.splitlines(keepends=True)[-1]
    assert left < len(last)
    written.write_text(text[: len(text) - len(last) + left])
    MetricsFile(written, first_step=4).write({"step": 5})
    assert steps(written) == [2, 4, 5]


def test_a_line_is_json_whatever_the_numbers_are(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", first_step=0)
    file.write({"step": 1, "loss": float("nan"), "loss_per_step": [1.0, float("inf")], "lr": 0.5})

    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is no JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "loss_per_step": [1.0, None], "lr": 0.5, "non_finite": 2}


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "lo', b'{"step": 3, "lo\n', b"\0" * 40 + b"\n", b'{"st{"step": 5}\n', b"\xff\n", b"3\n"]
)
def test_a_line_that_a_full_disk_tore_is_dropped_wherever_it_is(written, torn):
    lines = written.read_bytes().splitlines(keepends=True)
    written.write_bytes(b"".join([lines[0], torn, *lines[1:]]))
    MetricsFile(written, first_step=6).write({"step": 7})
    assert [step for step in steps(written) if step != 4] == [2, 6, 7]


def test_a_full_disk_names_the_metrics_and_leaves_what_was_there(written, monkeypatch):
    file = MetricsFile(written, first_step=4)
    file.path = Path("/dev/full")
    with pytest.raises(WriteError, match="/dev/full cannot be written: No space left on device; free some space"):
        file.write({"step": 5})

    def fails(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "sync", fails)
    with pytest.raises(WriteError, match="metrics.jsonl cannot be written"):
        MetricsFile(written, first_step=2)
    assert steps(written) == [2, 4]
