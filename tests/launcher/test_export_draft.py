"""From a checkpoint to the folder a server loads."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaForCausalLM

from engine.config.block_sections import BLOCK_METHODS, BlockSection
from engine.config.recipe import dump_config
from engine.config.sections import Config, DraftSection, TargetSection
from engine.models.block_drafter.block_method import BlockMethod
from engine.models.draft_folder import save_vocab_map
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.draft_config import derive_draft_config
from engine.models.eagle3.export import load_draft
from engine.models.method_registry import make_method
from engine.models.vocab_map import VocabMap
from engine.target.configuration import load_target_config
from engine.target.frozen import FrozenTarget
from launcher import export_draft
from tests.distributed import ONE_THREAD, launch
from tests.tiny_target import AUX_LAYERS, HIDDEN, WORDS

ROOT = Path(__file__).resolve().parents[2]
VOCAB_MAP = VocabMap.most_frequent(torch.arange(len(WORDS)), 40)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def main(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["export_draft.py", *map(str, arguments)])
    export_draft.main()


@pytest.fixture
def make_run(tiny_target, tmp_path, monkeypatch):
    """An output folder whose checkpoints hold, as it were, the weights of a seed that is the step's number."""

    def make(target: Path = tiny_target, dtype: str = "float32", **options: object) -> Path:
        run = tmp_path / "run"
        section = TargetSection(path=str(target), dtype=dtype, aux_layers=AUX_LAYERS)
        draft = DraftSection(vocab_size=40, **options)
        for step in (2, 10):
            (run / "checkpoints" / f"step_{step}").mkdir(parents=True)
            facts = {"ranks": 1, "step": step, "data": {}, "options": {}}
            (run / "checkpoints" / f"step_{step}" / "run.json").write_text(json.dumps(facts))
        (run / "checkpoints" / "latest").write_text("step_10")
        (run / "config.yaml").write_text(dump_config(Config(target=section, draft=draft)))
        save_vocab_map(VOCAB_MAP, run / "vocab_map.safetensors")
        config = derive_draft_config(AutoConfig.from_pretrained(target), draft, AUX_LAYERS)

        def weights(folder: Path, tag: str) -> dict[str, torch.Tensor]:
            assert folder == run / "checkpoints"
            torch.manual_seed(int(tag.removeprefix("step_")))
            return dict(Eagle3Draft(config).state_dict())

        monkeypatch.setattr(export_draft, "consolidated_weights", weights)
        return run

    return make


def test_the_newest_checkpoint_is_exported_unless_one_is_named(make_run, monkeypatch, capsys):
    run = make_run()
    main(monkeypatch, "--run", run)
    newest = digests(run / "draft")
    assert "step_10" in capsys.readouterr().out
    main(monkeypatch, "--run", run, "--tag", "step_2")
    older = digests(run / "draft")
    main(monkeypatch, "--run", run, "--tag", "step_10", "--output", run / "elsewhere" / "draft")
    assert newest == digests(run / "elsewhere" / "draft") != older
    assert load_draft(run / "draft", embed_weight_VD=torch.zeros(len(WORDS), HIDDEN)).model.config.aux_layers == AUX_LAYERS


@pytest.mark.parametrize("shards", ["one file", "several files"])
def test_a_draft_of_another_width_ships_the_target_s_embedding_read_alone(shards, make_run, tiny_target, tmp_path, monkeypatch):
    model = LlamaForCausalLM.from_pretrained(tiny_target)
    target = tmp_path / "target"
    model.save_pretrained(target, max_shard_size="20KB" if shards == "several files" else "1GB")
    assert (len(list(target.glob("*.safetensors"))) > 1) == (shards == "several files")
    monkeypatch.setattr(export_draft.FrozenTarget, "load", lambda *arguments: pytest.fail("the whole target was loaded"))
    run = make_run(target, hidden_size=12)
    main(monkeypatch, "--run", run)
    shipped_VD = load_file(run / "draft" / "model.safetensors")["embed_tokens.weight"]
    projection = export_draft.consolidated_weights(run / "checkpoints", "step_10")["embed_projection.weight"].bfloat16().float()
    expected_VD = model.get_input_embeddings().weight.detach() @ projection.T
    assert torch.equal(shipped_VD, expected_VD.bfloat16())


