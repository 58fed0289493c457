import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM

from engine.batch import MicroBatch, PackedBatch, TargetOutput
from engine.config.sections import TargetSection
from engine.config.tree_shape import TreeShape
from engine.evaluation.decoding import PromptLookupDrafter, plain_decode, rolls_back, speculative_decode
from engine.models.eagle3.draft_decoder import DraftDecoder
from engine.models.eagle3.tree_drafter import TreeDrafter
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
        ours = plain_decode(target, prompt_ids, 17, ())
        assert ours.token_ids == theirs[0, len(prompt_ids) :].tolist()
        assert ours.num_target_forwards == 16


SHAPES = (TreeShape(1), TreeShape(5), TreeShape(1, 3, 3), TreeShape(3, 2, 6), TreeShape(4, 5, 14, "sglang"))


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_speculative_decoding_is_greedy_decoding(target, shape, num_layers):
    draft = random_draft(target, num_layers=num_layers)
    for prompt_ids in prompts(8)[1::2]:
        plain = plain_decode(target, prompt_ids, 23, ())
        makers = (
            lambda: TreeDrafter(draft, shape),
            lambda: PromptLookupDrafter(shape.num_steps),
            lambda ids=prompt_ids, plain=plain: Oracle(
                ids, plain.token_ids, lambda i: i % 4 == 3, shape.num_steps, min(3, shape.topk)
            ),
        )
        for make in makers:
            drafted = speculative_decode(target, make(), prompt_ids, max_new_tokens=23, eos_ids=())
            assert drafted.token_ids == plain.token_ids
            beyond = 1 + drafted.num_target_forwards + sum(drafted.accepted_per_forward) - 23
            assert 0 <= beyond <= shape.num_steps


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("wrong_every", [1, 4, 99])
def test_a_drafter_reads_committed_tokens_with_the_true_states_before_them(target, wrong_every, width):
    for prompt_ids in prompts(4):
        reply_ids = plain_decode(target, prompt_ids, 16, ()).token_ids
        oracle = Oracle(prompt_ids, reply_ids, lambda index: index % wrong_every == 0, 4, width)
        speculative_decode(target, oracle, prompt_ids, max_new_tokens=16, eos_ids=())
        read = prompt_ids + reply_ids
        assert len(oracle.read_ids) >= len(read) - 5 and oracle.read_ids == read[: len(oracle.read_ids)]
        with capture(target.model, target.aux_layers) as seen:
            target.model(torch.tensor([oracle.read_ids[:-1]]))
        expected_TA = seen.aux()[0]
        read_TA = torch.cat(oracle.read_aux)
        assert (read_TA - expected_TA).abs().max() < 1e-5 * expected_TA.abs().max()


@pytest.mark.parametrize("max_new_tokens", [1, 2, 7, 13, 14])
def test_max_new_tokens_is_exact(target, max_new_tokens):
    prompt_ids = prompts(4)[3]
    plain = plain_decode(target, prompt_ids, 14, ())
    drafted = speculative_decode(
        target, Oracle(prompt_ids, plain.token_ids), prompt_ids, max_new_tokens=max_new_tokens, eos_ids=()
    )
    assert drafted.token_ids == plain.token_ids[:max_new_tokens]


@pytest.mark.parametrize("wrong", [lambda index: False, lambda index: index % 3 == 1, lambda index: True])
def test_an_end_token_ends_the_reply_wherever_it_comes(target, wrong):
    prompt_ids = prompts(4)[3]
    reply_ids = plain_decode(target, prompt_ids, 20, ()).token_ids
    for end_id in set(reply_ids):
        expected = reply_ids[: reply_ids.index(end_id) + 1]
        assert plain_decode(target, prompt_ids, 20, {end_id}).token_ids == expected
        oracle = Oracle(prompt_ids, reply_ids, wrong, depth=4)
        drafted = speculative_decode(target, oracle, prompt_ids, max_new_tokens=20, eos_ids={end_id})
        assert drafted.token_ids == expected
        proposed = drafted.proposed_per_forward
        accepted = drafted.accepted_per_forward
        assert all(a <= p for a, p in zip(accepted, proposed, strict=True))
        emitted = len(expected) - 1
        assert emitted - drafted.num_target_forwards <= sum(accepted) <= emitted + 4


