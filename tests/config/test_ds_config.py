"""DeepSpeed's JSON: our table of its keys against DeepSpeed itself, and what is refused in which words."""

import inspect
import json
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from engine.config.ds_config import (
    AUTO_KEYS,
    accumulation_steps,
    default_stage_config,
    load_ds_config,
    micro_batch_size,
    resolve_ds_config,
    stage_advice,
)
from engine.config.ds_keys import DS_HOMES, DS_KEYS, OF_MUON, OPTIMIZER, REFUSED, REQUIRED_BY_SCHEDULER, SCHEDULERS
from engine.config.sections import SECTIONS
from engine.config.strict import ConfigError, dotted_keys, read_as

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
ADAMW = {"type": "AdamW", "params": {"lr": 1e-4}}

# what the file adds to a valid one -> words that its one-line message must contain
REFUSED_FILES = [
    ({"gradient_cliping": 0.5}, ["gradient_cliping = 0.5", "unknown", "'gradient_clipping'"]),
    ({"train_micro_batch_size": 1}, ["'train_micro_batch_size_per_gpu'"]),
    ({"zero_optimisation": {"stage": 3}}, ["zero_optimisation = {stage: 3}", "'zero_optimization'"]),
    ({"stage": 3}, ["stage = 3", "'zero_optimization.stage'"]),
    ({"zero_optimization": {"stgae": 3}}, ["zero_optimization.stgae = 3", "'zero_optimization.stage'"]),
    (
        {"zero_optimization": {"stage": 3, "stage3_max_live_paramters": 1}},
        ["stage3_max_live_paramters", "'zero_optimization.stage3_max_live_parameters'"],
    ),
    ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, ["'zero_optimization.offload_optimizer.device'"]),
    ({"zero_optimization": {"legacy_stage1": True}}, ["legacy_stage1 = true", "removed"]),
    ({"zero_optimization": {"stage": 3, "elastic_checkpoint": True}}, ["elastic_checkpoint = true", "stage 3"]),
    ({"checkpoint": {"load_universal": True}}, ["checkpoint.load_universal = true", "not supported"]),
    ({"checkpoint": {"use_node_local_storage": True}}, ["checkpoint.use_node_local_storage", "not supported"]),
    ({"checkpoint": {"writer": {"decoupled": True}}}, ["checkpoint.writer.decoupled", "not supported"]),
    ({"data_types": {"grad_accum_dtype": "fp16"}}, ["data_types.grad_accum_dtype = fp16", "stage 0"]),
    ({"scheduler": {"type": "WarmupLR", "params": {}}}, ["scheduler.params.warmup_max_lr", "is missing"]),
    ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage = 4", "0 | 1 | 2 | 3"]),
    ({"zero_optimization": {"stage": True}}, ["zero_optimization.stage = true", "0 | 1 | 2 | 3"]),
    ({"zero_optimization": {"overlap_comm": "yes"}}, ["overlap_comm = 'yes'", "expected bool or null"]),
    ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, ["reduce_bucket_size", "expected int >= 1"]),
    ({"zero_optimization": {"reduce_bucket_size": "auto"}}, ["reduce_bucket_size = auto", *AUTO_KEYS]),
    ({"zero_optimization": 3}, ["zero_optimization = 3", "expected an object with stage"]),
    ({"bf16": True}, ["bf16 = true", "expected an object with enabled"]),
    ({"bf16": {"enabled": "auto"}}, ["bf16.enabled = auto", "'auto'"]),
    ({"bf16": {"enabled": 1}}, ["bf16.enabled = 1", "expected bool"]),
    ({"train_micro_batch_size_per_gpu": True}, ["train_micro_batch_size_per_gpu = true", "expected int >= 1"]),
    ({"train_micro_batch_size_per_gpu": 0}, ["= 0", "expected int >= 1"]),
    ({"train_batch_size": "auto"}, ["train_batch_size = auto", "'auto'"]),
    ({"gradient_clipping": "0.5"}, ["gradient_clipping = '0.5'", "expected float >= 0"]),
    ({"gradient_clipping": None}, ["gradient_clipping = null", "expected float >= 0"]),
    (
        {"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}},
        ["optimizer.params.learning_rate", "optimizer.params.lr"],
    ),
    ({"optimizer": {"type": "AdamW", "params": {"lr": "1e-4"}}}, ["optimizer.params.lr = '1e-4'", "expected float >= 0"]),
    ({"optimizer": {"type": "AdamW", "parms": {}}}, ["optimizer.parms = {}", "'optimizer.params'"]),
    ({"comms_logger": {"prof_ops": "all_reduce"}}, ["comms_logger.prof_ops = all_reduce", "expected list of str"]),
    ({"optimizer": {"type": "Adam", "params": {}}}, ["optimizer.type = Adam", "expected AdamW | Muon", "'AdamW'"]),
    ({"optimizer": {"params": {"lr": 1}}}, ["optimizer.type", "is missing"]),
    ({"optimizer": {**ADAMW, "params": {"betas": [0.9]}}}, ["optimizer.params.betas = [0.9]", "two"]),
    ({"optimizer": {**ADAMW, "params": {"muon_lr": 0.02}}}, ["optimizer.params.muon_lr = 0.02", "optimizer.type=Muon"]),
    ({"optimizer": {"type": "Muon"}, "gradient_clipping": 0.5}, ["gradient_clipping = 0.5", "Muon"]),
    ({"optimizer": {"type": "Muon"}, "zero_optimization": {"stage": 3}}, ["reduce_scatter = true", "stage 2"]),
    ({"optimizer": {"type": "Muon"}, "bf16": {"enabled": True}}, ["optimizer.type = Muon", "stage 0"]),
    (
        {
            "optimizer": {"type": "Muon"},
            "zero_optimization": {"stage": 1},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01}},
        },
        ["scheduler.params.warmup_max_lr = 0.01", "two numbers"],
    ),
    ({"optimizer": {**ADAMW, "params": {"max_grad_norm": 1.0}}}, ["optimizer.params.max_grad_norm", "gradient_clipping"]),
    ({"scheduler": {"type": "WarmupCosine"}}, ["scheduler.type = WarmupCosine", "'WarmupCosineLR'"]),
    ({"scheduler": {"params": {}}}, ["scheduler.type", "is missing", "WarmupCosineLR"]),
    ({"scheduler": {"type": "WarmupCosineLR", "params": {}}}, ["scheduler.params.total_num_steps", "is missing", '"auto"']),
    ({"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.1}}}, ["scheduler.params.cycle_max_lr", "is missing"]),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 5}}},
        ["scheduler.params.total_num_steps = 5", "unknown", "'scheduler.params.warmup_num_steps'"],
    ),
    (
        {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 5, "warmup_num_steps": "4 %"}}},
        ["scheduler.params.warmup_num_steps = 4 %", '"4%"'],
    ),
    (
        {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 5, "warmup_num_steps": "400%"}}},
        ["scheduler.params.warmup_num_steps = 400%", "share"],
    ),
    ({"tensorboard": {"enabled": True, "ouput_path": "x"}}, ["tensorboard.ouput_path = x", "'tensorboard.output_path'"]),
    ({"checkpoint": {"tag_validation": "strict"}}, ["checkpoint.tag_validation = strict", "Warn | Ignore | Fail"]),
    ({"checkpoint": {"every_steps": 10}}, ["checkpoint.every_steps = 10", "belongs to the recipe"]),
    ({"max_steps": 10}, ["max_steps = 10", "belongs to the recipe", "max_steps"]),
    ({"max_tokens": 10}, ["max_tokens = 10", "belongs to the recipe", "data.max_tokens"]),
    ({"ttt": {"steps": 7}}, ["ttt = {steps: 7}", "belongs to the recipe", "section"]),
    ({"ttt.steps": 7}, ["ttt.steps = 7", "belongs to the recipe"]),
    ({"curriculum_learning": {"enabled": True}}, ["curriculum_learning", "not supported", "removed from DeepSpeed 0.19"]),
    ({"pipeline": {"stages": 2}}, ["pipeline", "not supported"]),
    ({"zero_optimization": {"leaf_module": {"names": ["x"]}}}, ["zero_optimization.leaf_module", "train wrongly"]),
    ({"zero_optimization": {"cpu_offload": True}}, ["zero_optimization.cpu_offload = true", "offload_optimizer"]),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, ["fp16.enabled = true", "bf16.enabled"]),
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["offload_param.device = cpu", "at least 3"]),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["offload_optimizer.device = cpu", "at least 1"]),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["device = nvme", "nvme_path"]),
    (
        {"zero_optimization": {"max_live_parameters": 1, "stage3_max_live_parameters": 2}},
        ["zero_optimization.max_live_parameters = 1", "stage3_max_live_parameters", "keep one"],
    ),
]

