"""Judgement of machines: GPUs, cores, memory and limits."""

from collections import Counter
from collections.abc import Callable, Sequence

from engine.host.units import GIB, MIB, counted, size_text
from engine.setup_checks.finding import Finding, ok, problem, warning
from engine.setup_checks.rank_facts import RankFacts, by_value, names_of

MOST_USED = 0.5  # share of a GPU's memory which other processes may hold before training is unlikely to fit
LITTLE_USED = 0.1  # share that this process, the driver and a desktop may hold
LEAST_CORES_ON_GPU = 2.0  # one issues kernels, one reads data and writes checkpoints
LEAST_MEMORY_BYTES = 1 * GIB  # of host memory per rank
WANTED_MEMORY_BYTES = 8 * GIB  # a rank of a GPU; checkpoints are copied to host memory before they are written
LEAST_SHM_BYTES = 64 * MIB  # per rank, of which NCCL makes its buffers; the default of Docker is this much in total
WANTED_SHM_BYTES = 1 * GIB
LEAST_OPEN_FILES = 4096  # a store has a file per shard, and a connection is a file too
LEAST_LOCKED_BYTES = 1 * GIB  # InfiniBand locks the memory that it transfers


def judge_machines(ranks: Sequence[RankFacts]) -> list[Finding]:
    """Return the findings on the machines of all ranks."""
    on_gpu = any(rank.machine.num_gpus for rank in ranks)
    findings = judge_gpus(ranks) if on_gpu else [ok("GPUs", "none; training runs on the CPU")]
    findings += [_judge_cores(ranks, on_gpu), _judge_memory(ranks, on_gpu), _judge_shared_memory(ranks, on_gpu)]
    findings.append(_judge_open_files(ranks))
    if any(rank.machine.has_infiniband for rank in ranks):
        findings.append(_judge_locked_memory(ranks))
    return findings


def has_devices(ranks: Sequence[RankFacts]) -> bool:
    """Return whether the ranks can form a process group: each has a GPU of its own, or none has one."""
    with_gpu = [rank.machine.gpu for rank in ranks if rank.machine.gpu is not None]
    return len(with_gpu) == len(ranks) or not any(rank.machine.num_gpus for rank in ranks)


def judge_gpus(ranks: Sequence[RankFacts]) -> list[Finding]:
    """Return the findings on GPUs: their number, kinds and memory."""
    return [_judge_number_of_gpus(ranks), *_judge_kinds(ranks), *_judge_shared_gpus(ranks), *_judge_gpu_memory(ranks)]


def _judge_number_of_gpus(ranks: Sequence[RankFacts]) -> Finding:
    without = [rank for rank in ranks if rank.machine.gpu is None]
    if without:
        first = without[0]
        text = (
            f"{names_of(without)} have no GPU of their own: {first.local_size} ranks on the node see {first.machine.num_gpus}"
        )
        fix = "Start one rank per GPU, and let every rank see all GPUs of its node (in Slurm without --gpus-per-task)"
        return problem("GPUs", text, fix)
    each = by_value(ranks, [rank.machine.num_gpus for rank in ranks])
    counts = " or ".join(str(number) for number, _ in each)
    unused = [rank for rank in ranks if rank.machine.num_gpus > rank.local_size]
    if unused:
        text = f"{counts} per node, and {counted(unused[0].local_size, 'rank')} on {names_of(unused)}"
        return warning("GPUs", text, "Start one rank per GPU, or hide the GPUs that this job shall not use")
    return ok("GPUs", f"{counts} per node")


def _judge_kinds(ranks: Sequence[RankFacts]) -> list[Finding]:
    kinds = by_value(ranks, ["" if rank.machine.gpu is None else rank.machine.gpu.name for rank in ranks])
    named = [(kind, members) for kind, members in kinds if kind]
    if len(named) == 1:
        return [ok("GPU kind", named[0][0])]
    if not named:
        return []
    text = "; ".join(f"{kind} on {names_of(members)}" for kind, members in named)
    return [warning("GPU kind", text, "Use nodes with the same GPUs: every step waits for the slowest one")]


def _judge_shared_gpus(ranks: Sequence[RankFacts]) -> list[Finding]:
    """Return a problem if two ranks would use the same GPU, which NCCL refuses."""
    uuids = Counter(rank.machine.gpu.uuid for rank in ranks if rank.machine.gpu is not None and rank.machine.gpu.uuid)
    shared = [rank for rank in ranks if rank.machine.gpu is not None and uuids[rank.machine.gpu.uuid] > 1]
    if not shared:
        return []
    text = f"several of {names_of(shared)} use the same GPU"
    return [problem("GPUs", text, "Start one rank per GPU; the launcher must give every rank of a node another local rank")]


def _judge_gpu_memory(ranks: Sequence[RankFacts]) -> list[Finding]:
    least: tuple[float, str] | None = None
    taken: dict[bool, list[RankFacts]] = {True: [], False: []}  # whether most of the memory is taken
    for rank in ranks:
        gpu = rank.machine.gpu
        if gpu is None:
            continue
        used = 1 - gpu.free_bytes / gpu.total_bytes
        text = f"{size_text(gpu.free_bytes)} of {size_text(gpu.total_bytes)} free"
        if least is None or used > least[0]:
            least = (used, text)
        if used > LITTLE_USED:
            taken[used > MOST_USED].append(rank)
    if least is None:
        return []
    fix = "Run `nvidia-smi` there, and end the processes that hold the memory"
    if taken[True]:
        return [problem("GPU memory", f"{least[1]} on {names_of(taken[True])}; other processes hold the rest", fix)]
    if taken[False]:
        return [warning("GPU memory", f"{least[1]} on {names_of(taken[False])}; other processes hold the rest", fix)]
    return [ok("GPU memory", f"at least {least[1]} per rank")]


