"""Section of the page of a run: acceptance for a grid of tree shapes."""

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
    costs = f"a draft step {run.grid['draft_cost']:.3g}, a further token {run.grid['verify_cost']:.3g} of a target forward"
    lengths = _map("Acceptance length", cells, lambda cell: cell["reports"]["all"]["acceptance_length"])
    speeds = _map(f"Predicted speed-up ({costs})", cells, lambda cell: cell["speed_up"])
    return f"<h2>Shapes of trees{of_run(run, runs)}</h2>{lengths}{speeds}"


def _map(title: str, cells: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]) -> str:
    ordered = sorted(cells, key=lambda cell: (cell["topk"], cell["num_steps"]))
    rows = list(dict.fromkeys(_row(cell) for cell in ordered))
    columns = sorted({cell["num_draft_tokens"] for cell in cells})
    values = {(_row(cell), str(cell["num_draft_tokens"])): float(value(cell)) for cell in cells}
    return heat_map(title, HeatMap("draft tokens", "steps x topk", [str(count) for count in columns], rows, values))


def _row(cell: Mapping[str, Any]) -> str:
    return f"{cell['num_steps']} x {cell['topk']}"
