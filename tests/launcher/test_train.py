"""What train.py finds out before it imports anything heavy."""

import pytest

from engine.config.sections import CheckpointSection, Config, DraftSection, TargetSection
from engine.config.strict import ConfigError
from launcher.train import DRAFT_WEIGHTS, check_files


def config_of(folder, store=None, resume=False) -> Config:
    return Config(
        target=TargetSection(store=store),
        draft=DraftSection(init_from=str(folder)),
        checkpoint=CheckpointSection(resume=resume),
        output_dir=str(folder / "run"),
    )


@pytest.mark.parametrize("from_store", [False, True])
def test_the_folder_of_an_initial_draft_holds_weights(from_store, tmp_path):
    store = str(tmp_path) if from_store else None
    for other in ("vocab_map.safetensors", "model-00001-of-00002.safetensors", "training_args.bin"):
        (tmp_path / other).touch()
    with pytest.raises(ConfigError, match=r"draft\.init_from = .*: holds none of model\.safetensors, .*, pytorch_model\.bin"):
        check_files(config_of(tmp_path, store))
    for name in DRAFT_WEIGHTS:
        file = tmp_path / name
        file.touch()
        check_files(config_of(tmp_path, store))
        file.unlink()
    with pytest.raises(ConfigError, match=r"draft\.init_from = .*none: no such folder"):
        check_files(config_of(tmp_path / "none", store))


def test_a_resumed_run_needs_no_initial_draft(tmp_path):
    check_files(config_of(tmp_path / "none", resume=True))  # a checkpoint has its own weights
