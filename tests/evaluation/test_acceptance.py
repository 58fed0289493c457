import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from engine.evaluation.acceptance import (
    ALL,
    AcceptanceCounts,
    DecodedPrompt,
    Prompt,
    eos_ids,
    group_names,
    held_out_prompts,
    measure_acceptance,
)
from engine.evaluation.decoding import Generation

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if thinking %} think{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<system>", "<user>", "<assistant>", "<end>", "think", "be", "brief", *(f"q{i}" for i in range(12))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>", chat_template=TEMPLATE)


def generation(accepted: list[int], proposed: list[int], *, token_ids: list[int] | None = None, seconds: float = 1.0):
    if token_ids is None:
        token_ids = list(range(1 + len(accepted) + sum(accepted)))
    return Generation(token_ids, len(accepted), proposed, accepted, seconds)


def write(path, samples) -> str:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    return str(path)


def conversation(*turns: str) -> dict:
    return {"id": "x", "conversations": [dict(zip(("role", "content"), turn.split(": "), strict=True)) for turn in turns]}


def test_acceptance_per_depth_is_conditional_on_reaching_it():
    report = AcceptanceCounts.of(generation([3, 0, 1, 1], [3, 3, 3, 1]), None, num_steps=4).report()
    assert report.acceptance_per_depth == [3 / 4, 1 / 2, 1.0, None]
    assert report.acceptance_length == 9 / 4
    assert report.num_tokens == 9


def test_an_accepted_end_token_counts_as_emitted_once():
    ended = generation([2, 2], [3, 2], token_ids=[7, 1, 2, 3, 4, 9])
    report = AcceptanceCounts.of(ended, None, num_steps=3).report()
    assert report.acceptance_length == 5 / 2
    assert report.acceptance_per_depth == [1.0, 1.0, 0.0]


def test_groups_are_named_by_their_files_and_categories():
    sources = ["a/chat.jsonl:1", "b/chat.jsonl:1", "c/all.jsonl:2", "c/code.jsonl:3", "c/code.jsonl:4"]
    prompts = [Prompt(source, [1], category) for source, category in zip(sources, [None, None, None, "x", "y"], strict=True)]
    names = group_names(prompts)
    assert list(names.values()) == ["a/chat.jsonl", "b/chat.jsonl", "c/all.jsonl", "code: x", "code: y"]
    assert all(prompt.group in names for prompt in prompts)


def test_counts_of_ranks_add_up_to_those_of_all_prompts():
    generations = [generation([1, 0], [2, 2]), generation([], [], token_ids=[5]), generation([2], [2], seconds=0.25)]
    plain = [generations[0], generation([], [], token_ids=[6], seconds=0.5), generations[2]]
    counts = [AcceptanceCounts.of(*pair, num_steps=2) for pair in zip(generations, plain, strict=True)]
    whole = sum(counts, AcceptanceCounts.zero(2))
    shards = [(counts[0] + counts[2]).to_tensor(), counts[1].to_tensor(), AcceptanceCounts.zero(2).to_tensor()]
    assert AcceptanceCounts.from_tensor(sum(shards)) == whole
    report = whole.report()
    assert (report.num_prompts, report.num_tokens, report.mismatches) == (3, 6, 1)
    assert report.tokens_per_s == 6 / 2.25
    assert report.plain_tokens_per_s == 6 / 1.75


def test_a_rank_without_prompts_reports_no_gain_and_nothing_compared():
    report = AcceptanceCounts.zero(2).report()
    assert report.acceptance_length == 1.0
    assert report.acceptance_per_depth == [None, None]
    assert report.tokens_per_s is None and report.plain_tokens_per_s is None and report.mismatches is None
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_measuring_compares_every_prompt_with_plain_decoding():
    prompts = [Prompt(f"file:{index}", [index]) for index in range(3)]
    replies = [generation([2, 0], [2, 1]), generation([1], [1]), generation([], [], token_ids=[5])]

    def decoded(plain: list[Generation | None], **changes) -> list[DecodedPrompt]:
        timed = [replace(reply, **changes) for reply in replies]
        return [DecodedPrompt(*parts) for parts in zip(prompts, timed, plain, strict=True)]

    names = group_names(prompts)
    measured = measure_acceptance(iter(decoded(replies)), 2, names)
    assert set(measured) == {ALL}, "there is one group only"
    report = measured[ALL].report()
    assert (report.mismatches, report.num_prompts, report.num_tokens) == (0, 3, 6)
    assert report.acceptance_length == 6 / 3

    other = generation([], [], token_ids=[19, *replies[0].token_ids[1:-1], 20])
    assert measure_acceptance(decoded([other, *replies[1:]]), 2, names)[ALL].mismatches == 1
    alone = measure_acceptance(decoded([None] * 3, seconds=0.0), 2, names)[ALL].report()
    assert (alone.mismatches, alone.tokens_per_s, alone.plain_tokens_per_s) == (None, None, None)
    assert alone.acceptance_length == report.acceptance_length


