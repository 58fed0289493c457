"""A shard is a safetensors file whose every byte is known beforehand; fp8 keeps what its three bits can."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from engine.hidden_states.store_format import (
    DTYPES,
    Contents,
    Layout,
    Manifest,
    Shard,
    StoreError,
    document_checksum,
    from_stored,
    plan_shards,
    to_stored,
)


def contents_of(dtype: str = "bfloat16", hidden_size: int = 8) -> Contents:
    hashes = {"config_hash": "c", "tokenizer_hash": "t", "template_hash": "m"}
    sizes = {"hidden_size": hidden_size, "vocab_size": 64, "aux_layers": (0, 1, 3)}
    return Contents("here", None, **hashes, **sizes, mask_alignment="inference", temperature=1.0, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 0), (3, 11, 4), (5, 64, 60)])
def test_safetensors_reads_a_file_of_this_layout(dtype, sizes, tmp_path):
    layout = Layout.of(contents_of(dtype), Shard("s", 0, *sizes))
    path = tmp_path / "s"
    path.write_bytes(layout.header("0123456789abcdef").ljust(layout.num_bytes, b"\0"))
    with safe_open(path, "pt") as file:
        assert file.metadata()["checksum"] == "0123456789abcdef"
        for name, place in layout.places.items():
            tensor = file.get_tensor(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (place.dtype, place.shape)
            assert place.offset % place.dtype.itemsize == 0


@pytest.mark.parametrize("dtype, limit_kib", [("bfloat16", 28.1), ("float8_e4m3", 14.2)])
def test_at_width_4096_and_half_the_tokens_slots_a_token_costs_what_was_promised(dtype, limit_kib):
    num_tokens = 100_000
    layout = Layout.of(contents_of(dtype, 4096), Shard("s", 0, 100, num_tokens, num_tokens // 2))
    assert layout.num_bytes / num_tokens / 1024 <= limit_kib


@pytest.mark.parametrize("shard_bytes", [1, 5000, 10**9])
def test_every_document_lies_in_one_shard_and_no_shard_is_too_large(shard_bytes):
    generator = np.random.default_rng(0)
    contents = contents_of()
    lengths = generator.integers(1, 90, 40).tolist()
    slots = [int(length * 0.6) for length in lengths]
    shards = plan_shards(lengths, slots, contents, shard_bytes)
    assert [document for shard in shards for document in shard.documents] == list(range(40))
    for shard in shards:
        own = [sum(sizes[document] for document in shard.documents) for sizes in (lengths, slots)]
        assert own == [shard.num_tokens, shard.num_slots]
        assert shard.num_documents == 1 or own[0] * contents.bytes_per_token + own[1] * contents.bytes_per_slot <= shard_bytes


def test_fp8_errs_by_at_most_a_sixteenth_and_states_of_any_size_survive():
    states = torch.randn(50, 24) * torch.logspace(-6, 6, 50)[:, None]
    states[7] = 0
    stored, scale = to_stored(states, "float8_e4m3", num_scales=3)
    assert stored.dtype == torch.float8_e4m3fn and scale.shape == (50, 3)
    back = from_stored(stored, scale).float()
    largest = states.unflatten(1, (3, 8)).abs().amax(-1, keepdim=True)
    # half of the last of three bits, bf16's rounding, and half of the smallest step, 2**-9 of 448, of a part's largest
    error = (back - states).unflatten(1, (3, 8)).abs()
    assert (error <= states.unflatten(1, (3, 8)).abs() * (2**-4 + 2**-8) + largest * 2**-10 / 448).all()
    assert not back[7].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_precisions_are_kept_as_they_are(dtype):
    states = torch.randn(5, 6, dtype=DTYPES[dtype])
    assert torch.equal(from_stored(*to_stored(states, dtype, 3)), states)


def test_a_checksum_sees_a_single_bit():
    parts = [np.arange(7, dtype=np.int32), np.zeros((3, 2), np.float32)]
    before = document_checksum(parts)
    parts[1].view(np.uint8)[2, 3] ^= 1
    assert document_checksum(parts) != before


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    manifest = Manifest(
        contents_of(), "abc", (Shard("a.safetensors", 0, 2, 9, 3, "f" * 16), Shard("b.safetensors", 2, 1, 4, 2))
    )
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    assert Manifest.read(tmp_path) == manifest and not manifest.is_complete
    assert manifest.contents.differences(dataclasses.replace(manifest.contents, target="elsewhere")) == []
    assert manifest.contents.differences(contents_of("float32")) == ["dtype: 'float32', now 'bfloat16'"]


def test_a_manifest_of_before_quantised_activations_is_of_none(tmp_path):
    values = json.loads(Manifest(contents_of(), "abc", ()).to_json())
    assert values["contents"].pop("fp8_activations") is False
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    contents = Manifest.read(tmp_path).contents
    quantised = dataclasses.replace(contents, fp8_activations=True)
    assert contents == contents_of() and quantised.differences(contents) == ["fp8_activations: False, now True"]


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"version": 1}), json.dumps({"version": 99})])
def test_what_is_no_manifest_is_refused_by_name(text, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match="manifest.json"):
        Manifest.read(tmp_path)
    with pytest.raises(StoreError, match="capture_hidden_states"):
        Manifest.read(tmp_path / "nowhere")
