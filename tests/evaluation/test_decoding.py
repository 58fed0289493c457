import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM

from engine.batch import MicroBatch, PackedBatch, TargetOutput
from engine.config.sections import TargetSection
from engine.evaluation.decoding import PromptLookupDrafter, greedy_decode, rolls_back, speculative_decode
from engine.models.eagle3.chain_drafter import ChainDrafter
from engine.models.eagle3.unroll import unroll
from engine.target.frozen import FrozenTarget, capture
from tests.drafters import SHAPE, VOCAB, WIDTH, Oracle, prompts, random_draft, tiny_target
from tests.parallel.families import tiny_model


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> FrozenTarget:
    folder = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    section = TargetSection(path=str(folder), dtype="float32", aux_layers=(0, 1, 3))
    return FrozenTarget.load(section, torch.device("cpu"))


def test_greedy_decoding_is_that_of_transformers(target):
    for prompt_ids in prompts(5):
        theirs = target.model.generate(torch.tensor([prompt_ids]), do_sample=False, max_new_tokens=17, eos_token_id=VOCAB + 1)
        ours = greedy_decode(target, prompt_ids, 17, ())
        assert ours.token_ids == theirs[0, len(prompt_ids) :].tolist()
        assert ours.num_target_forwards == 16


@pytest.mark.parametrize("draft_tokens", [1, 3, 5])
@pytest.mark.parametrize("kind", ["chain", "deep chain", "prompt lookup", "oracle that errs"])
def test_speculative_decoding_is_greedy_decoding(target, kind, draft_tokens):
    draft = random_draft(target, num_layers=2 if kind == "deep chain" else 1)
    for prompt_ids in prompts(8):
        plain = greedy_decode(target, prompt_ids, 23, ())
        drafter = {
            "chain": lambda: ChainDrafter(draft),
            "deep chain": lambda: ChainDrafter(draft),
            "prompt lookup": PromptLookupDrafter,
            "oracle that errs": lambda ids=prompt_ids, plain=plain: Oracle(ids, plain.token_ids, lambda i: i % 4 == 3),
        }[kind]()
        drafted = speculative_decode(target, drafter, prompt_ids, max_new_tokens=23, draft_tokens=draft_tokens, eos_ids=())
        assert drafted.token_ids == plain.token_ids
        assert 1 + drafted.num_target_forwards + sum(drafted.accepted_per_forward) == 23


@pytest.mark.parametrize("wrong_every", [1, 2, 4, 99])
def test_a_drafter_reads_committed_tokens_with_the_true_states_before_them(target, wrong_every):
    for prompt_ids in prompts(4):
        reply_ids = greedy_decode(target, prompt_ids, 16, ()).token_ids
        oracle = Oracle(prompt_ids, reply_ids, lambda index: index % wrong_every == 0)
        speculative_decode(target, oracle, prompt_ids, max_new_tokens=16, draft_tokens=4, eos_ids=())
        assert oracle.read_ids == prompt_ids + reply_ids
        with capture(target.model, target.aux_layers) as seen:
            target.model(torch.tensor([oracle.read_ids[:-1]]))
        expected_TA = seen.aux()[0]
        read_TA = torch.cat(oracle.read_aux)
        assert (read_TA - expected_TA).abs().max() < 1e-5 * expected_TA.abs().max()


@pytest.mark.parametrize("max_new_tokens", [1, 2, 7, 13, 14])
def test_max_new_tokens_is_exact(target, max_new_tokens):
    prompt_ids = prompts(4)[3]
    plain = greedy_decode(target, prompt_ids, 14, ())
    drafted = speculative_decode(
        target, Oracle(prompt_ids, plain.token_ids), prompt_ids, max_new_tokens=max_new_tokens, draft_tokens=5, eos_ids=()
    )
    assert drafted.token_ids == plain.token_ids[:max_new_tokens]


