"""Decode prompts with the real vLLM engine; `run_vllm.py` starts this file with the Python of vLLM's environment.

    python vllm_worker.py TARGET DRAFT PROMPTS NEW_TOKENS NUM_STEPS

DRAFT may be empty, for decoding without one. PROMPTS is a JSON file with token ids. The last line that is printed is a JSON
object: the generated tokens, and for each prompt the verify steps and the accepted tokens at each depth.
"""

import json
import os
import sys

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

from vllm import LLM, SamplingParams  # noqa: E402  it reads the environment

PREFIX = "vllm:spec_decode_num_"


def counters(engine: LLM) -> tuple[int, list[int]]:
    """Return the verify steps and the accepted tokens at each depth since the engine was started."""
    metrics = {metric.name: metric for metric in engine.get_metrics()}
    return int(metrics[PREFIX + "drafts"].value), list(metrics[PREFIX + "accepted_tokens_per_pos"].values)


def main() -> None:
    target, draft, prompts_file, new_tokens, num_steps = sys.argv[1:]
    with open(prompts_file) as file:
        prompts = json.load(file)
    speculative = None
    if draft:
        speculative = {"method": "eagle3", "model": draft, "num_speculative_tokens": int(num_steps)}
    engine = LLM(
        model=target,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_seqs=4,
        max_model_len=max(map(len, prompts)) + int(new_tokens) + int(num_steps) + 1,
        disable_log_stats=False,
        seed=0,
        speculative_config=speculative,
    )
    greedy = SamplingParams(temperature=0, max_tokens=int(new_tokens), ignore_eos=True, detokenize=False)
    tokens = []
    steps = []
    accepted = []
    before = (0, [0] * int(num_steps))
    for prompt in prompts:  # one at a time, since the counters are the engine's
        (output,) = engine.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
        tokens.append(list(output.outputs[0].token_ids))
        after = counters(engine) if draft else before
        steps.append(after[0] - before[0])
        accepted.append([new - old for new, old in zip(after[1], before[1], strict=True)])
        before = after
    print(json.dumps({"tokens": tokens, "steps": steps, "accepted": accepted}), flush=True)
    os._exit(0)  # taking the engine down takes longer than decoding


if __name__ == "__main__":
    main()
