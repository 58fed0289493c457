"""Measure an exported draft on held-out prompts: speculative decoding compared with prompt lookup and greedy decoding.

    python launcher/measure_acceptance.py --draft outputs/run/draft

Target, prompts and settings are those of the run's `config.yaml` next to the draft's folder, unless
given here. Plugins are run only if they are given here. Under `deepspeed` or `torchrun` the prompts
are divided among the ranks, which share the target as in the run.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import torch
import transformers
from rich.text import Text
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine
from engine.config.recipe import load_config
from engine.config.sections import RECIPE, Config, EvaluationSection, TargetSection
from engine.config.tree_shape import TreeRule, TreeShape
from engine.conversations.prompt_sets import PROMPT_FILES, prompt_files
from engine.data.segments import decoded
from engine.data.templates import load_tokenizer
from engine.evaluation.acceptance import ALL, AcceptanceReport, Prompt, check_prompts, held_out_prompts
from engine.evaluation.decoding import Generation
from engine.evaluation.evaluator import AcceptanceEvaluator
from engine.evaluation.grid import (
    GRID,
    CostModel,
    GridCell,
    best_cell,
    grid_facts,
    grid_shapes,
    grid_table,
    group_table,
    part_of_block,
    serving_commands,
)
from engine.evaluation.model_card import has_own_card, update_acceptance
from engine.evaluation.report import PAGE, acceptance_table
from engine.evaluation.run_page import write_run_page
from engine.evaluation.sampling import Sampling
from engine.hidden_states.sources import OnlineSource
from engine.hidden_states.store_format import Manifest
from engine.host.files import write_json
from engine.host.telemetry import Telemetry, visible
from engine.kernels import choose_kernels
from engine.kernels.self_check import SelfCheck
from engine.models.draft_folder import CARD, CONFIG, read_draft_config
from engine.models.draft_method import DraftConfig, DraftMethod, ServedDraft
from engine.models.target_families import check_aux_layers, num_layers, text_config
from engine.parallel.mesh import ALONE, World
from engine.planning.target_cost import TargetCost
from engine.serving.draft_kinds import SGLANG_NAME, DraftKind, draft_kind
from engine.serving.served_folder import ADVICE, serving_problems
from engine.target.configuration import load_target_config
from engine.target.identity import what_changed
from engine.target.structure import without_weights
from launcher.command import (
    TRUST,
    add_sampling_options,
    end_process,
    hint_of_plugins,
    join_environment,
    method_of_run,
    non_negative_number,
    positive_number,
    run_plugins,
    sampling_of,
    stopping_at_errors,
    user_cache,
)

if TYPE_CHECKING:
    from launcher.job_ranks import JoinedJob


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--draft", type=Path, required=True, help="folder of the exported draft")
    parser.add_argument("--target", help="Hugging Face folder or hub id of the target; default: the run's")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help=f"{PROMPT_FILES}; default: the run's held-out files",
    )
    parser.add_argument(
        "--num_prompts",
        type=positive_number,
        help="prompts decoded, of each file of --data, or of the run's held-out files together; default: the run's",
    )
    parser.add_argument(
        "--num_steps",
        type=positive_number,
        nargs="+",
        help="depth of the drafted tokens; several values measure a grid; default: the run's",
    )
    parser.add_argument(
        "--topk",
        type=positive_number,
        nargs="+",
        help="tokens drafted after each node, 1 = a chain; several values measure a grid; default: the run's",
    )
    parser.add_argument(
        "--num_draft_tokens",
        type=positive_number,
        nargs="+",
        help="tokens of a tree that a target forward reads; several values measure a grid; default: the run's",
    )
    parser.add_argument(
        "--tree_rule",
        choices=get_args(TreeRule),
        help="keys that a node of a tree attends to in the draft: its ancestors', or as in SGLang; default: the run's",
    )
    add_sampling_options(parser)
    parser.add_argument(
        "--greedy_drafts",
        action="store_true",
        help="draft the most likely tokens for sampled replies too, as vLLM does by default; otherwise DSpark and DFlash2 "
        "draw them, as in SGLang",
    )
    parser.add_argument("--max_new_tokens", type=positive_number, help="tokens generated per prompt; default: the run's")
    parser.add_argument(
        "--dtype", choices=get_args(get_type_hints(TargetSection)["dtype"]), help="precision of the target; default: the run's"
    )
    parser.add_argument(
        "--tp_size", type=positive_number, help="ranks that share each layer; default: the run's, or 1 on one rank"
    )
    parser.add_argument(
        "--ep_size", type=positive_number, help="ranks that share experts; default: the run's, or 1 on one rank"
    )
    parser.add_argument(
        "--plugins",
        nargs="+",
        default=(),
        metavar="FILE",
        help="Python files that register its draft method or its target's family",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help=TRUST)
    parser.add_argument(
        "--draft_cost",
        type=non_negative_number,
        help="time of a draft step divided by that of a target forward, for the predicted speeds of a grid; default: the ratio "
        "of the weights that they read",
    )
    parser.add_argument(
        "--verify_cost",
        type=non_negative_number,
        default=0.0,
        help="time of each further token that a target forward reads, divided by that of the forward; default: 0, as at small "
        "batches",
    )
    parser.add_argument("--json", type=Path, help="file to write the reports to")
    parser.add_argument(
        "--update_card",
        action="store_true",
        help="write the acceptance of the best shape into the draft's model card, README.md",
    )
    parser.add_argument("--show", action="store_true", help="print rank 0's replies, with accepted draft tokens in green")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    return parser.parse_args()


def run_config(arguments: argparse.Namespace, num_ranks: int) -> tuple[Config, list[TreeShape]]:
    """Return the run's configuration with the command line's options applied, and the shapes that are measured.

    Raises ValueError if neither gives the target or the prompts.
    """
    path = arguments.draft.resolve().parent / RECIPE
    if path.is_file():
        run = load_config(path)
    elif arguments.target and arguments.data:
        run = Config()
    else:
        missing = "--data" if arguments.target else "--target"
        raise ValueError(f"{path} does not exist, so the draft's run is unknown; name its target and prompts: give {missing}")
    target = run.target
    data = run.data
    if target.store is not None and not arguments.target:
        captured = Manifest.read(Path(target.store)).contents  # decoding needs the target itself
        target = replace(target, path=captured.target, revision=captured.revision)
    if arguments.target:
        target = replace(target, path=arguments.target, revision=None, fp8_activations=False)
    target = replace(target, trust_remote_code=arguments.trust_remote_code)
    if arguments.dtype:
        target = replace(target, dtype=arguments.dtype)
    if arguments.data:
        files = prompt_files(arguments.data, Path(data.cache_dir or user_cache()) / "prompt_sets")
        data = replace(data, held_out=tuple(map(str, files)))
    default = EvaluationSection()
    shapes = shapes_of(arguments, run.evaluation)
    largest = max(shapes, key=lambda shape: shape.num_steps)
    evaluation = EvaluationSection(
        num_prompts=arguments.num_prompts or run.evaluation.num_prompts or default.num_prompts,
        max_new_tokens=arguments.max_new_tokens or run.evaluation.max_new_tokens,
        num_steps=largest.num_steps,
        topk=largest.topk,
        num_draft_tokens=largest.num_draft_tokens,
        tree_rule=largest.rule,
    )
    shared = run.parallel if num_ranks > 1 else replace(run.parallel, tp_size=1, ep_size=1)
    parallel = replace(shared, tp_size=arguments.tp_size or shared.tp_size, ep_size=arguments.ep_size or shared.ep_size)
    data = replace(data, cache_dir=data.cache_dir or str(user_cache()))
    loss = replace(run.loss, temperature=1.0)  # replies are the target's own, whatever the draft learned from
    return replace(run, target=target, data=data, evaluation=evaluation, parallel=parallel, loss=loss), shapes


def shapes_of(arguments: argparse.Namespace, section: EvaluationSection) -> list[TreeShape]:
    """Return the shapes that are measured. Raises ConfigError if the sizes contradict each other."""
    num_steps = arguments.num_steps or [section.num_steps]
    topk = arguments.topk or [section.topk]
    num_draft_tokens = arguments.num_draft_tokens
    if num_draft_tokens is None and section.num_draft_tokens is not None and max(topk) > 1:  # the run's are of trees
        num_draft_tokens = [section.num_draft_tokens]
    rule = arguments.tree_rule or section.tree_rule
    if max(len(num_steps), len(topk), len(num_draft_tokens or ())) > 1:
        if arguments.show or arguments.temperature:
            raise ValueError("a grid replays greedy replies; delete --show and --temperature, or give one value per size")
        return grid_shapes(num_steps, topk, num_draft_tokens, rule)
    return [TreeShape(num_steps[0], topk[0], num_draft_tokens[0] if num_draft_tokens else None, rule)]


def check_card(arguments: argparse.Namespace, sampling: Sampling) -> None:
    """Raise ValueError if the model card of the draft cannot hold what is measured."""
    if not sampling.is_greedy or arguments.target:
        raise ValueError("--update_card is about greedy replies of the run's target; delete it, or --temperature and --target")
    if not has_own_card(arguments.draft):
        card = arguments.draft / CARD
        raise ValueError(f"--update_card: {card} is not a model card of DraftSpeed; launcher/export_draft.py writes one")


def sampling_with_drafts(arguments: argparse.Namespace) -> Sampling:
    """Return how target and draft choose tokens. Raises ValueError for settings that contradict each other."""
    sampling = sampling_of(arguments)
    if arguments.greedy_drafts and sampling.is_greedy:
        raise ValueError("--greedy_drafts concerns sampled replies; add --temperature, such as --temperature 0.7")
    return replace(sampling, greedy_drafts=arguments.greedy_drafts)


def check_target(method: DraftMethod, draft: DraftConfig, section: TargetSection, config: PreTrainedConfig) -> tuple[int, ...]:
    """Return the layers of the target that the draft reads.

    config: the target's. Raises ValueError if the draft was not trained for this target.
    """
    path = section.path
    target = text_config(config)
    facts = {
        "a vocabulary of": (draft.vocab_size, target.vocab_size),
        "hidden size": (draft.target_hidden_size, target.hidden_size),
    }
    for name, (expected, found) in facts.items():
        if expected != found:
            raise ValueError(
                f"the draft was trained for a target with {name} {expected}, but {path} has {found}; pass its own target"
            )
    if draft.aux_layers is None:
        return method.choose_aux_layers(target, section.aux_layers)
    try:
        check_aux_layers(draft.aux_layers, num_layers(target))
    except ValueError as error:
        raise ValueError(f"the draft reads layers that {path} does not have; pass its own target ({error})") from error
    return draft.aux_layers


def shown(token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of tokens, without characters that a terminal would obey."""
    return visible(decoded(token_ids, tokenizer))


