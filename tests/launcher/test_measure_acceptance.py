import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.config.block_sections import BLOCK_METHODS, BlockSection
from engine.config.recipe import dump_config, load_config
from engine.config.sections import Config, DataSection, DraftSection, EvaluationSection, ParallelSection, TargetSection
from engine.evaluation.model_card import write_model_card
from engine.models.block_drafter.block_method import BlockMethod
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.draft_config import derive_draft_config
from engine.models.eagle3.export import export_draft
from engine.models.method_registry import make_method
from engine.models.vocab_map import VocabMap
from engine.target.configuration import load_target_config
from launcher.measure_acceptance import active_weights, main
from tests.block_drafts import HIDDEN, VOCAB, make_config, make_method_of
from tests.distributed import launch

WORDS = ["<unk>", "<user>", "<assistant>", "<end>", *(f"w{index}" for index in range(28))]
ROOT = Path(__file__).resolve().parents[2]
DRAFTERS = ("draft", "prompt lookup")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


def save_target(folder: Path, *, num_layers: int = 5, vocab_size: int = len(WORDS)) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=vocab_size, num_hidden_layers=num_layers, eos_token_id=3, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}<assistant>"
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", chat_template=template).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The output folder of a run: config.yaml, and the exported draft of a tiny target."""
    folder = tmp_path_factory.mktemp("run")
    path = save_target(folder / "target")
    target_config = AutoConfig.from_pretrained(path)
    config = derive_draft_config(target_config, DraftSection(vocab_size=20), (0, 1, 3))
    vocab_map = VocabMap.most_frequent(torch.arange(len(WORDS)), 20)
    weights = Eagle3Draft(config).state_dict().items()
    export_draft(folder / "draft", weights, replace(config, dtype="float32"), vocab_map, torch.zeros(len(WORDS), 16))
    turns = [[("user", f"w{index} w2 w3"), ("assistant", "w1")] for index in range(6)]
    samples = [{"conversations": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    resolved = Config(
        target=TargetSection(path=path, dtype="float32"),
        data=DataSection(held_out=(str(folder / "held_out.jsonl"),)),
        evaluation=EvaluationSection(num_prompts=4, max_new_tokens=9, num_steps=2),
        parallel=ParallelSection(tp_size=2),
    )
    (folder / "config.yaml").write_text(dump_config(resolved), encoding="utf-8")
    return folder


def write_block_run(name: str, run: Path, folder: Path) -> Path:
    """Write the folder of a run of a block drafter for the target and the prompts of `run`; returns it."""
    folder.mkdir()
    first = load_config(run / "config.yaml")
    own = {"dspark": {"markov_rank": 6}, "dflash2": {"conv_group": 8, "selector_rank": 5, "selector_top_k": 7}}
    block = BlockSection(size=4, mask_token_id=5, **own.get(name, {}))
    target = replace(first.target, aux_layers=(0, 1, 3))
    config = replace(first, target=target, draft=DraftSection(method=name, num_layers=2), block=block)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    method = make_method(config)
    assert isinstance(method, BlockMethod)
    torch.manual_seed(0)
    draft = method.draft_type(method.derive_config(load_target_config(target), target.aux_layers))
    draft.draw_weights()
    every_token = VocabMap.whole(len(WORDS))
    method.export(folder / "draft", draft.state_dict().items(), replace(draft.config, dtype="float32"), every_token, None)
    return folder


def measure(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["measure_acceptance.py", *map(str, arguments)])
    main()


def test_a_draft_is_measured_with_the_settings_of_its_run(run, tmp_path, monkeypatch, capsys):
    measure(monkeypatch, "--draft", run / "draft", "--json", tmp_path / "new" / "report.json")
    written = json.loads((tmp_path / "new" / "report.json").read_text())
    assert set(written) == {"about", "shape", "groups", *DRAFTERS}
    assert written["about"]["target"] == str(run / "target") and written["about"]["data"] == [str(run / "held_out.jsonl")]
    assert written["about"]["dtype"] == "float32" and written["about"]["versions"]["torch"] == torch.__version__
    assert written["shape"] == {"num_steps": 2, "topk": 1, "num_draft_tokens": 3, "tree_rule": "ancestors"}
    for report in (written[name] for name in DRAFTERS):
        assert (report["num_prompts"], report["mismatches"]) == (4, 0)
        assert len(report["acceptance_per_depth"]) == 2
        assert 1.0 <= report["acceptance_length"] <= 3.0
        assert report["tokens_per_s"] > 0 and report["plain_tokens_per_s"] > 0
    printed = capsys.readouterr().out
    assert "prompt lookup" in printed
    assert "--speculative-num-steps 2 --speculative-eagle-topk 1" in printed and '"num_speculative_tokens": 2' in printed


def on_two_ranks(run: Path, report: Path, *options: str) -> tuple[dict, str]:
    command = ["launcher/measure_acceptance.py", "--draft", str(run / "draft"), "--json", str(report), *options]
    result = launch(command, ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(report.read_text()), result.stdout


def test_two_ranks_measure_the_same_whether_they_share_the_target_or_not(run, tmp_path, monkeypatch, capsys):
    measure(monkeypatch, "--draft", run / "draft", "--json", tmp_path / "alone.json")
    alone = json.loads((tmp_path / "alone.json").read_text())
    replicated, _ = on_two_ranks(run, tmp_path / "replicated.json", "--tp_size", "1")
    shared, printed = on_two_ranks(run, tmp_path / "shared.json", "--show")
    rates = {"tokens_per_s": None, "plain_tokens_per_s": None}
    for name in DRAFTERS:
        report = alone[name]
        assert replicated[name] | rates == report | rates and replicated[name]["tokens_per_s"] > 0
        assert shared[name] == report | rates | {"mismatches": None}
    assert printed.count("<end> <assistant>") == 2 and "<user> w0 w2 w3 <end> <assistant>" in printed


def test_the_command_line_replaces_the_settings_of_the_run(run, tmp_path, monkeypatch, capsys):
    options = ["--num_prompts", 2, "--num_steps", 3, "--max_new_tokens", 5, "--dtype", "bfloat16", "--show"]
    measure(monkeypatch, "--draft", run / "draft", "--json", tmp_path / "report.json", *options)
    report = json.loads((tmp_path / "report.json").read_text())["draft"]
    assert report["num_prompts"] == 2 and report["num_tokens"] <= 8
    assert len(report["acceptance_per_depth"]) == 3
    printed = capsys.readouterr().out
    assert "<user> w0 w2 w3 <end> <assistant>" in printed and "<user> w3 w2 w3 <end> <assistant>" in printed


def test_prompts_are_counted_per_file_and_reported_per_file_and_category(run, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": [f"w{index} w2", "w3"], "category": kind} for kind in ("code", "talk") for index in range(10)]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = ["--data", run / "held_out.jsonl", tmp_path / "bench.jsonl", "--num_prompts", 4]
    measure(monkeypatch, "--draft", run / "draft", *files, "--json", tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    counts = {name: report["num_prompts"] for name, report in written["groups"].items()}
    assert counts == {"held_out": 4, "bench: code": 2, "bench: talk": 2} and written["draft"]["num_prompts"] == 8
    assert "bench: talk" in capsys.readouterr().out


def test_a_folder_that_a_server_would_run_otherwise_gets_no_command_for_it(run, tmp_path, monkeypatch, capsys):
    draft = tmp_path / "draft"
    shutil.copytree(run / "draft", draft)
    config = json.loads((draft / "config.json").read_text())
    del config["eagle_aux_hidden_state_layer_ids"]
    (draft / "config.json").write_text(json.dumps(config))
    named = ["--target", run / "target", "--data", run / "held_out.jsonl", "--max_new_tokens", 4]
    measure(monkeypatch, "--draft", draft, *named)
    printed = " ".join(capsys.readouterr().out.split())
    assert "vllm serve" not in printed and "vLLM would serve this folder otherwise" in printed
    assert "python -m sglang.launch_server" in printed


def test_a_tree_is_also_measured_by_the_rule_of_the_server(run, tmp_path, monkeypatch, capsys):
    tree = ["--num_steps", 3, "--topk", 2, "--num_draft_tokens", 6]
    measure(monkeypatch, "--draft", run / "draft", *tree, "--json", tmp_path / "tree.json")
    printed = " ".join(capsys.readouterr().out.split())
    written = json.loads((tmp_path / "tree.json").read_text())
    served = written["by_rows_of_sglang"]
    assert "SGLang lets the tokens of a tree attend to rows" in printed and f"{served['acceptance_length']:.2f}" in printed
    measure(monkeypatch, "--draft", run / "draft", *tree, "--tree_rule", "sglang", "--json", tmp_path / "rows.json")
    by_rows = json.loads((tmp_path / "rows.json").read_text())
    assert by_rows["draft"]["acceptance_length"] == served["acceptance_length"] and "by_rows_of_sglang" not in by_rows
    measure(monkeypatch, "--draft", run / "draft", *tree[:3], 1, *tree[3:], "--json", tmp_path / "grid.json")
    grid = json.loads((tmp_path / "grid.json").read_text())
    best = max(grid["cells"], key=lambda cell: cell["speed_up"])
    assert (best["topk"] > 1) == ("by_rows_of_sglang" in grid)


def test_the_model_card_gets_the_acceptance_that_was_measured(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    write_model_card(folder, folder / "draft", measured=False)
    card = folder / "draft" / "README.md"
    before = card.read_text()
    assert "It was not measured" in before
    measure(monkeypatch, "--draft", folder / "draft", "--num_prompts", 1)
    assert card.read_text() == before, "it is written if asked for"
    measure(monkeypatch, "--draft", folder / "draft", "--update_card")
    after = card.read_text()
    assert "tokens per target forward (2 steps, topk 1)" in after and "4 prompts of held_out.jsonl" in after
    assert "It was not measured" not in after and "Model card with this acceptance" in capsys.readouterr().out
    parts = before.split("It was not measured: `launcher/measure_acceptance.py` measures it.")
    assert after.startswith(parts[0]) and after.endswith(parts[1])
    with pytest.raises(SystemExit, match="is about greedy replies of the run's target"):
        measure(monkeypatch, "--draft", folder / "draft", "--temperature", 0.8, "--update_card")
    card.write_text("# somebody else's card\n\n## Acceptance\n\nhigh\n")
    with pytest.raises(SystemExit, match="is not a model card of DraftSpeed"):
        measure(monkeypatch, "--draft", folder / "draft", "--update_card")
    assert "high" in card.read_text()


def test_sampled_replies_are_measured_too(run, tmp_path, monkeypatch, capsys):
    options = ["--temperature", 0.8, "--top_k", 5, "--top_p", 0.9, "--json", tmp_path / "report.json"]
    measure(monkeypatch, "--draft", run / "draft", *options)
    report = json.loads((tmp_path / "report.json").read_text())["draft"]
    assert report["num_prompts"] == 4 and report["mismatches"] is None and report["tokens_per_s"] > 0
    assert "Sampled replies of 4" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="add --temperature"):
        measure(monkeypatch, "--draft", run / "draft", "--top_k", 5)
    with pytest.raises(SystemExit, match="--greedy_drafts concerns sampled replies"):
        measure(monkeypatch, "--draft", run / "draft", "--greedy_drafts")
    with pytest.raises(SystemExit, match="a grid replays greedy replies"):
        measure(monkeypatch, "--draft", run / "draft", "--num_steps", 1, 2, "--temperature", 1)
    with pytest.raises(SystemExit, match="top_p=2"):
        measure(monkeypatch, "--draft", run / "draft", "--top_p", 2, "--temperature", 1)


def test_several_sizes_measure_a_grid_that_the_report_shows(run, tmp_path, monkeypatch, capsys):
    sizes = ["--num_steps", 1, 3, "--topk", 1, 2, "--num_draft_tokens", 3, 6]
    measure(monkeypatch, "--draft", run / "draft", *sizes, "--verify_cost", 0.5)
    printed = capsys.readouterr().out
    grid = json.loads((run / "acceptance_grid.json").read_text())
    assert len(grid["cells"]) == 5 and grid["verify_cost"] == 0.5 and 0 < grid["draft_cost"] < 10
    assert {(cell["num_steps"], cell["topk"], cell["num_draft_tokens"]) for cell in grid["cells"]} == {
        (1, 1, 2),
        (3, 1, 4),
        (1, 2, 3),
        (3, 2, 3),
        (3, 2, 6),
    }
    best = max(grid["cells"], key=lambda cell: cell["speed_up"])
    assert f"--speculative-num-steps {best['num_steps']} --speculative-eagle-topk {best['topk']}" in printed
    assert "vllm serve" in printed and "Shapes of trees" in (run / "report.html").read_text()
    measure(monkeypatch, "--draft", run / "draft", *sizes[:3], "--draft_cost", 0.1, "--json", tmp_path / "grid.json")
    assert [cell["topk"] for cell in json.loads((tmp_path / "grid.json").read_text())["cells"]] == [1, 1]
    with pytest.raises(SystemExit, match="--num_draft_tokens is missing"):
        measure(monkeypatch, "--draft", run / "draft", "--topk", 1, 2)
    with pytest.raises(SystemExit, match="chains determine it"):
        measure(monkeypatch, "--draft", run / "draft", "--num_draft_tokens", 8, 16)
    with pytest.raises(SystemExit, match="delete --show"):
        measure(monkeypatch, "--draft", run / "draft", "--num_steps", 1, 2, "--show")
    with pytest.raises(SystemExit, match="topk = 21: is more than the 20 tokens"):
        measure(monkeypatch, "--draft", run / "draft", "--num_steps", 1, "--topk", 21, "--num_draft_tokens", 9)
    with pytest.raises(SystemExit, match="num_draft_tokens = 9"):
        measure(monkeypatch, "--draft", run / "draft", "--num_steps", 1, "--topk", 2, "--num_draft_tokens", 9)


@pytest.mark.parametrize("name", BLOCK_METHODS)
def test_a_block_drafter_is_measured_whole_in_part_and_on_sampled_replies(name, run, tmp_path, monkeypatch, capsys):
    block_run = write_block_run(name, run, tmp_path / "run")
    measured = {}
    for steps in (1, 3):
        measure(monkeypatch, "--draft", block_run / "draft", "--num_steps", steps, "--json", tmp_path / "one.json")
        report = json.loads((tmp_path / "one.json").read_text())["draft"]
        assert report["mismatches"] == 0
        measured[steps] = report["acceptance_length"]
    assert measured[1] <= measured[3]
    printed = capsys.readouterr().out
    assert printed.count("Measured with") == (2 if name == "dspark" else 1), "3 of its 4 tokens, or all of 3"
    measure(monkeypatch, "--draft", block_run / "draft", "--num_steps", 1, 3)
    grid = json.loads((block_run / "acceptance_grid.json").read_text())
    assert {cell["num_steps"]: cell["reports"]["all"]["acceptance_length"] for cell in grid["cells"]} == measured
    assert grid["drafts_blocks"] and 0 < grid["draft_cost"] < 10
    printed = capsys.readouterr().out
    algorithm = "DSPARK" if name == "dspark" else "DFLASH"
    assert f"--speculative-algorithm {algorithm}" in printed and "--speculative-num-steps" not in printed
    assert f'"num_speculative_tokens": {4 if name == "dspark" else 3}' in printed
    assert "Tokens drafted per block" in (block_run / "report.html").read_text()
    measure(monkeypatch, "--draft", block_run / "draft", "--num_steps", 3, "--temperature", 0.8, "--json", tmp_path / "s.json")
    sampled = json.loads((tmp_path / "s.json").read_text())
    assert sampled["draft"]["num_prompts"] == 4 and 1.0 <= sampled["draft"]["acceptance_length"] <= 4.0
    assert sampled["about"]["sampling"]["greedy_drafts"] is False
    with pytest.raises(SystemExit, match="num_steps = 5"):
        measure(monkeypatch, "--draft", block_run / "draft", "--num_steps", 5)
    with pytest.raises(SystemExit, match="drafts chains only"):
        measure(monkeypatch, "--draft", block_run / "draft", "--topk", 2, "--num_draft_tokens", 4)


def test_a_forward_of_the_target_reads_its_layers_and_its_head(run):
    layers = 5 * (4 * 16 * 16 - 2 * 16 * 8 + 3 * 16 * 24)  # q, o and half as wide k, v; MLP
    assert active_weights(TargetSection(path=str(run / "target")), torch.device("cpu")) == layers + len(WORDS) * 16


def test_the_cost_of_a_block_is_that_of_the_weights_which_a_server_reads():
    further = {}
    for name in BLOCK_METHODS:
        method = make_method_of(name)
        config = make_config(method)
        further[name] = method.count_read_weights(config) - method.count_weights(config)
    head = VOCAB * HIDDEN
    # DSpark reads one of its tables for each of 5 tokens, and single rows of the other one; DFlash2 single rows of both.
    assert further == {"dflash": head, "dspark": head - 6 * VOCAB + 4 * 6 * VOCAB, "dflash2": head - 2 * 5 * VOCAB}


def test_a_draft_far_from_its_run_is_measured_once_target_and_data_are_named(run, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "elsewhere" / "draft"
    copy.mkdir(parents=True)
    for file in (run / "draft").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    named = ["--target", run / "target", "--data", run / "held_out.jsonl", "--dtype", "float32", "--max_new_tokens", 4]
    measure(monkeypatch, "--draft", copy, *named)
    assert "0 of 6" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="give --target"):
        measure(monkeypatch, "--draft", copy)
    with pytest.raises(SystemExit, match="give --data"):
        measure(monkeypatch, "--draft", copy, *named[:2])


def test_what_does_not_fit_is_refused_by_name(run, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="not an exported draft"):
        measure(monkeypatch, "--draft", tmp_path / "nothing")
    with pytest.raises(SystemExit, match="vocabulary of 32, .* has 50"):
        measure(monkeypatch, "--draft", run / "draft", "--target", save_target(tmp_path / "wide", vocab_size=50))
    with pytest.raises(SystemExit, match="reads layers .*does not have"):
        measure(monkeypatch, "--draft", run / "draft", "--target", save_target(tmp_path / "shallow", num_layers=4))
    with pytest.raises(SystemExit, match="no_such.jsonl"):
        measure(monkeypatch, "--draft", run / "draft", "--data", tmp_path / "no_such.jsonl")
    with pytest.raises(SystemExit, match=r"parallel.tp_size=3 does not divide 1 ranks; use one of \[1\]"):
        measure(monkeypatch, "--draft", run / "draft", "--tp_size", 3)
    for number in ("0", "-3", "2.5", "many"):
        with pytest.raises(SystemExit):
            measure(monkeypatch, "--draft", run / "draft", f"--num_steps={number}")
        assert f"--num_steps: '{number}': expected a whole number" in capsys.readouterr().err
