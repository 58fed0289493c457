import random

import pytest

from engine.overlap.look_ahead import Limits, LookAhead


def test_batches_begin_up_to_the_limit_in_front_of_what_is_asked_for():
    state = LookAhead(Limits(2))
    assert [state.may_begin(batch, 0) for batch in range(4)] == [True, True, False, False]
    state.ask()
    assert [state.may_begin(batch, 0) for batch in range(4)] == [True, True, True, False]


def test_only_what_is_not_asked_for_counts_towards_the_bytes():
    state = LookAhead(Limits(9, num_bytes=10))
    state.begin(0, 8)
    assert state.bytes_ahead == 8 and not state.may_begin(1, 3)
    state.ask()
    assert state.bytes_ahead == 0 and state.may_begin(1, 10) and not state.may_begin(1, 11)


def test_a_batch_that_is_asked_for_always_begins():
    state = LookAhead(Limits(0, num_bytes=1))
    assert not state.may_begin(0, 100)
    state.ask()
    assert state.may_begin(0, 100)


@pytest.mark.parametrize("seed", range(20))
def test_batches_that_end_out_of_order_are_taken_in_order(seed):
    generator = random.Random(seed)
    state = LookAhead(Limits(3))
    begun: list[int] = []
    taken = 0
    while taken < 50:
        for batch in range(taken, 50):
            if batch not in begun and state.may_begin(batch, 1):
                state.begin(batch, 1)
                begun.append(batch)
        running = [batch for batch in begun if batch >= taken and batch not in state._finished]
        if running:
            state.finish(generator.choice(running))
        if state.num_asked == taken:
            state.ask()
        while state.is_ready and state.num_asked > taken:
            state.take()
            taken += 1
            assert state.num_taken == taken
            state.ask()
