"""Replies that the report shows: each token's text and where the token came from."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from engine.evaluation.acceptance import Prompt
from engine.evaluation.decoding import Generation
from engine.evaluation.samples import MOST_TOKENS, Sample, sampled_prompts, token_depths, token_texts, write_samples


def tokenizer_of(vocabulary: list[str], decoder) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def of_bytes() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single bytes, as the rarest ones of a byte-level vocabulary."""
    return tokenizer_of(sorted(ByteLevel.alphabet()), decoders.ByteLevel())


def ids_of(data: bytes, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids of bytes, found by decoding: ASCII stands for itself, and others by ByteLevel's rule."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    return tokenizer.convert_tokens_to_ids([names[byte] for byte in data])


def test_a_character_belongs_to_the_token_that_completes_it(of_bytes):
    text = "aé🙂\n日b"
    texts = token_texts(ids_of(text.encode(), of_bytes), of_bytes)
    assert texts == ["a", "", "é", "", "", "", "🙂", "\n", "", "", "日", "b"]


def test_bytes_that_are_no_character_do_not_hide_what_follows(of_bytes):
    texts = token_texts(ids_of(b"\xff\xff\xff\xff\xffab\xc3", of_bytes), of_bytes)
    assert "".join(texts).replace("\ufffd", "") == "ab" and texts[-1] == "\ufffd"


def test_spaces_between_words_are_kept():
    words = tokenizer_of(["▁a", "▁b", "c"], decoders.Metaspace())
    assert token_texts([0, 1, 2, 0], words) == ["a", " b", "c", " a"]


def test_depths_count_from_one_after_each_token_of_the_target():
    generation = Generation([5, 6, 7, 8, 9, 10, 11], 3, [3, 3, 2], [2, 0, 2], 1.0)
    assert token_depths(generation) == [0, 1, 2, 0, 0, 1, 2], "an end token was drafted, so no token of the target follows"
    assert token_depths(Generation([5], 0, [], [], 0.0)) == [0]


@pytest.mark.parametrize(("count", "indices"), [(0, set()), (3, {0, 1, 2}), (80, {0, 20, 40, 60})])
def test_samples_are_spread_over_the_prompts(count, indices):
    assert sampled_prompts(count) == indices


def test_a_long_sample_is_cut_and_says_how_long_it_was(of_bytes, tmp_path):
    ids = ids_of(b"x" * (MOST_TOKENS + 5), of_bytes)
    prompt = Prompt("file:3", ids_of(b"<" + b"p" * 600, of_bytes))
    sample = Sample.of(prompt, Generation(ids, len(ids) - 1, [1] * (len(ids) - 1), [0] * (len(ids) - 1), 1.0), of_bytes)
    assert len(sample.tokens) == len(sample.depths) == MOST_TOKENS and sample.num_tokens == MOST_TOKENS + 5
    assert sample.prompt.startswith("... p") and sample.prompt.endswith("p")
    write_samples(tmp_path / "samples.jsonl", [sample, sample], step=7)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[0]["step"] == 7 and lines[0]["tokens"] == sample.tokens
