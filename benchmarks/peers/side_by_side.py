"""Run one task on two sides, check that their results are equal, and compare their time and memory.

Each side is a process (side_process.py). A comparison is built to hold on a machine that other work
shares:

- Both sides are timed directly after one another, in rounds of alternating order. A round gives one
  ratio. The median of the ratios is reported, so that load which changes between rounds cancels.
- Within a round, the faster side repeats its step until it has run about as long as the slower one,
  so that short bursts of other load meet both.
- The spread of the ratios is their interquartile range, relative to the median. A comparison whose
  spread exceeds `SPREAD_LIMIT` is repeated for more rounds. If the spread of all rounds still
  exceeds the limit, the comparison says so.
- The share of its time for which a side waited for a processor is measured as well. Load that is
  always there need not widen the spread, but it can change the ratio: the side that starts more
  small parallel operations waits more often.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.record import machine_and_versions

ROOT = Path(__file__).resolve().parents[2]
# In addition to the check. Peers compile, and both allocators reach a steady state.
WARM_UP_ROUNDS = 2
# The standard error of a median is about 0.93 of the interquartile range divided by the square root
# of the number of rounds. Five rounds at this limit leave an error of 6%, that is one in the second
# digit of the ratios. Rounds on a quiet machine have spreads of 0.02 to 0.13, and seldom more.
SPREAD_LIMIT = 0.15
# A step whose threads wait for a tenth of its time takes at least a tenth longer, about as much as the
# spread that is allowed.
WAITED_LIMIT = 0.10
# Columns of the tables of comparisons; `figures_of` makes their cells.
FIGURES = ("speed-up", "quartiles", "spread", "waited", "memory", "loss differs", "gradients")
MAX_STEPS_PER_ROUND = 4


@dataclass(frozen=True)
class SideCommand:
    """How to start a side.

    module: module that is run; it calls `side_process.serve`.
    task: the task as JSON.
    attention: the side's name of its attention implementation; "" = its default.
    path: folder that the side can import from in addition to the repository, or None.
    """

    name: str
    module: str
    task: str
    threads: int
    attention: str = ""
    path: Path | None = None


@dataclass(frozen=True)
class Side:
    """Running process of one side."""

    name: str
    process: subprocess.Popen

    @classmethod
    def start(cls, command: SideCommand) -> "Side":
        words = [sys.executable, "-m", command.module, "--task", command.task]
        words += ["--threads", str(command.threads), f"--attention={command.attention}"]
        paths = [str(ROOT)]
        if command.path is not None:
            paths.append(str(command.path))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return cls(command.name, subprocess.Popen(words, env=environment, **pipes))

    def ask(self, order: str) -> Any:
        """Send an order and return the answer. Raises RuntimeError if the process has ended."""
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            code = self.process.wait()
            raise RuntimeError(f"{self.name} ended with exit code {code}; see its error output above")
        return json.loads(answer)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class Timing:
    """Mean time of some successive steps of a side.

    waited_share: mean share of this time for which a thread was ready but had no processor; None if
        unknown.
    """

    seconds: float
    waited_share: float | None = None


@dataclass(frozen=True)
class Verdict:
    """Ratios of the rounds of a comparison, the time of the second side divided by that of the first.

    waited_share: share of the time for which threads waited for a processor, of the side that waited
        more; None if unknown.
    """

    ratios: tuple[float, ...]
    waited_share: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.ratios) == 1:
            return self.ratios[0], self.ratios[0]
        low, _, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """Interquartile range of the ratios relative to their median."""
        low, high = self.quartiles
        return (high - low) / self.median

    @property
    def too_wide(self) -> bool:
        return self.spread > SPREAD_LIMIT

    @property
    def busy(self) -> bool:
        return self.waited_share is not None and self.waited_share > WAITED_LIMIT

    @property
    def warning(self) -> str | None:
        """Why the ratio cannot be relied on and what to do, or None."""
        if not self.too_wide and not self.busy:
            return None
        problems = []
        if self.too_wide:
            low, high = self.quartiles
            problems.append(
                f"half of the {len(self.ratios)} rounds lie outside {low:.2f}x to {high:.2f}x, a spread of "
                f"{self.spread:.2f} where at most {SPREAD_LIMIT} is expected"
            )
        if self.busy:
            problems.append(
                f"threads waited for a processor for {self.waited_share:.0%} of the time, where at most "
                f"{WAITED_LIMIT:.0%} is expected"
            )
        fix = "Stop other work on this machine, or pass fewer --threads and more --rounds, and run it again."
        return f"{self.median:.2f}x is not reliable: {'; '.join(problems)}. {fix}"

    def record(self) -> dict[str, Any]:
        return {
            "ratios": list(self.ratios),
            "quartiles": list(self.quartiles),
            "spread": self.spread,
            "too_wide": self.too_wide,
            "waited_share": self.waited_share,
            "busy": self.busy,
        }


@dataclass(frozen=True)
class Rounds:
    """How often both sides are timed: at least `least` rounds, and up to `most` if they disagree."""

    least: int
    most: int


# Runs a number of steps of one side.
TimeSteps = Callable[[int], Timing]


def time_in_rounds(sides: Sequence[TimeSteps], rounds: Rounds) -> tuple[list[tuple[float, float]], Verdict]:
    """Return the seconds of both sides in each round, and the verdict on their ratios.

    sides: two functions, each of which runs a number of steps of its side.
    """
    warm_up = []
    for _ in range(WARM_UP_ROUNDS):
        warm_up = [time_steps(1).seconds for time_steps in sides]
    num_steps = [steps_per_round(seconds, max(warm_up)) for seconds in warm_up]
    pairs: list[tuple[float, float]] = []
    waited: tuple[list[float], list[float]] = ([], [])
    while True:
        order = (0, 1) if len(pairs) % 2 == 0 else (1, 0)
        timings = {side: sides[side](num_steps[side]) for side in order}
        pairs.append((timings[0].seconds, timings[1].seconds))
        for side, timing in timings.items():
            if timing.waited_share is not None:
                waited[side].append(timing.waited_share)
        verdict = judge(pairs, waited)
        settled = len(pairs) >= rounds.least and verdict.warning is None
        if settled or len(pairs) >= rounds.most:
            return pairs, verdict


def judge(pairs: Sequence[tuple[float, float]], waited: Sequence[Sequence[float]] = ()) -> Verdict:
    """Return the verdict on the rounds so far.

    pairs: seconds of the first and the second side in each round.
    waited: for each side, shares of the time for which threads waited for a processor.
    """
    ratios = tuple(second / first for first, second in pairs)
    means = [statistics.mean(shares) for shares in waited if shares]
    return Verdict(ratios, max(means, default=None))


def steps_per_round(seconds: float, slower_s: float) -> int:
    """Return how many steps a side runs per round, given the seconds of its step and of the slower one."""
    return min(MAX_STEPS_PER_ROUND, max(1, round(slower_s / seconds)))


def timer_of(side: Side) -> TimeSteps:
    return lambda num_steps: Timing(**side.ask(f"time {num_steps}"))


def compare(commands: Sequence[SideCommand], tolerances: tuple[float, float], rounds: Rounds) -> dict[str, Any]:
    """Run one task on two sides, and return their differences, time and memory.

    commands: DraftSpeed's side and its peer's.
    tolerances: relative tolerances of the losses, and of each gradient in the Frobenius norm.
    Raises RuntimeError if the results differ.
    """
    with ExitStack() as stack:
        sides = []
        for command in commands:
            side = Side.start(command)
            stack.callback(side.stop)
            sides.append(side)
        differences = check_equal(*results_of(sides), tolerances)
        pairs, verdict = time_in_rounds([timer_of(side) for side in sides], rounds)
        memory_bytes = [side.ask("memory") for side in sides]
    seconds = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return {
        "peer": commands[1].name,
        "speedup": verdict.median,
        "memory_ratio": memory_bytes[0] / memory_bytes[1],
        **differences,
        **verdict.record(),
        "seconds": seconds,
        "all_seconds": pairs,
        "peak_bytes": memory_bytes,
        "warning": verdict.warning,
    }


def figures_of(case: dict[str, Any]) -> list[str]:
    """Return the cells of the columns `FIGURES` for what `compare` returned."""
    low, high = case["quartiles"]
    waited = "unknown" if case["waited_share"] is None else f"{case['waited_share']:.0%}"
    return [
        f"{case['speedup']:.2f}x",
        f"{low:.2f} to {high:.2f}",
        f"{case['spread']:.2f}{' (!)' if case['too_wide'] else ''}",
        f"{waited}{' (!)' if case['busy'] else ''}",
        f"{case['memory_ratio']:.2f}x",
        f"{case['max_relative_loss_difference']:.1e}",
        f"{case['max_relative_gradient_difference']:.1e}",
    ]


def results_of(sides: Sequence[Side]) -> list[dict[str, Tensor]]:
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for side in sides:
            file = Path(folder) / f"{side.name}.safetensors"
            side.ask(f"check {file}")
            results.append(load_file(file))
    return results


def check_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerances: tuple[float, float]) -> dict[str, float]:
    """Return the largest relative differences of losses and gradients.

    Raises RuntimeError above the tolerances, or if a gradient exists on one side only.
    """
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"only one side has gradients of {sorted(ours.keys() ^ theirs.keys())}")
    losses = ours["losses"]
    expected = theirs["losses"]
    loss = ((losses - expected).abs() / expected.abs()).max().item()
    errors = {}
    for name in ours.keys() - {"losses"}:
        errors[name] = ((ours[name] - theirs[name]).norm() / theirs[name].norm()).item()
    worst = max(errors, key=lambda name: errors[name])
    if not (loss <= tolerances[0] and errors[worst] <= tolerances[1]):
        raise RuntimeError(f"not equal: losses differ by {loss:.2g}, the gradient of {worst} by {errors[worst]:.2g}")
    return {"max_relative_loss_difference": loss, "max_relative_gradient_difference": errors[worst]}


def write_cases(path: Path, cases: list[dict[str, Any]], command: str, device: str, about: dict[str, Any]) -> None:
    """Write the cases to a JSON file, and machine, versions, command and `about` to a second one."""
    path.write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")
    description = {"command": command} | machine_and_versions(torch.device(device)) | about
    path.with_suffix(".machine.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
