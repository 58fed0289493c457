"""A run's folder is read whatever is in it; what cannot be read is left out and named."""

import pytest

from engine.evaluation.run_record import RunRecord


def read(folder, **files: str) -> RunRecord:
    (folder / "config.yaml").write_text("target: {store: /s}\n")
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return RunRecord.read(folder)


def test_lines_that_cannot_be_read_are_left_out_and_named(tmp_path):
    lines = '{"step": 1, "loss": 2}\nnonsense\n[3]\n{"loss": 4}\n{"step": 5, "loss": "x"}\n{"step": 6, "lo'
    run = read(tmp_path, metrics_jsonl=lines)
    assert [line["step"] for line in run.metrics] == [1, 5] and run.column("loss") == [2.0, None]
    assert run.notes == (
        "metrics.jsonl: 2 lines left out that cannot be read.",
        "metrics.jsonl: 1 line left out that cannot be read.",
    )
    assert run.reads_store and run.samples == [] and run.summary is None


def test_numbers_that_are_none_count_as_missing(tmp_path):
    values = ["NaN", "1e999", "1" + "0" * 400, "true", "[2]", "3"]
    lines = "".join(f'{{"step": {step}, "x": {value}}}\n' for step, value in enumerate(values))
    run = read(tmp_path, metrics_jsonl=lines)
    assert run.column("x") == [None] * 5 + [3.0] and run.column("x", 0) == [None] * 4 + [2.0, None]


@pytest.mark.parametrize("text", ["[1]", "{", "\x00", "null", "[" * 1000])
def test_a_summary_that_is_none_is_left_out(tmp_path, text):
    run = read(tmp_path, summary_json=text)
    assert run.summary is None and run.notes == ("summary.json is not a JSON object, and is left out.",)


def test_the_best_draft_is_the_one_kept_last_whether_or_not_it_was_decoded(tmp_path):
    lines = '{"step": 1, "acceptance_length": 2, "is_kept": true}\n{"step": 2, "acceptance_length": 3}\n'
    run = read(tmp_path, evaluations_jsonl=lines + '{"step": 4, "is_kept": true, "is_gone": true}\n')
    assert run.best == run.measured == {"step": 1, "acceptance_length": 2, "is_kept": True}
    run = read(tmp_path, evaluations_jsonl=lines + '{"step": 4, "acceptance_length": null, "is_kept": true}\n')
    assert run.best is not None and run.best["step"] == 4 and run.measured is None


def test_an_unreadable_recipe_names_no_options(tmp_path):
    run = read(tmp_path)
    (tmp_path / "config.yaml").write_bytes(b"\xff: [")
    assert RunRecord.read(tmp_path).recipe == {} and run.option("target", "store") == "/s"
