"""Batches that travel between real ranks."""

import random
import time

import torch
from torch import distributed

from engine.overlap.bridge import Bridge, Sides
from engine.overlap.look_ahead import Limits
from engine.overlap.split_pipeline import SplitPipeline, send_batches
from engine.overlap.step_clock import TARGET_FORWARD, WAIT, StepClock
from engine.parallel.mesh import World
from tests.distributed import run_ranks

CPU = torch.device("cpu")
NUM_BATCHES = 9
# Draft ranks, target ranks, look-ahead and micro-batches per step.
CASES = [(1, 1, 0, 1), (1, 1, 4, 3), (1, 3, 2, 1), (3, 1, 1, 1), (2, 2, 1, 3), (1, 2, 3, 9), (2, 1, 0, 3)]


def states(rank: int, index: int) -> list[torch.Tensor]:
    """What travels for a batch; every batch has another size."""
    generator = torch.Generator().manual_seed(100 * rank + index)
    count = 1 + (7 * rank + 3 * index) % 11
    return [torch.randn(count, 3, generator=generator), torch.arange(count, dtype=torch.int32), torch.empty(0)]


def exchange(world: World) -> list[tuple[int, int]]:
    """For each case, what this rank found: batches that differ, and buffers."""
    found = []
    store = distributed.distributed_c10d._get_default_store()
    for number, (num_draft, num_target, look_ahead, per_step) in enumerate(CASES):
        sides = Sides(num_draft, num_target)
        if world.rank >= sides.size:
            continue
        bridge = Bridge(sides, world.rank, distributed.PrefixStore(f"case {number}", store), 60, CPU)
        clock = StepClock(CPU)
        delays = random.Random(number * 10 + world.rank)
        if sides.is_target(world.rank):
            own = sides.batches_of(world.rank - num_draft, NUM_BATCHES)

            def prepare(batch: tuple[int, int], delays: random.Random = delays) -> list[torch.Tensor]:
                time.sleep(delays.random() * 0.004)
                return states(*batch)

            send_batches([(rank, index, (rank, index)) for rank, index in own], prepare, bridge, clock, CPU)
            assert clock.take_seconds()[TARGET_FORWARD] > 0
            continue
        pipeline = SplitPipeline(
            range(NUM_BATCHES),
            lambda index: [part.to("meta") for part in states(world.rank, index)],
            lambda index, parts: (index, parts),
            clock,
            Limits(look_ahead),
            bridge,
            CPU,
        )
        num_wrong = 0
        with pipeline:
            for first in range(0, NUM_BATCHES, per_step):
                pipeline.release()
                for index in range(first, first + per_step):
                    got, parts = next(pipeline)
                    expected = states(world.rank, index)
                    equal = [torch.equal(a, b) for a, b in zip(parts, expected, strict=True)]
                    num_wrong += got != index or not all(equal)
                    time.sleep(delays.random() * 0.004)
            assert next(pipeline, None) is None
        seconds = clock.take_seconds()
        assert seconds[TARGET_FORWARD] > 0 and seconds[WAIT] > 0
        num_buffers = len(pipeline._side._ring.buffers)
        assert num_buffers <= look_ahead + per_step, "the look-ahead, and the batches of the step"
        found.append((num_wrong, num_buffers))
    return found


def test_every_batch_arrives_once_in_order_and_buffers_are_reused():
    results = run_ranks(exchange, 4)
    assert sum(len(result) for result in results) == sum(case[0] for case in CASES)
    assert all(num_wrong == 0 and num_buffers > 0 for result in results for num_wrong, num_buffers in result)
