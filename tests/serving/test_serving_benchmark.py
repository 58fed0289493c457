"""A benchmark compares each server with the one without a draft."""

import math

import pytest

from engine.serving.endpoint import ReplySettings, VllmEndpoint
from engine.serving.http_stream import ServingError
from engine.serving.serving_benchmark import LoadPlan, ServingBenchmark, with_repeats
from engine.serving.serving_results import PLAIN, Ratio
from tests.serving.fake_server import CHUNK, serving

PROMPTS = {"chat": [[1, 2], [3, 4], [5, 6]]}
PLAN = LoadPlan((1, 2), ReplySettings(1 + 2 * CHUNK), repeats=2, num_warmup=1)
TIMEOUT_S = 60.0
STEP_S = 0.01  # of a target forward


def test_each_prompt_is_sent_equally_often():
    assert with_repeats([[1], [2]], 3) == [[1], [2], [1], [2]]
    assert with_repeats([[1], [2]], 2) == [[1], [2]]


def test_speed_up_and_mismatches_are_against_the_same_batch_size():
    benchmark = ServingBenchmark(PROMPTS, PLAN)
    lines: list[str] = []
    benchmark.after_load = lines.append
    with serving(drafts=False) as plain, serving() as drafting:
        plain.step_s = STEP_S
        drafting.step_s = STEP_S
        drafting.odd_prompt = 3
        benchmark.measure(VllmEndpoint(plain.url, TIMEOUT_S), PLAIN)
        benchmark.measure(VllmEndpoint(drafting.url, TIMEOUT_S), "draft")
        num_requests = len(drafting.requests)
        assert num_requests == 2 * (1 + 2 * 3), "a warm-up request and two repeats per batch size"
        num_after_prompt = (plain.num_drafts / num_requests, drafting.num_drafts / num_requests)
        assert num_after_prompt == (2 * CHUNK, 2), "forwards of a request after the one over the prompt"
    assert len(lines) == 2 * PLAN.num_loads(1) == 8
    found = [(one.setting, one.batch, one.mismatches, one.num_compared) for one in benchmark.cells]
    assert found == [(PLAIN, 1, 0, 3), (PLAIN, 2, 0, 3), ("draft", 1, 2, 6), ("draft", 2, 2, 6)]
    assert benchmark.cells[0].speed_up is None
    for plain_cell, cell in zip(benchmark.cells[:2], benchmark.cells[2:], strict=True):
        assert cell.acceptance.length == CHUNK
        assert cell.speed_up == Ratio.of(cell.tokens_per_s, plain_cell.tokens_per_s)
        assert cell.speed_up.low <= cell.speed_up.middle <= cell.speed_up.high
        requests_in_a_row = math.ceil(3 / cell.batch)
        for measured, num_forwards in ((plain_cell, 1 + 2 * CHUNK), (cell, 1 + 2)):
            least_s = requests_in_a_row * num_forwards * STEP_S
            assert min(repeat.seconds for repeat in measured.repeats) >= least_s


def test_servers_that_are_mixed_up_are_refused():
    with serving(drafts=False) as plain, serving() as drafting:
        with pytest.raises(ServingError, match="without a draft drafts tokens"):
            ServingBenchmark(PROMPTS, PLAN).measure(VllmEndpoint(drafting.url, TIMEOUT_S), PLAIN)
        with pytest.raises(ServingError, match="spec_decode_num_drafts_total.*--speculative-config"):
            ServingBenchmark(PROMPTS, PLAN).measure(VllmEndpoint(plain.url, TIMEOUT_S), "draft")
