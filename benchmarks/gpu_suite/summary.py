"""Readable summaries of what the parts of the suite measured."""

from typing import Any


def lines_of(part: str, results: Any) -> list[str]:
    """Return lines that describe the results of a part; an empty list if there are no results.

    results: the content of the part's JSON file, or None.
    """
    if not results:
        return []
    if part == "specforge":
        return [f"{case['mask']:.0%} loss: {_peer_figures(case)}" for case in results]
    if part == "block_peers":
        return [f"{case['peer']}, {case['method']}: {_peer_figures(case)}" for case in results]
    if "rows" in results:
        lines = []
        for row in results["rows"]:
            lines += _benchmark_lines(row)
        return lines
    return list(results.get("lines", []))


def problems_of(results: Any) -> list[str]:
    """Return the errors in the results of a part that ended normally.

    Benchmarks record the error of a row and continue.
    """
    if not isinstance(results, dict):
        return []
    rows = results.get("rows", [])
    return [f"{row['shape']}, {row['provider']}: {row['error']}" for row in rows if "error" in row]


def _benchmark_lines(row: dict[str, Any]) -> list[str]:
    """Return the lines of one row of benchmarks/harness.py.

    They contain the time, the ratio to the floor, the memory, and the most expensive kernels.
    """
    name = f"{row['shape']}, {row['provider']}"
    if "error" in row:
        return [f"{name}: {row['error']}"]
    peak_bytes = row.get("peak_bytes")
    peak = "peak unknown" if peak_bytes is None else f"peak {peak_bytes / 2**30:.2f} GiB"
    speed = f"{row['tokens/s']:,.0f} tokens/s, " if "tokens/s" in row else ""
    figures = f"{row['median_ms']:.2f} ms, {speed}{row['over_floor']:.2f} x floor, MFU {row['mfu']:.1%}, {peak}"
    lines = [f"{name}: {figures}"]
    for kernel in row.get("kernels", [])[:5]:
        lines.append(f"    {kernel['ms']:9.3f} ms {kernel['share']:6.1%} x{kernel['calls']:<5} {kernel['name'][:80]}")
    return lines


def _peer_figures(case: dict[str, Any]) -> str:
    ours_s, theirs_s = case["seconds"]
    times = f"{1e3 * ours_s:.1f} ms against {1e3 * theirs_s:.1f} ms"
    doubt = ", not reliable" if case["warning"] else ""
    return f"{case['speedup']:.2f}x{doubt}, {times}, memory {case['memory_ratio']:.2f}x"
