"""Section of the page of a run: acceptance for a grid of tree shapes, or of tokens drafted per block."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.evaluation.charts import HeatMap, heat_map
from engine.evaluation.page_parts import of_run
from engine.evaluation.run_record import RunRecord


def grid_section(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """Return heat maps of what `measure_acceptance.py` found for several shapes, or "" if it was not run."""
    if run.grid is None:
        return ""
    cells = run.grid["cells"]
    is_block = bool(run.grid.get("drafts_blocks"))
    drafting = f"a draft {'block' if is_block else 'step'} {run.grid['draft_cost']:.3g}"
    costs = f"{drafting}, a further token {run.grid['verify_cost']:.3g} of a target forward"
    lengths = _map("Acceptance length", cells, is_block, lambda cell: cell["reports"]["all"]["acceptance_length"])
    speeds = _map(f"Predicted speed-up ({costs})", cells, is_block, lambda cell: cell["speed_up"])
    heading = "Tokens drafted per block" if is_block else "Shapes of trees"
    return f"<h2>{heading}{of_run(run, runs)}</h2>{lengths}{speeds}"


def _map(title: str, cells: Sequence[Mapping[str, Any]], is_block: bool, value: Callable[[Mapping[str, Any]], float]) -> str:
    ordered = sorted(cells, key=lambda cell: (cell["topk"], cell["num_steps"]))
    rows = list(dict.fromkeys(_row(cell, is_block) for cell in ordered))
    column_key = "num_steps" if is_block else "num_draft_tokens"
    columns = sorted({cell[column_key] for cell in cells})
    values = {(_row(cell, is_block), str(cell[column_key])): float(value(cell)) for cell in cells}
    row_name = "" if is_block else "steps x topk"
    column_name = "drafted tokens" if is_block else "draft tokens"
    return heat_map(title, HeatMap(column_name, row_name, [str(count) for count in columns], rows, values))


def _row(cell: Mapping[str, Any], is_block: bool) -> str:
    return "one block" if is_block else f"{cell['num_steps']} x {cell['topk']}"
