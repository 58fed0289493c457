"""Recipes and overrides: what is accepted, what is refused, and what the refusal says."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from engine.config.recipe import describe_options, dump_config, load_config
from engine.config.sections import DRAFT_METHODS, EAGLE3, OPTIONS, SECTIONS, Config, DataSection, DraftSection
from engine.config.strict import ConfigError, as_yaml, option_type, type_name
from engine.models.method_registry import make_method

# override -> words that its one-line message must contain
REFUSED_OVERRIDES = {
    "ttt.stepz=7": ["ttt.stepz = 7", "unknown", "'ttt.steps'"],
    "tt.steps=7": ["tt.steps", "'ttt.steps'"],
    "ttt.max_tokens=512": ["ttt.max_tokens = 512", "'data.max_tokens'"],
    "max_token=512": ["'data.max_tokens'"],
    "draft.vocabsize=100": ["'draft.vocab_size'"],
    "output_dirr=x": ["'output_dir'"],
    "zeroo.x=1": ["unknown", "valid are target, data, prepare, regenerate, draft"],
    "ttt.qqqq=1": ["valid are ttt.steps, ttt.mask_alignment"],
    "block.anchor_share=0": ["block.anchor_share = 0", "above 0"],
    "block.anchor_share=1.5": ["block.anchor_share = 1.5", "<= 1"],
    "ttt": ["'ttt'", "section.key=value"],
    "ttt=3": ["ttt", "is a section"],
    "ttt.steps=": ["ttt.steps = null", "expected int >= 1"],
    "ttt.steps=seven": ["ttt.steps = seven", "expected int >= 1"],
    "ttt.steps='7'": ["ttt.steps = '7'", "expected int >= 1"],
    "ttt.steps=7.0": ["ttt.steps = 7.0", "expected int >= 1"],
    "ttt.steps=true": ["ttt.steps = true", "expected int >= 1"],
    "ttt.steps=0": ["ttt.steps = 0", "expected int >= 1"],
    "ttt.steps=[7": ["ttt.steps", "not valid YAML", "line 1"],
    "seed=-1": ["seed = -1", "expected int >= 0"],
    "max_steps=0": ["max_steps = 0", "expected int >= 1 or null"],
    "data.max_bad_share=1.5": ["expected float >= 0 and <= 1"],
    "loss.step_decay=.nan": ["loss.step_decay", "expected float >= 0"],
    "loss.step_decay='1e-4'": ["loss.step_decay = '1e-4'", "expected float >= 0"],
    "data.max_tokens=1e3": ["data.max_tokens = 1000.0", "expected int >= 8"],
    "block.anchors=al": ["block.anchors = al", "expected int >= 1 or all or null"],
    "block.anchors=0": ["block.anchors = 0", "expected int >= 1 or all or null"],
    "loss.step_decay=high": ["loss.step_decay = high", "expected float >= 0"],
    "checkpoint.resume=1": ["checkpoint.resume = 1", "expected false | true | auto"],
    "output_dir=[a]": ["output_dir = [a]", "expected str"],
    'output_dir={a: "x\\n\\ny"}': ["output_dir", "expected str"],
    "data.train=3": ["data.train = 3", "expected list of str"],
    "data.train=[a.jsonl, 3]": ["data.train = [a.jsonl, 3]", "expected list of str"],
    "data.template_kwargs=[1]": ["expected mapping with text keys or null"],
    "target.source=stored": ["target.source = stored", "needs target.store"],
    "loss.kind=lk_lamda": ["loss.kind = lk_lamda", "kl | lk_alpha | lk_lambda", "'lk_lambda'"],
    "target.aux_layers=[1, x, 3]": ["target.aux_layers = [1, x, 3]", "expected list of int or null"],
    "target.aux_layers=[28, 15, 1]": ["target.aux_layers = [28, 15, 1]", "ascending"],
    "target.aux_layers=[1, 1, 28]": ["distinct"],
    "target.aux_layers=[1, 28]": ["three"],
    "target.aux_layers=[-1, 2, 3]": ["0-based"],
    "target.revision=main": ["target.revision = main", "target.path"],
    "data.train=[]": ["data.train = []", "at least one file"],
    "data.held_out=[]": ["data.held_out = []", "evaluation.num_prompts = 24"],
    "loss.step_weights=[1, 0.5]": ["loss.step_weights = [1.0, 0.5]", "ttt.steps = 7"],
    "loss.step_weights=[0, 0, 0, 0, 0, 0, 0]": ["loss.step_weights", "above 0"],
    "loss.step_weights=[]": ["loss.step_weights = []", "above 0"],
    "loss.step_weights=[1, 1, 1, 1, 1, 1, -1]": ["loss.step_weights", "at least 0"],
    "draft.train_embedding_projection=true": ["draft.train_embedding_projection = true", "draft.hidden_size"],
    "optimizer.params.lr=1e-4": ["belongs to DeepSpeed", "optimizer.params.lr", "--ds_config"],
    "optimizer.type=AdamW": ["belongs to DeepSpeed", "optimizer"],
    "draft.lr=1e-4": ["draft.lr", "belongs to DeepSpeed", "optimizer.params.lr"],
    "train_micro_batch_size_per_gpu=2": ["belongs to DeepSpeed", "train_micro_batch_size_per_gpu"],
    "data.batch_size=2": ["belongs to DeepSpeed", "train_micro_batch_size_per_gpu"],
    "zero_optimization.stage=3": ["belongs to DeepSpeed", "zero_optimization.stage"],
    "bf16.enabled=true": ["belongs to DeepSpeed", "bf16.enabled"],
    "checkpoint.tag_validation=true": ["belongs to DeepSpeed", "checkpoint.tag_validation"],
}

REFUSED_RECIPES = {
    "ttt:\n  stepz: 7\n": ["ttt.stepz = 7", "'ttt.steps'"],
    "tttt:\n  steps: 7\n": ["tttt", "'ttt'"],
    "target:\n  fp8_activations: true\n  keep_quantised: none\n": [
        "target.fp8_activations = true",
        "target.keep_quantised=fp8",
    ],
    "ttt: 7\n": ["ttt = 7", "is a section"],
    "- ttt\n": ["expected sections and options", "list"],
    "ttt:\n  steps: 7\n  steps: 5\n": ["steps", "given twice", "line 3"],
    "seed: 1\nttt: {steps: 3}\nseed: 2\n": ["seed", "given twice", "line 3"],
    "ttt:\n  steps: [7\nseed: 1\n": ["not valid YAML", "line"],
    "optimizer:\n  type: AdamW\n": ["optimizer = {type: AdamW}", "belongs to DeepSpeed", "--ds_config"],
    "lr: 1e-4\n": ["lr = 0.0001", "belongs to DeepSpeed", "optimizer.params.lr"],
    "draft:\n  config: d.json\n  hidden_size: 64\n": ["draft.hidden_size = 64", "draft.config = d.json"],
    "draft:\n  config: d.json\n  num_layers: 2\n": ["draft.num_layers = 2", "draft.config = d.json"],
    "draft:\n  config: d.json\n  fc_norm: true\n": ["draft.fc_norm = true", "draft.config = d.json"],
    "draft:\n  config: d.json\n  vocab_size: 16000\n": ["draft.vocab_size = 16000", "draft.config = d.json"],
    "draft: {num_attention_heads: 6, num_key_value_heads: 4}\n": ["draft.num_key_value_heads = 4", "[1, 2, 3, 6]"],
    "data: {train: a.jsonl, held_out: ./a.jsonl}\n": ["data.held_out", "'./a.jsonl' is also in data.train"],
}


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("override", "words"), REFUSED_OVERRIDES.items(), ids=list(REFUSED_OVERRIDES))
def test_a_refused_override_is_named_in_one_line(override, words):
    with pytest.raises(ConfigError) as refusal:
        load_config(None, [override])
    message = str(refusal.value)
    assert message.startswith("command line: ") and "\n" not in message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(("text", "words"), REFUSED_RECIPES.items(), ids=[repr(text) for text in REFUSED_RECIPES])
def test_a_refused_recipe_is_named_in_one_line(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as refusal:
        load_config(path, [])
    message = str(refusal.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_a_contradiction_names_the_file_of_the_contradicting_option(tmp_path):
    path = write(tmp_path, "loss:\n  step_weights: [1, 1, 1]\n")
    with pytest.raises(ConfigError, match="recipe.yaml: loss.step_weights"):
        load_config(path, ["ttt.steps=5"])
    assert load_config(path, ["ttt.steps=3"]).loss.step_weights == (1.0, 1.0, 1.0)


def test_a_missing_recipe_names_the_most_similar_file(tmp_path):
    write(tmp_path, "seed: 1\n")
    with pytest.raises(ConfigError, match=r"recipes\.yaml: cannot be read .*did you mean '.*recipe\.yaml'"):
        load_config(tmp_path / "recipes.yaml", [])


def test_a_recipe_s_choices_for_its_method_do_not_reach_another_one(tmp_path):
    """A recipe may set what its own draft method reads alone, and yet be used with another method."""
    path = write(tmp_path, "seed: 1\nttt: {steps: 3}\n")
    assert load_config(path, []).ttt.steps == load_config(path, ["draft.method=eagle3"]).ttt.steps == 3
    config = load_config(path, ["draft.method=dflash", "block.size=6"])
    assert config.ttt == Config().ttt and (config.seed, config.block.size) == (1, 6)
    blocks = write(tmp_path, "draft: {method: dflash}\nblock: {size: 6}\nobjective: {decay: 3}\n")
    assert load_config(blocks, ["draft.method=dspark"]).block.size == 6
    config = load_config(blocks, ["draft.method=eagle3", "ttt.steps=5"])
    assert (config.block, config.objective, config.ttt.steps) == (Config().block, Config().objective, 5)
    given = load_config(path, ["draft.method=dflash", "ttt.steps=5"])
    with pytest.raises(ConfigError, match="ttt.steps = 5: has no effect on DFlash"):
        make_method(given)


def test_an_override_wins_over_the_recipe_and_the_recipe_over_the_default(tmp_path):
    config = load_config(write(tmp_path, "seed: 1\nttt: {steps: 3}\nloss:\n"), ["ttt.steps=5"])
    assert (config.seed, config.ttt.steps, config.epochs) == (1, 5, Config().epochs)


def test_the_same_override_twice_is_refused():
    with pytest.raises(ConfigError, match="ttt.steps = 4: given twice"):
        load_config(None, ["ttt.steps=3", "ttt.steps=4"])


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("loss.step_decay=1", lambda c: c.loss.step_decay, 1.0),
        ("loss.step_decay=1e-4", lambda c: c.loss.step_decay, 1e-4),
        ("loss.step_weights=[1, 1e-1, 0.5, 0, 0, 0, 0]", lambda c: c.loss.step_weights, (1.0, 0.1, 0.5, 0.0, 0.0, 0.0, 0.0)),
        ("data.train=a=b.jsonl", lambda c: c.data.train, ("a=b.jsonl",)),
        ("data.train=[a.jsonl, b.jsonl]", lambda c: c.data.train, ("a.jsonl", "b.jsonl")),
        ("data.template_kwargs={enable_thinking: false}", lambda c: c.data.template_kwargs, {"enable_thinking": False}),
        ("target.aux_layers=[1, 15, 28]", lambda c: c.target.aux_layers, (1, 15, 28)),
        ("target.aux_layers=null", lambda c: c.target.aux_layers, None),
        ("max_steps=10", lambda c: c.max_steps, 10),
    ],
)
def test_an_accepted_override_has_the_type_of_its_field(override, read, value):
    got = read(load_config(None, [override]))
    assert (got, type(got)) == (value, type(value))


CONFIGS = {
    "defaults": [],
    "tuples": [
        "target.aux_layers=[1, 15, 28]",
        "data.train=[a.jsonl, 'b c.jsonl']",
        "loss.step_weights=[1, 1, 1, 1, 1, 1, 1e-7]",
    ],
    "texts that look like other types": ["output_dir='1e-4'", "data.train='null'", "target.path='yes'", "draft.config='12: 3'"],
    "mapping and unicode": ["data.template_kwargs={a: [1, {b: null}]}", "output_dir=größe"],
}


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=list(CONFIGS))
def test_a_dumped_configuration_loads_as_an_equal_one(tmp_path, overrides):
    config = load_config(None, overrides)
    assert load_config(write(tmp_path, dump_config(config)), []) == config


def test_the_dump_lists_every_option_so_that_later_defaults_cannot_change_a_run():
    dumped = yaml.safe_load(dump_config(Config()))
    keys = {f"{k}.{name}" for k in SECTIONS for name in dumped[k]} | set(dumped) - set(SECTIONS)
    assert keys == set(OPTIONS)


def test_help_lists_every_option_with_type_default_unit_and_text():
    text = describe_options()
    for key, option in OPTIONS.items():
        line = next(line for line in text.splitlines() if line.split()[:1] == [key])
        expected = f"{key} {type_name(option_type(option))} {as_yaml(option.default)} {option.metadata['unit']}"
        assert " ".join(line.split()) == " ".join(expected.split())
        assert option.metadata["text"] in " ".join(text.split())
    assert all(len(line) <= 110 for line in text.splitlines())
    assert "ttt.steps" in text and " 7 " in next(line for line in text.splitlines() if "ttt.steps " in line)
    assert [line.split(":")[0] for line in text.splitlines() if line and line[0] != " "] == [*SECTIONS, "At the top"]


def test_every_default_has_the_type_its_field_declares():
    for key, option in OPTIONS.items():
        default = list(option.default) if isinstance(option.default, tuple) else option.default
        given = yaml.safe_dump(default, default_flow_style=True).removesuffix("\n...\n").strip()
        assert load_config(None, [f"{key}={given}"]) == Config(), key


def test_a_contradiction_is_refused_however_the_section_is_built():
    with pytest.raises(ValueError, match="draft.train_embedding_projection"):
        DraftSection(train_embedding_projection=True)
    assert DraftSection(train_embedding_projection=True, hidden_size=64).hidden_size == 64
    assert DataSection(train=("embedded",), held_out=("embedded",)).held_out == ("embedded",)


@pytest.mark.parametrize("method", DRAFT_METHODS)
def test_a_run_of_an_earlier_version_states_its_defaults_and_is_still_read(method, tmp_path):
    config = Config(draft=DraftSection(method=method))
    config = replace(config, objective=replace(config.objective, kl=0.0, selector_inject=False, selector_normaliser="same"))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    make_method(load_config(tmp_path / "config.yaml"))
    for option in ("objective.kl=0.5", "objective.selector_inject=true"):
        if method == EAGLE3:
            with pytest.raises(ConfigError, match="is for block drafters"):
                load_config(tmp_path / "config.yaml", [option])


def test_an_earlier_name_of_an_option_still_reads(tmp_path):
    recipe = tmp_path / "config.yaml"
    recipe.write_text("parallel: {unproven: true}\n")
    assert load_config(recipe).parallel.allow_unverified
    assert "allow_unverified: true" in dump_config(load_config(recipe))
