"""Plugins for launched runs that do something before a training step."""

from textwrap import dedent, indent

BEFORE_EACH_STEP = """
import os, shutil, signal, time
from itertools import count
from pathlib import Path

import torch

from engine.parallel.zero import ZeroDraft

whole = ZeroDraft.train
steps = count(1)

def before_step(step, rank):
{body}

def train(self, *arguments):
    before_step(next(steps), torch.distributed.get_rank())
    return whole(self, *arguments)

ZeroDraft.train = train
"""


def before_each_step(body: str) -> str:
    """Return the text of a plugin whose ranks run `body` before each step.

    body: statements that may use `step`, which this process counts from 1, and `rank`. `os`, `shutil`, `signal`, `time` and
    `Path` are imported.
    """
    return BEFORE_EACH_STEP.format(body=indent(dedent(body).strip("\n"), "    "))