def test_an_embedding_of_an_unknown_name_is_found_by_loading_the_target(make_run, tiny_target, tmp_path, monkeypatch):
    target = tmp_path / "target"
    model = LlamaForCausalLM.from_pretrained(tiny_target)
    model.config.num_nextn_predict_layers = 1
    model.save_pretrained(target)
    weights = load_file(target / "model.safetensors")
    section = TargetSection(path=str(target), dtype="bfloat16", aux_layers=AUX_LAYERS)
    config = derive_draft_config(AutoConfig.from_pretrained(target), DraftSection(vocab_size=40), AUX_LAYERS)
    alone = export_draft.read_embedding(section, config)
    assert torch.equal(alone, weights["model.embed_tokens.weight"].bfloat16())
    # As DeepSeek-V3 does, the MTP layer has an embedding of its own; only the model tells which of the two is the target's.
    twin = f"model.layers.{model.config.num_hidden_layers}.embed_tokens.weight"
    save_file(weights | {twin: torch.zeros(len(WORDS), HIDDEN)}, target / "model.safetensors", {"format": "pt"})
    assert torch.equal(export_draft.read_embedding(section, config), alone)


def test_the_format_of_speculators_has_its_own_folder(make_run, tiny_target, monkeypatch, capsys):
    run = make_run()
    main(monkeypatch, "--run", run)
    main(monkeypatch, "--run", run, "--format", "vllm", "--output", run / "for_vllm")
    for_servers = digests(run / "draft")
    assert digests(run / "for_vllm") == for_servers, "SGLang and vLLM read one folder"
    main(monkeypatch, "--run", run, "--format", "speculators")
    assert "ready for speculators and vLLM" in capsys.readouterr().out
    assert digests(run / "draft") == for_servers
    exported = json.loads((run / "draft_speculators" / "config.json").read_text())
    verifier = exported["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": str(tiny_target), "architectures": ["LlamaForCausalLM"]}
    own_VD = LlamaForCausalLM.from_pretrained(tiny_target).get_input_embeddings().weight
    shipped_VD = load_file(run / "draft_speculators" / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(shipped_VD, own_VD.bfloat16())


def test_a_draft_of_another_width_cannot_be_written_for_speculators(make_run, monkeypatch):
    run = make_run(hidden_size=12)
    with pytest.raises(SystemExit, match="draft.hidden_size=12 differs from the target's 16"):
        main(monkeypatch, "--run", run, "--format", "speculators")
    assert not (run / "draft_speculators").exists()


def test_what_is_missing_is_named(make_run, tmp_path, monkeypatch):
    def refused(*arguments: object, message: str) -> None:
        with pytest.raises(SystemExit, match=message):
            main(monkeypatch, *arguments)

    run = make_run()
    refused("--run", tmp_path / "nothing", message="nothing is no folder")
    refused("--run", run / "checkpoints", message="not the output_dir of a training run: it has no config.yaml")
    refused("--run", run, "--tag", "step_3", message="holds no checkpoint step_3; --tag can be one of step_2, step_10$")
    (run / "precious").mkdir()
    (run / "precious" / "notes.txt").write_text("mine")
    refused("--run", run, "--output", run / "precious", message="precious exists and is no exported draft")
    assert (run / "precious" / "notes.txt").read_text() == "mine"
    (run / "vocab_map.safetensors").rename(run / "moved")
    refused("--run", run, message="it has no vocab_map.safetensors")
    (run / "moved").rename(run / "vocab_map.safetensors")
    (run / "checkpoints").rename(run / "gone")
    refused("--run", run, message="checkpoints holds no checkpoint; train with checkpoint.every_steps above 0")
    assert not (run / "draft").exists()


def test_a_checkpoint_of_another_shape_is_refused(make_run, tiny_target, monkeypatch):
    run = make_run()
    section = TargetSection(path=str(tiny_target), aux_layers=AUX_LAYERS)
    (run / "config.yaml").write_text(dump_config(Config(target=section, draft=DraftSection(vocab_size=39))))
    with pytest.raises(SystemExit, match=r"lm_head.weight has shape \[40, 16\], its config asks for \[39, 16\]"):
        main(monkeypatch, "--run", run)


@pytest.mark.parametrize("name", BLOCK_METHODS)
def test_a_checkpoint_of_a_block_drafter_gives_a_folder_without_the_target_s_tables(name, make_run, tiny_target, monkeypatch):
    run = make_run()
    section = TargetSection(path=str(tiny_target), dtype="float32", aux_layers=AUX_LAYERS)
    own = {"dspark": {"markov_rank": 6}, "dflash2": {"conv_group": 8, "selector_rank": 5, "selector_top_k": 7}}
    block = BlockSection(size=4, mask_token_id=5, **own.get(name, {}))
    recipe = Config(target=section, draft=DraftSection(method=name, num_layers=2), block=block)
    (run / "config.yaml").write_text(dump_config(recipe))
    method = make_method(recipe)
    assert isinstance(method, BlockMethod)
    draft = method.draft_type(method.derive_config(load_target_config(section), AUX_LAYERS))
    draft.draw_weights()
    monkeypatch.setattr(export_draft, "consolidated_weights", lambda folder, tag: dict(draft.state_dict()))
    monkeypatch.setattr(export_draft, "read_embedding", lambda *arguments: pytest.fail("the embedding is the target's"))
    main(monkeypatch, "--run", run)
    target = FrozenTarget.load(section, torch.device("cpu"), AUX_LAYERS)
    loaded = method.load(run / "draft", target, torch.float32).model.state_dict()
    expected = {name: weight.bfloat16().float() for name, weight in draft.state_dict().items()}
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)
    card = (run / "draft" / "README.md").read_text()
    assert f"which draft {draft.config.num_predictions} tokens" in card and "| mask token | 5 |" in card
    assert f'"num_speculative_tokens": {draft.config.num_predictions}' in card


