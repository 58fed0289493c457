"""Export the draft of a checkpoint for SGLang and vLLM: in one process, without a GPU, for any ZeRO stage.

    python launcher/export_draft.py --run outputs/run [--tag step_100] [--format speculators] [--output FOLDER]

The run's `config.yaml` gives the draft's shapes, its `vocab_map.safetensors` the tokens that it can
propose. The default folder is read by SGLang and by vLLM; `--format speculators` writes that of vLLM's
library `speculators`, which includes the target's embedding.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.recipe import load_config
from engine.config.sections import CHECKPOINTS, DRAFT, RECIPE, Config, TargetSection
from engine.evaluation.model_card import write_model_card
from engine.hidden_states.store_format import Manifest
from engine.host.checkpoint_files import COMPLETE
from engine.models.draft_folder import VOCAB, check_replaceable, load_vocab_facts, load_vocab_map, read_draft_config
from engine.models.draft_method import DraftConfig, TargetFacts
from engine.parallel.zero_checkpoint import consolidated_weights
from engine.runtime.checkpoint import TAG, Checkpoint, Checkpoints
from engine.serving.draft_kinds import draft_kind
from engine.target.configuration import load_target_config
from engine.target.frozen import FrozenTarget
from engine.weights.weight_files import find_weight_files, read_header
from launcher.command import TRUST, check_run, method_of_run, run_plugins

SGLANG, VLLM, SPECULATORS = "sglang", "vllm", "speculators"  # --format
EMBEDDING_NAMES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, required=True, help="output_dir of the training run")
    parser.add_argument("--tag", help="checkpoint to export; default: the newest")
    parser.add_argument(
        "--format",
        choices=(SGLANG, VLLM, SPECULATORS),
        default=SGLANG,
        help="sglang, vllm = one folder that both servers read, so the two names mean the same; speculators = that of vLLM's "
        "library speculators; default: %(default)s",
    )
    parser.add_argument("--plugins", nargs="+", default=(), metavar="FILE", help="Python files that register its draft method")
    parser.add_argument("--trust_remote_code", action="store_true", help=TRUST)
    parser.add_argument(
        "--output", type=Path, help="folder of the exported draft; default: 'draft' in --run, or 'draft_speculators'"
    )
    return parser.parse_args()


def choose_tag(folder: Path, wanted: str | None) -> str:
    """Return the tag `wanted`, or that of the newest checkpoint in `folder` if it is None.

    Raises ValueError that lists the existing checkpoints if this one does not exist.
    """
    matches = (TAG.fullmatch(path.name) for path in folder.glob("*"))
    steps = {match[0]: int(match[1]) for match in matches if match is not None}
    if not steps:
        raise ValueError(f"{folder} holds no checkpoint; train with checkpoint.every_steps above 0")
    if wanted is None:
        newest = Checkpoints(folder).find(lambda problem: print(f"export_draft.py: {problem}", file=sys.stderr))
        wanted = None if newest is None else newest.tag
    if wanted not in steps:
        available = ", ".join(sorted(steps, key=lambda name: steps[name]))
        raise ValueError(f"{folder} holds no checkpoint {wanted}; --tag can be one of {available}")
    if (folder / wanted / COMPLETE).exists():
        Checkpoint.read(folder, wanted)  # compares its files with their checksums
    return wanted


def read_embedding(section: TargetSection, config: DraftConfig) -> torch.Tensor:
    """Return the target's embedding [V, D] in the recipe's precision.

    If exactly one tensor of the checkpoint matches by name and shape, only that one is read.
    Otherwise the whole target is loaded.
    """
    shape = [config.vocab_size, config.target_hidden_size]
    found = []
    for name, path in _embedding_candidates(section):
        with safe_open(path, "pt") as file:
            if file.get_slice(name).get_shape() == shape:
                found.append(file.get_tensor(name))
    if len(found) == 1:
        return found[0] if section.dtype == "auto" else found[0].to(getattr(torch, section.dtype))
    return FrozenTarget.load(section, torch.device("cpu"), config.aux_layers).embedding.whole()


def _embedding_candidates(section: TargetSection) -> list[tuple[str, Path]]:
    """Return (tensor name, file) of the target's tensors that are named like an embedding.

    The list is empty if the checkpoint is not in safetensors files.
    """
    files = find_weight_files(section.path, section.revision)
    if not files.is_safetensors:
        return []
    files.check()
    if files.index is not None:
        places = [(name, files.paths[file]) for name, file in files.index.items()]
    else:
        (whole,) = files.paths.values()
        places = [(name, whole) for name in read_header(whole)]
    return [(name, path) for name, path in places if name.endswith(EMBEDDING_NAMES)]


def target_section(section: TargetSection) -> TargetSection:
    """Return where the whole target of a run is: for a run that read a store, the target that was captured."""
    if section.store is None:
        return section
    captured = Manifest.read(Path(section.store)).contents
    return replace(section, path=captured.target, revision=captured.revision)


def target_facts(recipe: Config, section: TargetSection) -> TargetFacts:
    """Return what the format of speculators says about the target and about serving."""
    architectures = load_target_config(section).architectures or ()
    return TargetFacts(section.path, tuple(architectures), recipe.evaluation.num_steps)


def export(
    run: Path,
    tag: str | None,
    output: Path | None,
    plugins: Sequence[str] = (),
    trust_remote_code: bool = False,
    format_name: str = SGLANG,
) -> tuple[str, Path]:
    """Export a checkpoint of `run` and return its tag and the folder written.

    plugins: Python files that register the run's draft method.
    trust_remote_code: whether to run code of the target's checkpoint; the run may be someone else's.
    format_name: one of --format.
    Raises ValueError if a file or the checkpoint is missing, or if the format cannot express the draft.
    """
    as_speculators = format_name == SPECULATORS
    folder = output or run / (f"{DRAFT}_{SPECULATORS}" if as_speculators else DRAFT)
    check_run(run)
    tag = choose_tag(run / CHECKPOINTS, tag)
    check_replaceable(folder)
    run_plugins(plugins, "--plugins")
    recipe = load_config(run / RECIPE)
    recipe = replace(recipe, target=replace(recipe.target, trust_remote_code=trust_remote_code))
    target = load_target_config(recipe.target)
    method = method_of_run(recipe, plugins)
    trained_with = load_vocab_facts(run / VOCAB).get("trained_with")
    config = method.derive_config(target, recipe.target.aux_layers, trained_with)
    weights = consolidated_weights(run / CHECKPOINTS, tag).items()
    vocab_map = load_vocab_map(run / VOCAB)
    if as_speculators:
        section = target_section(recipe.target)
        if section.revision is not None:
            problem = f"the format of speculators has no place for target.revision={section.revision}"
            print(f"export_draft.py: {problem}; servers will load the default revision of {section.path}", file=sys.stderr)
        facts = target_facts(recipe, section)
        method.export_speculators(folder, weights, config, vocab_map, read_embedding(section, config), facts)
    else:
        embed_weight_VD = read_embedding(recipe.target, config) if method.ships_embedding(config) else None
        method.export(folder, weights, config, vocab_map, embed_weight_VD)
    write_model_card(run, folder, measured=False)
    return tag, folder


def main() -> None:
    arguments = parse_arguments()
    try:
        tag, folder = export(
            arguments.run,
            arguments.tag,
            arguments.output,
            arguments.plugins,
            arguments.trust_remote_code,
            arguments.format,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"export_draft.py: {error}")
    if arguments.format == SPECULATORS:
        print(f"Draft of {tag}, ready for speculators and vLLM: {folder}")
        return
    kind = draft_kind(read_draft_config(folder))
    ready = "" if kind is None else f", ready for {kind.servers}"
    print(f"Draft of {tag}{ready}: {folder}")


if __name__ == "__main__":
    main()
