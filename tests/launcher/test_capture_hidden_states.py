"""Two commands: a capture on two ranks, then a draft trained from it without the target, as if the target had been there."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.hidden_states.store_reader import open_store
from tests.distributed import ONE_THREAD, launch
from tests.evaluation.test_history import lines_of as evaluations
from tests.test_trainer import arguments, metrics, run
from tests.tiny_target import TinyCorpus


def capture(store: Path, target: Path, corpus: TinyCorpus, *overrides: str) -> list[str]:
    """A capture; without held-out data, the embedded corpus would be written, which takes seconds."""
    files = [f"data.train={corpus.train}", f"data.held_out={corpus.held_out}"]
    options = [f"target.store={store}", f"target.path={target}", "target.aux_layers=[0,1,3]", *files]
    return ["launcher/capture_hidden_states.py", *options, "data.max_tokens=40", ONE_THREAD, *overrides]


def test_a_target_that_ranks_share_captures_the_same(tmp_path, tiny_target, tiny_corpus):
    stores = []
    for name, options in (("alone", []), ("shared", ["parallel.tp_size=2"])):
        stores.append(tmp_path / name)
        run([*capture(stores[-1], tiny_target, tiny_corpus), *options], ranks=2)
    alone, shared = (open_store(store, skip_bad=False).documents for store in stores)
    for one, other in zip(alone.shards, shared.shards, strict=True):
        assert one.shard.num_tokens == other.shard.num_tokens
        for name in ("input_ids", "slots", "argmax"):
            assert np.array_equal(one.rows(name, 0, None), other.rows(name, 0, None))
        for name in ("aux", "last_hidden", "lse"):
            np.testing.assert_allclose(one.rows(name, 0, None), other.rows(name, 0, None), rtol=1e-4, atol=1e-5)


def test_offline_training_is_online_training(tmp_path, tiny_target, tiny_corpus):
    target = shutil.copytree(tiny_target, tmp_path / "target")
    evaluating = ["evaluation.every_steps=3", "evaluation.best_by=loss"]
    online = arguments(tmp_path / "online", target, tiny_corpus, "max_steps=6", *evaluating)
    run(online)
    held_out = tmp_path / "held_out"
    run(capture(held_out, target, TinyCorpus(train=tiny_corpus.held_out, held_out=tiny_corpus.train)))
    printed = run(capture(tmp_path / "store", target, tiny_corpus), ranks=2)
    assert (
        "40 documents, 600 tokens" in printed and "KiB per token" in printed and f"target.store={tmp_path / 'store'}" in printed
    )
    (target / "model.safetensors").unlink()  # nobody needs it any more
    offline = [f"target.store={tmp_path / 'store'}", f"output_dir={tmp_path / 'offline'}", "data.max_tokens=40", ONE_THREAD]
    options = ["draft.vocab_size=48", "ttt.steps=3", "max_steps=6", "data.train=gone.jsonl", *evaluating]
    options += [f"evaluation.store={held_out}", f"data.held_out={tiny_corpus.held_out}"]
    printed = run(["launcher/train.py", "--ds_config", "ds_configs/zero3.json", *offline, *options])
    assert "the target itself is not loaded" in printed
    ours = metrics(tmp_path / "offline")
    theirs = metrics(tmp_path / "online")
    assert len(ours) == 6
    for line, expected in zip(ours, theirs, strict=True):
        assert line["loss_per_step"] == pytest.approx(expected["loss_per_step"], rel=1e-3)
    ours, theirs = (evaluations(tmp_path / name) for name in ("offline", "online"))
    assert [line["step"] for line in ours] == [3, 6]
    for line, expected in zip(ours, theirs, strict=True):
        assert line["held_out_loss_per_step"] == pytest.approx(expected["held_out_loss_per_step"], rel=1e-3)
        assert line["acceptance_length"] is None
    exported, expected = (load_file(tmp_path / name / "draft" / "model.safetensors") for name in ("offline", "online"))
    for name, tensor in exported.items():
        assert (tensor.float() - expected[name].float()).norm() <= 1e-2 * expected[name].float().norm(), name
    config = json.loads((tmp_path / "offline" / "draft" / "config.json").read_text())
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 3]
    contents = json.loads((tmp_path / "store" / "manifest.json").read_text())["contents"]
    recorded = ("tokenizer_hash", "template_hash", "target_identity")
    assert config["draftspeed"] == {name: contents[name] for name in recorded}
    assert config["draftspeed"] == json.loads((tmp_path / "online" / "draft" / "config.json").read_text())["draftspeed"]


@pytest.mark.parametrize(
    "overrides, problem",
    [
        ([], "target.store = null: expected the folder"),
        (["target.store={tmp}/file"], "expected the folder that the store is to be written to"),
        (["target.store={tmp}/x", "data.train=nowhere.jsonl"], "data.train = .*nowhere.jsonl.*: no such file"),
        (["target.stor={tmp}/x"], "target.store"),
        (["target.store=/proc/x"], "/proc/x"),
    ],
)
def test_a_wrong_option_is_named_before_anything_is_loaded(overrides, problem, tmp_path):
    (tmp_path / "file").touch()
    result = launch(["launcher/capture_hidden_states.py", *(text.format(tmp=tmp_path) for text in overrides)])
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert re.search(problem, result.stderr), result.stderr


def test_training_from_a_folder_that_is_no_store_ends_with_one_line(tmp_path):
    command = ["launcher/train.py", "--ds_config", "ds_configs/zero3.json", f"target.store={tmp_path}"]
    result = launch([*command, f"output_dir={tmp_path / 'out'}"])
    assert result.returncode == 1
    assert "manifest.json" in result.stderr.splitlines()[-1] and "capture_hidden_states.py" in result.stderr


def test_the_draft_vocabulary_may_be_the_target_s_likeliest_tokens_or_an_earlier_run_s(tmp_path, tiny_target, tiny_corpus):
    run(capture(tmp_path / "store", tiny_target, tiny_corpus))
    train = ["launcher/train.py", "--ds_config", "ds_configs/zero3.json", f"target.store={tmp_path / 'store'}"]
    train += [
        "data.train=gone.jsonl",
        f"data.held_out={tiny_corpus.held_out}",
        "evaluation.num_prompts=0",
        "data.max_tokens=40",
        ONE_THREAD,
    ]
    train += ["draft.vocab_size=20", "ttt.steps=2", "max_steps=1"]
    printed = run([*train, "draft.vocab_from=argmax", f"output_dir={tmp_path / 'a'}"])
    assert "of the target's most likely" in printed
    counts_V = torch.from_numpy(open_store(tmp_path / "store", skip_bad=False).documents.count_argmax(64))
    vocabulary = load_file(tmp_path / "a" / "vocab_map.safetensors")
    chosen_U = vocabulary["t2d"].nonzero().flatten()
    assert 3 in chosen_U, "the end of a turn, whatever is counted"
    others_V = counts_V.clone().index_fill(0, chosen_U, -1)
    assert sorted(counts_V[chosen_U].tolist())[3:] and counts_V[chosen_U].sum() >= 0.5 * counts_V.sum()
    assert others_V.max() <= counts_V[[token for token in chosen_U.tolist() if token > 3]].min()
    run([*train, f"draft.vocab_map={tmp_path / 'a' / 'vocab_map.safetensors'}", f"output_dir={tmp_path / 'b'}"])
    assert torch.equal(load_file(tmp_path / "b" / "vocab_map.safetensors")["t2d"], vocabulary["t2d"])
