"""Pipelines for tests and benchmarks that iterate over prepared work themselves."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from engine.config.sections import COLOCATED, SERIAL
from engine.overlap.look_ahead import Limits
from engine.overlap.pipeline import Pipeline, Producer
from engine.overlap.placement import Settings, open_pipeline
from engine.overlap.step_clock import StepClock

CPU = torch.device("cpu")


def pipeline(items: Iterable[Any], prepare: Callable[[Any], Any], look_ahead: int, device: torch.device = CPU) -> Pipeline:
    """One whose producer issues no collectives; with a look-ahead of 0, the serial one."""
    settings = Settings(COLOCATED if look_ahead else SERIAL, Limits(look_ahead))
    return open_pipeline(Producer(items, prepare), StepClock(device), settings, device)


def prepared(items: Iterable[Any], prepare: Callable[[Any], Any], look_ahead: int, device: torch.device = CPU) -> Iterator[Any]:
    """What is prepared, in order; each is valid until the next one is asked for."""
    with pipeline(items, prepare, look_ahead, device) as work:
        for one in work:
            yield one
            work.release()