def test_a_prompt_is_what_comes_before_the_first_reply(tokenizer, tmp_path):
    first = conversation("system: be brief", "user: q1", "assistant: q2", "user: q3", "assistant: q4")
    sharegpt = {"conversations": [{"from": "human", "value": "q5"}, {"from": "gpt", "value": "q6"}]}
    path = write(tmp_path / "a.jsonl", [first, sharegpt])
    prompts = held_out_prompts([path], tokenizer, 2, None)
    texts = [tokenizer.decode(prompt.token_ids) for prompt in prompts]
    assert texts == ["<system> be brief <end> <user> q1 <end> <assistant>", "<user> q5 <end> <assistant>"]
    assert [prompt.source for prompt in prompts] == [f"{path}:1", f"{path}:2"]
    thinking = held_out_prompts([path], tokenizer, 2, {"thinking": True})
    assert tokenizer.decode(thinking[1].token_ids) == "<user> q5 <end> <assistant> think"


def test_prompts_are_spread_evenly_over_the_files(tokenizer, tmp_path):
    samples = [conversation(f"user: q{index}", "assistant: be") for index in range(12)]
    paths = [write(tmp_path / "a.jsonl", samples[:5]), write(tmp_path / "b.jsonl", samples[5:])]

    def asked(count: int) -> list[str]:
        return [tokenizer.decode(prompt.token_ids[1:2]) for prompt in held_out_prompts(paths, tokenizer, count, None)]

    assert asked(4) == ["q0", "q3", "q6", "q9"]
    assert asked(5) == ["q0", "q2", "q4", "q7", "q9"]
    assert asked(99) == [f"q{index}" for index in range(12)]


def test_conversations_without_a_question_are_passed_over(tokenizer, tmp_path):
    asked = conversation("user: q1", "assistant: be")
    unusable = [conversation("assistant: be", "user: q2"), conversation("user: q3"), {"conversations": "q4"}]
    path = write(tmp_path / "a.jsonl", [*unusable, asked])
    with open(path, "ab") as file:
        file.write(b"\n{ not JSON\n\xff\xfe\x00{}\n")
    assert [prompt.source for prompt in held_out_prompts([path], tokenizer, 9, None)] == [f"{path}:4"]
    with pytest.raises(ValueError, match="there are no prompts"):
        held_out_prompts([write(tmp_path / "b.jsonl", unusable)], tokenizer, 9, None)
    with pytest.raises(ValueError, match="no such file"):
        held_out_prompts([tmp_path / "c.jsonl"], tokenizer, 9, None)
    with pytest.raises(ValueError, match=r"a.jsonl:4 cannot be rendered: .*brief only"):
        held_out_prompts([path], tokenizer, 9, {"chat_template": "{{ raise_exception('brief only') }}"})
    fussy = "{% if 'again' in messages[0]['content'] %}{{ raise_exception('once only') }}{% endif %}" + TEMPLATE
    both = write(tmp_path / "d.jsonl", [conversation("user: again", "assistant: be"), asked])
    assert [prompt.source for prompt in held_out_prompts([both], tokenizer, 9, {"chat_template": fussy})] == [f"{both}:2"]
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        held_out_prompts([path], bare, 9, None)


@pytest.mark.parametrize(
    "generation_eos, config_eos, expected", [(None, None, {4}), ([7, 8], 7, {4, 7, 8}), (None, [5, 4], {4, 5})]
)
def test_end_tokens_are_all_that_anyone_names(tokenizer, generation_eos, config_eos, expected):
    config = LlamaConfig(vocab_size=20, eos_token_id=config_eos)
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=generation_eos), config=config)
    assert eos_ids(model, tokenizer) == expected


def test_a_prompt_of_formatted_text_is_that_of_its_messages(tokenizer, tmp_path):
    messages = conversation("user: q1", "assistant: q2", "user: q3")
    written = tokenizer.apply_chat_template(messages["conversations"], tokenize=False)
    paths = [write(tmp_path / "a.jsonl", [messages]), write(tmp_path / "b.jsonl", [{"text": written}])]
    asked, of_text = held_out_prompts(paths, tokenizer, 2, None)
    assert asked.token_ids == of_text.token_ids
