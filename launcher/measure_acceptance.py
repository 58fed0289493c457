"""Measure an exported draft by real speculative decoding on held-out prompts, beside prompt lookup and plain greedy decoding.

    python launcher/measure_acceptance.py --draft outputs/run/draft

Target, prompts and settings are those of the run's `config.yaml` beside the draft's folder, unless given here.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config import EMBEDDED, Config, EvaluationSection, TargetSection, load_config  # noqa: E402  (after sys.path)
from engine.data.cpython_corpus import write_corpus  # noqa: E402
from engine.decode import ChainDrafter, Drafter, Generation, PromptLookupDrafter, greedy_decode  # noqa: E402
from engine.evaluate import AcceptanceReport, Prompt, eos_ids, held_out_prompts, measure_acceptance  # noqa: E402
from engine.export import CONFIG, load_draft  # noqa: E402
from engine.models.draft_config import DraftConfig  # noqa: E402
from engine.models.registry import check_aux_layers, text_config  # noqa: E402
from engine.target.frozen import FrozenTarget  # noqa: E402

EMBEDDED_TARGET = Path(__file__).resolve().parent / "embedded" / "target"


@dataclass(frozen=True)
class Measurement:
    """What is measured: a target, its prompts, and how far each drafter may reach."""

    target: FrozenTarget
    prompts: list[Prompt]
    eos_ids: frozenset[int]
    evaluation: EvaluationSection
    console: Console

    def plain(self) -> list[Generation]:
        prompts = track(self.prompts, "plain greedy", console=self.console, transient=True)
        return [
            greedy_decode(self.target, prompt.token_ids, self.evaluation.max_new_tokens, self.eos_ids) for prompt in prompts
        ]

    def drafted(
        self, make_drafter: Callable[[], Drafter], plain: list[Generation], on_progress: Callable[[Prompt, Generation], None]
    ) -> AcceptanceReport:
        counts = measure_acceptance(
            self.target,
            make_drafter,
            self.prompts,
            draft_tokens=self.evaluation.draft_tokens,
            max_new_tokens=self.evaluation.max_new_tokens,
            eos_ids=self.eos_ids,
            plain=plain,
            on_progress=on_progress,
        )
        return counts.report()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", type=Path, required=True, help="folder of the exported draft")
    parser.add_argument("--target", help="Hugging Face folder or hub id of the target; default: the run's")
    parser.add_argument("--data", nargs="+", help="JSONL conversation files the prompts come from; default: the run's held-out")
    parser.add_argument("--num-prompts", type=_positive, help="prompts decoded; default: the run's")
    parser.add_argument("--draft-tokens", type=_positive, help="tokens proposed per target forward; default: the run's")
    parser.add_argument("--max-new-tokens", type=_positive, help="tokens generated per prompt; default: the run's")
    parser.add_argument(
        "--dtype", choices=get_args(get_type_hints(TargetSection)["dtype"]), help="precision; default: the run's"
    )
    parser.add_argument("--json", type=Path, help="file to write the reports to")
    parser.add_argument("--show", action="store_true", help="print every reply; the tokens that the draft guessed are green")
    return parser.parse_args()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: expected at least 1")
    return value


def run_config(arguments: argparse.Namespace) -> Config:
    """The run's configuration with the command line over it. Raises ValueError if neither names the target or the prompts."""
    path = arguments.draft.resolve().parent / "config.yaml"
    if path.is_file():
        run = load_config(path)
    elif arguments.target and arguments.data:
        run = Config()
    else:
        missing = "--data" if arguments.target else "--target"
        raise ValueError(f"{path} does not exist, so the draft's run is unknown; name its target and prompts: give {missing}")
    target, data = run.target, run.data
    if arguments.target:
        target = replace(target, path=arguments.target, revision=None)
    if arguments.dtype:
        target = replace(target, dtype=arguments.dtype)
    if target.path == EMBEDDED:
        target = replace(target, path=str(EMBEDDED_TARGET))
    if arguments.data:
        data = replace(data, held_out=tuple(arguments.data))
    default = EvaluationSection()
    evaluation = EvaluationSection(
        num_prompts=arguments.num_prompts or run.evaluation.num_prompts or default.num_prompts,
        max_new_tokens=arguments.max_new_tokens or run.evaluation.max_new_tokens,
        draft_tokens=arguments.draft_tokens or run.evaluation.draft_tokens,
    )
    return replace(run, target=target, data=data, evaluation=evaluation)


