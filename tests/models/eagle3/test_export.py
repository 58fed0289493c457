"""The exported folder, as docs/formats.md has it."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.host.files import WriteError
from engine.models import draft_folder
from engine.models.draft_folder import load_vocab_map, save_vocab_map
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.export import export_draft, load_draft
from engine.models.eagle3.unroll import unroll
from engine.models.vocab_map import VocabMap
from tests.tiny import DRAFT_VOCAB, HIDDEN, VOCAB, make_draft, make_micro, make_test

VOCAB_MAP = VocabMap.most_frequent(torch.randint(9, (VOCAB,), generator=torch.Generator().manual_seed(3)), DRAFT_VOCAB)
EMBED_VD = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(4))
SHAPES = {
    "one layer": {},
    "EAGLE-3.1": {"fc_norm": True, "norm_output": True},
    "three layers": {"num_hidden_layers": 3},
    "narrower": {"hidden_size": 24},
    "wider": {"hidden_size": 40},
}


def draft_with(**changes: object) -> Eagle3Draft:
    torch.manual_seed(1)
    return Eagle3Draft(replace(make_draft().config, **changes))


def write(folder: Path, draft: Eagle3Draft, **changes: torch.Tensor | None) -> Path:
    """Export with some tensors changed; None leaves one out."""
    weights = {name: weight for name, weight in (draft.state_dict() | changes).items() if weight is not None}
    export_draft(folder, weights.items(), draft.config, VOCAB_MAP, EMBED_VD)
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_drafts_give_equal_bytes(shape, tmp_path):
    first = write(tmp_path / "first", draft_with(**SHAPES[shape]))
    draft = draft_with(**SHAPES[shape])
    backwards = reversed(list(draft.state_dict().items()))
    export_draft(tmp_path / "second", backwards, draft.config, VOCAB_MAP, EMBED_VD)
    assert digests(first) == digests(tmp_path / "second")
    assert set(digests(first)) == {"config.json", "model.safetensors"}


def test_a_draft_with_the_whole_vocabulary_has_no_tables_and_is_read_with_or_without_them(tmp_path):
    draft = draft_with(draft_vocab_size=VOCAB)
    every_token = VocabMap.whole(VOCAB)
    export_draft(tmp_path / "draft", draft.state_dict().items(), draft.config, every_token, EMBED_VD)
    weights = tmp_path / "draft" / "model.safetensors"
    tensors = load_file(weights)
    assert not {"d2t", "t2d"} & tensors.keys(), "vLLM refuses them"
    assert torch.equal(load_draft(tmp_path / "draft", EMBED_VD).vocab_map.target_ids_U, every_token.target_ids_U)
    tables = {"d2t": every_token.d2t, "t2d": every_token.in_draft_V}
    save_file(tensors | tables, weights)
    assert torch.equal(load_draft(tmp_path / "draft", EMBED_VD).vocab_map.target_ids_U, every_token.target_ids_U)
    save_file(tensors | {"d2t": every_token.d2t}, weights)
    with pytest.raises(ValueError, match="t2d must have"):
        load_draft(tmp_path / "draft", EMBED_VD)


def test_the_listing_is_that_of_a_server_s_checkpoint(tmp_path):
    tensors = load_file(write(tmp_path / "draft", draft_with(dtype="bfloat16")) / "model.safetensors")
    layer = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    layer += ["hidden_norm", "input_layernorm", "post_attention_layernorm"]
    weights = {f"midlayer.{name}.weight" for name in layer} | {"fc.weight", "norm.weight", "lm_head.weight"}
    assert set(tensors) == weights | {"d2t", "t2d"}
    assert {tensors[name].dtype for name in weights} == {torch.bfloat16}
    assert (tensors["d2t"].dtype, tensors["d2t"].shape) == (torch.int64, (DRAFT_VOCAB,))
    assert (tensors["t2d"].dtype, tensors["t2d"].shape) == (torch.bool, (VOCAB,))
    assert torch.equal(tensors["t2d"].nonzero().flatten(), tensors["d2t"] + torch.arange(DRAFT_VOCAB))
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["eagle_config"] == {"eagle_aux_hidden_state_layer_ids": [1, 2, 3], "use_aux_hidden_state": True}
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 3, 4], "vLLM captures the inputs of these layers"
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["tie_word_embeddings"] is False


def test_deeper_layers_hold_their_norm_under_both_servers_names(tmp_path):
    draft = draft_with(num_hidden_layers=3)
    for layer in draft.layers:
        layer.hidden_norm.weight.data.uniform_(0.5, 1.5)
    folder = write(tmp_path / "draft", draft)
    tensors = load_file(folder / "model.safetensors")
    for index in (1, 2):
        own_D = tensors[f"layers.{index}.input_layernorm.weight"]
        assert torch.equal(own_D, tensors[f"layers.{index}.hidden_norm.weight"]) and own_D.std() > 0
    assert not torch.equal(tensors["layers.0.input_layernorm.weight"], tensors["layers.0.hidden_norm.weight"])
    tensors["layers.2.input_layernorm.weight"] = torch.ones(HIDDEN)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.2\.input_layernorm\.weight differs.*vLLM"):
        load_draft(folder, embed_weight_VD=EMBED_VD)


@pytest.mark.parametrize(
    ("inner", "outer", "problem"),
    [
        ([1, 2, 3], [1, 2, 3], "must be one more"),
        ([1, 3, 2], None, "ascending order"),
        ([1, 2], None, "3 distinct layers"),
        ([1, 1, 2], None, "3 distinct layers"),
        (None, [0, 1, 2], "ascending order"),
    ],
)
def test_ids_by_which_a_server_would_capture_other_layers_are_refused(inner, outer, problem, tmp_path):
    folder = write(tmp_path / "draft", draft_with())
    config = json.loads((folder / "config.json").read_text())
    config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": inner} if inner else {}
    config["eagle_aux_hidden_state_layer_ids"] = outer
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(ValueError, match=problem):
        load_draft(folder, embed_weight_VD=EMBED_VD)


def test_ids_that_are_given_for_vllm_alone_are_understood(tmp_path):
    folder = write(tmp_path / "draft", draft_with())
    config = json.loads((folder / "config.json").read_text())
    del config["eagle_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_draft(folder, embed_weight_VD=EMBED_VD).model.config.aux_layers == (1, 2, 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_embedding_is_shipped_only_where_the_widths_differ(shape, tmp_path):
    draft = draft_with(**SHAPES[shape])
    tensors = load_file(write(tmp_path / "draft", draft) / "model.safetensors")
    assert "embed_projection.weight" not in tensors
    if draft.embed_projection is None:
        assert "embed_tokens.weight" not in tensors
    else:
        torch.testing.assert_close(tensors["embed_tokens.weight"], draft.embed(EMBED_VD).detach())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_reloaded_it_gives_the_same_logits(shape, dtype, tmp_path):
    draft = draft_with(**SHAPES[shape], dtype=dtype).to(getattr(torch, dtype)).requires_grad_(False)
    served = load_draft(write(tmp_path / "draft", draft), embed_weight_VD=EMBED_VD)
    assert served.model.config == draft.config
    assert torch.equal(served.vocab_map.target_ids_U, VOCAB_MAP.target_ids_U)
    assert not any(parameter.requires_grad for parameter in served.model.parameters())
    micro = make_micro(make_test(), seed=0, dtype=getattr(torch, dtype))
    if draft.embed_projection is not None:
        draft.embed_projection = None
    micro = replace(micro, embed_TD=served.embed(micro.batch.input_ids_T))
    for ours, reloaded in zip(unroll(draft, micro, 3), unroll(served.model, micro, 3), strict=True):
        assert torch.equal(draft.logits(ours), served.model.logits(reloaded))


def test_it_can_be_loaded_in_another_precision(tmp_path):
    served = load_draft(write(tmp_path / "draft", draft_with()), embed_weight_VD=EMBED_VD, dtype=torch.bfloat16)
    assert {p.dtype for p in served.model.parameters()} | {served.embed_weight_VD.dtype} == {torch.bfloat16}


BROKEN = {
    "missing": ({"fc.weight": None}, "missing ['fc.weight'], unknown []"),
    "misnamed": ({"norm.weight": None, "norm.w": torch.ones(HIDDEN)}, "missing ['norm.weight'], unknown ['norm.w']"),
    "misshapen": ({"fc.weight": torch.ones(HIDDEN, 5)}, f"fc.weight has shape [{HIDDEN}, 5], its config asks for [32, 96]"),
    "not a number": ({"norm.weight": torch.full((HIDDEN,), torch.nan)}, "norm.weight holds values that are not finite"),
    "infinite": ({"norm.weight": torch.full((HIDDEN,), torch.inf)}, "norm.weight holds values that are not finite"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_draft_is_refused_and_the_previous_export_stays(kind, tmp_path):
    changes, message = BROKEN[kind]
    folder = write(tmp_path / "draft", draft_with())
    before = digests(tmp_path)
    with pytest.raises(ValueError) as error:
        write(folder, make_draft(seed=9), **changes)
    assert message in str(error.value)
    assert digests(tmp_path) == before


def test_values_that_only_the_exported_precision_cannot_hold_are_refused(tmp_path):
    too_large = torch.full((HIDDEN,), 3e38) * 1.1
    assert too_large.isfinite().all()
    with pytest.raises(ValueError, match="norm.weight holds values that are not finite"):
        write(tmp_path / "draft", draft_with(dtype="float16"), **{"norm.weight": too_large})


def test_a_vocabulary_or_an_embedding_of_another_target_is_refused(tmp_path):
    draft = draft_with(hidden_size=24)
    weights = draft.state_dict()
    small = VocabMap.most_frequent(torch.arange(VOCAB), DRAFT_VOCAB - 1)
    other = VocabMap.most_frequent(torch.arange(VOCAB + 1), DRAFT_VOCAB)
    for vocab_map, message in ((small, "d2t must have 64 entries"), (other, "t2d must have 96 entries")):
        with pytest.raises(ValueError, match=message):
            export_draft(tmp_path / "draft", weights.items(), draft.config, vocab_map, EMBED_VD)
    with pytest.raises(ValueError, match=r"embedding has shape \[96, 31\], the draft's config asks for \[96, 32\]"):
        export_draft(tmp_path / "draft", weights.items(), draft.config, VOCAB_MAP, EMBED_VD[:, 1:])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["write_tensors", "write_json", "replace"])
def test_a_write_that_fails_leaves_the_previous_export(step, tmp_path, monkeypatch):
    folder = write(tmp_path / "draft", draft_with())
    before = digests(folder)

    def fail(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(draft_folder.os if step == "replace" else draft_folder, step, fail)
    with pytest.raises(WriteError, match="draft.* cannot be written: no space left on device"):
        write(folder, make_draft(seed=9))
    assert digests(folder) == before
    monkeypatch.undo()
    write(folder, make_draft(seed=9))
    assert digests(folder) != before
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_a_folder_that_cannot_be_loaded_is_refused_by_name(tmp_path):
    def loaded() -> None:
        load_draft(tmp_path / "draft", embed_weight_VD=EMBED_VD)

    with pytest.raises(ValueError, match="is not an exported draft: it has no model.safetensors"):
        loaded()
    folder = write(tmp_path / "draft", draft_with())
    weights = folder / "model.safetensors"
    config = folder / "config.json"
    whole = load_file(weights)
    text = config.read_text()
    for changes, message in (
        ({"fc.weight": None}, r"missing \['fc.weight'\]"),
        ({"midlayer.extra": torch.ones(1)}, r"unknown \['midlayer.extra'\]"),
        ({"lm_head.weight": torch.ones(3, HIDDEN)}, r"lm_head.weight has shape \[3, 32\]"),
        ({"d2t": None}, "d2t must have 64 entries"),
        ({"d2t": whole["d2t"] + 1}, "different draft vocabularies"),
        ({"embed_tokens.weight": torch.ones(VOCAB, 3)}, r"embedding has shape \[96, 3\]"),
    ):
        save_file({name: tensor for name, tensor in (whole | changes).items() if tensor is not None}, weights)
        with pytest.raises(ValueError, match=message):
            loaded()
    save_file(whole, weights)
    loaded()
    config.write_text(text[:-9])
    with pytest.raises(ValueError, match="config.json.*is not valid JSON"):
        loaded()
    config.unlink()
    with pytest.raises(ValueError, match="it has no config.json"):
        loaded()


def test_a_draft_that_shares_its_target_s_embedding_needs_the_right_one(tmp_path):
    folder = write(tmp_path / "draft", draft_with())
    with pytest.raises(ValueError, match="ships no embedding"):
        load_draft(folder, embed_weight_VD=None)
    with pytest.raises(ValueError, match=r"embedding has shape \[95, 32\]"):
        load_draft(folder, embed_weight_VD=EMBED_VD[1:])
    assert load_draft(write(tmp_path / "own", draft_with(hidden_size=24)), embed_weight_VD=None).embed_weight_VD.shape == (
        VOCAB,
        24,
    )


def test_a_vocabulary_map_survives_its_file(tmp_path):
    save_vocab_map(VOCAB_MAP, tmp_path / "map.safetensors")
    again = load_vocab_map(tmp_path / "map.safetensors")
    assert torch.equal(again.target_ids_U, VOCAB_MAP.target_ids_U) and torch.equal(again.in_draft_V, VOCAB_MAP.in_draft_V)


def test_a_draft_vocabulary_of_another_tokenizer_is_refused(tmp_path):
    path = tmp_path / "map.safetensors"
    save_vocab_map(VOCAB_MAP, path, {"tokenizer_hash": "abc", "coverage": 0.5})
    assert torch.equal(load_vocab_map(path, "abc").target_ids_U, VOCAB_MAP.target_ids_U)
    with pytest.raises(ValueError, match="counted with another tokenizer .abc, this one is def.*draft.vocab_map"):
        load_vocab_map(path, "def")
    save_vocab_map(VOCAB_MAP, path)
    with pytest.raises(ValueError, match="none that it names"):
        load_vocab_map(path, "def")
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is not a draft vocabulary"):
        load_vocab_map(path)