def cores_of(ranks: Sequence[RankFacts]) -> dict[int, float]:
    """Return the cores of each rank. Ranks of a node that may run on the same core share it."""
    users = Counter((rank.node, core) for rank in ranks for core in rank.machine.cores)
    cores = {rank.rank: sum(1 / users[rank.node, core] for core in rank.machine.cores) for rank in ranks}
    for rank in ranks:
        if rank.machine.cpu_quota is not None:
            cores[rank.rank] = min(cores[rank.rank], rank.machine.cpu_quota / rank.local_size)
    return cores


def _judge_cores(ranks: Sequence[RankFacts], on_gpu: bool) -> Finding:
    cores = cores_of(ranks)
    wanted = LEAST_CORES_ON_GPU if on_gpu else 1.0
    few = [rank for rank in ranks if cores[rank.rank] < wanted]
    if few:
        number = min(cores[rank.rank] for rank in few)
        text = f"{number:.2g} per rank on {names_of(few)}; a rank should have at least {wanted:.0f}"
        fix = "Give the job more cores (--cpus-per-task in Slurm, the limit of a container), or start fewer ranks per node"
        return warning("CPU cores", text, fix)
    whole = max(len(rank.machine.cores) for rank in ranks)
    return ok("CPU cores", f"{whole} for a rank to run on, {min(cores.values()):.3g} per rank")


def _judge_memory(ranks: Sequence[RankFacts], on_gpu: bool) -> Finding:
    fix = "End other processes, raise the memory limit of the job or container, or start fewer ranks per node"
    wanted = WANTED_MEMORY_BYTES if on_gpu else 2 * LEAST_MEMORY_BYTES

    def per_rank(rank: RankFacts) -> float:
        return rank.machine.free_memory_bytes / rank.local_size

    least = min(ranks, key=per_rank)
    free = f"{size_text(least.machine.free_memory_bytes)} of {size_text(least.machine.memory_bytes)} free"
    text = f"{free}, {size_text(per_rank(least))} per rank"
    short = [rank for rank in ranks if per_rank(rank) < wanted]
    if not short:
        return ok("host memory", f"at least {text}")
    named = f"{text}, on {names_of(short)}"
    if per_rank(least) < LEAST_MEMORY_BYTES:
        return problem("host memory", named, fix)
    return warning("host memory", f"{named}; {size_text(wanted)} per rank leave room for checkpoints", fix)


def _judge_shared_memory(ranks: Sequence[RankFacts], on_gpu: bool) -> Finding:
    fix = "Start the container with --shm-size=8g or --ipc=host, or mount a larger /dev/shm"
    without = [rank for rank in ranks if rank.machine.free_shm_bytes is None]
    if without:
        return problem("/dev/shm", f"does not exist on {names_of(without)}; ranks of a node exchange data there", fix)

    def free(rank: RankFacts) -> int:
        return rank.machine.free_shm_bytes or 0

    least = min(ranks, key=free)
    text = f"{size_text(free(least))} of {size_text(least.machine.shm_bytes or 0)} free"
    lacks = [rank for rank in ranks if rank.local_size > 1 and free(rank) < LEAST_SHM_BYTES * rank.local_size]
    if lacks and on_gpu:
        needed = f"{size_text(LEAST_SHM_BYTES)} for each of {lacks[0].local_size} ranks"
        return problem("/dev/shm", f"{text} on {names_of(lacks)}; NCCL needs about {needed}", fix)
    small = [rank for rank in ranks if free(rank) < WANTED_SHM_BYTES]
    if small:
        text = f"{text} on {names_of(small)}; NCCL and gloo exchange data of a node's ranks there"
        return warning("/dev/shm", text, fix)
    return ok("/dev/shm", f"at least {text}")


def _judge_open_files(ranks: Sequence[RankFacts]) -> Finding:
    limit, few = _below(ranks, lambda rank: rank.machine.open_files, LEAST_OPEN_FILES)
    if few:
        text = f"at most {limit:,} on {names_of(few)}; stores and many ranks need {LEAST_OPEN_FILES:,}"
        return warning("open files", text, "Raise the hard limit (`ulimit -Hn`, limits.conf, or --ulimit nofile of Docker)")
    return ok("open files", "unlimited" if limit is None else f"at most {limit:,}")


def _judge_locked_memory(ranks: Sequence[RankFacts]) -> Finding:
    with_infiniband = [rank for rank in ranks if rank.machine.has_infiniband]
    limit, few = _below(with_infiniband, lambda rank: rank.machine.locked_bytes, LEAST_LOCKED_BYTES)
    if not few:
        return ok("locked memory", "unlimited" if limit is None else f"at most {size_text(limit)}")
    text = f"at most {size_text(limit or 0)} on {names_of(few)}, which have InfiniBand"
    fix = (
        "Set memlock to unlimited (limits.conf, --ulimit memlock=-1 of Docker, PropagateResourceLimitsExcept=MEMLOCK of Slurm)"
    )
    return (problem if ranks[-1].node > 0 else warning)("locked memory", text, fix)


def _below(
    ranks: Sequence[RankFacts], limit_of: Callable[[RankFacts], int | None], wanted: int
) -> tuple[int | None, list[RankFacts]]:
    """Return the smallest limit, None = unlimited, and the ranks whose limit is below `wanted`."""
    limits = [(limit_of(rank), rank) for rank in ranks]
    numbers = [limit for limit, _ in limits if limit is not None]
    return min(numbers, default=None), [rank for limit, rank in limits if limit is not None and limit < wanted]
