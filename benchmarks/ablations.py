"""Train the embedded draft with one option changed at a time, and compare the acceptance lengths.

    python -m benchmarks.ablations [--variants NAME ...] [--seeds 0 1 2] [--max_steps N] [--num_prompts N]
        [--output_dir FOLDER] [--json FILE]

Run from the repository's root. Every variant is trained by `launcher/train.py` with the same seeds
(`seed`: order of the data and initial weights), steps and tokens per step, on one rank with one
thread. Then all drafts decode the same held-out prompts. Differences to the default are paired by
seed and prompt.

Variants with a store are trained from captured hidden states, which gives the same drafts as the
running target does in less time. Stores are captured once.

The command can be stopped and started again at any time. A finished trial is a line of
`results.jsonl` and is not repeated; an unfinished training continues from its newest checkpoint.
Trials with other options or sizes are other lines. If a trial fails, the others go on, and the next
start tries it again.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablation_trials import AcceptanceMeasurer, Budget, CommandTrainer, FailedCommandError, Trial, Variant
from benchmarks.paired_lengths import Estimate, estimate, influence, lengths
from benchmarks.record import machine_and_versions, show
from engine.config.recipe import load_config
from engine.host.files import write_json
from engine.host.folder_lock import hold_folder
from launcher.command import DEFAULT_RECIPE

RESULTS = "results.jsonl"
DEFAULT = "default"
VARIANTS = {
    DEFAULT: Variant("KL, mask alignment inference, 3 TTT steps, EAGLE-3.1, 768 tokens, AdamW, hidden states in fp32"),
    # A store holds the slots of one mask alignment, so this one runs the target.
    "mask specforge": Variant("mask alignment of SpecForge", ("ttt.mask_alignment=specforge",), store=None),
    "loss lk_alpha": Variant("LK loss, alpha", ("loss.kind=lk_alpha",)),
    "loss lk_lambda": Variant("LK loss, lambda", ("loss.kind=lk_lambda",)),
    "loss tv": Variant("total variation", ("loss.kind=total_variation",)),
    "ttt 1": Variant("1 TTT step", ("ttt.steps=1",)),
    "ttt 7": Variant("7 TTT steps", ("ttt.steps=7",)),
    "fp8 store": Variant("hidden states in fp8", store="float8_e4m3"),
    "eagle 3": Variant("EAGLE-3: neither fc_norm nor norm_output", ("draft.fc_norm=false", "draft.norm_output=false")),
    "vocab 384": Variant("draft vocabulary of 384 tokens", ("draft.vocab_size=384",)),
    "vocab 1024": Variant("draft vocabulary of all 1024 tokens", ("draft.vocab_size=1024",)),
    # The learning rate of the default is 1e-4 * 4096 / 192 = 0.0021.
    "lr 0.001": Variant("AdamW, learning rate 0.001", learning_rate=0.001),
    "lr 0.004": Variant("AdamW, learning rate 0.004", learning_rate=0.004),
    "muon": Variant("Muon", ds_config="zero2_muon.json"),
}

Train = Callable[[Trial], Path]  # returns the folder of the draft
Measure = Callable[[Path], tuple[list[int], list[int]]]  # returns tokens and target forwards of each prompt


class Results:
    """Finished trials, one line each in a file; a line that a killed process left unfinished is ignored."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._by_key = {line["key"]: line for line in self._lines()}

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self._path.is_file():
            return
        for text in self._path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(text)
            except json.JSONDecodeError:
                continue

    def of(self, trial: Trial) -> dict[str, Any] | None:
        """Return the line of a trial, or None if it is not finished."""
        return self._by_key.get(trial.key)

    def by_seed(self, name: str, seeds: Sequence[int], budget: Budget) -> dict[int, dict[str, Any]]:
        """Return the finished lines of a variant by seed."""
        lines = {seed: self.of(Trial(name, VARIANTS[name], seed, budget)) for seed in seeds}
        return {seed: line for seed, line in lines.items() if line is not None}

    def add(self, trial: Trial, values: dict[str, Any]) -> None:
        """Write the line of a finished trial."""
        line = {"key": trial.key, "variant": trial.name, "seed": trial.seed} | asdict(trial.budget) | values
        # A newline first, in case that the line before was cut off.
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(line) + "\n")
        self._by_key[trial.key] = line