def reply_text(generation: Generation, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Return the reply as rich text, with accepted draft tokens in green."""
    text = Text(shown(generation.token_ids[:1], tokenizer))
    start = 1
    for num_accepted in generation.accepted_per_forward:
        end = start + num_accepted
        text.append(shown(generation.token_ids[start:end], tokenizer), style="green")
        text.append(shown(generation.token_ids[end : end + 1], tokenizer))
        start = end + 1
    return text


@dataclass(frozen=True)
class Measurement:
    """What is measured: a draft of a method, under a configuration, for one shape or several.

    aux_layers: target layers that the draft reads.
    kind: how servers run the draft; None = no server knows its architecture.
    problems: why servers would run the folder otherwise, by name of the server.
    """

    method: DraftMethod
    draft_config: DraftConfig
    aux_layers: tuple[int, ...]
    run: Config
    shapes: list[TreeShape]
    sampling: Sampling
    kind: DraftKind | None
    problems: Mapping[str, str]

    @property
    def is_grid(self) -> bool:
        return len(self.shapes) > 1

    @classmethod
    def of(cls, arguments: argparse.Namespace, num_ranks: int) -> "Measurement":
        """Read the draft's config and the run's. Raises ValueError if they, or the options, do not fit together."""
        exported = read_draft_config(arguments.draft)
        sampling = sampling_with_drafts(arguments)
        run, shapes = run_config(arguments, num_ranks)
        run_plugins(arguments.plugins, "--plugins")
        method = method_of_run(run, arguments.plugins)
        draft_config = method.read_config(exported, arguments.draft / CONFIG)
        for shape in shapes:
            method.check_shape(shape, draft_config)
        target_config = load_target_config(run.target)
        aux_layers = check_target(method, draft_config, run.target, target_config)
        kind = draft_kind(exported)
        problems = {} if kind is None else serving_problems(arguments.draft, kind, target_config)
        if arguments.update_card:
            check_card(arguments, sampling)
        return cls(method, draft_config, aux_layers, run, shapes, sampling, kind, problems)


def measure(arguments: argparse.Namespace, measurement: Measurement, world: World) -> None:
    """Load the draft and the target, decode the prompts, and print and write the results on rank 0."""
    method = measurement.method
    draft_config = measurement.draft_config
    run = measurement.run
    sampling = measurement.sampling
    kind = measurement.kind
    telemetry = Telemetry(speaks=world.is_main)
    tokenizer = load_tokenizer(run.target, run.data)
    source = OnlineSource(run, tokenizer, world, telemetry)
    if run.target.plugins and not arguments.plugins:
        telemetry.note(hint_of_plugins(run))
    change = what_changed((draft_config.trained_with or {}).get("target_identity"), source.target_identity)
    if change is not None:
        telemetry.note(f"The draft was trained for another target: {change}.", style="bold")
    draft_cost = arguments.draft_cost
    if draft_cost is None and measurement.is_grid:
        draft_cost = method.count_read_weights(draft_config) / active_weights(run.target, world.device)
    costs = CostModel(draft_cost or 0.0, arguments.verify_cost, kind is not None and kind.block_tokens is not None)
    prompts = prompts_of(run, tokenizer, per_file=arguments.data is not None)
    check_prompts(prompts, draft_config.vocab_size)
    target = source.load_target(measurement.aux_layers)
    dtype = target.dtype
    kernels = choose_kernels(run.kernels, world.device, dtype, draft_config.head_dim)
    self_check = SelfCheck.of(world, run.data.cache_dir, telemetry.warn)
    kernels = self_check.sound(kernels, dtype, draft_config.head_dim)
    draft = method.load(arguments.draft, target, dtype, world.device, kernels)

    def show(prompt: Prompt, generation: Generation) -> None:
        per_forward = (len(generation.token_ids) - 1) / max(1, generation.num_target_forwards)
        telemetry.console.rule(f"{prompt.source}: {per_forward:.2f} tokens per forward")
        asked = Text(shown(prompt.token_ids, tokenizer), style="dim")
        telemetry.console.print(asked, reply_text(generation, tokenizer), sep="\n")

    evaluator = AcceptanceEvaluator(run.evaluation, target, tokenizer, prompts, world, telemetry, run.data.max_tokens, sampling)
    baseline = None
    if measurement.is_grid:
        measured = evaluator.measure_shapes(draft, measurement.shapes)
    else:
        measured = {measurement.shapes[0]: evaluator.measure_groups(draft, show if arguments.show else None)}
        baseline = evaluator.measure_prompt_lookup()
    cells = []
    for shape, reports in measured.items():
        cells.append(GridCell(shape, reports, costs.speed_up(shape, reports[ALL].acceptance_length)))
    results = Results(cells, costs, baseline, by_rows_of_sglang(evaluator, draft, best_cell(cells).shape, measurement))
    if world.is_main:
        write_results(results, measurement, arguments, str(dtype))
        show_results(results, measurement, arguments, telemetry, str(dtype))


def prompts_of(run: Config, tokenizer: PreTrainedTokenizerBase, per_file: bool) -> list[Prompt]:
    """Return the prompts. per_file: whether `evaluation.num_prompts` counts those of each file."""
    files = run.data.held_out
    groups = [(path,) for path in files] if per_file else [files]
    prompts = []
    for paths in groups:
        prompts += held_out_prompts(paths, tokenizer, run.evaluation.num_prompts, run.data.template_kwargs)
    return prompts


def active_weights(section: TargetSection, device: torch.device) -> float:
    """Return the number of the target's weights that a forward over one token reads, from its config."""
    model = without_weights(load_target_config(section), section, device)
    return TargetCost(model, ALONE).num_active_weights + model.get_output_embeddings().weight.numel()


def by_rows_of_sglang(
    evaluator: AcceptanceEvaluator, draft: ServedDraft, shape: TreeShape, measurement: Measurement
) -> AcceptanceReport | None:
    """Return the acceptance of greedy replies with a tree by SGLang's rule of attention; a collective.

    None for chains and trees that were measured so, for sampled replies, and for drafts that SGLang does not know.
    """
    is_served = measurement.kind is not None and measurement.kind.block_tokens is None
    if shape.is_chain or shape.rule == "sglang" or not is_served or not measurement.sampling.is_greedy:
        return None
    as_served = replace(shape, rule="sglang")
    return evaluator.measure_shapes(draft, [as_served])[as_served][ALL]


@dataclass(frozen=True)
class Results:
    """What was measured.

    cells: one per shape. baseline: prompt lookup, measured if there is one shape.
    by_rows: the best shape by SGLang's rule of attention; None as in `by_rows_of_sglang`.
    """

    cells: Sequence[GridCell]
    costs: CostModel
    baseline: AcceptanceReport | None
    by_rows: AcceptanceReport | None

    @property
    def best(self) -> GridCell:
        return best_cell(self.cells)


def show_results(
    results: Results, measurement: Measurement, arguments: argparse.Namespace, telemetry: Telemetry, dtype: str
) -> None:
    """Print tables, the commands that serve the best shape, and what was written."""
    draft = arguments.draft
    best = results.best
    if results.baseline is None:
        telemetry.console.print(grid_table(results.cells, results.costs))
    else:
        reports = {"draft": best.report, "prompt lookup": results.baseline}
        replies = "Greedy decoding" if measurement.sampling.is_greedy else "Sampled replies"
        telemetry.console.print(acceptance_table(reports, replies))
        if any(report.mismatches for report in reports.values()):
            telemetry.note(f"Replies may differ where two tokens nearly tie in {dtype}; use --dtype float32 to find out.")
    by_group = group_table(best)
    if by_group is not None:
        telemetry.console.print(by_group)
    if results.by_rows is not None:
        telemetry.note(
            f"SGLang lets the tokens of a tree attend to rows instead of their ancestors. {str(best.shape).capitalize()} then "
            f"accepts {results.by_rows.length_text} instead of {best.report.length_text}; --tree_rule sglang measures all so."
        )
    if measurement.kind is not None:
        show_commands(results, measurement, draft, measurement.kind, telemetry)
    run_folder = run_of(draft)
    if measurement.is_grid and arguments.json is None and run_folder is not None:
        telemetry.console.print(f"\nReport with these shapes: {run_folder / PAGE}")
    if arguments.update_card:
        telemetry.console.print(f"Model card with this acceptance: {draft / CARD}")


def show_commands(results: Results, measurement: Measurement, draft: Path, kind: DraftKind, telemetry: Telemetry) -> None:
    """Print the commands that serve the best shape, or why a server would run this folder otherwise."""
    for server, command in best_commands(results.cells, measurement.run.target.path, draft, kind).items():
        problem = measurement.problems.get(server)
        if problem is not None:
            telemetry.note(f"{server} would serve this folder otherwise: {problem}; {ADVICE}.", style="bold")
        else:
            telemetry.console.print(f"\n{server}:\n  {command}", markup=False, soft_wrap=True)
    partly = part_of_block(results.best.shape.num_steps, kind)
    if partly is not None:
        telemetry.note(f"\n{partly}")


def run_of(draft: Path) -> Path | None:
    """Return the folder of the run that a draft is in, or None."""
    folder = draft.resolve().parent
    return folder if (folder / RECIPE).is_file() else None


def best_commands(cells: Sequence[GridCell], target: str, draft: Path, kind: DraftKind) -> dict[str, str]:
    """Return the commands that serve the best shape, by server; for vLLM the best chain."""
    commands = serving_commands(best_cell(cells).shape, target, draft, kind)
    chains = [cell for cell in cells if cell.shape.is_chain]
    if not chains:
        return commands
    for_chains = serving_commands(best_cell(chains).shape, target, draft, kind)
    return for_chains | {SGLANG_NAME: commands[SGLANG_NAME]}


def write_results(results: Results, measurement: Measurement, arguments: argparse.Namespace, dtype: str) -> None:
    """Write the results to `--json`, and into the model card if asked for.

    A grid without `--json` goes into the folder of the draft's run, whose report then shows it.
    """
    facts = {"about": about(measurement, arguments, dtype)}
    if results.by_rows is not None:
        facts["by_rows_of_sglang"] = results.by_rows.to_dict()
    if measurement.is_grid:
        facts |= grid_facts(results.cells, results.costs)
    else:
        (cell,) = results.cells
        facts["shape"] = {**cell.shape.sizes, "tree_rule": cell.shape.rule}
        facts["groups"] = {name: report.to_dict() for name, report in cell.reports.items() if name != ALL}
        facts["draft"] = cell.report.to_dict()
        if results.baseline is not None:
            facts["prompt lookup"] = results.baseline.to_dict()
    run_folder = run_of(arguments.draft)
    if arguments.json is not None:
        write_json(arguments.json, facts)
    elif measurement.is_grid and run_folder is not None:
        write_json(run_folder / GRID, facts)
        write_run_page([run_folder], run_folder / PAGE)
    if arguments.update_card:
        data = measurement.run.data.held_out
        update_acceptance(arguments.draft, results.best, results.baseline, data, measurement.kind)


def about(measurement: Measurement, arguments: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Return what was measured and with what, for JSON."""
    run = measurement.run
    return {
        "draft": str(arguments.draft),
        "target": run.target.path,
        "revision": run.target.revision,
        "dtype": dtype.removeprefix("torch."),
        "data": list(run.data.held_out),
        "max_new_tokens": run.evaluation.max_new_tokens,
        "sampling": asdict(measurement.sampling),
        "versions": {
            "draftspeed": engine.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def main() -> None:
    arguments = parse_arguments()
    environment = join_environment() if "RANK" in os.environ else None
    world = World.alone() if environment is None else World(**environment)
    with stopping_at_errors(world.rank):
        measurement = Measurement.of(arguments, world.size)
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
        if not world.is_main:
            disable_progress_bar()
    job: JoinedJob | None = None
    if environment is not None and world.size > 1:
        from launcher.job_ranks import join_job

        with stopping_at_errors(world.rank):
            job = join_job(environment, measurement.run.parallel, arguments.draft)
    with stopping_at_errors(world.rank) if job is None else job.ending_together():
        measure(arguments, measurement, world)
    if job is not None:
        job.leave()


if __name__ == "__main__":
    main()
    end_process()
