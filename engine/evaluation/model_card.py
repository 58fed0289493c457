"""The model card of a draft: what it was trained for and on, how often it is right, and how to serve it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine
from engine.config.strict import dump_yaml, read_text
from engine.config.tree_shape import TreeShape
from engine.evaluation.acceptance import AcceptanceReport
from engine.evaluation.grid import RULE_TEXTS, GridCell, part_of_block, serving_commands
from engine.evaluation.page_parts import length_text
from engine.evaluation.run_record import RunRecord
from engine.host.files import write_text
from engine.models.draft_folder import CARD, read_draft_config
from engine.serving.draft_kinds import SGLANG_NAME, VLLM_NAME, DraftKind, draft_kind

TAG = "draftspeed"
ACCEPTANCE = "## Acceptance"
HEADING = f"\n{ACCEPTANCE}\n"
SGLANG_TREE = TreeShape(5, 8, 32)  # a usual shape of SGLang's trees


def write_model_card(run_folder: Path, draft_folder: Path, measured: bool = True) -> None:
    """Write the card of a run's draft into the draft's folder.

    measured: whether the acceptance in the run's summary is that of this draft.
    Raises ValueError if a folder is not what it should be, and WriteError.
    """
    run = RunRecord.read(run_folder)
    if not measured:
        run = replace(run, summary=None)
    write_text(draft_folder / CARD, model_card(run, read_draft_config(draft_folder)))


def model_card(run: RunRecord, draft: Mapping[str, Any]) -> str:
    """Return the card as Markdown. draft: the config.json of the draft."""
    target = str(run.option("target", "path"))
    kind = draft_kind(draft)
    facts = {"base_model": target, "tags": ["speculative-decoding", str(run.option("draft", "method")), TAG]}
    parts = [
        f"---\n{dump_yaml(facts)}---",
        f"# A draft for {target}",
        "This is a draft model for speculative decoding: it proposes tokens that the target then verifies, so the target's "
        f"output stays the same. It was trained with DraftSpeed {engine.__version__}.",
        _table(_facts(run, draft, target, kind)),
        ACCEPTANCE,
        _acceptance(run, kind),
        *(() if kind is None else ("## Serving", _serving(draft, target, kind))),
        "## Recipe",
        f"```yaml\n{run.config.rstrip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _facts(run: RunRecord, draft: Mapping[str, Any], target: str, kind: DraftKind | None) -> dict[str, str]:
    revision = run.option("target", "revision")
    own = _autoregressive_facts(run, draft) if kind is None or kind.block_tokens is None else _block_facts(draft, kind)
    facts = {
        "target": target if revision is None else f"{target}, revision {revision}",
        "method": str(run.option("draft", "method")),
        "architecture": ", ".join(draft.get("architectures") or ()),
        **own,
        "training data": _names(run.option("data", "train")),
        "held-out data": _names(run.option("data", "held_out")),
        "optimizer steps": str(run.metrics[-1]["step"]) if run.metrics else "",
    }
    return {name: value for name, value in facts.items() if value}


def _layers_read(draft: Mapping[str, Any]) -> list[int]:
    """Return the 0-based target layers whose outputs a draft reads, from its config.json in either format."""
    name = "eagle_aux_hidden_state_layer_ids"
    eagle = draft.get("eagle_config")
    if eagle is None:
        return [layer - 1 for layer in draft.get(name) or ()]
    return eagle.get(name) or []


def _autoregressive_facts(run: RunRecord, draft: Mapping[str, Any]) -> dict[str, str]:
    layer_config = draft.get("transformer_layer_config") or draft  # the former in the format of speculators
    return {
        "target layers read": _listed(_layers_read(draft)),
        "draft vocabulary": f"{draft.get('draft_vocab_size')} of {layer_config.get('vocab_size')} tokens",
        "loss": str(run.option("loss", "kind")),
    }


def _block_facts(draft: Mapping[str, Any], kind: DraftKind) -> dict[str, str]:
    """Return the facts of a block drafter, which shares the target's vocabulary."""
    nested = draft.get("dflash_config") or {}
    windows = f"sliding window of {draft.get('sliding_window')} tokens" if draft.get("use_sliding_window") else ""
    markov = draft.get("markov_head_type")
    return {
        "target layers read": _listed(nested.get("target_layer_ids", draft.get("target_layer_ids"))),
        "draft layers": _listed([draft.get("num_hidden_layers"), windows]),
        "block": f"{kind.block_size} rows, which draft {kind.block_tokens} tokens",
        "mask token": str(nested.get("mask_token_id", draft.get("mask_token_id"))),
        "Markov head": f"{markov}, rank {draft.get('markov_rank')}" if markov else "",
    }


def _listed(values: Any) -> str:
    return ", ".join(str(value) for value in values or () if value not in (None, ""))


def _names(paths: Any) -> str:
    """Return the file names without their folders, which say nothing on another machine."""
    return ", ".join(Path(path).name for path in paths or ())