REFUSED_TEXTS = {
    '{"bf16": {"enabled": true}\n "fp16": {}}': ["not valid JSON", "line 2"],
    '{"steps_per_print": 1, "steps_per_print": 2}': ["steps_per_print", "given twice", "1", "2"],
    '{"bf16": {"enabled": true, "enabled": false}}': ["enabled", "given twice"],
    '{"gradient_clipping": NaN}': ["NaN"],
    "[1]": ["expected an object", "list"],
    "{}": ["optimizer.type", "is missing"],
}


def refusal(tmp_path: Path, text: str) -> str:
    path = tmp_path / "zero.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_ds_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize(("added", "words"), REFUSED_FILES, ids=[json.dumps(added) for added, _ in REFUSED_FILES])
def test_a_refused_key_is_named_in_one_line(tmp_path, added, words):
    message = refusal(tmp_path, json.dumps({"optimizer": ADAMW, **added}))
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(("text", "words"), REFUSED_TEXTS.items(), ids=list(REFUSED_TEXTS))
def test_a_refused_file_is_named_in_one_line(tmp_path, text, words):
    message = refusal(tmp_path, text)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("key", REFUSED)
def test_every_unsupported_key_is_refused_with_its_reason(tmp_path, key):
    content: dict = {"optimizer": {"type": "AdamW"}}
    *sections, name = key.split(".")
    inner = content
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = True
    assert REFUSED[key] in refusal(tmp_path, json.dumps(content))
    assert key not in set(dotted_keys(DS_KEYS))


