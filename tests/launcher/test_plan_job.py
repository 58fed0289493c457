"""The command, on the embedded target and on one that no GPU holds."""

import json
import sys

import pytest

from launcher.plan_job import main
from tests.recipes_configs import target_config


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plan_job.py", *arguments])
    main()


def test_the_embedded_job_fits_one_gpu(monkeypatch, capsys, tmp_path):
    run(monkeypatch, "--json", str(tmp_path / "plan" / "job.json"), "output_dir=" + str(tmp_path))
    printed = capsys.readouterr().out
    assert "on one GPU" in printed and "an estimate, nothing was run" in printed and "parallel.tp_size=1" in printed
    facts = json.loads((tmp_path / "plan" / "job.json").read_text())
    assert facts["fits"] and facts["gpus"] == 1 and sum(facts["bytes"].values()) > 1e9


def test_packs_that_do_not_fit_are_halved(monkeypatch, capsys, tmp_path):
    options = ("--ds_config", "ds_configs/zero3.json", "--gpus", "1", "--memory_gb", "2", "data.max_tokens=32768")
    run(monkeypatch, *options, f"output_dir={tmp_path}")
    printed = capsys.readouterr().out
    assert "Set data.max_tokens=16384" in printed and "up to 16,384 tokens per GPU" in printed


def test_a_large_target_is_planned_from_its_config_alone(monkeypatch, capsys, tmp_path):
    target_config("llama3.3-70b").save_pretrained(tmp_path)
    options = ("--recipe", "launcher/recipes/llama3.3-70b.yaml", f"target.path={tmp_path}", "--gpu", "H100")
    run(monkeypatch, *options)
    printed = capsys.readouterr().out
    assert "70.55 billion weights" in printed and "all-gather of tokens (TP)" in printed
    assert "Set data.max_tokens=8192" in printed
    run(monkeypatch, *options, "--fixed", "--gpus", "4")
    assert "does not fit" in capsys.readouterr().out


def test_placements_are_compared_with_measured_shares(monkeypatch, capsys, tmp_path):
    target_config("llama3.1-8b").save_pretrained(tmp_path)
    (tmp_path / "target.json").write_text(json.dumps({"command": "python -m benchmarks.bench_target", "rows": [{"mfu": 0.6}]}))
    (tmp_path / "draft.json").write_text(json.dumps({"draft_share_of_peak": 0.3}))
    measured = ("--measured", str(tmp_path / "target.json"), str(tmp_path / "draft.json"))
    options = ("--recipe", "launcher/recipes/llama3.1-8b.yaml", f"target.path={tmp_path}", "--gpus", "1")
    run(monkeypatch, *options, *measured, "--placements", "2")
    printed = capsys.readouterr().out
    assert "placements of the target, computed" in printed
    assert all(placement in printed for placement in ("serial", "colocated", "split")) and "1:1" in printed
    (tmp_path / "other.json").write_text(json.dumps({"rows": []}))
    for name, problem in {"other.json": "expected target_share_of_peak", "draft.json": "at most 1"}.items():
        (tmp_path / "draft.json").write_text(json.dumps({"draft_share_of_peak": 30}))
        with pytest.raises(SystemExit, match=problem):
            run(monkeypatch, *options, "--measured", str(tmp_path / name))


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (("--gpus", "1"), "needs"),
        (("--gpu", "GeForce"), "no datasheet for 'GeForce'; use one of"),
        (("--fixed", "--gpus", "6", "parallel.tp_size=4"), "parallel.tp_size=4 does not divide 6 ranks"),
        (("--gpu", "A100"), "use one of ['NVIDIA A100-SXM4-40GB', 'NVIDIA A100-SXM4-80GB']"),
        (("target.path=/nowhere",), "no such folder"),
        (("--gpus", "0"), "--gpus"),
        (("--network_gb_per_s", "0"), "--network_gb_per_s"),
        (("target.store=/data/store",), "loads no target"),
        (("--assistant_share", "1.5"), "--assistant_share"),
        (("parallel.tpsize=4",), "tp_size"),
        (("--ds_config", "nowhere.json"), "nowhere.json"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(arguments, problem, monkeypatch, capsys, tmp_path):
    target_config("llama3.3-70b").save_pretrained(tmp_path)
    target = () if any("target.path" in argument for argument in arguments) else (f"target.path={tmp_path}",)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *target, *arguments)
    assert problem in str(stopped.value) + capsys.readouterr().err
