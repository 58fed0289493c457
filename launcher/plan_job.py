"""Estimate the resources of a job: python launcher/plan_job.py --recipe FILE [--gpus N] [--gpu NAME] [section.key=value ...]

Reads only the target's config.json. Prints the memory per rank, the smallest number of GPUs that
suffices, how they should share the target, the largest micro-batch, the traffic of each collective,
and an estimate of the speed.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from rich.table import Table

from engine.config.ds_config import (
    LARGE_DRAFT_CONFIG,
    SMALL_DRAFT_CONFIG,
    SMALL_DRAFT_WEIGHTS,
    default_stage_config,
    load_ds_config,
    stage_advice,
)
from engine.config.sections import SPLIT, Config, ConfigError
from engine.host.files import write_json
from engine.host.telemetry import Telemetry
from engine.models.costs import PEAKS
from engine.models.target_families import check_family, text_config
from engine.parallel.mesh import check_sizes
from engine.parallel.rules import check_proven
from engine.planning.job import Assumed, DocumentSizes, Gpus, JobPlan, Planner, Ranks
from engine.planning.placements import PlacementPlanner
from engine.target.configuration import load_target_config
from engine.target.structure import without_weights
from engine.weights.quantised_checkpoint import (
    StaysQuantised,
    check_fp8_activations,
    check_quantisation,
    forget_quantisation,
)
from launcher.command import (
    check_target,
    make_parser,
    naming_source,
    read_config,
    run_plugins,
    shipped_ds_config,
    stopping_at_errors,
    with_paths,
)

TARGET, DRAFT = "target_share_of_peak", "draft_share_of_peak"  # keys of --measured
SHOWN = 5
PLACEMENT_HEADINGS = (
    *("GPUs", "placement", "target:draft", "tp_size", "ep_size"),
    *("tokens per micro-batch", "tokens/s per GPU", "hours per billion tokens"),
)
LEAST_TOKENS = 2048  # smallest pack that is tried; shorter packs would cut many conversations


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, ("target", "data", "draft", "ttt", "parallel", "overlap"))
    add = parser.add_argument
    limit = f"{SMALL_DRAFT_WEIGHTS / 1e9:.0f} billion weights"
    shipped = f"{SMALL_DRAFT_CONFIG}, or {LARGE_DRAFT_CONFIG} for a draft of {limit} and more"
    add("--ds_config", type=shipped_ds_config, help=f"DeepSpeed's JSON; default: {shipped}")
    add("--gpus", type=int, default=32, metavar="N", help="number of available GPUs; default 32")
    add("--gpu", default="H200", metavar="NAME", help=f"GPU model, or a part of its name: {', '.join(PEAKS)}; default H200")
    add("--gpus_per_node", type=int, default=8, metavar="N", help="GPUs per node; default 8")
    add("--memory_gb", type=float, metavar="GB", help="memory per GPU in GB; default: that of its datasheet")
    add(
        "--network_gb_per_s",
        type=float,
        default=50,
        metavar="GB/S",
        help="bandwidth per GPU to other nodes in GB/s; default 50",
    )
    add("--headroom", type=float, default=0.1, metavar="SHARE", help="share of GPU memory that stays free; default 0.1")
    add(
        "--document_tokens",
        type=int,
        default=2048,
        metavar="N",
        help="tokens per document, for the speed estimate; default 2048",
    )
    add(
        "--assistant_share",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="share of assistant tokens in a document, for the speed estimate; default 0.5",
    )
    add(
        "--share_of_peak",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="share of a GPU's peak FLOP/s that matrix products reach; default 0.4",
    )
    add(
        "--placements",
        type=int,
        nargs="+",
        metavar="N",
        help="also compare the placements of the target on these numbers of GPUs: the fastest of each, and the ratio of split",
    )
    add(
        "--measured",
        type=Path,
        metavar="FILE",
        help="JSON with measured shares of a GPU's peak, target_share_of_peak and draft_share_of_peak, or the --json files "
        "of bench_target and bench_train_step, in place of --share_of_peak",
        nargs="+",
    )
    add("--fixed", action="store_true", help="plan only for --gpus GPUs and the recipe's parallel sizes and micro-batch")
    add("--json", type=Path, metavar="FILE", help="write the figures of the best plan as JSON")
    arguments = parser.parse_intermixed_args()
    for name in ("assistant_share", "headroom", "share_of_peak"):
        if not 0 <= getattr(arguments, name) <= 1 or (name == "share_of_peak" and not arguments.share_of_peak):
            parser.error(f"--{name} {getattr(arguments, name)}: expected a share between 0 and 1")
    for size in arguments.placements or ():
        if size < 1:
            parser.error(f"--placements {size}: expected at least 1")
    for name in ("gpus", "gpus_per_node", "document_tokens"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: expected at least 1")
    for name in ("network_gb_per_s", "memory_gb"):
        if (value := getattr(arguments, name)) is not None and value <= 0:
            parser.error(f"--{name} {value}: expected more than 0")
    return arguments


def make_planner(config: Config, ds_config: dict[str, Any] | None, arguments: argparse.Namespace) -> Planner:
    """Return the planner of a job.

    ds_config: DeepSpeed's JSON; None = the shipped file that suits the size of the draft.
    Raises ValueError or OSError for problems that a user can fix.
    """
    section = config.target
    target = load_target_config(section)
    check_family(target)
    is_shared = config.parallel.tp_size > 1 or config.parallel.ep_size > 1
    may_share = config.parallel.allow_unverified
    try:
        check_proven(text_config(target))
        may_share = True
    except ValueError:
        if is_shared:
            raise
    gpus = Gpus.named(arguments.gpu, arguments.memory_gb, arguments.network_gb_per_s, arguments.gpus_per_node)
    documents = DocumentSizes(min(arguments.document_tokens, config.data.max_tokens), arguments.assistant_share)
    measured = measured_shares(arguments.measured or ())
    assumed = Assumed(documents, arguments.share_of_peak, arguments.headroom, measured.get(TARGET), measured.get(DRAFT))
    check_fp8_activations(target, section)
    check_quantisation(target, section.path, is_shared)
    quantised = StaysQuantised.of(target, section.keep_quantised, section.fp8_activations)
    forget_quantisation(target)
    model = without_weights(target, section, torch.device("cuda"))
    planner = Planner(config, ds_config or {}, model, gpus, assumed, quantised, may_share)
    if ds_config is None:
        arguments.ds_config = ROOT / "ds_configs" / default_stage_config(planner.num_draft_weights)
        planner.ds_config = load_ds_config(arguments.ds_config)
    return planner


def find_plans(planner: Planner, arguments: argparse.Namespace) -> tuple[Planner, list[JobPlan]]:
    """Return the planner and the plans of a job, best plan first.

    Packs are halved until a job fits the GPUs. With --fixed there is one plan.
    Raises ValueError if nothing fits even with packs of `LEAST_TOKENS`.
    """
    if arguments.fixed:
        ranks = Ranks.of(planner.config, planner.ds_config, arguments.gpus)
        check_sizes(ranks.size, ranks.tp_size, ranks.ep_size)
        return planner, [planner.plan(ranks)]
    smaller = planner
    while True:
        found = smaller.smallest(arguments.gpus)
        if found:
            return smaller, found
        max_tokens = smaller.config.data.max_tokens // 2
        if max_tokens < LEAST_TOKENS:
            raise ValueError(f"{planner.config.target.path} {planner.why_nothing_fits(arguments.gpus)}")
        smaller = smaller.with_max_tokens(max_tokens)


def measured_shares(paths: Sequence[Path]) -> dict[str, float]:
    """Return the shares of the peak that the target and the draft reach, as far as the files tell.

    The files of the benchmarks hold rows with `mfu`, the share of the peak that a call reached. The
    median over the rows counts.
    Raises ValueError for a file without such figures.
    """
    shares: dict[str, float] = {}
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        stated = {name: record[name] for name in (TARGET, DRAFT) if name in record}
        if not stated:
            stated = {_side_of(record, path): _median_share(record, path)}
        for name, share in stated.items():
            if not isinstance(share, int | float) or not 0 < share <= 1:
                raise ValueError(f"--measured {path}: {name} = {share}; expected a share above 0 and at most 1")
            shares[name] = float(share)
    return shares


def _side_of(record: dict[str, Any], path: Path) -> str:
    command = str(record.get("command", ""))
    for benchmark, side in (("bench_target", TARGET), ("bench_train_step", DRAFT)):
        if benchmark in command:
            return side
    problem = f"expected {TARGET} or {DRAFT}, or a file that bench_target or bench_train_step wrote"
    raise ValueError(f"--measured {path}: {problem}")


def _median_share(record: dict[str, Any], path: Path) -> float:
    shares = [row["mfu"] for row in record.get("rows", []) if row.get("mfu")]
    if not shares:
        raise ValueError(f"--measured {path}: no row has mfu, the share of the GPU's peak")
    return statistics.median(shares)


def show_placements(planner: Planner, sizes: Sequence[int], telemetry: Telemetry) -> None:
    """Print the fastest job of each placement for each number of GPUs."""
    table = Table(box=None, padding=(0, 2, 0, 0), title="placements of the target, computed", title_justify="left")
    for heading in PLACEMENT_HEADINGS:
        table.add_column(heading, justify="left" if heading == "placement" else "right")
    comparer = PlacementPlanner(planner)
    for size in sizes:
        jobs = comparer.compare(size)
        if not jobs:
            telemetry.note(f"  {size} GPUs: no placement fits", style="bold red")
        for job in jobs:
            table.add_row(*job.cells)
    telemetry.console.print(table)


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f}"


def show_ways(planner: Planner, found: list[JobPlan], telemetry: Telemetry) -> None:
    """Print a table with one line per way to share the target."""
    size = found[0].ranks.size
    title = f"ways to share the target on {size} GPUs" if size > 1 else "on one GPU"
    table = Table(box=None, padding=(0, 2, 0, 0), title=title)
    for heading in ("tp_size", "ep_size", "tokens per micro-batch", "GB per rank", "tokens/s"):
        table.add_column(heading, justify="right")
    for plan in found[:SHOWN]:
        ranks = plan.ranks
        used = gigabytes(planner.bytes_of(plan))
        row = (ranks.tp_size, ranks.ep_size, f"{plan.num_tokens:,}", used, f"{planner.tokens_per_s(plan):,.0f}")
        table.add_row(*map(str, row))
    telemetry.console.print(table)


def show_plan(planner: Planner, plan: JobPlan, telemetry: Telemetry) -> None:
    """Print the memory, traffic and time of one plan."""
    facts = planner.facts(plan)
    for title, values, show in (
        ("peak GB per rank", facts["bytes"] | {"total": sum(facts["bytes"].values())}, gigabytes),
        ("GB sent per rank and micro-batch", facts["traffic_bytes"], gigabytes),
        ("ms per micro-batch", {name: 1e3 * seconds for name, seconds in facts["seconds"].items()}, "{:,.1f}".format),
    ):
        if not values:
            continue
        table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left", show_header=False)
        for name, value in values.items():
            table.add_row(name, show(value))
        telemetry.console.print(table)


def show_advice(planner: Planner, plan: JobPlan, arguments: argparse.Namespace, telemetry: Telemetry) -> None:
    ranks = plan.ranks
    share = f"{planner.assumed.share_of_peak:.0%} of a {planner.gpus.peak.name}'s peak"
    telemetry.note(
        f"{planner.tokens_per_s(plan):,.0f} tokens/s, if matrix products reach {share}, links reach their own peak, "
        "and nothing overlaps: an estimate, nothing was run"
    )
    if not planner.fits(plan):
        usable = gigabytes(planner.usable_bytes)
        telemetry.note(f"This does not fit {usable} GB per GPU; leave out --fixed to find a plan that does", style="bold red")
    max_tokens = planner.config.data.max_tokens
    telemetry.note(
        f"Set data.max_tokens={max_tokens} and, in {arguments.ds_config.name}, "
        f"train_micro_batch_size_per_gpu to {ranks.micro_batch}: a micro-batch then has up to {plan.num_tokens:,} tokens per "
        f"GPU. Start {ranks.size} ranks, and set parallel.tp_size={ranks.tp_size} parallel.ep_size={ranks.ep_size}; "
        f"an optimizer step then reads {ranks.size * plan.num_tokens * plan.accumulation:,} tokens"
    )
    advice = stage_advice(planner.ds_config, plan.num_draft_weights)
    if advice is not None:
        telemetry.note(advice)


def main() -> None:
    arguments = parse_arguments()
    with stopping_at_errors(rank=0), naming_source(arguments):
        config = read_config(arguments)
        check_target(config)
        if config.target.store is not None:
            problem = "a run that trains from a store loads no target; leave it out to plan the capture or an online run"
            raise ConfigError(problem, key="target.store", value=config.target.store)
        ds_config = None if arguments.ds_config is None else load_ds_config(arguments.ds_config)
    telemetry = Telemetry(speaks=True)
    with stopping_at_errors(rank=0):
        run_plugins(config.target.plugins)
        planner = make_planner(with_paths(config, Path(config.output_dir)), ds_config, arguments)
        planner, found = find_plans(planner, arguments)
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(arguments.json, planner.facts(found[0]))
    telemetry.note(planner.target_line(), style="bold")
    if config.overlap.placement == SPLIT:
        telemetry.note(
            "This plans a job whose ranks run both sides; add --placements for one with ranks of their own for the target"
        )
    show_ways(planner, found, telemetry)
    show_plan(planner, found[0], telemetry)
    show_advice(planner, found[0], arguments, telemetry)
    if arguments.placements:
        show_placements(planner, arguments.placements, telemetry)


if __name__ == "__main__":
    main()
