"""Decode prompts with the real vLLM engine; `run_vllm.py` starts this file with the Python of vLLM's environment.

    python vllm_worker.py '{"target": FOLDER, "prompts": [[5, 6]], "new_tokens": 60, "speculative": null, "runner": "v1"}'

`prompts` are token ids. `speculative` is the value of vLLM's option: null for decoding without a draft, and if `target` is a
folder in the format of speculators, which names its draft itself. `num_tokens` is the number of tokens drafted per step. The
last line that is printed is a JSON object: for each prompt the generated tokens, all drafted tokens, the verify steps, and the
accepted tokens at each depth.

`runner` is "v1" or "v2". GPUs run the second one, which alone drafts with DSpark and DFlash2. Its Triton kernels have no CPU
backend in this environment; Triton's interpreter runs them instead.
"""

import json
import os
import sys
from typing import Any

# The engine runs in this process, on one thread, and asks no hub.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_TARGET_DEVICE="cpu",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
)
PREFIX = "vllm:spec_decode_num_"


class InterpretedDriver:
    """A driver that vLLM finds active; the interpreter needs none."""

    @staticmethod
    def is_active() -> bool:
        return True


class InterpretedBackend:
    """Stands for Triton's CPU backend, without which vLLM does not import Triton on a CPU."""

    driver = InterpretedDriver
    compiler = None


def interpret_triton() -> None:
    """Let vLLM's second model runner start on a CPU. Must be called before vLLM is imported."""
    os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
    from triton.backends import backends

    backends.setdefault("cpu", InterpretedBackend)


def norm_keys_of_each_layer() -> None:
    """Replace the norm of the context's keys in vLLM's block drafters by one that is right on a CPU.

    vLLM passes the weights of all layers to one call of `rms_norm`. The kernel for CPUs, in version 0.32, applies those of the
    first layer to the keys of every layer.
    """
    import torch
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

    def normed(self: Any, key_LTGE: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer.self_attn.k_norm(key_TGE) for layer, key_TGE in zip(self.layers, key_LTGE, strict=True)])

    DFlashQwen3Model._normalize_context_k = normed


class GreedyWalk:
    """DFlash2's choice among scored candidates, in PyTorch: the interpreter does not execute the mask of vLLM's kernel for it.

    The candidates, their scores and all that comes before are still vLLM's.
    """

    def __getitem__(self, grid: tuple[int]) -> Any:
        return self.walk

    @staticmethod
    def walk(scores: Any, candidates: Any, *states: Any, num_steps: int, top_k: int, **sizes: Any) -> None:
        """Write the most likely chain of each request to `tokens`, as the kernel does at temperature 0."""
        *_, tokens, realized = states
        for request, scores_SKK in enumerate(scores.view(-1, num_steps, top_k, top_k)):
            previous = 0
            for step, scores_KK in enumerate(scores_SKK):
                realized[request, step] = scores_KK[previous]
                previous = int(scores_KK[previous].argmax())
                tokens[request, step] = candidates[request, step, previous]


def walk_without_triton() -> None:
    """Let vLLM's second model runner choose the tokens of DFlash2 with `GreedyWalk`."""
    from vllm.v1.worker.gpu.spec_decode.dflash2 import speculator

    speculator._selector_walk_kernel = GreedyWalk()


def recording_drafts() -> list[list[int]]:
    """Return a list to which both model runners add the tokens of each draft from now on."""
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    drafts: list[list[int]] = []
    drafting: list[Any] = [SpecDecodeBaseProposer]
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER"):
        from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator
        from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator import TargetDependentARSpeculator

        drafting += [DFlashSpeculator, TargetDependentARSpeculator]
    for owner in drafting:
        propose = owner.propose

        def recorded(*arguments: Any, propose: Any = propose, **options: Any) -> Any:
            result = propose(*arguments, **options)
            token_ids = result[0] if isinstance(result, tuple) else result
            drafts.append(token_ids[0].tolist())
            return result

        owner.propose = recorded
    return drafts


def counters(engine: Any) -> tuple[int, list[int]]:
    """Return the verify steps and the accepted tokens at each depth since the engine was started."""
    metrics = {metric.name: metric for metric in engine.get_metrics()}
    return int(metrics[PREFIX + "drafts"].value), list(metrics[PREFIX + "accepted_tokens_per_pos"].values)


def main() -> None:
    job = json.loads(sys.argv[1])
    if job["runner"] == "v2":
        interpret_triton()
    from vllm import LLM, SamplingParams

    norm_keys_of_each_layer()
    if job["runner"] == "v2":
        walk_without_triton()
    prompts = job["prompts"]
    speculative = job["speculative"]
    num_tokens = job["num_tokens"]
    engine = LLM(
        model=job["target"],
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_seqs=4,
        # Near the limit the first model runner stops drafting.
        max_model_len=max(map(len, prompts)) + job["new_tokens"] + 4 * num_tokens + 4,
        disable_log_stats=False,
        seed=0,
        speculative_config=speculative,
    )
    greedy = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False)
    recorded = recording_drafts()
    tokens = []
    drafts = []
    steps = []
    accepted = []
    before = (0, [0] * num_tokens)
    for prompt in prompts:  # one at a time, since the counters are the engine's
        recorded.clear()
        (output,) = engine.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
        tokens.append(list(output.outputs[0].token_ids))
        drafts.append(list(recorded))
        after = counters(engine) if num_tokens else before
        steps.append(after[0] - before[0])
        accepted.append([new - old for new, old in zip(after[1], before[1], strict=True)])
        before = after
    print(json.dumps({"tokens": tokens, "drafts": drafts, "steps": steps, "accepted": accepted}), flush=True)
    os._exit(0)  # taking the engine down takes longer than decoding


if __name__ == "__main__":
    main()