def test_a_missing_file_names_the_most_similar_one():
    with pytest.raises(ConfigError, match=r"zero33\.json: cannot be read .*did you mean '.*zero3\.json'"):
        load_ds_config(SHIPPED[0].parent / "zero33.json")


def models() -> dict[str, type[BaseModel]]:
    """DeepSpeed's own model of each section that has one."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "tensorboard": TensorBoardConfig,
        "csv_monitor": CSVConfig,
        "wandb": WandbConfig,
        "comet": CometConfig,
        "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }


def section(dotted: str) -> dict:
    table = DS_KEYS
    for name in dotted.split("."):
        table = table[name]
    return table


def test_the_table_has_exactly_the_fields_of_deepspeeds_models():
    for name, model in models().items():
        fields = set(model.model_fields) | {field.alias for field in model.model_fields.values() if field.alias}
        refused = {key.rpartition(".")[2] for key in REFUSED if key.rpartition(".")[0] == name}
        removed = {"mics_shard_size", "zeropp_loco_param"}
        assert set(section(name)) == fields - refused, name
        assert refused <= fields | removed, name


def test_what_the_table_accepts_deepspeeds_models_accept():
    samples = [True, 0, 1, 7, -1, 0.5, 1.5, -0.5, "x", "cpu", "nvme", None, ["all_reduce"], [1], {}]
    tried = 0
    for name, model in models().items():
        for key, kind in section(name).items():
            for sample in [] if isinstance(kind, dict) else samples:
                try:
                    read_as(sample, kind)
                except ConfigError:
                    continue
                try:
                    model(**{key: sample, **({"stage": 2} if key == "compute_grad_norm" else {})})
                except ValidationError as error:
                    pytest.fail(f"{name}.{key} = {sample!r}: {error}")
                tried += 1
    assert tried > 150


def test_the_table_accepts_every_default_of_deepspeeds_models():
    for name, model in models().items():
        for key, field in model.model_fields.items():
            kind = section(name).get(field.alias or key)
            if kind is not None and not isinstance(kind, dict):
                default = field.default
                plain = next((t for t in (bool, int, float, str) if isinstance(default, t)), lambda value: value)
                read_as(plain(default), kind)


def test_the_table_has_every_top_level_key_that_deepspeed_reads():
    from deepspeed.runtime.config import DeepSpeedConfig

    class Recorder(dict):
        read: set[str] = set()

        def get(self, key, default=None):
            self.read.add(key)
            return super().get(key, default)

        def __contains__(self, key):
            self.read.add(key)
            return super().__contains__(key)

        def keys(self):
            return self

        def __copy__(self):
            return self

    DeepSpeedConfig(Recorder(train_batch_size=1))
    assert len(Recorder.read) > 40
    assert set(DS_KEYS) | {key for key in REFUSED if "." not in key} >= Recorder.read
    assert set(DS_KEYS) - Recorder.read == set()


def test_scheduler_parameters_are_those_of_deepspeeds_schedulers():
    from deepspeed.runtime import lr_schedules

    assert set(SCHEDULERS) == set(lr_schedules.VALID_LR_SCHEDULES)
    for name, params in SCHEDULERS.items():
        signature = inspect.signature(getattr(lr_schedules, name)).parameters
        own = {key: parameter for key, parameter in signature.items() if key != "optimizer"}
        assert set(params) == set(own), name
        required = {key for key, parameter in own.items() if parameter.default is inspect.Parameter.empty}
        required |= {"warmup_max_lr"} & set(own)  # whose default would silently replace the optimizer's learning rate
        assert set(REQUIRED_BY_SCHEDULER.get(name, ())) == required, name


def test_optimizer_parameters_are_those_of_torchs_adamw():
    from torch.optim import AdamW

    of_adam = set(OPTIMIZER["params"]) - {"torch_adam", *OF_MUON}
    assert of_adam <= set(inspect.signature(AdamW).parameters)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_loads_and_deepspeed_takes_it(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    raw = load_ds_config(path)
    resolved = resolve_ds_config(raw, world_size=1, total_steps=200, hidden_size=4096)
    assert DeepSpeedConfig(resolved).zero_optimization_stage == int(path.stem[4])
    assert resolved["scheduler"]["params"]["total_num_steps"] == 200
    is_of_blocks = path.stem.endswith("block")
    assert resolved["scheduler"]["params"]["warmup_num_steps"] == (8 if is_of_blocks else 3)
    assert raw["scheduler"]["params"]["total_num_steps"] == "auto", "the file as read is left alone"
    assert raw["bf16"]["enabled"] and resolved["optimizer"]["params"]["lr"] == (6e-4 if is_of_blocks else 1e-4)
    is_muon = raw["optimizer"]["type"] == "Muon"
    clipping = 1.0 if is_of_blocks else 0.5
    assert resolved["gradient_clipping"] == (0.0 if is_muon else clipping) and is_muon == path.stem.endswith("muon")
    assert ("offload" in path.stem) == ("offload_optimizer" in raw["zero_optimization"])


def test_the_shipped_files_cover_stages_0_to_3_offload_muon_and_block_drafters():
    stages = ["zero0", "zero1", "zero2", "zero2_block", "zero2_muon", "zero2_offload", "zero3", "zero3_offload"]
    assert sorted(path.stem for path in SHIPPED) == stages


def test_numbers_written_with_an_exponent_are_whole_where_deepspeed_takes_whole_ones(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(
        '{"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "zero_optimization": {"reduce_bucket_size": 5e8}}'
    )
    raw = load_ds_config(path)
    assert raw["zero_optimization"]["reduce_bucket_size"] == 500_000_000 and raw["optimizer"]["params"]["lr"] == 1e-3
    assert type(raw["zero_optimization"]["reduce_bucket_size"]) is int


@pytest.mark.parametrize("given", ["auto", None, 3e-4])
@pytest.mark.parametrize(("hidden_size", "automatic"), [(4096, 1e-4), (8192, 5e-5), (256, 1.6e-3)])
def test_the_automatic_learning_rate_is_1e_4_at_width_4096_and_inverse_to_the_width(given, hidden_size, automatic):
    optimizer = {"type": "AdamW"} if given is None else {"type": "AdamW", "params": {"lr": given}}
    resolved = resolve_ds_config({"optimizer": optimizer}, world_size=1, total_steps=10, hidden_size=hidden_size)
    assert resolved["optimizer"]["params"]["lr"] == pytest.approx(3e-4 if given == 3e-4 else automatic)


@pytest.mark.parametrize(("total_steps", "horizon", "warmup"), [(1, 2, 1), (2, 2, 1), (60, 60, 1), (1000, 1000, 15)])
def test_an_auto_schedule_spans_the_run_with_a_short_warm_up(total_steps, horizon, warmup):
    params = {"total_num_steps": "auto", "warmup_num_steps": "auto", "warmup_type": "linear"}
    raw = {"optimizer": ADAMW, "scheduler": {"type": "WarmupCosineLR", "params": params}}
    resolved = resolve_ds_config(raw, world_size=1, total_steps=total_steps, hidden_size=64)["scheduler"]["params"]
    assert resolved == {"total_num_steps": horizon, "warmup_num_steps": warmup, "warmup_type": "linear"}


@pytest.mark.parametrize(
    ("share", "total_steps", "warmup"), [("4%", 1000, 40), ("2.5%", 1000, 25), ("4%", 5, 1), ("100%", 7, 7)]
)
def test_a_warm_up_can_be_a_share_of_the_run(share, total_steps, warmup, tmp_path):
    params = {"total_num_steps": "auto", "warmup_num_steps": share}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"optimizer": ADAMW, "scheduler": {"type": "WarmupCosineLR", "params": params}}))
    resolved = resolve_ds_config(load_ds_config(path), world_size=1, total_steps=total_steps, hidden_size=64)
    assert resolved["scheduler"]["params"] == {"total_num_steps": total_steps, "warmup_num_steps": warmup}


BATCHES = [
    ({}, 4, (1, 1)),
    ({"gradient_accumulation_steps": 3}, 4, (1, 3)),
    ({"train_micro_batch_size_per_gpu": 2}, 4, (2, 1)),
    ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, 4, (2, 3)),
    ({"train_batch_size": 16}, 4, (4, 1)),
    ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}, 4, (2, 2)),
    ({"train_batch_size": 16, "gradient_accumulation_steps": 2}, 4, (2, 2)),
    ({"train_batch_size": 16, "gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 2}, 4, (2, 2)),
]


@pytest.mark.parametrize(("given", "world_size", "solved"), BATCHES)
def test_free_batch_sizes_follow_from_the_given_ones(given, world_size, solved):
    assert (micro_batch_size(given, world_size), accumulation_steps(given, world_size)) == solved
    resolved = resolve_ds_config({"optimizer": ADAMW, **given}, world_size=world_size, total_steps=10, hidden_size=64)
    assert (resolved["train_micro_batch_size_per_gpu"], resolved["gradient_accumulation_steps"]) == solved


@pytest.mark.parametrize("batch", [given for given, _, _ in BATCHES if "train_batch_size" in given])
def test_free_batch_sizes_are_those_that_deepspeed_derives(batch, monkeypatch):
    from deepspeed.runtime import config as deepspeed_config

    monkeypatch.setattr(deepspeed_config.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(deepspeed_config.dist, "get_world_size", lambda: 4)
    theirs = deepspeed_config.DeepSpeedConfig(dict(batch))
    solved = (theirs.train_micro_batch_size_per_gpu, theirs.gradient_accumulation_steps)
    assert (micro_batch_size(batch, 4), accumulation_steps(batch, 4)) == solved


@pytest.mark.parametrize(
    "given",
    [
        {"train_batch_size": 3},
        {"train_batch_size": 10},
        {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 3},
        {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
    ],
)
def test_batch_sizes_that_do_not_fit_the_ranks_are_refused(given):
    with pytest.raises(ConfigError) as caught:
        micro_batch_size(given, 4)
    message = str(caught.value)
    for word in (f"train_batch_size = {given['train_batch_size']}", "train_micro_batch_size_per_gpu", "ranks", "--ds_config"):
        assert word in message


def test_no_key_has_a_home_in_both_files():
    assert {key for key in DS_KEYS if key in SECTIONS} == {"checkpoint"}, "the one name both files use, for different keys"
    assert {home for home in DS_HOMES.values() if home.split(".")[0] not in DS_KEYS} == set()


def test_stage_3_is_advised_against_for_a_small_draft_alone():
    stage3, stage2 = ({"zero_optimization": {"stage": stage}} for stage in (3, 2))
    advice = stage_advice(stage3, 420_000_000)
    assert "0.42 billion weights" in advice and "ds_configs/zero2.json" in advice
    assert (SHIPPED[0].parent / default_stage_config(420_000_000)).name == "zero2.json"
    assert (SHIPPED[0].parent / default_stage_config(2_000_000_000)).name == "zero3.json"
    offloaded = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    for ds_config, num_weights in [(stage3, 2_000_000_000), (stage2, 420_000_000), (offloaded, 420_000_000), ({}, 1)]:
        assert stage_advice(ds_config, num_weights) is None