def test_tokens_drafted_behind_an_end_token_are_not_judged(target):
    prompt_ids = prompts(4)[3]
    reply_ids = plain_decode(target, prompt_ids, 20, ()).token_ids
    index = next(i for i in range(2, 6) if reply_ids[i] not in reply_ids[:i])
    oracle = Oracle(prompt_ids, reply_ids, depth=9)
    drafted = speculative_decode(target, oracle, prompt_ids, max_new_tokens=20, eos_ids={reply_ids[index]})
    assert drafted.proposed_per_forward == drafted.accepted_per_forward == [index]


def test_a_perfect_drafter_emits_one_more_than_it_drafts_and_a_hopeless_one_emits_one(target):
    for prompt_ids in prompts(4):
        reply_ids = plain_decode(target, prompt_ids, 31, ()).token_ids
        request = {"prompt_ids": prompt_ids, "max_new_tokens": 31, "eos_ids": ()}
        perfect = speculative_decode(target, Oracle(prompt_ids, reply_ids), **request)
        assert perfect.accepted_per_forward == perfect.proposed_per_forward == [5] * 5
        hopeless = speculative_decode(target, Oracle(prompt_ids, reply_ids, lambda index: True), **request)
        assert hopeless.num_target_forwards == 30
        assert hopeless.accepted_per_forward == [0] * 30


@pytest.mark.parametrize(
    "options", [{}, {"fc_norm": True, "norm_output": True}, {"num_layers": 3}, {"num_layers": 2, "norm_output": True}]
)
def test_drafting_with_caches_is_the_training_time_test(target, options, monkeypatch):
    monkeypatch.setattr("engine.models.eagle3.tree_drafter.ROWS_PER_FORWARD", 4)
    draft = random_draft(target, **options)
    count = 5
    ids = torch.randint(0, VOCAB, (19,), generator=torch.Generator().manual_seed(3))
    aux_TA = torch.randn(19, 3 * WIDTH, generator=torch.Generator().manual_seed(4))
    rows = []
    predict = DraftDecoder.predict
    monkeypatch.setattr(DraftDecoder, "predict", lambda self, output_QD: rows.append(output_QD) or predict(self, output_QD))
    drafter = TreeDrafter(draft, TreeShape(count))
    drafter.start(ids[:11].tolist(), aux_TA[:10])
    for known, end in ((11, 12), (12, 18), (18, 19)):
        drafter.propose()
        drafter.extend(ids[known:end].tolist(), aux_TA[known - 1 : end - 1])
    rows.clear()
    drafted = drafter.propose().token_ids
    monkeypatch.undo()

    all_ids = torch.cat((ids, torch.tensor(drafted)))
    batch = PackedBatch(all_ids, torch.ones_like(all_ids, dtype=torch.bool), torch.tensor([0, all_ids.numel()]))
    none = torch.empty(0)
    garbage_QA = torch.full((1 + count, 3 * WIDTH), 9.0)
    features = TargetOutput(torch.cat((aux_TA[:18], garbage_QA)), none, none, none, none)
    outputs = unroll(draft.model, MicroBatch(batch, features, draft.embed(all_ids), none), count)
    for served, trained in zip(rows, outputs, strict=True):
        assert (served.reshape(-1) - trained[17]).abs().max() < 1e-5 * trained[17].abs().max()
    assert drafted == [draft.best_id(draft.model.logits(output[17:18])).item() for output in outputs]


