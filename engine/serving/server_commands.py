"""Command lines that start SGLang and vLLM with a draft of a given shape, or without one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from engine.config.tree_shape import TreeShape

SGLANG = "sglang"
VLLM = "vllm"
MODULES = {SGLANG: "sglang.launch_server", VLLM: "vllm.entrypoints.openai.api_server"}
WITHOUT_PREFIX_CACHE = {SGLANG: "--disable-radix-cache", VLLM: "--no-enable-prefix-caching"}


@dataclass(frozen=True)
class ServerProgram:
    """How servers are started.

    server: "sglang" or "vllm". python: the interpreter of its environment. target, draft: folders or hub ids.
    arguments: further arguments of the server, which come last and so replace earlier ones.
    keeps_prefixes: whether a prompt that was seen before may be answered from the server's prefix cache.
    """

    server: str
    python: str
    target: str
    draft: str
    arguments: Sequence[str] = ()
    keeps_prefixes: bool = False

    def command(self, shape: TreeShape | None, host: str, port: int) -> list[str]:
        """Return the command of a server. shape: that of the draft; None = without the draft."""
        model = "--model-path" if self.server == SGLANG else "--model"
        command = [self.python, "-m", MODULES[self.server], model, self.target, "--host", host, "--port", str(port)]
        if shape is not None:
            command += draft_arguments(self.server, shape, self.draft)
        if not self.keeps_prefixes:
            command.append(WITHOUT_PREFIX_CACHE[self.server])
        return [*command, *self.arguments]


def draft_arguments(server: str, shape: TreeShape, draft: str) -> list[str]:
    """Return the arguments with which a server drafts with this shape.

    Raises ValueError for a tree in vLLM, which drafts chains only.
    """
    check_topk(server, shape.topk)
    if server == VLLM:
        config = {"method": "eagle3", "model": draft, "num_speculative_tokens": shape.num_steps}
        return ["--speculative-config", json.dumps(config)]
    sizes = {
        "--speculative-num-steps": shape.num_steps,
        "--speculative-eagle-topk": shape.topk,
        "--speculative-num-draft-tokens": shape.tokens_per_forward,
    }
    arguments = ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", draft]
    for option, size in sizes.items():
        arguments += [option, str(size)]
    return arguments


def check_topk(server: str, topk: int) -> None:
    """Raise ValueError if a server cannot draft trees of this `topk`."""
    if server == VLLM and topk > 1:
        raise ValueError(f"vLLM drafts chains only, found --topk {topk}; use --topk 1, or measure trees with --server sglang")
