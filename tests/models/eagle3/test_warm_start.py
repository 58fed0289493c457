"""A draft starts from another one's weights, by name, by token, whichever program wrote them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.host.weight_index import INDEX
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.export import export_draft
from engine.models.eagle3.warm_start import HEAD, start_from_draft
from engine.models.vocab_map import VocabMap
from tests.test_trainer import arguments, run
from tests.tiny import make_draft

VOCAB = 96
OTHER = VocabMap.most_frequent(torch.arange(VOCAB), 64)  # the tokens 32 to 95
OWN = VocabMap.most_frequent(-torch.arange(VOCAB) + VOCAB, 64)  # the tokens 0 to 63


@pytest.fixture
def other(tmp_path) -> tuple[Path, Eagle3Draft]:
    """An exported draft, and what it was before."""
    draft = make_draft(seed=3)
    folder = tmp_path / "other"
    export_draft(folder, draft.state_dict().items(), draft.config, OTHER, None)
    return folder, draft


def rewrite(folder: Path, rename, pickled: bool = False) -> None:
    weights = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")


def in_two_files(folder: Path) -> None:
    """Write the weights in two files with an index, as Transformers writes large models."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + (name == HEAD)}-of-00002.safetensors" for name in weights}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


LAYOUTS = {
    "this project, SpecForge": (lambda name: name, False),
    "vLLM": (lambda name: name.replace("midlayer.", "layers.0."), False),
    "EAGLE": (lambda name: name, True),
    "a wrapped module": (lambda name: "module." + name, False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_found_under_other_names_and_the_head_by_token(layout, other, tmp_path):
    folder, trained = other
    rewrite(folder, *LAYOUTS[layout])
    draft = make_draft(seed=8)
    before = draft.lm_head.weight.detach().clone()
    line = start_from_draft(draft, folder, OWN)
    assert "32 of 64 tokens of the LM head were known" in line
    for name, weight in draft.state_dict().items():
        expected = trained.state_dict()[name]
        if name != "lm_head.weight":
            assert torch.equal(weight, expected), name
            continue
        assert torch.equal(weight[:32], before[:32]), "tokens that the other draft does not have"
        assert torch.equal(weight[32:], expected[:32]), "the tokens 32 to 63, which are its first rows"


def test_a_draft_over_the_whole_vocabulary_needs_no_table(other):
    folder, _ = other
    weights = load_file(folder / "model.safetensors")
    whole = torch.randn(VOCAB, 32)
    kept = {name: tensor for name, tensor in weights.items() if name not in ("d2t", "t2d")}
    save_file(kept | {"lm_head.weight": whole}, folder / "model.safetensors")
    draft = make_draft(seed=8)
    start_from_draft(draft, folder, OWN)
    assert torch.equal(draft.lm_head.weight, whole[:64])
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(ValueError, match="64 rows in its lm_head and no d2t"):
        start_from_draft(draft, folder, OWN)


def test_what_does_not_fit_is_named(other, tmp_path):
    folder, _ = other
    with pytest.raises(ValueError, match="holds neither model.safetensors nor pytorch_model.bin"):
        start_from_draft(make_draft(), tmp_path, OWN)
    with pytest.raises(ValueError, match="needs a draft as wide as its target"):
        start_from_draft(make_draft(hidden_size=24), folder, OWN)
    with pytest.raises(ValueError, match="fc_norm.0.weight is missing"):
        start_from_draft(Eagle3Draft(replace(make_draft().config, fc_norm=True)), folder, OWN)
    with pytest.raises(ValueError, match="another vocabulary than 40 tokens"):
        start_from_draft(make_draft(), folder, VocabMap.most_frequent(torch.arange(40), 40))
    config = json.loads((folder / "config.json").read_text())
    for key, value in (("norm_before_residual", True), ("norm_output", True), ("architectures", ["LlamaForCausalLM2"])):
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=key):
            start_from_draft(make_draft(), folder, OWN)
    config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [0, 1, 2]
    config["eagle_aux_hidden_state_layer_ids"] = [1, 2, 3]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"reads the target's layers \[0, 1, 2\], .*set target.aux_layers=\[0, 1, 2\]"):
        start_from_draft(make_draft(), folder, OWN)


def test_weights_in_several_files_are_read(other):
    folder, before = other
    in_two_files(folder)
    draft = make_draft(seed=8)
    start_from_draft(draft, folder, OTHER)
    for name, weight in before.named_parameters():
        assert torch.equal(draft.get_parameter(name), weight)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="draft.init_from: .*model-00002-of-00002.safetensors is missing"):
        start_from_draft(draft, folder, OTHER)


@pytest.mark.parametrize(
    ("name", "problem"),
    [("model.safetensors", "cannot be read"), ("pytorch_model.bin", "is damaged or holds more than tensors")],
)
def test_a_damaged_file_is_one_clear_error(name, problem, other):
    folder, _ = other
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cut off")
    with pytest.raises(ValueError, match=f"draft.init_from: .*{name} {problem}"):
        start_from_draft(make_draft(), folder, OWN)


def test_a_run_that_starts_from_a_draft_begins_with_its_acceptance(tmp_path, tiny_target, tiny_corpus):
    first = tmp_path / "first"
    run([*arguments(first, tiny_target, tiny_corpus), "epochs=3"])
    second = tmp_path / "second"
    printed = run([*arguments(second, tiny_target, tiny_corpus), "max_steps=1", f"draft.init_from={first / 'draft'}"])
    assert "48 of 48 tokens of the LM head were known" in printed
    after = json.loads((first / "summary.json").read_text())["after"]["acceptance_length"]
    assert json.loads((second / "summary.json").read_text())["before"]["acceptance_length"] == pytest.approx(after, abs=0.05)