def make_trials(names: Sequence[str], seeds: Sequence[int], budget: Budget) -> list[Trial]:
    """Return the trials in the order in which they run: all variants with the first seed, then with the next one."""
    return [Trial(name, VARIANTS[name], seed, budget) for seed in seeds for name in names]


def run_trials(
    trials: Sequence[Trial],
    results: Results,
    train: Train,
    measure: Measure,
    processes: int = 1,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Train and measure the trials that are not finished.

    processes: trials at the same time. Returns the errors of trials that failed, by name of variant.
    """
    waiting = [trial for trial in trials if results.of(trial) is None]
    if len(waiting) < len(trials):
        say(f"{len(trials) - len(waiting)} of {len(trials)} trials are already finished")
    commit = machine_and_versions(torch.device("cpu"))["commit"]

    def run(trial: Trial) -> dict[str, Any]:
        start_s = time.monotonic()
        draft = train(trial)
        train_s = round(time.monotonic() - start_s, 1)
        tokens, forwards = measure(draft)
        return {"commit": commit, "train_s": train_s, "tokens": tokens, "forwards": forwards}

    failures: dict[str, str] = {}
    start_s = time.monotonic()
    with ThreadPoolExecutor(processes) as threads:
        running = {threads.submit(run, trial): trial for trial in waiting}
        try:
            for count, future in enumerate(as_completed(running), start=1):
                trial = running[future]
                outcome, problem = _finish(trial, future, results)
                if problem is not None:
                    failures[trial.name] = problem
                left_min = (time.monotonic() - start_s) / count * (len(waiting) - count) / 60
                say(f"{count}/{len(waiting)}  {trial.name}, seed {trial.seed}: {outcome}  {left_min:.0f} min left")
        except BaseException:
            threads.shutdown(cancel_futures=True)  # otherwise the waiting trials would still run
            raise
    return failures


def _finish(trial: Trial, future: Future[dict[str, Any]], results: Results) -> tuple[str, str | None]:
    """Keep the result of a trial; return a text for the log, and the error if it failed."""
    try:
        values = future.result()
    except (FailedCommandError, ValueError, OSError) as error:
        return f"FAILED: {error}", str(error)
    results.add(trial, values)
    return f"{sum(values['tokens']) / sum(values['forwards']):.3f}, {values['train_s']:.0f} s", None


def compare(names: Sequence[str], seeds: Sequence[int], budget: Budget, results: Results) -> list[dict[str, Any]]:
    """Return one row per variant that is finished for at least two seeds.

    Differences to the default are taken over the seeds that both have.
    """
    base = results.by_seed(DEFAULT, seeds, budget)
    rows = []
    for name in names:
        found = results.by_seed(name, seeds, budget)
        if len(found) < 2:
            continue
        tokens_SP, forwards_SP = _stacked(found, list(found))
        own = estimate(influence(tokens_SP, forwards_SP))
        of_seeds = lengths(tokens_SP, forwards_SP).tolist()
        row = {
            "variant": name,
            "change": VARIANTS[name].about,
            "acceptance_length": own.mean,
            "standard_error": own.standard_error,
            "half_width_95": own.half_width,
            "by_seed": {str(seed): length for seed, length in zip(found, of_seeds, strict=True)},
            "train_s": sum(line["train_s"] for line in found.values()) / len(found),
        }
        both = [seed for seed in found if seed in base]
        if name != DEFAULT and len(both) >= 2:
            difference_SP = influence(*_stacked(found, both)) - influence(*_stacked(base, both))
            row |= _difference(estimate(difference_SP))
        rows.append(row)
    return rows


def _stacked(lines: dict[int, dict[str, Any]], seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and target forwards, [seeds, prompts]."""
    tokens_SP = torch.tensor([lines[seed]["tokens"] for seed in seeds])
    forwards_SP = torch.tensor([lines[seed]["forwards"] for seed in seeds])
    return tokens_SP, forwards_SP


def _difference(found: Estimate) -> dict[str, Any]:
    verdict = "none shown"
    if found.is_nonzero:
        verdict = "better" if found.mean > 0 else "worse"
    return {
        "difference": found.mean,
        "difference_standard_error": found.standard_error,
        "difference_half_width_95": found.half_width,
        "difference_degrees_of_freedom": found.degrees,
        "verdict": verdict,
    }


def show_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    table: list[dict[str, float | str]] = []
    for row in rows:
        difference = "" if "difference" not in row else f"{row['difference']:+.3f} ±{row['difference_half_width_95']:.3f}"
        table.append(
            {
                "variant": row["variant"],
                "acceptance length": f"{row['acceptance_length']:.3f}",
                "standard error": f"{row['standard_error']:.3f}",
                "to the default, 95%": difference,
                "difference": row.get("verdict", ""),
                "training, s": f"{row['train_s']:.0f}",
            }
        )
    if table:
        show(table)


def command_line(names: Sequence[str], seeds: Sequence[int], budget: Budget) -> str:
    """Return the command that repeats a comparison; names of variants are left out if they are all there."""
    words = ["python -m benchmarks.ablations"]
    if set(names) != set(VARIANTS):
        words += ["--variants", *(f"'{name}'" if " " in name else name for name in names)]
    words += ["--seeds", *map(str, seeds), "--max_steps", str(budget.max_steps)]
    return " ".join([*words, "--max_new_tokens", str(budget.max_new_tokens)])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--max_steps", type=int, default=300, help="optimizer steps of 256 tokens; default: %(default)s")
    parser.add_argument("--num_prompts", type=int, default=1000, help="held-out prompts, at most; default: all")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens decoded per prompt; default: %(default)s")
    parser.add_argument("--processes", type=int, default=1, help="trainings at the same time, on one core each; default: 1")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ablations"), help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="file to write the table, machine, versions and commit to")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.processes)
    budget = Budget(options.max_steps, options.num_prompts, options.max_new_tokens)
    names = list(dict.fromkeys([DEFAULT, *options.variants]))
    output_dir = options.output_dir.absolute()
    lock = hold_folder(output_dir)
    results = Results(output_dir / RESULTS)
    measure = AcceptanceMeasurer(output_dir, budget)
    trials = make_trials(names, options.seeds, budget)
    print(f"{len(trials)} trials of {budget.max_steps} steps, {measure.section.num_prompts} held-out prompts", flush=True)
    say = functools.partial(print, flush=True)
    failures = run_trials(trials, results, CommandTrainer(output_dir), measure, options.processes, say)
    rows = compare(names, options.seeds, budget, results)
    show_rows(rows)
    for name, problem in failures.items():
        print(f"{name} failed: {problem}")
    lines = [results.of(trial) for trial in trials]
    commits = sorted({str(line["commit"]) for line in lines if line is not None})
    if len(commits) > 1:
        print(f"The trials are of several commits: {', '.join(commits)}. Name a new --output_dir to repeat them.")
    if options.json is not None:
        record = {"command": command_line(names, options.seeds, budget)} | machine_and_versions(torch.device("cpu"))
        record["commits_of_trials"] = commits
        record["budget"] = asdict(budget) | {
            "tokens_per_step": load_config(DEFAULT_RECIPE).data.max_tokens,
            "prompts_measured": measure.section.num_prompts,
            "num_steps": measure.section.num_steps,
            "seeds": options.seeds,
        }
        write_json(options.json, record | {"rows": rows, "failures": failures})
    lock.close()
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
