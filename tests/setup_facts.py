"""Made-up facts about ranks, for tests of what is judged from them."""

from dataclasses import replace
from typing import Any

from engine.host.units import GIB
from engine.setup_checks.machine_facts import GpuFacts, MachineFacts
from engine.setup_checks.rank_facts import RankFacts
from engine.setup_checks.software_facts import SoftwareFacts

GPU = GpuFacts("NVIDIA H100 80GB HBM3", "", 80 * GIB, 79 * GIB)
VERSIONS = {"torch": "2.13.0+cu130", "deepspeed": "0.19.8", "transformers": "5.23.0", "numpy": "2.4.6"}
SOFTWARE = SoftwareFacts(
    python="3.12.3",
    versions=VERSIONS | {"triton": "3.9.0", "liger-kernel": "0.8.5", "nvidia-ml-py": "13.580.82"},
    draftspeed="0.1.0",
    source="0123456789ab",
    cuda="13.0",
    nccl="2.28.3",
    driver="580.65.06",
    sees_gpu=True,
    hides_gpus=False,
    has_nvidia_apex=False,
    has_apex=False,
    flash="torch",
)
MACHINE = MachineFacts(
    num_gpus=4,
    gpu=GPU,
    cores=tuple(range(32)),
    cpu_quota=None,
    memory_bytes=512 * GIB,
    free_memory_bytes=400 * GIB,
    shm_bytes=256 * GIB,
    free_shm_bytes=250 * GIB,
    open_files=1 << 20,
    locked_bytes=None,
    has_infiniband=False,
)


def make_ranks(num_nodes: int = 2, local_size: int = 4, **of_machine: Any) -> list[RankFacts]:
    """Ranks of nodes with GPUs that are ready to train. of_machine: facts that are otherwise on every rank."""
    ranks = []
    for rank in range(num_nodes * local_size):
        node, local_rank = divmod(rank, local_size)
        machine = replace(MACHINE, gpu=replace(GPU, uuid=f"gpu-{rank}"))
        ranks.append(RankFacts(rank, local_rank, local_size, f"node{node}", SOFTWARE, replace(machine, **of_machine)))
    return ranks


def with_machine(ranks: list[RankFacts], number: int, **changed: Any) -> list[RankFacts]:
    """The ranks, of which one has other facts about its machine."""
    changed_rank = replace(ranks[number], machine=replace(ranks[number].machine, **changed))
    return [*ranks[:number], changed_rank, *ranks[number + 1 :]]


def with_software(ranks: list[RankFacts], number: int, **changed: Any) -> list[RankFacts]:
    """The ranks, of which one has other facts about its software."""
    changed_rank = replace(ranks[number], software=replace(ranks[number].software, **changed))
    return [*ranks[:number], changed_rank, *ranks[number + 1 :]]