def _acceptance(run: RunRecord, kind: DraftKind | None) -> str:
    report = run.report("after")
    if report is None:
        return "It was not measured: `launcher/measure_acceptance.py` measures it."
    names = ("num_steps", "topk", "num_draft_tokens", "tree_rule")
    sizes = {name: run.option("evaluation", name) for name in names}
    sizes["rule"] = sizes.pop("tree_rule") or TreeShape.rule
    shape = TreeShape(**sizes)
    text = _measured(shape, report, run.report("prompt_lookup"), run.option("data", "held_out"), kind)
    confidence = run.option("evaluation", "min_confidence")
    if confidence and kind is not None and kind.block_tokens is not None:
        text += (
            f"\n\nDrafts ended where the estimated probability of acceptance fell below {confidence}; by default, servers "
            "verify whole blocks."
        )
    return text


def has_own_card(folder: Path) -> bool:
    """Return whether an exported draft has a model card of this project. Raises ConfigError if the file is no text."""
    path = folder / CARD
    if not path.is_file():
        return False
    text = read_text(path)
    lines = text.splitlines()
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return False
    front_matter = lines[: lines.index("---", 1)]
    return f"- {TAG}" in front_matter and HEADING in text


def update_acceptance(
    folder: Path,
    cell: GridCell,
    baseline: AcceptanceReport | None,
    data: Sequence[str],
    kind: DraftKind | None,
) -> None:
    """Replace the acceptance in the model card of an exported draft, which `has_own_card`.

    cell: the measured shape. baseline: prompt lookup, if it was measured. data: files of the prompts. Raises WriteError.
    """
    path = folder / CARD
    text = read_text(path)
    start = text.index(HEADING) + len(HEADING)
    end = text.find("\n## ", start)
    if end < 0:
        end = len(text)
    section = _measured(cell.shape, cell.report.to_dict(), None if baseline is None else baseline.to_dict(), data, kind)
    write_text(path, f"{text[:start]}\n{section}\n{text[end:]}")


def _measured(
    shape: TreeShape, report: Mapping[str, Any], baseline: Mapping[str, Any] | None, data: Any, kind: DraftKind | None
) -> str:
    """Return the acceptance of greedy replies as Markdown.

    report, baseline: of the draft and of prompt lookup, as plain values.
    """
    if kind is not None and kind.block_tokens is not None:
        drafted = f"{shape.num_steps} drafted tokens"
    else:
        drafted = f"{shape.num_steps} steps, topk {shape.topk}"
    if not shape.is_chain:
        drafted += f", {shape.num_draft_tokens} draft tokens; {RULE_TEXTS[shape.rule]}"
    depths = [share for share in report.get("acceptance_per_depth") or () if share is not None]
    rows = {
        "acceptance length": f"{length_text(report)} tokens per target forward ({drafted})",
        "accepted by depth, if all before were": " ".join(f"{share:.0%}" for share in depths),
        "measured on": f"{report['num_prompts']} prompts of {_names(data)}, {report['num_tokens']} tokens, greedy decoding",
    }
    if baseline is not None:
        rows["prompt lookup, without a draft"] = length_text(baseline)
    partly = None if kind is None else part_of_block(shape.num_steps, kind)
    return "\n\n".join([_table(rows), *(() if partly is None else (partly,))])


def _serving(draft: Mapping[str, Any], target: str, kind: DraftKind) -> str:
    folder = Path("THIS_FOLDER")
    if "speculators_config" in draft:
        text = (
            "This folder is in the format of vLLM's library speculators. The first command takes the target and the number of"
        )
        text += " drafted tokens from its config.json; the second one names them."
        own = ("vllm serve THIS_FOLDER", serving_commands(TreeShape(3), target, folder)[VLLM_NAME])
        return "\n\n".join([text, *(f"```bash\n{command}\n```" for command in own)])
    if kind.block_tokens is not None:
        return _block_serving(target, folder, kind)
    chain = serving_commands(TreeShape(3), target, folder)
    tree = serving_commands(SGLANG_TREE, target, folder)
    parts = [
        "Both servers load this folder as it is. The first two commands draft chains of three tokens, the last one a tree.",
        *(f"```bash\n{command}\n```" for command in (chain[SGLANG_NAME], chain[VLLM_NAME], tree[SGLANG_NAME])),
    ]
    return "\n\n".join(parts)


def _block_serving(target: str, folder: Path, kind: DraftKind) -> str:
    commands = serving_commands(TreeShape(kind.block_size or 1), target, folder, kind)
    loads = "Both servers load this folder as it is"
    if VLLM_NAME not in commands:
        loads = "SGLang loads this folder as it is; vLLM does not, since it has the vanilla Markov head only"
    parts = [f"{loads}. A block of {kind.block_tokens} tokens is drafted in one forward; other sizes were not trained."]
    parts += [f"```bash\n{command}\n```" for command in commands.values()]
    return "\n\n".join(parts)


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {value.replace('|', '/')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
