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


def card(tmp_path, method: str = "eagle3", measured: bool = True) -> str:
    data = DataSection(train=("/data/chat.jsonl",), held_out=("/data/held|out.jsonl",))
    draft = DraftSection(method=method) if method == "eagle3" else DraftSection()
    config = Config(target=TargetSection(path="org/model", revision="abc"), data=data, draft=draft)
    (tmp_path / "config.yaml").write_text(dump_config(config).replace("method: eagle3", f"method: {method}"))
    (tmp_path / "summary.json").write_text(json.dumps({"after": REPORT, "prompt_lookup": REPORT | {"acceptance_length": 1.5}}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 900, "loss": 1.0}\n')
    folder = tmp_path / "draft"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(DRAFT))
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
    assert "24 held-out prompts, 1269 tokens" in rest and "| prompt lookup, without a draft | 1.50 ± 0.17 |" in rest
    recipe = rest.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe)["target"]["path"] == "org/model"


def test_its_commands_serve_the_target_with_both_servers(tmp_path):
    commands = [shlex.split(block.split("\n```")[0]) for block in card(tmp_path).split("```bash\n")[1:]]
    assert [command[:3] for command in commands] == [
        ["python", "-m", "sglang.launch_server"],
        ["vllm", "serve", "org/model"],
        ["python", "-m", "sglang.launch_server"],
    ]
    assert "## Serving" not in card(tmp_path, method="mine"), "no server knows the method of a plugin"


def test_acceptance_that_was_measured_on_another_draft_is_left_out(tmp_path):
    text = card(tmp_path, measured=False)
    assert "It was not measured" in text and "2.31" not in text
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match="no config.yaml"):
        write_model_card(tmp_path, tmp_path / "draft")
