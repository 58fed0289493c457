"""Command lines that start SGLang and vLLM with a draft of a given shape, or without one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from engine.config.tree_shape import TreeShape
from engine.serving.draft_kinds import EAGLE3, DraftKind

SGLANG = "sglang"
VLLM = "vllm"
MODULES = {SGLANG: "sglang.launch_server", VLLM: "vllm.entrypoints.openai.api_server"}
WITHOUT_PREFIX_CACHE = {SGLANG: "--disable-radix-cache", VLLM: "--no-enable-prefix-caching"}


@dataclass(frozen=True)
class ServerProgram:
    """How servers are started.

    server: "sglang" or "vllm". python: the interpreter of its environment. target, draft: folders or hub ids.
    kind: of the draft.
    arguments: further arguments of the server, which come last and so replace earlier ones.
    keeps_prefixes: whether a prompt that was seen before may be answered from the server's prefix cache.
    """

    server: str
    python: str
    target: str
    draft: str
    arguments: Sequence[str] = ()
    keeps_prefixes: bool = False
    kind: DraftKind = EAGLE3

    def command(self, shape: TreeShape | None, host: str, port: int) -> list[str]:
        """Return the command of a server. shape: that of the draft; None = without the draft."""
        model = "--model-path" if self.server == SGLANG else "--model"
        command = [self.python, "-m", MODULES[self.server], model, self.target, "--host", host, "--port", str(port)]
        if shape is not None:
            command += draft_arguments(self.server, shape, self.draft, self.kind)
        if not self.keeps_prefixes:
            command.append(WITHOUT_PREFIX_CACHE[self.server])
        return [*command, *self.arguments]


def draft_arguments(server: str, shape: TreeShape, draft: str, kind: DraftKind = EAGLE3) -> list[str]:
    """Return the arguments with which a server drafts with this shape.

    Raises ValueError for a shape that the server cannot draft: a tree in vLLM, or less than a whole block.
    """
    check_shape(server, shape, kind)
    if server == VLLM:
        config = {"method": kind.vllm_method, "model": draft, "num_speculative_tokens": shape.num_steps}
        return ["--speculative-config", json.dumps(config)]
    arguments = ["--speculative-algorithm", kind.sglang_algorithm, "--speculative-draft-model-path", draft]
    if kind.block_tokens is not None:  # SGLang reads all sizes from the draft's config, and overrides given ones
        return arguments
    sizes = {
        "--speculative-num-steps": shape.num_steps,
        "--speculative-eagle-topk": shape.topk,
        "--speculative-num-draft-tokens": shape.tokens_per_forward,
    }
    for option, size in sizes.items():
        arguments += [option, str(size)]
    return arguments


def check_shape(server: str, shape: TreeShape, kind: DraftKind) -> None:
    """Raise ValueError if a server cannot draft with this shape."""
    if server == VLLM and kind.vllm_method is None:
        raise ValueError("vLLM serves the vanilla Markov head of DSpark only; use --server sglang for this draft")
    if kind.block_tokens is not None and shape != TreeShape(kind.block_tokens, rule=shape.rule):
        raise ValueError(
            f"servers draft whole blocks, of {kind.block_tokens} tokens with this draft, found {shape}; delete --num_steps, "
            "--topk and --num_draft_tokens"
        )
    check_topk(server, shape.topk)


def check_topk(server: str, topk: int) -> None:
    """Raise ValueError if a server cannot draft trees of this `topk`."""
    if server == VLLM and topk > 1:
        raise ValueError(f"vLLM drafts chains only, found --topk {topk}; use --topk 1, or measure trees with --server sglang")


def served_shape(shape: TreeShape, kind: DraftKind) -> TreeShape:
    """Return the shape that a server drafts with instead of a measured one: the whole block of a block drafter."""
    return shape if kind.block_tokens is None else TreeShape(kind.block_tokens, rule=shape.rule)
