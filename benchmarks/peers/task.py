"""The task on which two trainers are compared.

Each process creates the same weights and the same batch from a seed.

A process that serves a task reads commands from its standard input and answers each with one line
of JSON. `check FILE` runs the first step and writes its losses and gradients, `time` runs a step
and returns its seconds, and `memory` returns the peak memory in bytes.
"""

import argparse
import ctypes
import gc
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

STEPS = 7


@dataclass(frozen=True)
class Task:
    """One training step of a draft on one document, including the target head.

    hidden_size to num_tokens: sizes; the draft is as wide as its target.
    mask: share of assistant tokens, which are the last ones.
    hits: "all" if the target's most likely token is always in the draft vocabulary, "random" if it
    is there as often as any other token.
    device, dtype: names in torch.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    draft_vocab_size: int
    vocab_size: int
    num_tokens: int
    mask: float
    hits: str
    device: str
    dtype: str

    def config(self) -> dict:
        """Return the options of the draft's config.json."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "draft_vocab_size": self.draft_vocab_size,
            "max_position_embeddings": 2 * self.num_tokens,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "pad_token_id": 0,
        }

    def tensors(self) -> "TaskTensors":
        torch.set_default_device(self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        dtype = getattr(torch, self.dtype)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype).mul_(scale)

        size = self.hidden_size
        vocab = self.vocab_size
        in_draft_V = torch.zeros(vocab, dtype=torch.bool)
        in_draft_V[torch.randperm(vocab, generator=generator)[: self.draft_vocab_size]] = True
        head_VD = draw(vocab, size, scale=4.5 * size**-0.5)
        if self.hits == "all":  # Logits near zero are never the largest.
            head_VD[~in_draft_V] *= 0.05
        position_T = torch.arange(self.num_tokens)
        tensors = TaskTensors(
            input_ids_T=torch.randint(vocab, (self.num_tokens,), generator=generator),
            # No token follows a document's last token, so it cannot be trained on.
            mask_T=(position_T >= round(self.num_tokens * (1 - self.mask))) & (position_T < self.num_tokens - 1),
            aux_TA=draw(self.num_tokens, 3 * size),
            last_hidden_TD=draw(self.num_tokens, size),
            head_VD=head_VD,
            embed_VD=draw(vocab, size, scale=0.5),
            in_draft_V=in_draft_V,
            weights=self._weights(draw),
        )
        torch.set_default_device(None)
        return tensors

    def _weights(self, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
        size = self.hidden_size
        mlp_width = self.intermediate_size
        heads = self.num_heads * self.head_dim
        groups = self.num_key_value_heads * self.head_dim
        shapes = {"fc": (size, 3 * size), "lm_head": (self.draft_vocab_size, size)}
        widths = {"q": heads, "k": groups, "v": groups}
        shapes |= {f"midlayer.self_attn.{name}_proj": (width, 2 * size) for name, width in widths.items()}
        shapes |= {"midlayer.self_attn.o_proj": (size, heads), "midlayer.mlp.gate_proj": (mlp_width, size)}
        shapes |= {"midlayer.mlp.up_proj": (mlp_width, size), "midlayer.mlp.down_proj": (size, mlp_width)}
        weights = {f"{name}.weight": draw(*shape, scale=shape[1] ** -0.5) for name, shape in shapes.items()}
        norms = ("norm", *(f"midlayer.{name}" for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")))
        return weights | {f"{name}.weight": 1 + draw(size, scale=0.1) for name in norms}


@dataclass(frozen=True)
class TaskTensors:
    """Tensors of a task.

    input_ids_T, mask_T: token ids and assistant mask, not shifted.
    head_VD, embed_VD: weights of the target's head and embedding.
    weights: the draft's weights by name.
    """

    input_ids_T: Tensor
    mask_T: Tensor
    aux_TA: Tensor
    last_hidden_TD: Tensor
    head_VD: Tensor
    embed_VD: Tensor
    in_draft_V: Tensor
    weights: dict[str, Tensor]


def read_task() -> tuple[Task, argparse.Namespace]:
    """Return the task and the options of this process's command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", required=True, help="Task as JSON")
    parser.add_argument("--backend", default="sdpa")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return Task(**json.loads(options.task)), options


def task_json(task: Task) -> str:
    return json.dumps(asdict(task))


def serve(task: Task, model: nn.Module, forward: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Run the commands of the standard input until it ends.

    forward: returns the total loss, a differentiable scalar, and the losses of the TTT steps, [S].
    """
    on_gpu = task.device == "cuda"

    def step() -> Tensor:
        for parameter in model.parameters():
            parameter.grad = None
        loss, loss_S = forward()
        loss.backward()
        if on_gpu:
            torch.cuda.synchronize()
        return loss_S.detach()

    before = _start_counting(on_gpu)
    for line in sys.stdin:
        order, _, argument = line.strip().partition(" ")
        if order == "check":
            results = {"losses": step()}
            results |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            save_file({name: tensor.float().cpu().contiguous() for name, tensor in results.items()}, Path(argument))
            answer = True
        elif order == "time":
            start = time.perf_counter()
            step()
            answer = time.perf_counter() - start
        else:
            answer = (torch.cuda.max_memory_allocated() if on_gpu else _peak_rss_bytes()) - before
        print(json.dumps(answer), flush=True)


def _start_counting(on_gpu: bool) -> int:
    """Reset the peak memory counter and return the bytes in use before the first step."""
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Otherwise the steps could use pages freed while the task was created, without being counted.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _peak_rss_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
