"""Acceptance for a grid of tree shapes, and the shape that a cost model of serving prefers."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from engine.config.strict import ConfigError
from engine.config.tree_shape import TreeRule, TreeShape, num_candidates
from engine.evaluation.acceptance import ALL, AcceptanceReport
from engine.serving.draft_kinds import EAGLE3, SGLANG_NAME, VLLM_NAME, DraftKind
from engine.serving.server_commands import MODULES, SGLANG, VLLM, draft_arguments, served_shape

GRID = "acceptance_grid.json"  # file in a run's folder
RULE_TEXTS: dict[TreeRule, str] = {
    "ancestors": "tokens attend to their ancestors",
    "sglang": "tokens attend to rows, as in SGLang",
}
MOST_SHOWN = 20  # shapes in the printed table


@dataclass(frozen=True)
class CostModel:
    """Times of a server, each divided by that of a target forward that reads one token.

    draft_step: of a forward of the draft, which drafts one token, or the whole block of a block
    drafter. verify_token: of each further token that a target forward reads. drafts_blocks: whether
    the draft is a block drafter. At small batches both sides wait for their weights, so a forward of
    the draft costs about as much of a target forward as the draft has of the weights that the forward
    reads, and further tokens are almost free. At large batches they cost more.
    """

    draft_step: float
    verify_token: float = 0.0
    drafts_blocks: bool = False

    def speed_up(self, shape: TreeShape, acceptance_length: float) -> float:
        """Return the predicted speed, divided by that of decoding without a draft."""
        num_forwards = 1 if self.drafts_blocks else shape.num_steps
        return acceptance_length / (1 + self.draft_step * num_forwards + self.verify_token * shape.num_nodes)


@dataclass(frozen=True)
class GridCell:
    """What was measured for one shape. reports: over all prompts (`ALL`), and per file and category if there are several."""

    shape: TreeShape
    reports: Mapping[str, AcceptanceReport]
    speed_up: float

    @property
    def report(self) -> AcceptanceReport:
        return self.reports[ALL]

    def to_dict(self) -> dict[str, Any]:
        """Return the cell as plain values, for JSON."""
        reports = {name: report.to_dict() for name, report in self.reports.items()}
        return {**self.shape.sizes, "tree_rule": self.shape.rule, "speed_up": self.speed_up, "reports": reports}


def grid_shapes(
    num_steps: Sequence[int], topk: Sequence[int], num_draft_tokens: Sequence[int] | None, rule: TreeRule
) -> list[TreeShape]:
    """Return all possible shapes of these sizes.

    num_draft_tokens: of trees; None if all are chains, which determine theirs.
    Raises ValueError if sizes are missing or have no effect, or if there is no such shape.
    """
    if num_draft_tokens is None and max(topk) > 1:
        raise ValueError("--num_draft_tokens is missing: trees need it, such as --num_draft_tokens 8 16 32")
    if num_draft_tokens is not None and max(topk) == 1:
        problem = "--num_draft_tokens has no effect on chains: chains determine it, as num_steps + 1"
        raise ValueError(f"{problem}; delete it, or give a --topk above 1")
    shapes = list(dict.fromkeys(_possible(num_steps, topk, num_draft_tokens or (), rule)))
    if not shapes:
        problem = (
            f"evaluation.num_steps = {list(num_steps)} and evaluation.topk = {list(topk)} allow no tree of that many tokens"
        )
        raise ConfigError(problem, key="evaluation.num_draft_tokens", value=num_draft_tokens)
    return shapes


def _possible(
    num_steps: Sequence[int], topk: Sequence[int], num_draft_tokens: Sequence[int], rule: TreeRule
) -> Iterator[TreeShape]:
    for steps, width in product(sorted(num_steps), sorted(topk)):
        if width == 1:
            yield TreeShape(steps, rule=rule)
            continue
        most = num_candidates(steps, width) + 1
        for count in sorted(num_draft_tokens):
            if 2 <= count <= most:
                yield TreeShape(steps, width, count, rule)


def best_cell(cells: Sequence[GridCell]) -> GridCell:
    """Return the cell with the largest predicted speed-up; of equal ones, the first."""
    return max(cells, key=lambda cell: cell.speed_up)


def grid_table(cells: Sequence[GridCell], costs: CostModel) -> Table:
    """Return a table of the cells with the largest predicted speed-ups, best first."""
    some = cells[0].report
    shown = sorted(cells, key=lambda cell: -cell.speed_up)[:MOST_SHOWN]
    left_out = f"; the best {len(shown)} of {len(cells)} shapes" if len(shown) < len(cells) else ""
    title = f"Greedy decoding of {some.num_prompts} held-out prompts{left_out}"
    unit = "blocks" if costs.drafts_blocks else "steps"
    caption = (
        f"predicted for draft {unit} of {costs.draft_step:.3g} and further tokens of {costs.verify_token:.3g} target forwards"
    )
    rules = {cell.shape.rule for cell in cells if not cell.shape.is_chain}
    if rules:
        caption += f"; in trees, {' or '.join(RULE_TEXTS[rule] for rule in sorted(rules))}"
    table = Table(title=title, caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    headings = ("drafted", "topk", "tokens per\nforward") if costs.drafts_blocks else ("steps", "topk", "draft\ntokens")
    for heading in (*headings, "acceptance\nlength", "accepted %\nby depth", "predicted\nspeed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in shown:
        sizes = map(str, cell.shape.sizes.values())
        table.add_row(*sizes, cell.report.length_text, cell.report.depths_text, f"{cell.speed_up:.2f}x")
    return table


def group_table(cell: GridCell) -> Table | None:
    """Return a table of the acceptance per file and category of prompts, or None if there is one group."""
    names = [name for name in cell.reports if name != ALL]
    if not names:
        return None
    table = Table(title=f"Acceptance of {cell.shape} by kind of prompt", box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("prompts of", "number", "acceptance length"):
        table.add_column(heading, justify="left" if heading == "prompts of" else "right")
    for name in names:
        report = cell.reports[name]
        table.add_row(name, str(report.num_prompts), report.length_text)
    return table


def serving_commands(shape: TreeShape, target: str, draft: Path, kind: DraftKind = EAGLE3) -> dict[str, str]:
    """Return the commands that serve a draft with this shape, by server; a block drafter always drafts a whole block.

    vLLM is left out if it cannot: it drafts chains only.
    """
    served = served_shape(shape, kind)
    sglang = ["python", "-m", MODULES[SGLANG], "--model-path", target, *draft_arguments(SGLANG, served, str(draft), kind)]
    commands = {SGLANG_NAME: shlex.join(sglang)}
    if served.is_chain and kind.vllm_method is not None:
        commands[VLLM_NAME] = shlex.join(["vllm", "serve", target, *draft_arguments(VLLM, served, str(draft), kind)])
    return commands


def part_of_block(num_steps: int, kind: DraftKind) -> str | None:
    """Return a sentence for an acceptance that was measured with fewer tokens than servers draft, or None for any other."""
    if kind.block_tokens is None or num_steps >= kind.block_tokens:
        return None
    return (
        f"Measured with {num_steps} of the {kind.block_tokens} tokens of a block; servers draft and verify all "
        f"{kind.block_tokens}, which usually accepts more."
    )


def grid_facts(cells: Sequence[GridCell], costs: CostModel) -> dict[str, Any]:
    """Return the cells and the cost model as plain values, for JSON."""
    return {
        "draft_cost": costs.draft_step,
        "verify_cost": costs.verify_token,
        "drafts_blocks": costs.drafts_blocks,
        "cells": [cell.to_dict() for cell in cells],
    }
