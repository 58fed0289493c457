"""Process of one side of a comparison: its command line and the orders it answers.

A side reads orders from its standard input and answers each with one line of JSON. `check FILE`
runs one step and writes its losses and gradients, `time N` runs N steps and returns their mean
wall-clock seconds and the share of this time in which threads waited for a processor, `memory`
returns the peak memory since the last check in bytes, in addition to what the side held before its first step.
"""

import argparse
import ctypes
import gc
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def read_command_line() -> argparse.Namespace:
    """Return the options of a side's command line, and set the number of threads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", required=True, help="task as JSON")
    parser.add_argument("--attention", default="", help="the peer's name of its attention implementation")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def serve(
    model: nn.Module,
    forward: Callable[[], tuple[Tensor, Tensor]],
    device: str,
    common_name: Callable[[str], str] = str,
) -> None:
    """Answer the orders of the standard input until it ends.

    forward: returns the total loss, a differentiable scalar, and the losses it consists of, [S].
    common_name: returns the name that both sides use for a parameter of the model.
    """
    on_gpu = device == "cuda"

    def step() -> Tensor:
        for parameter in model.parameters():
            parameter.grad = None
        loss, loss_S = forward()
        loss.backward()
        if on_gpu:
            torch.cuda.synchronize()
        return loss_S.detach()

    before_bytes = _start_counting(on_gpu)
    for line in sys.stdin:
        order, _, argument = line.strip().partition(" ")
        if order == "check":
            results = {"losses": step()}
            results |= {common_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
            save_file({name: tensor.float().cpu().contiguous() for name, tensor in results.items()}, Path(argument))
            del results
            _reset_peak(on_gpu)  # writing the file took memory too
            answer = True
        elif order == "time":
            answer = _time(step, int(argument), torch.get_num_threads())
        else:
            answer = (torch.cuda.max_memory_allocated() if on_gpu else _peak_rss_bytes()) - before_bytes
        print(json.dumps(answer), flush=True)


def _time(step: Callable[[], Tensor], num_steps: int, num_threads: int) -> dict[str, float | None]:
    before_s = waiting_s()
    start_s = time.perf_counter()
    for _ in range(num_steps):
        step()
    seconds = time.perf_counter() - start_s
    after_s = waiting_s()
    known = before_s is not None and after_s is not None
    waited_share = (after_s - before_s) / (seconds * num_threads) if known else None
    return {"seconds": seconds / num_steps, "waited_share": waited_share}


def waiting_s(tasks: Path = Path("/proc/self/task")) -> float | None:
    """Return the seconds for which threads of this process were ready but had no processor.

    None if the kernel does not count them.
    """
    nanoseconds = 0
    for thread in tasks.glob("*"):
        try:
            _running, waiting, _times = (thread / "schedstat").read_text(encoding="ascii").split()
        except (OSError, ValueError):  # The thread has ended, or the kernel has no such file.
            continue
        nanoseconds += int(waiting)
    return nanoseconds / 1e9 if nanoseconds else None


def _start_counting(on_gpu: bool) -> int:
    """Reset the peak memory counter and return the bytes in use before the first step."""
    _reset_peak(on_gpu)
    if on_gpu:
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _reset_peak(on_gpu: bool) -> None:
    """Give back memory that is not in use, and reset the peak memory counter."""
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    # Otherwise later steps could use pages that were freed before, without being counted.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.


def _peak_rss_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
