import threading

import pytest

from engine.overlap.thread_turns import Turns, TurnsEnded


def worker(turns: Turns, body) -> threading.Thread:
    def run() -> None:
        try:
            turns.wait()
            body()
        except TurnsEnded:
            pass
        finally:
            turns.leave()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_the_two_threads_alternate():
    turns = Turns()
    order = []

    def body() -> None:
        for number in range(100):
            order.append(f"worker {number}")
            turns.give_back()

    thread = worker(turns, body)
    for number in range(100):
        turns.give()
        order.append(f"main {number}")
    turns.end()
    thread.join(timeout=10)
    assert order == [f"{who} {number}" for number in range(100) for who in ("worker", "main")]


@pytest.mark.parametrize("num_turns", [0, 1, 3])
def test_the_end_reaches_the_worker_wherever_it_waits(num_turns):
    turns = Turns()
    cleaned = []

    def body() -> None:
        try:
            while True:
                turns.give_back()
        finally:
            cleaned.append(True)

    thread = worker(turns, body)
    for _ in range(num_turns):
        turns.give()
    turns.end()
    thread.join(timeout=10)
    assert not thread.is_alive() and cleaned == [True] * (num_turns > 0)


def test_a_turn_for_a_worker_that_has_ended_returns_at_once():
    turns = Turns()
    thread = worker(turns, lambda: None)
    turns.give()
    thread.join(timeout=10)
    turns.give()
