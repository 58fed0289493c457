"""A grid of shapes, the shape that a cost model prefers, and the commands that serve it."""

import json
import shlex

import pytest
from rich.console import Console

from engine.config.strict import ConfigError
from engine.config.tree_shape import TreeShape
from engine.evaluation.acceptance import AcceptanceReport
from engine.evaluation.grid import (
    ALL,
    MOST_SHOWN,
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
from engine.serving.draft_kinds import DraftKind

CHAIN = TreeShape(3)
BLOCK = DraftKind("DFLASH", "dflash", block_size=16, unused_rows=1)
TREE = TreeShape(2, 4, 8, "sglang")


def report(length: float, num_prompts: int = 9) -> AcceptanceReport:
    return AcceptanceReport(length, [0.5, None], None, None, num_prompts, 90, None, 0.1, 40)


def cell(shape: TreeShape, length: float, costs: CostModel) -> GridCell:
    reports = {ALL: report(length), "chat": report(length + 0.5, 4), "code": report(length - 0.5, 5)}
    return GridCell(shape, reports, costs.speed_up(shape, length))


def test_shapes_are_all_that_the_sizes_allow():
    shapes = grid_shapes([3, 1], [2, 1], [8, 3, 99], "ancestors")
    assert shapes == [TreeShape(1), TreeShape(1, 2, 3), TreeShape(3), TreeShape(3, 2, 3), TreeShape(3, 2, 8)]
    with pytest.raises(ConfigError, match="num_draft_tokens"):
        grid_shapes([1], [2], [4, 5], "ancestors")


def test_the_best_shape_depends_on_what_steps_and_tokens_cost():
    free = CostModel(0.0)
    assert free.speed_up(CHAIN, 2.5) == 2.5
    costs = CostModel(draft_step=0.1, verify_token=0.02)
    assert costs.speed_up(CHAIN, 2.5) == pytest.approx(2.5 / (1 + 0.3 + 0.06))
    assert costs.speed_up(TREE, 2.6) == pytest.approx(2.6 / (1 + 0.2 + 0.14))
    for model, best in ((free, TREE), (costs, TREE), (CostModel(0.0, 0.05), CHAIN)):
        assert best_cell([cell(CHAIN, 2.5, model), cell(TREE, 2.6, model)]).shape == best


def test_tables_and_the_file_hold_every_number(capsys):
    costs = CostModel(0.25, 0.01)
    cells = [cell(CHAIN, 2.5, costs), cell(TREE, 2.75, costs)]
    console = Console(width=120)
    console.print(grid_table(cells, costs))
    console.print(group_table(cells[1]))
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 4 8 2.75 ±0.10 50 - 1.75x 3 1 4 2.50 ±0.10" in printed, "the best one comes first"
    assert "chat 4 3.25 ±0.10 code 5 2.25 ±0.10" in printed
    many = [cell(TreeShape(steps), 2.0, costs) for steps in range(1, MOST_SHOWN + 4)]
    assert grid_table(many, costs).row_count == MOST_SHOWN
    assert group_table(GridCell(CHAIN, {ALL: report(2.0)}, 1.0)) is None
    assert "in trees, tokens attend to rows, as in SGLang" in printed
    written = json.loads(json.dumps(grid_facts(cells, costs)))
    assert (written["draft_cost"], written["verify_cost"]) == (0.25, 0.01)
    sizes = [(one["num_steps"], one["topk"], one["num_draft_tokens"], one["tree_rule"]) for one in written["cells"]]
    assert sizes == [(3, 1, 4, "ancestors"), (2, 4, 8, "sglang")]
    assert written["cells"][1]["reports"]["code"]["acceptance_length"] == 2.25


def test_commands_name_the_shape_in_the_servers_own_words(tmp_path):
    tree = serving_commands(TREE, "org/target", tmp_path)
    assert set(tree) == {"SGLang"}, "vLLM drafts chains only"
    words = shlex.split(tree["SGLang"])
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options["--model-path"] == "org/target" and options["--speculative-draft-model-path"] == str(tmp_path)
    names = ("--speculative-num-steps", "--speculative-eagle-topk", "--speculative-num-draft-tokens")
    assert [options[name] for name in names] == ["2", "4", "8"]
    chain = serving_commands(CHAIN, "org/target", tmp_path)
    assert "--speculative-num-draft-tokens 4" in chain["SGLang"]
    config = json.loads(shlex.split(chain["vLLM"])[-1])
    assert config == {"method": "eagle3", "model": str(tmp_path), "num_speculative_tokens": 3}


def test_a_block_costs_one_forward_however_many_of_its_tokens_are_measured(capsys):
    costs = CostModel(draft_step=0.5, verify_token=0.01, drafts_blocks=True)
    assert costs.speed_up(CHAIN, 2.5) == pytest.approx(2.5 / (1 + 0.5 + 0.03))
    Console(width=120).print(grid_table([cell(CHAIN, 2.5, costs)], costs))
    printed = capsys.readouterr().out
    assert "drafted" in printed and "steps" not in printed and "draft blocks of 0.5" in printed


def test_servers_are_always_asked_for_whole_blocks(tmp_path):
    commands = serving_commands(CHAIN, "org/target", tmp_path, BLOCK)
    assert "--speculative-algorithm DFLASH" in commands["SGLang"]
    assert "num-steps" not in commands["SGLang"] and "topk" not in commands["SGLang"]
    config = json.loads(shlex.split(commands["vLLM"])[-1])
    assert config == {"method": "dflash", "model": str(tmp_path), "num_speculative_tokens": 15}
    assert "3 of the 15 tokens" in (part_of_block(3, BLOCK) or "")
    assert part_of_block(15, BLOCK) is None and part_of_block(3, DraftKind("EAGLE3", "eagle3")) is None
