"""The checks of a job whose ranks have joined, one after the other; each is a collective."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from engine.parallel.mesh import World
from engine.parallel.nodes import is_shared
from engine.setup_checks.disk_speed import DiskFacts, existing, judge_disk, measure_disk
from engine.setup_checks.finding import ok
from engine.setup_checks.hub_cache import HubFacts, judge_hub
from engine.setup_checks.kernel_results import check_all_kernels, judge_kernels
from engine.setup_checks.link_speed import LinkSpeed, free_bytes_of, judge_links, judge_memory, measure_scope, scopes_of
from engine.setup_checks.rank_facts import RankFacts
from engine.setup_checks.setup_report import SetupReport
from engine.setup_checks.trial_run import judge_trial, run_trial

TEMPORARY = "draftspeed-check-"  # first part of the name of a temporary folder
COMPILE_FACTOR = 5  # kernels and the first training step may have to be compiled
GROUP_FACTOR = 2 * COMPILE_FACTOR  # process groups wait longer than rank 0, which says what it waits for
LINKS_FIX = (
    "Allow connections on all ports between the nodes, and choose their network with NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME "
    "(docs/multi_node.md); NCCL_DEBUG=INFO shows what NCCL waits for"
)
SLOW_FIX = "If this may be slow, raise --timeout_s; otherwise look at the disks and processes of the nodes"


@dataclass(frozen=True)
class CheckSettings:
    """Settings of the checks, and the facts that they use.

    own: facts of this rank. everyone: facts of all ranks, on rank 0; others have none.
    folder: whose disk is measured. ds_config: DeepSpeed's configuration of the training step, as loaded.
    target: folder of the embedded target. hub, is_offline: folder of models, and whether downloads are switched off.
    timeout_s: limit of each check. end: ends the job with a text, from any thread.
    """

    own: RankFacts
    everyone: Sequence[RankFacts]
    folder: Path
    ds_config: dict[str, Any]
    target: Path
    hub: Path
    is_offline: bool
    timeout_s: int
    end: Callable[[str], None]


def group_timeout_s(timeout_s: int) -> int:
    """Return the timeout of collectives, given the limit of each check."""
    return GROUP_FACTOR * timeout_s


class CheckList:
    """The checks after the ranks have joined."""

    def __init__(self, world: World, report: SetupReport, settings: CheckSettings, temporary: Path) -> None:
        """Create the checks.

        temporary: folder for their files, which is empty or does not exist on this node yet; the caller removes it.
        """
        self.world = world
        self.report = report
        self.settings = settings
        self.temporary = temporary

    def run(self) -> None:
        """Run all checks and add what they find to the report."""
        timeout_s = self.settings.timeout_s
        limited = partial(self.report.limit, end=self.settings.end)
        self.report.begin("Links")
        self.check_links()
        self.report.begin("Disk")
        with limited(timeout_s, SLOW_FIX):
            self.check_disk()
        with limited(timeout_s, SLOW_FIX):
            self.check_hub()
        self.report.begin("Kernels")
        with limited(COMPILE_FACTOR * timeout_s, SLOW_FIX):
            self.check_kernels()
        self.report.begin("Training")
        with limited(COMPILE_FACTOR * timeout_s, SLOW_FIX):
            self.check_training()

    def check_links(self) -> None:
        """Measure collectives between the ranks."""
        scopes = scopes_of(self.world.size, self.world.local_size)
        ranks = self.world.decide(lambda: self.settings.everyone)
        free_bytes = min(free_bytes_of(rank) for rank in ranks)
        lack = judge_memory(ranks, self.world.device.type)
        measured: list[LinkSpeed] = []
        if not scopes:
            self.report.add(ok("links", "one rank, so there is nothing to measure"))
        elif lack is not None:
            self.report.add(lack)
            scopes = []

        timeout_s = self.settings.timeout_s
        for scope in scopes:
            with self.report.limit(timeout_s, LINKS_FIX, self.settings.end):
                speeds = measure_scope(self.world, scope, free_bytes, group_timeout_s(timeout_s), self.report.busy)
            measured += speeds
            if self.world.is_main:
                self.report.add(*judge_links(speeds, self.world.device.type, ranks, scope))
        facts = []
        for speed in measured:
            rates = {"bus_gb_per_s": speed.gb_per_s, "node_gb_per_s": speed.node_gb_per_s}
            facts.append(asdict(speed) | {"seconds": speed.seconds} | rates)
        self.report.facts["links"] = facts

    def check_disk(self) -> None:
        """Measure the disk on the first rank of each node."""
        folder = self.settings.folder
        own: DiskFacts | None = None
        shared: bool | None = None
        with existing(folder):
            if self.world.local_rank == 0:
                self.report.busy(f"writing to {folder}")
                own = measure_disk(folder, self.settings.own.host)
            nodes = [facts for facts in self.world.gather(own) if facts is not None]
            is_usable = not any(facts.error for facts in nodes)
            if is_usable and self.world.num_nodes > 1:
                shared = is_shared(folder, self.world)
        self.report.facts["disk"] = {"nodes": [asdict(facts) for facts in nodes], "is_shared": shared}
        self.report.add(*judge_disk(nodes, folder, shared))

    def check_hub(self) -> None:
        """Look at the folder of models on the first rank of each node."""
        own: HubFacts | None = None
        if self.world.local_rank == 0:
            own = HubFacts.own(self.settings.own.host, self.settings.hub, self.settings.is_offline)
        nodes = [facts for facts in self.world.gather(own) if facts is not None]
        self.report.facts["models"] = [asdict(facts) for facts in nodes]
        self.report.add(judge_hub(nodes))

    def check_kernels(self) -> None:
        """Compare the kernels of every rank with plain PyTorch."""
        cache_dir = self.temporary / "cache"
        own, reason = check_all_kernels(self.world.device, self.world.rank, cache_dir, self.report.busy)
        results = [result for of_rank in self.world.gather(own) for result in of_rank]
        self.report.facts["kernels"] = [asdict(result) for result in results]
        self.report.add(*judge_kernels(results, reason))

    def check_training(self) -> None:
        """Train for two steps."""
        self.report.busy("two optimizer steps for the embedded target")
        folder = self.temporary / "run"
        world = self.world
        if world.num_nodes > 1:
            world = replace(world, shares_output=is_shared(folder, world))
        steps = run_trial(
            world,
            self.settings.ds_config,
            self.settings.target,
            folder,
            group_timeout_s(self.settings.timeout_s),
            self.temporary / "cache",
        )
        self.report.facts["training"] = [asdict(step) for step in steps]
        self.report.add(judge_trial(steps, world.size))


def make_temporary(world: World) -> Path:
    """Create one temporary folder with the same name on every node, and return it; a collective."""
    folder = Path(world.decide(lambda: tempfile.mkdtemp(prefix=TEMPORARY)))
    if world.local_rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    world.barrier()
    return folder


def remove_temporary(folder: Path) -> None:
    """Remove the temporary folder of this node, as far as that is possible."""
    shutil.rmtree(folder, ignore_errors=True)
