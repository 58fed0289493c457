"""Measure how much faster the embedded target decodes with a draft than without, for several shapes of trees.

    python -m benchmarks.bench_decoding [--draft FOLDER] [--repeats 3] [--threads 1] [--json FILE]

Run from the repository's root. Each prompt is decoded plainly and with every shape, one after the
other, so that other load on the machine affects all of them alike. A speed-up is the ratio of the
two times for one prompt.

- `speed-up`: its median over prompts and repeats. `quarter`, `three quarters`: its quartiles.
- `cycle`: time of a target forward with its drafting, as a multiple of plain decoding's time per
  token. `predicted`: by the cost model of measure_acceptance.py, if a draft step costs the draft's
  share of the weights that are read, and further tokens nothing.
"""

import argparse
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.record import show, write_record
from engine.config.sections import TargetSection
from engine.config.tree_shape import TreeShape
from engine.evaluation.decoding import PromptLookupDrafter, plain_decode, speculative_decode
from engine.evaluation.grid import CostModel
from engine.models.drafter import Drafter
from engine.models.eagle3.export import load_draft
from engine.models.eagle3.served_draft import ServedEagle3
from engine.target.frozen import FrozenTarget

ROOT = Path(__file__).resolve().parents[1]
SERVING = ROOT / "tests" / "golden" / "serving"
NEW_TOKENS = 60
WIDE = 1.5  # a ratio of the quartiles from which on the machine was too busy
SHAPES = (
    TreeShape(2),
    TreeShape(3),
    TreeShape(4),
    TreeShape(5),
    TreeShape(2, 4, 8),
    TreeShape(3, 4, 8),
    TreeShape(4, 4, 12),
    TreeShape(5, 4, 16),
)


@dataclass
class Decoded:
    """Replies with one way of drafting.

    ratios: time of plain decoding divided by this one's, per prompt and repeat. seconds, plain_seconds: sums.
    """

    ratios: list[float] = field(default_factory=list)
    seconds: float = 0.0
    plain_seconds: float = 0.0
    num_tokens: int = 0
    num_forwards: int = 0

    def row(self, name: str, predicted: float | str) -> dict[str, float | str]:
        first, _, third = statistics.quantiles(self.ratios, n=4)
        length = self.num_tokens / self.num_forwards
        row: dict[str, float | str] = {"drafting": name, "acceptance length": length}
        row |= {"speed-up": statistics.median(self.ratios), "quarter": first, "three quarters": third}
        row |= {"cycle": self.seconds / self.plain_seconds * length, "predicted": predicted}
        return row


def measure(target: FrozenTarget, draft: ServedEagle3, prompts: list[list[int]], repeats: int) -> list[dict[str, float | str]]:
    ways: dict[str, TreeShape | None] = {str(shape): shape for shape in SHAPES}
    ways["prompt lookup of 5"] = None
    found = {name: Decoded() for name in ways}
    for _ in range(repeats):
        for prompt in prompts:
            plain = plain_decode(target, prompt, NEW_TOKENS, ())
            for name, shape in ways.items():
                drafter: Drafter = PromptLookupDrafter(5) if shape is None else draft.drafter(shape)
                reply = speculative_decode(target, drafter, prompt, max_new_tokens=NEW_TOKENS, eos_ids=())
                assert reply.token_ids == plain.token_ids, f"{name} changed the reply"
                own = found[name]
                own.ratios.append(plain.seconds / reply.seconds)
                own.seconds += reply.seconds
                own.plain_seconds += plain.seconds
                own.num_tokens += NEW_TOKENS - 1
                own.num_forwards += reply.num_target_forwards
    draft_weights = sum(weight.numel() for weight in draft.model.parameters())
    target_weights = sum(weight.numel() for weight in target.model.parameters())
    costs = CostModel(draft_weights / target_weights)
    rows = []
    for name, shape in ways.items():
        predicted: float | str = "-" if shape is None else 1 / costs.speed_up(shape, 1.0)
        rows.append(found[name].row(name, predicted))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", type=Path, default=SERVING / "draft", help="folder of a draft for the embedded target")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="compute threads, as each rank of the embedded job has")
    parser.add_argument("--json", type=Path, help="file to write the figures, machine, versions and commit to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    section = TargetSection(path=str(ROOT / "launcher" / "embedded" / "target"), dtype="float32")
    target = FrozenTarget.load(section, torch.device("cpu"))
    draft = load_draft(options.draft, target.embedding.whole(), torch.float32)
    target = FrozenTarget.load(section, torch.device("cpu"), draft.model.config.aux_layers)
    prompts = json.loads((SERVING / "prompts.json").read_text())
    plain_decode(target, prompts[0], NEW_TOKENS, ())
    rows = measure(target, draft, prompts, options.repeats)
    show(rows, "{:,.2f}")
    if any(row["three quarters"] > WIDE * row["quarter"] for row in rows):
        print("The speed-ups vary too much to be trusted: something else ran on this machine. Repeat the measurement.")
    command = f"python -m benchmarks.bench_decoding --repeats {options.repeats} --threads {options.threads}"
    write_record(options.json, command, rows)


if __name__ == "__main__":
    main()