@pytest.mark.parametrize("wrong", [lambda index: False, lambda index: index % 3 == 1, lambda index: True])
def test_an_end_token_ends_the_reply_wherever_it_comes(target, wrong):
    prompt_ids = prompts(4)[3]
    reply_ids = greedy_decode(target, prompt_ids, 20, ()).token_ids
    for end_id in set(reply_ids):
        expected = reply_ids[: reply_ids.index(end_id) + 1]
        assert greedy_decode(target, prompt_ids, 20, {end_id}).token_ids == expected
        oracle = Oracle(prompt_ids, reply_ids, wrong)
        drafted = speculative_decode(target, oracle, prompt_ids, max_new_tokens=20, draft_tokens=4, eos_ids={end_id})
        assert drafted.token_ids == expected
        proposed = drafted.proposed_per_forward
        accepted = drafted.accepted_per_forward
        assert all(a <= p for a, p in zip(accepted, proposed, strict=True))
        emitted = len(expected) - 1
        assert emitted - drafted.num_target_forwards <= sum(accepted) <= emitted


def test_tokens_drafted_behind_an_end_token_are_not_judged(target):
    prompt_ids = prompts(4)[3]
    reply_ids = greedy_decode(target, prompt_ids, 20, ()).token_ids
    index = next(i for i in range(2, 6) if reply_ids[i] not in reply_ids[:i])
    oracle = Oracle(prompt_ids, reply_ids)
    drafted = speculative_decode(target, oracle, prompt_ids, max_new_tokens=20, draft_tokens=9, eos_ids={reply_ids[index]})
    assert drafted.proposed_per_forward == drafted.accepted_per_forward == [index]


def test_a_perfect_drafter_emits_one_more_than_it_drafts_and_a_hopeless_one_emits_one(target):
    for prompt_ids in prompts(4):
        reply_ids = greedy_decode(target, prompt_ids, 31, ()).token_ids
        request = {"prompt_ids": prompt_ids, "max_new_tokens": 31, "draft_tokens": 5, "eos_ids": ()}
        perfect = speculative_decode(target, Oracle(prompt_ids, reply_ids), **request)
        assert perfect.accepted_per_forward == perfect.proposed_per_forward == [5] * 5
        hopeless = speculative_decode(target, Oracle(prompt_ids, reply_ids, lambda index: True), **request)
        assert hopeless.num_target_forwards == 30
        assert hopeless.accepted_per_forward == [0] * 30


@pytest.mark.parametrize(
    "options", [{}, {"fc_norm": True, "norm_output": True}, {"num_layers": 3}, {"num_layers": 2, "norm_output": True}]
)
def test_drafting_with_caches_is_the_training_time_test(target, options, monkeypatch):
    monkeypatch.setattr("engine.models.eagle3.chain_drafter._ROWS_PER_STEP", 4)
    draft = random_draft(target, **options)
    count = 5
    ids = torch.randint(0, VOCAB, (19,), generator=torch.Generator().manual_seed(3))
    aux_TA = torch.randn(19, 3 * WIDTH, generator=torch.Generator().manual_seed(4))
    rows = []
    step = draft.model.step
    monkeypatch.setattr(draft.model, "step", lambda *arguments: rows.append(step(*arguments)) or rows[-1])
    drafter = ChainDrafter(draft)
    drafter.start(ids[:11].tolist(), aux_TA[:10])
    for known, end in ((11, 12), (12, 18), (18, 19)):
        drafter.propose(count)
        drafter.extend(ids[known:end].tolist(), aux_TA[known - 1 : end - 1])
    newest = rows[-1][0][-1]
    drafted = drafter.propose(count)
    monkeypatch.undo()

    all_ids = torch.cat((ids, torch.tensor(drafted)))
    batch = PackedBatch(all_ids, torch.ones_like(all_ids, dtype=torch.bool), torch.tensor([0, all_ids.numel()]))
    none = torch.empty(0)
    garbage_QA = torch.full((1 + count, 3 * WIDTH), 9.0)
    features = TargetOutput(torch.cat((aux_TA[:18], garbage_QA)), none, none, none, none)
    outputs = unroll(draft.model, MicroBatch(batch, features, draft.embed(all_ids), none), count)
    for served, trained in zip([newest, *(output for output, _ in rows[-count + 1 :])], outputs, strict=True):
        assert (served.reshape(-1) - trained[17]).abs().max() < 1e-5 * trained[17].abs().max()
    assert drafted == [draft.propose_id(output[17:18]).item() for output in outputs]