def read_draft_config(folder: Path, target: TargetSection) -> DraftConfig:
    """The draft's shapes. Raises ValueError if `folder` holds no draft, or one that was not trained for this target."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not an exported draft: it has no {CONFIG}; a run writes one to its output_dir/draft")
    draft = DraftConfig.from_dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    hub = {"revision": target.revision, "trust_remote_code": target.trust_remote_code}
    config = text_config(AutoConfig.from_pretrained(target.path, **hub))
    for name, ours, theirs in (
        ("vocabulary", draft.vocab_size, config.vocab_size),
        ("hidden size", draft.target_hidden_size, config.hidden_size),
    ):
        if ours != theirs:
            raise ValueError(
                f"{folder} was trained for a target with {name} {ours}, {target.path} has {theirs}; "
                "give --target the one it was trained for"
            )
    try:
        check_aux_layers(draft.aux_layers, config.num_hidden_layers)
    except ValueError as error:
        raise ValueError(f"{folder} reads layers that {target.path} cannot give: {error}") from error
    return draft


def read_prompts(run: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    with tempfile.TemporaryDirectory() as folder:
        embedded = write_corpus(Path(folder))[1] if EMBEDDED in run.data.held_out else None
        paths = [embedded if path == EMBEDDED else path for path in run.data.held_out]
        return held_out_prompts(paths, tokenizer, run.evaluation.num_prompts, run.data.template_kwargs)


def reply_text(generation: Generation, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The reply; accepted drafted tokens are green, the target's own are not."""
    text, start = Text(tokenizer.decode(generation.token_ids[:1])), 1
    for num_accepted in generation.accepted_per_forward:
        end = start + num_accepted
        text.append(tokenizer.decode(generation.token_ids[start:end]), style="green")
        text.append(tokenizer.decode(generation.token_ids[end : end + 1]))
        start = end + 1
    return text


def table(reports: dict[str, AcceptanceReport], evaluation: EvaluationSection) -> Table:
    some = next(iter(reports.values()))
    plain_tokens_per_s = some.plain_tokens_per_s
    title = f"{some.num_prompts} prompts, up to {evaluation.max_new_tokens} tokens each, {evaluation.draft_tokens} drafted"
    result = Table(
        "drafter", "acceptance length", "accepted at depth 1, 2, ...", "tokens/s", "speed", "differs from greedy", title=title
    )
    result.add_row("none (plain greedy)", "1.00", "", _rate(plain_tokens_per_s), "1.00x" if plain_tokens_per_s else "-", "")
    for name, report in reports.items():
        depths = " ".join("-" if share is None else f"{share:.2f}" for share in report.acceptance_per_depth)
        speed = f"{report.tokens_per_s / plain_tokens_per_s:.2f}x" if plain_tokens_per_s else "-"
        length = f"{report.acceptance_length:.2f}"
        result.add_row(name, length, depths, _rate(report.tokens_per_s), speed, f"{report.mismatches} of {report.num_prompts}")
    return result


def _rate(tokens_per_s: float | None) -> str:
    return f"{tokens_per_s:.1f}" if tokens_per_s else "-"


def measure(arguments: argparse.Namespace, console: Console) -> None:
    run = run_config(arguments)
    draft_config = read_draft_config(arguments.draft, run.target)
    hub = {"revision": run.target.revision, "trust_remote_code": run.target.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(run.target.path, **hub)
    prompts = read_prompts(run, tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = FrozenTarget.load(run.target, device, aux_layers=draft_config.aux_layers)
    dtype = getattr(torch, run.target.dtype)
    draft = load_draft(arguments.draft, embed_weight_VD=target.embed_weight_VD, dtype=dtype, device=device)
    measurement = Measurement(target, prompts, eos_ids(target.model, tokenizer), run.evaluation, console)

    def show(prompt: Prompt, generation: Generation) -> None:
        if arguments.show:
            per_forward = (len(generation.token_ids) - 1) / max(1, generation.num_target_forwards)
            console.rule(f"{prompt.source}: {per_forward:.2f} tokens per forward")
            console.print(Text(tokenizer.decode(prompt.token_ids), style="dim"), reply_text(generation, tokenizer))

    plain = measurement.plain()
    reports = {
        "draft": measurement.drafted(lambda: ChainDrafter(draft), plain, show),
        "prompt lookup": measurement.drafted(PromptLookupDrafter, plain, lambda prompt, generation: None),
    }
    console.print(table(reports, run.evaluation))
    if any(report.mismatches for report in reports.values()):
        console.print(
            f"Replies may differ from greedy decoding where two tokens tie in {run.target.dtype}; --dtype float32 tells."
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({name: report.to_dict() for name, report in reports.items()}, indent=2) + "\n")


def main() -> int:
    console = Console()
    try:
        measure(parse_arguments(), console)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