# DSpark without the loss of its confidence head, which it then does not have.
BLOCK_RUN = {
    "draft.method": "dspark",
    "block.size": 5,
    "block.markov_rank": 4,
    "block.mask_token_id": 0,
    "block.anchors": "null",
    "objective.confidence": 0,
}


RUNS = [("embedded.yaml", {"draft.vocab_size": 40, "ttt.steps": 3}), ("embedded-dflash.yaml", BLOCK_RUN)]


@pytest.mark.parametrize("method", RUNS, ids=["eagle3", "dspark"])
def test_a_real_checkpoint_gives_the_files_the_run_itself_wrote(method, tiny_target, tiny_corpus, tmp_path):
    run = tmp_path / "run"
    options = {
        "output_dir": run,
        "max_steps": 2,
        "checkpoint.every_steps": 2,
        "evaluation.num_prompts": 0,
        "data.train": f"[{tiny_corpus.train}]",
        "data.held_out": f"[{tiny_corpus.held_out}]",
        "data.max_tokens": 64,
        "target.path": tiny_target,
        "target.aux_layers": list(AUX_LAYERS),
    }
    recipe, method_options = method
    options |= method_options
    overrides = [f"{key}={value}" for key, value in options.items()] + [ONE_THREAD]
    train = ["launcher/train.py", "--ds_config", "ds_configs/zero2.json", "--recipe", f"launcher/recipes/{recipe}", *overrides]
    export = ["launcher/export_draft.py", "--run", str(run), "--output", str(tmp_path / "again")]
    for command in (train, export):
        done = launch(command)
        assert done.returncode == 0, done.stdout + done.stderr
    assert digests(tmp_path / "again") == digests(run / "draft")
