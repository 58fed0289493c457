"""The model card of a draft: what it was trained for and on, how often it is right, and how to serve it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine
from engine.config.sections import DRAFT_METHODS
from engine.config.strict import dump_yaml
from engine.config.tree_shape import TreeShape
from engine.evaluation.grid import serving_commands
from engine.evaluation.page_parts import length_text
from engine.evaluation.run_record import RunRecord
from engine.host.files import write_text
from engine.models.draft_folder import CARD, read_draft_config

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
    facts = {"base_model": target, "tags": ["speculative-decoding", str(run.option("draft", "method")), "draftspeed"]}
    parts = [
        f"---\n{dump_yaml(facts)}---",
        f"# A draft for {target}",
        "This is a draft model for speculative decoding: it proposes tokens that the target then verifies, so the target's "
        f"output stays the same. It was trained with DraftSpeed {engine.__version__}.",
        _table(_facts(run, draft, target)),
        "## Acceptance",
        _acceptance(run),
        *(("## Serving", _serving(target)) if run.option("draft", "method") in DRAFT_METHODS else ()),
        "## Recipe",
        f"```yaml\n{run.config.rstrip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _facts(run: RunRecord, draft: Mapping[str, Any], target: str) -> dict[str, str]:
    revision = run.option("target", "revision")
    eagle = draft.get("eagle_config") or {}
    facts = {
        "target": target if revision is None else f"{target}, revision {revision}",
        "method": str(run.option("draft", "method")),
        "architecture": ", ".join(draft.get("architectures") or ()),
        "target layers read": ", ".join(map(str, eagle.get("eagle_aux_hidden_state_layer_ids") or ())),
        "draft vocabulary": f"{draft.get('draft_vocab_size')} of {draft.get('vocab_size')} tokens",
        "training data": _names(run.option("data", "train")),
        "held-out data": _names(run.option("data", "held_out")),
        "loss": str(run.option("loss", "kind")),
        "optimizer steps": str(run.metrics[-1]["step"]) if run.metrics else "",
    }
    return {name: value for name, value in facts.items() if value}


def _names(paths: Any) -> str:
    """Return the file names without their folders, which say nothing on another machine."""
    return ", ".join(Path(path).name for path in paths or ())


def _acceptance(run: RunRecord) -> str:
    report = run.report("after")
    if report is None:
        return "It was not measured: `launcher/measure_acceptance.py` measures it."
    shape = f"{run.option('evaluation', 'num_steps')} steps, topk {run.option('evaluation', 'topk')}"
    depths = [share for share in report.get("acceptance_per_depth") or () if share is not None]
    rows = {
        "acceptance length": f"{length_text(report)} tokens per target forward ({shape})",
        "accepted by depth, if all before were": " ".join(f"{share:.0%}" for share in depths),
        "measured on": f"{report['num_prompts']} held-out prompts, {report['num_tokens']} tokens, greedy decoding",
    }
    baseline = run.report("prompt_lookup")
    if baseline is not None:
        rows["prompt lookup, without a draft"] = length_text(baseline)
    return _table(rows)


def _serving(target: str) -> str:
    folder = Path("THIS_FOLDER")
    chain = serving_commands(TreeShape(3), target, folder)
    tree = serving_commands(SGLANG_TREE, target, folder)
    parts = [
        "Both servers load this folder as it is. The first two commands draft chains of three tokens, the last one a tree.",
        *(f"```bash\n{command}\n```" for command in (chain["SGLang"], chain["vLLM"], tree["SGLang"])),
    ]
    return "\n\n".join(parts)


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {value.replace('|', '/')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