def test_a_drafter_starts_anew_with_every_prompt(target):
    drafter, (first, second) = ChainDrafter(random_draft(target)), prompts(6)[4:]
    request = {"max_new_tokens": 12, "draft_tokens": 3, "eos_ids": ()}
    speculative_decode(target, drafter, first, **request)
    again = speculative_decode(target, drafter, second, **request)
    alone = speculative_decode(target, ChainDrafter(random_draft(target)), second, **request)
    assert again.accepted_per_forward == alone.accepted_per_forward


@pytest.mark.parametrize("window", [4, 9])
def test_sliding_window_caches_roll_back(window):
    torch.manual_seed(5)
    config = AutoConfig.for_model("mistral", **SHAPE, sliding_window=window)
    target = FrozenTarget(AutoModelForCausalLM.from_config(config, dtype=torch.float32), (0, 1, 3))
    for prompt_ids in prompts(6):
        plain = greedy_decode(target, prompt_ids, 20, ())
        oracle = Oracle(prompt_ids, plain.token_ids, lambda index: index % 3 == 2)
        drafted = speculative_decode(target, oracle, prompt_ids, max_new_tokens=20, draft_tokens=5, eos_ids=())
        assert drafted.token_ids == plain.token_ids


def test_learned_positions_decode_too():
    torch.manual_seed(6)
    config = GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=5, n_head=4, n_positions=64, initializer_range=0.3)
    target = FrozenTarget(AutoModelForCausalLM.from_config(config, dtype=torch.float32), (0, 1, 3))
    prompt_ids = prompts(4)[3]
    plain = greedy_decode(target, prompt_ids, 20, ())
    oracle = Oracle(prompt_ids, plain.token_ids, lambda index: index % 3 == 2)
    drafted = speculative_decode(target, oracle, prompt_ids, max_new_tokens=20, draft_tokens=5, eos_ids=())
    assert drafted.token_ids == plain.token_ids


def test_targets_whose_state_cannot_forget_are_refused_by_name():
    target = tiny_target("qwen3_next")
    assert len(greedy_decode(target, [1, 2], 3, ()).token_ids) == 3
    with pytest.raises(ValueError, match="qwen3_next.*LinearAttentionLayer"):
        speculative_decode(target, PromptLookupDrafter(), [1, 2], max_new_tokens=3, draft_tokens=1, eos_ids=())


@pytest.mark.parametrize("family", ["deepseek_v4", "doge"])
def test_a_cache_that_only_claims_to_roll_back_is_not_asked_to(family):
    target = FrozenTarget(tiny_model(family), (0, 1, 2))
    assert not rolls_back(target)
    with pytest.raises(ValueError, match=f"{family}.*cannot forget rejected tokens"):
        speculative_decode(target, PromptLookupDrafter(), [4, 5], max_new_tokens=3, draft_tokens=1, eos_ids=())


def test_requests_that_cannot_be_met_are_refused(target):
    with pytest.raises(ValueError, match="no token"):
        greedy_decode(target, [], 3, ())
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        greedy_decode(target, [1], 0, ())
    with pytest.raises(ValueError, match="draft_tokens=0"):
        speculative_decode(target, PromptLookupDrafter(), [1], max_new_tokens=3, draft_tokens=0, eos_ids=())


@pytest.mark.parametrize(
    "token_ids, expected",
    [
        ([7], []),
        ([1, 2, 3], []),
        ([5, 5], [5]),
        ([1, 2, 3, 9, 1, 2, 3], [9, 1, 2, 3]),
        ([1, 2, 8, 4, 3, 2, 9, 1, 2], [8, 4, 3, 2]),
        ([2, 8, 4, 3, 2, 9, 6, 2], [9, 6, 2]),
        ([4, 1, 2, 3, 8, 7, 2, 3, 9, 1, 2, 3], [8, 7, 2, 3]),
    ],
)
def test_prompt_lookup_continues_the_latest_earlier_copy_of_the_longest_ngram(token_ids, expected):
    none = torch.empty(0)
    whole = PromptLookupDrafter()
    grown = PromptLookupDrafter()
    whole.start(token_ids, none)
    grown.start(token_ids[:1], none)
    for token_id in token_ids[1:]:
        grown.extend([token_id], none)
    assert whole.propose(4) == grown.propose(4) == expected
    assert whole.propose(1) == expected[:1]
