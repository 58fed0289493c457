"""Draw the timeline of a run as a picture: python -m benchmarks.draw_trace outputs/run/trace.json docs/overlap_trace.svg

The run had `overlap.trace_steps`. Each rank has two rows: the parts of the target's work, and those
of the draft's step.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "draftspeed"  # the same picture gives the same file
import matplotlib.pyplot as plt

from engine.overlap.step_clock import BACKWARD, DRAFT_FORWARD, OPTIMIZER, TARGET_FORWARD, TRANSFER, WAIT

COLOURS = {
    TARGET_FORWARD: "#4c78a8",
    TRANSFER: "#72b7b2",
    DRAFT_FORWARD: "#f58518",
    BACKWARD: "#e45756",
    OPTIMIZER: "#b279a2",
    WAIT: "#d9d9d9",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(json.loads(options.trace.read_text(encoding="utf-8"))["traceEvents"], options.picture)


def draw(events: list[dict], picture: Path) -> None:
    """Write a picture of trace events."""
    shown = [event for event in events if event["name"] in COLOURS]
    rows = sorted({(event["pid"], event["tid"]) for event in shown}, reverse=True)
    started_us = min(event["ts"] for event in shown)
    figure, axes = plt.subplots(figsize=(10, 0.6 + 0.5 * len(rows)), layout="constrained")
    for event in shown:
        row = rows.index((event["pid"], event["tid"]))
        start_ms = (event["ts"] - started_us) / 1e3
        axes.barh(row, event["dur"] / 1e3, left=start_ms, height=0.7, color=COLOURS[event["name"]], label=event["name"])
    axes.set_yticks(range(len(rows)), [f"rank {rank}, {side}" for rank, side in rows])
    axes.set_xlabel("ms")
    by_name = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    place = {"ncols": len(by_name), "loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    axes.legend(by_name.values(), by_name.keys(), frameon=False, **place)
    figure.savefig(picture, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
