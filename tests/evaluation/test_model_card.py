"""The model card says of a draft what its run's folder says, and no more."""

import json
import shlex

import pytest
import yaml

from engine.config.recipe import dump_config
from engine.config.sections import Config, DataSection, DraftSection, TargetSection
from engine.evaluation.model_card import write_model_card

REPORT = {"acceptance_length": 2.314, "confidence": 0.17, "acceptance_per_depth": [0.54, 0.6, None], "num_prompts": 24}
REPORT["num_tokens"] = 1269
DRAFT = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "draft_vocab_size": 32000,
    "vocab_size": 128256,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 15, 28]},
}


BLOCK = {
    "architectures": ["Qwen3DSparkModel"],
    "num_hidden_layers": 5,
    "block_size": 7,
    "mask_token_id": 151669,
    "markov_head_type": "vanilla",
    "markov_rank": 256,
    "target_layer_ids": [1, 9, 17, 25, 33],
}


def card(tmp_path, method: str = "eagle3", measured: bool = True, exported: dict = DRAFT) -> str:
    data = DataSection(train=("/data/chat.jsonl",), held_out=("/data/held|out.jsonl",))
    draft = DraftSection(method=method) if method == "eagle3" else DraftSection()
    config = Config(target=TargetSection(path="org/model", revision="abc"), data=data, draft=draft)
    (tmp_path / "config.yaml").write_text(dump_config(config).replace("method: eagle3", f"method: {method}"))
    (tmp_path / "summary.json").write_text(json.dumps({"after": REPORT, "prompt_lookup": REPORT | {"acceptance_length": 1.5}}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 900, "loss": 1.0}\n')
    folder = tmp_path / "draft"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(exported))
    (folder / "model.safetensors").touch()
    write_model_card(tmp_path, folder, measured)
    return (folder / "README.md").read_text()


def test_it_names_target_data_recipe_and_acceptance(tmp_path):
    text = card(tmp_path)
    front, rest = text.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front) == {"base_model": "org/model", "tags": ["speculative-decoding", "eagle3", "draftspeed"]}
    assert "| target | org/model, revision abc |" in rest and "| target layers read | 1, 15, 28 |" in rest
    assert "| training data | chat.jsonl |" in rest and "| held-out data | held/out.jsonl |" in rest
    assert "| draft vocabulary | 32000 of 128256 tokens |" in rest and "| optimizer steps | 900 |" in rest
    assert "2.31 ± 0.17 tokens per target forward (5 steps, topk 1)" in rest and "54% 60%" in rest
    assert "24 prompts of held/out.jsonl, 1269 tokens" in rest and "| prompt lookup, without a draft | 1.50 ± 0.17 |" in rest
    recipe = rest.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe)["target"]["path"] == "org/model"


def test_its_commands_serve_the_target_with_both_servers(tmp_path):
    commands = [shlex.split(block.split("\n```")[0]) for block in card(tmp_path).split("```bash\n")[1:]]
    assert [command[:3] for command in commands] == [
        ["python", "-m", "sglang.launch_server"],
        ["vllm", "serve", "org/model"],
        ["python", "-m", "sglang.launch_server"],
    ]
    plugin = DRAFT | {"architectures": ["IndependentHeads"]}
    assert "## Serving" not in card(tmp_path, method="mine", exported=plugin), "no server knows the method of a plugin"


def test_the_card_of_a_block_drafter_has_its_own_facts_and_commands(tmp_path):
    text = card(tmp_path, "dspark", exported=BLOCK)
    assert "| target layers read | 1, 9, 17, 25, 33 |" in text and "| mask token | 151669 |" in text
    assert "| block | 7 rows, which draft 7 tokens |" in text and "| Markov head | vanilla, rank 256 |" in text
    assert "draft vocabulary" not in text and "| loss |" not in text and "topk" not in text.split("## Recipe")[0]
    assert "with 5 of the 7 tokens of a block" in text, "evaluation.num_steps is 5"
    assert "--speculative-algorithm DSPARK" in text and '"num_speculative_tokens": 7' in text
    gated = card(tmp_path, "dspark", exported=BLOCK | {"markov_head_type": "gated"})
    assert "vllm serve" not in gated and "vanilla Markov head only" in gated
    nested = {"mask_token_id": 4, "target_layer_ids": [2, 3], "block_size": 6}
    flash = card(tmp_path, "dflash", exported={"architectures": ["DFlashDraftModel"], "dflash_config": nested})
    assert "| block | 6 rows, which draft 5 tokens |" in flash and "| target layers read | 2, 3 |" in flash
    assert "of the 5 tokens of a block" not in flash, "all of them were measured"


def test_a_draft_in_the_format_of_speculators_is_served_by_vllm_alone(tmp_path):
    exported = {
        "architectures": ["Eagle3DraftModel"],
        "draft_vocab_size": 32000,
        "speculators_config": {},
        "transformer_layer_config": {"vocab_size": 128256},
        "eagle_aux_hidden_state_layer_ids": [2, 16, 29],
    }
    text = card(tmp_path, exported=exported)
    assert "| target layers read | 1, 15, 28 |" in text and "| draft vocabulary | 32000 of 128256 tokens |" in text
    assert "vllm serve THIS_FOLDER\n" in text and "vllm serve org/model --spec" in text and "sglang" not in text


def test_acceptance_that_was_measured_on_another_draft_is_left_out(tmp_path):
    text = card(tmp_path, measured=False)
    assert "It was not measured" in text and "2.31" not in text
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match="no config.yaml"):
        write_model_card(tmp_path, tmp_path / "draft")