def test_a_drafter_starts_anew_with_every_prompt(target):
    drafter, (first, second) = TreeDrafter(random_draft(target), TreeShape(3)), prompts(6)[4:]
    request = {"max_new_tokens": 12, "eos_ids": ()}
    speculative_decode(target, drafter, first, **request)
    again = speculative_decode(target, drafter, second, **request)
    alone = speculative_decode(target, TreeDrafter(random_draft(target), TreeShape(3)), second, **request)
    assert again.accepted_per_forward == alone.accepted_per_forward


@pytest.mark.parametrize("window", [4, 9])
def test_sliding_window_caches_roll_back(window):
    torch.manual_seed(5)
    config = AutoConfig.for_model("mistral", **SHAPE, sliding_window=window)
    target = FrozenTarget(AutoModelForCausalLM.from_config(config, dtype=torch.float32), (0, 1, 3))
    for prompt_ids in prompts(6):
        plain = plain_decode(target, prompt_ids, 20, ())
        for width in (1, 3):
            oracle = Oracle(prompt_ids, plain.token_ids, lambda index: index % 3 == 2, width=width)
            drafted = speculative_decode(target, oracle, prompt_ids, max_new_tokens=20, eos_ids=())
            assert drafted.token_ids == plain.token_ids
            assert drafted.num_target_forwards < 12


def test_learned_positions_decode_too():
    torch.manual_seed(6)
    config = GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=5, n_head=4, n_positions=64, initializer_range=0.3)
    target = FrozenTarget(AutoModelForCausalLM.from_config(config, dtype=torch.float32), (0, 1, 3))
    prompt_ids = prompts(4)[3]
    plain = plain_decode(target, prompt_ids, 20, ())
    oracle = Oracle(prompt_ids, plain.token_ids, lambda index: index % 3 == 2)
    drafted = speculative_decode(target, oracle, prompt_ids, max_new_tokens=20, eos_ids=())
    assert drafted.token_ids == plain.token_ids


def test_targets_whose_state_cannot_forget_are_refused_by_name():
    target = tiny_target("qwen3_next")
    assert len(plain_decode(target, [1, 2], 3, ()).token_ids) == 3
    with pytest.raises(ValueError, match="qwen3_next.*LinearAttentionLayer"):
        speculative_decode(target, PromptLookupDrafter(1), [1, 2], max_new_tokens=3, eos_ids=())


def test_a_target_that_reads_no_trees_is_refused_one_and_reads_chains(target, monkeypatch):
    monkeypatch.setattr("engine.evaluation.decoding.reads_trees", lambda target: False)
    prompt_ids = prompts(4)[3]
    told = plain_decode(target, prompt_ids, 12, ()).token_ids
    chain = speculative_decode(target, Oracle(prompt_ids, told), prompt_ids, max_new_tokens=12, eos_ids=())
    assert chain.token_ids == told
    with pytest.raises(ValueError, match="'llama' cannot read a tree"):
        speculative_decode(target, Oracle(prompt_ids, told, width=2), prompt_ids, max_new_tokens=12, eos_ids=())


@pytest.mark.parametrize("family", ["deepseek_v4", "doge"])
def test_a_cache_that_only_claims_to_roll_back_is_not_asked_to(family):
    target = FrozenTarget(tiny_model(family), (0, 1, 2))
    assert not rolls_back(target)
    with pytest.raises(ValueError, match=f"{family}.*cannot forget rejected tokens"):
        speculative_decode(target, PromptLookupDrafter(1), [4, 5], max_new_tokens=3, eos_ids=())


def test_requests_that_cannot_be_met_are_refused(target):
    with pytest.raises(ValueError, match="no token"):
        plain_decode(target, [], 3, ())
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        plain_decode(target, [1], 0, ())


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
    whole = PromptLookupDrafter(4)
    grown = PromptLookupDrafter(4)
    whole.start(token_ids, none)
    grown.start(token_ids[:1], none)
    for token_id in token_ids[1:]:
        grown.extend([token_id], none)
    assert whole.propose().is_chain and whole.propose().token_ids == grown.propose().token_ids == expected
