"""Secrets are hidden in what is written and shown, and nothing else is."""

import json

import pytest

from engine.config.ds_config import load_ds_config
from engine.config.recipe import dump_config, load_config
from engine.config.secret_values import HIDDEN, hidden_in_text, is_secret_name, without_secrets
from engine.config.sections import Config, RegenerateSection
from engine.config.strict import ConfigError
from launcher import command

KEY = "s3cr3t-k3y"
ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}


@pytest.mark.parametrize(
    "name", ["api_key", "comet.api_key", "apikey", "WANDB_API_KEY", "hub_token", "hf_token", "password", "client_secret"]
)
def test_a_value_is_hidden_by_its_name(name):
    assert is_secret_name(name)
    assert without_secrets({"a": [{name: KEY}], "b": ({name: None},)}) == {"a": [{name: HIDDEN}], "b": ({name: None},)}


@pytest.mark.parametrize(
    "name", ["max_new_tokens", "eos_token_id", "eos_token", "num_draft_tokens", "experiment_name", "keep", "key"]
)
def test_tokens_of_a_text_are_no_secrets(name):
    assert without_secrets({name: "x"}) == {name: "x"}


@pytest.mark.parametrize(
    "text, hidden",
    [
        (f"http://me:{KEY}@host:30000/v1/models does not answer", f"http://{HIDDEN}@host:30000/v1/models does not answer"),
        (f"https://host/v1?api_key={KEY}&x=1", f"https://host/v1?api_key={HIDDEN}&x=1"),
        (f"header Bearer {KEY} refused", f"header Bearer {HIDDEN} refused"),
        ("hf_aBcdefghijklmnopqrstuv0123456789AB and sk-proj-abc_DEFghijkl0123456789", f"hf_{HIDDEN} and sk-{HIDDEN}"),
        ("/data/hf_checkpoints_2025_and_a_long_name/llama", "/data/hf_checkpoints_2025_and_a_long_name/llama"),
        ("/data/sk-learn-data-set-of-2025/train.jsonl", "/data/sk-learn-data-set-of-2025/train.jsonl"),
        ("mail me@host, see http://host/a@b", "mail me@host, see http://host/a@b"),
        ("a risk-averse-and-long-word-here", "a risk-averse-and-long-word-here"),
    ],
)
def test_a_secret_in_a_text_is_hidden_by_its_form(text, hidden):
    assert hidden_in_text(text) == hidden


def test_a_written_recipe_hides_passwords_and_is_read_back():
    config = Config(regenerate=RegenerateSection(servers=(f"http://me:{KEY}@host:1/v1",)))
    assert KEY not in dump_config(config) and f"http://{HIDDEN}@host:1/v1" in dump_config(config)


def test_a_message_about_options_hides_secrets(tmp_path):
    for section in ({"api_key": [KEY]}, {"api_kye": KEY}, {"api_key": KEY, "enabled": "yes"}):
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(ADAMW | {"comet": section}))
        with pytest.raises(ConfigError) as error:
            load_ds_config(path)
        assert KEY not in str(error.value) and str(path) in str(error.value)
    twice = f'"api_key": "{KEY}"'
    path.write_text('{"comet": {' + twice + ", " + twice + "}}")
    with pytest.raises(ConfigError) as error:
        load_ds_config(path)
    assert KEY not in str(error.value)
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"regenerate.servers=ftp://me:{KEY}@host"])
    assert KEY not in str(error.value) and "regenerate.servers" in str(error.value)


def test_a_file_with_hidden_secrets_is_not_read_as_if_they_were_there(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ADAMW | {"comet": {"enabled": True, "api_key": HIDDEN}}))
    with pytest.raises(ConfigError, match="comet.api_key: is hidden .* write the secret itself"):
        load_ds_config(path)


def test_the_last_message_of_a_command_repeats_no_secret(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(SystemExit) as ended:
        command.stop(ValueError(f"401: wrong key {KEY}"), rank=0)
    assert KEY not in str(ended.value) and "401: wrong key" in str(ended.value)
