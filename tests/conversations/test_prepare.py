import json
import os
import resource
import signal
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from engine.config.sections import Config, DataSection, PrepareSection
from engine.conversations import prepare as module
from engine.conversations.prepare import num_taken, prepare, question_hash
from engine.data.messages import read_messages

OUTPUTS = {"train.jsonl", "held_out.jsonl", "report.json"}


def talk(question, answer="So.", **more):
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def talks(name, count):
    return [talk(f"{name} {index}?", f"{index}") for index in range(count)]


@contextmanager
def silent(total, name):
    yield SimpleNamespace(move_to=lambda done, text: None)


@pytest.fixture
def write(tmp_path):
    """Writes rows, bytes as they are, to a JSONL file."""

    def to_file(name, rows):
        lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
        (tmp_path / name).write_bytes(b"".join(line + b"\n" for line in lines))
        return str(tmp_path / name)

    return to_file


@pytest.fixture
def run(tmp_path):
    """Prepares sources into a folder of the test's; the report and the lines of both files."""

    def with_options(*sources, to="out", progress=silent, seed=0, max_bad_share=0.05, **options):
        section = PrepareSection(sources=sources, output_dir=str(tmp_path / to), **options)
        config = Config(prepare=section, data=DataSection(max_bad_share=max_bad_share), seed=seed)
        return prepare(config, progress), *(read(tmp_path / to / name) for name in ("train.jsonl", "held_out.jsonl"))

    return with_options


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def questions(lines):
    return [line["conversations"][0]["content"] for line in lines]


def sources(lines):
    return Counter(os.path.basename(line["source"]) for line in lines)


