"""One report over all ranks, however the target decodes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from engine.config.sections import EvaluationSection
from engine.config.tree_shape import TreeShape
from engine.evaluation import evaluator
from engine.evaluation.acceptance import AcceptanceReport, Prompt
from engine.evaluation.decoding import plain_decode
from engine.evaluation.evaluator import BATCH_SIZE, AcceptanceEvaluator
from engine.evaluation.sampling import Sampling
from engine.host.telemetry import Telemetry
from engine.parallel.mesh import TargetMesh, World
from tests.distributed import run_ranks
from tests.drafters import prompts, random_draft, tiny_target

SECTION = EvaluationSection(num_prompts=5, max_new_tokens=12, num_steps=3)
TOKENIZER = SimpleNamespace(eos_token_id=7, decode=lambda ids, **options: "".join(f" {token_id}" for token_id in ids))
PROMPTS = [Prompt(f"file:{number}", prompt_ids) for number, prompt_ids in enumerate(prompts(5))]


def measure(world: World, family: str, tp_size: int, count: int = 5, replies=None) -> list[AcceptanceReport]:
    target = tiny_target(family, TargetMesh.make(world, tp_size, 1))
    held_out = AcceptanceEvaluator(SECTION, target, TOKENIZER, PROMPTS[:count], world, Telemetry(speaks=False), max_tokens=50)
    on_reply = None if replies is None else lambda prompt, reply: replies.append((prompt, reply.token_ids))
    return [held_out.measure_draft(random_draft(tiny_target(family)), on_reply), held_out.measure_prompt_lookup()]


@pytest.mark.parametrize("count", [5, 1, 0])
def test_ranks_that_share_the_target_report_what_one_reports_alone(count):
    alone = measure(World.alone(), "llama", 1, count)
    untimed = {"tokens_per_s": None, "plain_tokens_per_s": None, "mismatches": None}
    for reports in run_ranks(measure, 2, "llama", 2, count):
        assert reports == [replace(report, **untimed) for report in alone]
    assert all(report.num_prompts == count and report.mismatches == (0 if count else None) for report in alone)


def test_plain_and_drafted_decoding_take_turns(monkeypatch):
    """So that a machine whose speed changes does not change their ratio."""
    turns = []

    def recorded(name: str):
        decode = getattr(evaluator, name)
        return lambda *arguments, **options: turns.append(name) or decode(*arguments, **options)

    for name in ("plain_decode", "speculative_decode"):
        monkeypatch.setattr(evaluator, name, recorded(name))
    target = tiny_target("llama")
    held_out = AcceptanceEvaluator(SECTION, target, TOKENIZER, PROMPTS, World.alone(), Telemetry(speaks=False), 50)
    for _ in range(2):
        turns.clear()
        assert held_out.measure_prompt_lookup().mismatches == 0
        assert turns[-2 * len(PROMPTS) :] == ["plain_decode", "speculative_decode"] * len(PROMPTS)


def test_samples_are_the_replies_whose_acceptance_was_measured(monkeypatch):
    shown = []
    for batch_size in (1, 5):
        monkeypatch.setitem(BATCH_SIZE, "cpu", batch_size)
        target = tiny_target("llama")
        held_out = AcceptanceEvaluator(SECTION, target, TOKENIZER, PROMPTS, World.alone(), Telemetry(speaks=False), 50)
        assert held_out.samples == []
        replies = []
        held_out.measure_draft(random_draft(target), lambda prompt, reply, replies=replies: replies.append(reply))
        samples = held_out.samples
        held_out.measure_prompt_lookup()
        assert held_out.samples == samples, "they are those of the draft"
        for sample, prompt, reply in zip(samples, PROMPTS[:4], replies[:4], strict=True):
            assert sample.source == prompt.source and sample.tokens == [f" {token_id}" for token_id in reply.token_ids]
            assert sum(depth > 0 for depth in sample.depths) == sum(reply.accepted_per_forward)
        shown.append(samples)
    assert shown[0] == shown[1] and len(shown[0]) == 4


def test_drafts_learn_how_replies_are_sampled(monkeypatch):
    target = tiny_target("llama")
    draft = random_draft(target)
    told = []
    monkeypatch.setattr(type(draft), "sampling_drafter", lambda self, shape, how: told.append(how) or self.drafter(shape))
    for sampling in (Sampling(0.8, top_p=0.9, seed=3), Sampling(0.8, greedy_drafts=True), Sampling()):
        common = SECTION, target, TOKENIZER, PROMPTS[:2], World.alone(), Telemetry(speaks=False), 50
        AcceptanceEvaluator(*common, sampling).measure_draft(draft)
    assert told == [Sampling(0.8, seed=seed).of_drafts for seed in (3, 4)]


@pytest.mark.parametrize("batch_size", [2, 5])
def test_prompts_decoded_together_give_the_report_of_one_by_one(batch_size, monkeypatch):
    alone = measure(World.alone(), "llama", 1)
    monkeypatch.setitem(BATCH_SIZE, "cpu", batch_size)
    together = measure(World.alone(), "llama", 1)
    untimed = {"tokens_per_s": None, "plain_tokens_per_s": None, "mismatches": None}
    assert together == [replace(report, **untimed) for report in alone]


SHAPES = (TreeShape(3), TreeShape(1, 2, 3), TreeShape(3, 2, 5), TreeShape(2, 2, 7, "sglang"))


def measure_shapes(world: World, tp_size: int) -> dict[TreeShape, dict[str, AcceptanceReport]]:
    target = tiny_target("llama", TargetMesh.make(world, tp_size, 1))
    asked = [
        *PROMPTS[:3],
        *(replace(prompt, source=prompt.source.replace("file", "folder/other.jsonl")) for prompt in PROMPTS[3:]),
    ]
    held_out = AcceptanceEvaluator(SECTION, target, TOKENIZER, asked, world, Telemetry(speaks=False), max_tokens=50)
    return held_out.measure_shapes(random_draft(tiny_target("llama")), SHAPES)


def test_a_grid_gives_each_shape_its_own_report_and_each_file_its_part():
    alone = measure_shapes(World.alone(), 1)
    assert list(alone) == list(SHAPES)
    for shape, reports in alone.items():
        sizes = {"num_steps": shape.num_steps, "topk": shape.topk, "num_draft_tokens": shape.num_draft_tokens}
        section = replace(SECTION, **sizes, tree_rule=shape.rule, prompts_per_batch=2)
        target = tiny_target("llama")
        held_out = AcceptanceEvaluator(section, target, TOKENIZER, PROMPTS, World.alone(), Telemetry(speaks=False), 50)
        assert reports["all"] == held_out.measure_draft(random_draft(target))
        assert set(reports) == {"all", "file", "other"}
        parts = [report for name, report in reports.items() if name != "all"]
        assert sum(report.num_tokens for report in parts) == reports["all"].num_tokens
        assert [report.num_prompts for report in parts] == [3, 2]
    assert run_ranks(measure_shapes, 2, 2) == [alone, alone]


def test_a_target_whose_cache_cannot_roll_back_is_measured_too():
    replies = []
    target = tiny_target("qwen3_next")
    reports = measure(World.alone(), "qwen3_next", 1, replies=replies)
    assert replies == [(prompt, plain_decode(target, prompt.token_ids, 12, {7}).token_ids) for prompt in PROMPTS]
    assert all(report.num_tokens == sum(len(ids) - 1 for _, ids in replies) and report.mismatches is None for report in reports)
    assert reports[1].acceptance_length > 1


@pytest.mark.parametrize("batch_size", [1, 5])
def test_prompts_for_which_the_target_is_not_finite_are_named_and_left_out(batch_size, monkeypatch, capsys):
    monkeypatch.setitem(BATCH_SIZE, "cpu", batch_size)
    good = measure_prompts([PROMPTS[0], PROMPTS[2]], None)
    bad_id = next(token for token in PROMPTS[1].token_ids if token not in PROMPTS[0].token_ids + PROMPTS[2].token_ids)
    capsys.readouterr()
    mixed = measure_prompts(PROMPTS[:3], bad_id)
    printed = capsys.readouterr().err
    assert "held-out prompt file:1: NaN or infinity, first in the output of layer" in printed and "file:0" not in printed
    untimed = {"tokens_per_s": None, "plain_tokens_per_s": None}
    assert [replace(report, **untimed) for report in mixed] == [replace(report, **untimed) for report in good]
    assert mixed[0].num_prompts == 2


def measure_prompts(chosen: list[Prompt], bad_id: int | None) -> list[AcceptanceReport]:
    """Reports of these prompts by a target whose embedding of one token is not finite."""
    target = tiny_target("llama")
    if bad_id is not None:
        target.embedding.weight_VD.data[bad_id, 0] = float("inf")
    held_out = AcceptanceEvaluator(SECTION, target, TOKENIZER, chosen, World.alone(), Telemetry(speaks=False), max_tokens=50)
    return [held_out.measure_draft(random_draft(tiny_target("llama"))), held_out.measure_prompt_lookup()]