def in_a_child(action):
    """The exit status of a process that does this; below 0, the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def names(folder):
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_every_line_is_a_conversation_that_training_reads(run, write, tmp_path):
    tools = [{"name": "f"}]
    path = write("a.jsonl", [talk("Ünïcode?", id="x", tools=tools, score=3), *talks("a", 99)])
    _, train, held_out = run(path, held_out_share=0.3)
    assert len(train) + len(held_out) == 100 and len(train) > len(held_out) > 0
    for line in train + held_out:
        messages, extra = read_messages(line)
        assert messages == line["conversations"] and line["source"] == path and line["id"].startswith(f"{path}:")
        assert list(line) == ["id", "conversations", *extra, "source"]
    (first,) = [line for line in train + held_out if line["id"] == f"{path}:x"]
    assert first == {**talk("Ünïcode?"), "id": f"{path}:x", "tools": tools, "source": path}
    assert names(tmp_path / "out") == OUTPUTS


def test_ids_are_unique_however_rows_are_named(run, write):
    rows = [talk("1?", id="x"), talk("2?", id="x"), talk("3?", id="x#2"), talk("4?"), talk("5?", id=4), talk("6?", id=True)]
    path = write("a.jsonl", rows)
    _, train, _ = run(path, held_out_share=0.0)
    assert {line["id"] for line in train} == {f"{path}:{name}" for name in ("x", "x#2", "x#2#3", "4", "4#5", "6")}


def test_what_is_said_twice_is_taken_once_across_sources(run, write):
    shared = talks("shared", 5)
    with_tools = talk("shared 0?", "0", tools=[{"name": "f"}])
    first = write("a.jsonl", [*shared, shared[0], *talks("a", 5)])
    other = [{"messages": [{"from": "human", "value": f"shared {i}?"}, {"from": "gpt", "value": f"{i}"}]} for i in range(5)]
    second = write("b.jsonl", [*other, with_tools, *talks("b", 5)])
    report, train, _ = run(first, second, held_out_share=0.0)
    assert [(of.rows, of.duplicates, of.kept) for of in report.sources] == [(11, 1, 10), (11, 5, 6)]
    assert sources(train) == {"a.jsonl": 10, "b.jsonl": 6}
    said = [json.dumps([line["conversations"], line.get("tools")]) for line in train]
    assert len(set(said)) == len(said)


@pytest.mark.parametrize(
    "available, weights, max_samples, expected",
    [
        ([10, 3], None, None, [10, 3]),
        ([10, 3], [2, 1], None, [6, 3]),
        ([10, 100], [0.1, 0.3], None, [10, 30]),
        ([3, 100], [1, 1.5], None, [3, 4]),
        ([100, 100], [2, 1], 10, [7, 3]),
        ([100, 100], [2, 1], 1000, [100, 50]),
        ([100, 300], None, 8, [2, 6]),
        ([5, 5, 5], None, 4, [2, 1, 1]),
        ([7, 0], None, None, [7, 0]),
        ([7, 0], None, 3, [3, 0]),
        ([10, 10], [1000, 1], None, [10, 0]),
        ([1, 1], None, 10, [1, 1]),
    ],
)
def test_weights_and_the_bound_share_out_what_there_is(available, weights, max_samples, expected):
    assert num_taken(available, weights, max_samples) == expected


def test_sources_are_mixed_by_weight_as_far_as_the_scarcest_reaches(run, write):
    paths = [write("a.jsonl", talks("a", 100)), write("b.jsonl", talks("b", 20))]
    report, train, held_out = run(*paths, weights=(2.0, 1.0), held_out_share=0.1)
    assert sources(train + held_out) == {"a.jsonl": 40, "b.jsonl": 20}
    assert [of.to_dict()["taken"] for of in report.sources] == [40, 20]
    assert len({line["id"] for line in train + held_out}) == 60
    _, train, _ = run(*paths, to="few", weights=(1.0, 3.0), max_samples=16, held_out_share=0.0)
    assert sources(train) == {"a.jsonl": 4, "b.jsonl": 12}


def test_the_choice_is_a_draw_and_no_prefix(run, write):
    path = write("a.jsonl", talks("a", 1000))
    _, train, _ = run(path, max_samples=100, held_out_share=0.0)
    drawn = [int(line["id"].rpartition(":")[2]) for line in train]
    assert max(drawn) > 900 and drawn != sorted(drawn)


def test_a_seed_decides_every_byte(run, write, tmp_path):
    paths = [write("a.jsonl", talks("a", 200)), write("b.jsonl", talks("b", 200))]
    options = {"weights": (1.0, 2.0), "max_samples": 90, "held_out_share": 0.2}
    for folder, seed in (("1", 7), ("2", 7), ("3", 8)):
        run(*paths, to=folder, seed=seed, **options)
    first, same, other = ({name: (tmp_path / to / name).read_bytes() for name in OUTPUTS} for to in "123")
    assert first == same
    assert first["train.jsonl"] != other["train.jsonl"] and first["held_out.jsonl"] != other["held_out.jsonl"]


def test_a_question_is_never_on_both_sides(run, write):
    rows = [
        talk(text, f"{n}")
        for index in range(60)
        for n, text in enumerate((f"Why {index}?", f" why  {index}?\n", f"WHY {index}?"))
    ]
    _, train, held_out = run(write("a.jsonl", rows), held_out_share=0.3)
    sides = [{" ".join(question.lower().split()) for question in questions(side)} for side in (train, held_out)]
    assert len(train) + len(held_out) == 180 and all(sides) and not sides[0] & sides[1]


def test_what_is_held_out_stays_held_out_when_data_grows(run, write):
    few = write("few.jsonl", talks("a", 300))
    many = write("many.jsonl", [*talks("b", 200), *talks("a", 600)])
    _, train, held_out = run(few, held_out_share=0.1)
    _, more_train, more_held_out = run(many, to="more", seed=5, held_out_share=0.1)
    assert set(questions(held_out)) < set(questions(more_held_out))
    assert set(questions(train)) < set(questions(more_train))
    _, _, wider = run(few, to="wider", held_out_share=0.3)
    assert set(questions(held_out)) < set(questions(wider))
    assert 40 < len(more_held_out) < 120  # 80 expected, standard deviation 8.5


def test_a_question_is_the_user_s_first_message():
    def asked(*turns):
        return question_hash([{"role": role, "content": content} for role, content in turns])

    assert asked(("system", "x"), ("user", "Why?"), ("assistant", "So.")) == asked(("user", " WHY?\n"))
    assert asked(("user", "Why?")) != asked(("user", "Why not?"))


def test_nothing_held_out_means_no_file(run, write, tmp_path):
    report, train, _ = run(write("a.jsonl", talks("a", 20)), held_out_share=0.0)
    assert len(train) == 20 and names(tmp_path / "out") == OUTPUTS - {"held_out.jsonl"}
    assert list(report.files) == ["train.jsonl"] and not any("held_out" in line for line in report.lines())
    report, _, _ = run(write("b.jsonl", talks("b", 3)), to="few", held_out_share=1e-6)
    assert names(tmp_path / "few") == OUTPUTS - {"held_out.jsonl"}
    assert "no held_out.jsonl: too few conversations for prepare.held_out_share=1e-06" in report.lines()


def test_nothing_left_to_train_on_is_refused(run, write, tmp_path):
    held_out = [row for row in talks("a", 20) if question_hash(row["conversations"]) < 2**62]
    with pytest.raises(ValueError, match=rf"all {len(held_out)} conversations are held out; lower prepare\.held_out_share"):
        run(write("a.jsonl", held_out), held_out_share=0.25)
    assert names(tmp_path / "out") == set()


NO_TEXT = {"text": "Why?", "\ud800" * 999: 1}
BAD = [b'{"conversations": [', NO_TEXT, b'{"\xff": 1}', talk("Why?", " "), talk("\ud800?"), {"text": "So?"}, []]


def test_refused_rows_are_counted_and_the_first_five_named(run, write):
    path = write("a.jsonl", [*talks("a", 3), *BAD])
    report, train, _ = run(path, held_out_share=0.0, max_bad_share=0.7)
    (counts,) = report.sources
    assert len(train) == counts.kept == 3 and counts.rows == 10 and counts.num_dropped == 7
    assert counts.dropped == {"unknown columns": 2, "not UTF-8": 2, "not JSON": 1, "empty turn": 1, "not a conversation": 1}
    first = [(place, reason) for place, reason, _ in counts.first_dropped]
    expected = ["not JSON", "unknown columns", "not UTF-8", "empty turn", "not UTF-8"]
    assert first == [(f"{path}:{line}", reason) for line, reason in enumerate(expected, start=4)]
    lines = "\n".join(report.lines())
    assert f"{path}: 7 unusable: 2 unknown columns, 2 not UTF-8" in lines and max(map(len, lines.splitlines())) < 600
    assert f"{path}:5: unknown columns: found text, \\ud800" in lines


def test_too_many_refused_rows_stop_the_job_and_leave_nothing(run, write, tmp_path):
    good = write("good.jsonl", talks("a", 13))
    bad = write("bad.jsonl", [*talks("b", 2), *BAD[:5]])
    with pytest.raises(ValueError, match=r"25\.0% of the rows are unusable, data\.max_bad_share allows 24\.0%") as error:
        run(good, bad, max_bad_share=0.24)
    assert f"{bad}:3: not JSON" in str(error.value) and "good.jsonl:" not in str(error.value)
    assert names(tmp_path / "out") == set()
    run(good, bad, max_bad_share=0.25)


def test_a_source_of_no_use_is_named(run, write, tmp_path, monkeypatch):
    good = write("a.jsonl", talks("a", 90))
    bad = write("bad.jsonl", BAD[:1])
    blank = write("blank.jsonl", [b"", b""])
    for path in (bad, blank):
        with pytest.raises(ValueError, match=f"{path}: no row is usable"):
            run(good, path)
    doubled = write("b.jsonl", talks("a", 5))
    assert [of.duplicates for of in run(good, doubled)[0].sources] == [0, 5]
    with pytest.raises(ValueError, match=f"{doubled}: all of it is in earlier sources too"):
        run(good, doubled, to="weighted", weights=(1.0, 1.0))
    monkeypatch.setattr(module, "ROWS_TO_JUDGE", 4)
    endless = write("endless.jsonl", BAD[1:2] * 9 + talks("c", 500))
    with pytest.raises(ValueError, match=f"{endless}: none of its first 4 rows is usable; .*max_bad_share=1"):
        run(endless, to="judged")
    assert run(endless, to="judged", max_bad_share=1.0)[0].sources[0].kept == 500
    assert names(tmp_path / "weighted") == set()


@pytest.mark.parametrize("name", sorted(OUTPUTS))
def test_outputs_that_are_there_are_refused_before_anything_is_read(run, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("precious")
    with pytest.raises(ValueError, match=rf"{name} exists already; name another prepare\.output_dir or delete it"):
        run("no such source", held_out_share=0.0)
    assert (tmp_path / "out" / name).read_text() == "precious"


def test_an_unknown_source_is_refused_before_any_is_read(run, write, tmp_path):
    with pytest.raises(ValueError, match="gsm8: no such file"):
        run(write("a.jsonl", talks("a", 9)), "gsm8")
    assert not (tmp_path / "out").exists()


def test_a_report_says_what_became_of_every_row(run, write, tmp_path):
    path = write("a.jsonl", [*talks("a", 100), *talks("a", 2), *BAD[:2]])
    options = {"weights": [1.0], "max_samples": 50, "held_out_share": 0.2}
    report, train, held_out = run(path, **{**options, "weights": (1.0,)}, seed=3)
    out = tmp_path / "out"
    sides = {"train.jsonl": train, "held_out.jsonl": held_out}
    written = json.loads((out / "report.json").read_text())
    assert written == {
        "sources": [json.loads(json.dumps(report.sources[0].to_dict()))],
        "files": {name: {"conversations": len(side), "bytes": (out / name).stat().st_size} for name, side in sides.items()},
        "seed": 3,
        **options,
    }
    (counts,) = written["sources"]
    expected = {"rows": 104, "duplicates": 2, "kept": 100, "taken": 50, "train": len(train), "held_out": len(held_out)}
    assert expected.items() <= counts.items() and counts["dropped"] == {"not JSON": 1, "unknown columns": 1}
    assert counts["mean_turns"] == 2.0 and counts["mean_characters"] == 6.8  # "a 10?" and "10"; ten have one digit less


def test_progress_ends_at_all_there_is(run, write, monkeypatch):
    monkeypatch.setattr(module, "ROWS_BETWEEN_SIGNS", 7)
    seen = {}

    @contextmanager
    def progress(total, name):
        done = seen[name, total] = []
        yield SimpleNamespace(move_to=lambda now, text: done.append(now))

    paths = [write("a.jsonl", talks("a", 30)), write("b.jsonl", talks("b", 28))]
    run(*paths, progress=progress)
    assert [name for name, _ in seen] == [*paths, "conversations written"]
    for (_, total), done in seen.items():
        assert done[-1] == total and done == sorted(set(done)) and len(done) > 3


def test_a_job_killed_anywhere_leaves_no_output_and_runs_again(run, write, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS_BETWEEN_SIGNS", 1)
    paths = [write("a.jsonl", talks("a", 6)), write("b.jsonl", talks("b", 6)), write("c.jsonl", talks("c", 1))]
    signs = []

    def killing(at):
        @contextmanager
        def progress(total, name):
            def move_to(done, text):
                signs.append(name)
                if len(signs) == at:
                    os.kill(os.getpid(), signal.SIGKILL)

            yield SimpleNamespace(move_to=move_to)

        return progress

    expected = run(*paths, to="whole", progress=killing(at=0), held_out_share=0.3)[1:]
    assert len(signs) == 26 and all(expected)
    num_signs = len(signs)
    left = set()
    for at in range(1, num_signs + 1):
        signs.clear()
        assert in_a_child(lambda at=at: run(*paths, progress=killing(at), held_out_share=0.3)) == -signal.SIGKILL
        assert not OUTPUTS & names(tmp_path / "out")
        left |= names(tmp_path / "out")
    assert left == {f"source_{n}.jsonl.partial" for n in range(3)} | {"train.jsonl.partial", "held_out.jsonl.partial"}
    assert run(paths[0], paths[1], paths[2], held_out_share=0.3)[1:] == expected
    assert names(tmp_path / "out") == OUTPUTS


@pytest.mark.parametrize("share", [0.2, 0.9], ids=["while reading", "while writing"])
def test_a_full_disk_ends_the_job_without_a_trace(share, run, write, tmp_path):
    paths = [write("a.jsonl", talks("a", 60)), write("b.jsonl", talks("b", 60))]
    run(*paths, to="whole")
    limit = int(share * (tmp_path / "whole" / "train.jsonl").stat().st_size)  # a working file takes half of it

    def with_small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(OSError, match="out.* cannot be written: File too large"):
            run(*paths)

    assert in_a_child(with_small_files) == 0
    assert names(tmp_path / "out") == set()
