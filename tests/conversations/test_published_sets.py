import gzip
import json
import sys
from dataclasses import replace

import pytest

from engine.conversations.published_sets import SOURCES, conversation_of, open_source
from engine.data.messages import BadSample, read_messages

TRAIN = "data/train-00000-of-00001.parquet"


def user(content, role="user"):
    return {"role": role, "content": content}


def assistant(content, **more):
    return user(content, "assistant") | more


TALK = [user("Why?"), assistant("So.")]
ROW = {"id": 1, "messages": TALK}
EXPECTED = {"id": 1, "conversations": TALK}


def conversations(rows):
    return [conversation_of(row) for _, row in rows]


def reason(row):
    with pytest.raises(BadSample) as error:
        conversation_of(row)
    return error.value.reason


def turns(roles):
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool", "d": "developer"}
    return {"messages": [user(f"{index}", names[role]) for index, role in enumerate(roles)]}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes rows to a JSON or Parquet file below the test's folder; `datasets` keeps its locks there, too."""
    pytest.importorskip("datasets", reason="datasets is not installed")
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def to_file(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):
            path.write_text(json.dumps(rows))
        else:
            parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=2)
        return str(path)

    return to_file


@pytest.fixture
def publish(tmp_path, write, monkeypatch):
    """Makes a folder of files {name: rows}, as the hub keeps a set, what a named source stands for."""

    def as_hub_set(source, files, card=""):
        for name, rows in files.items():
            write(f"{source}/{name}", rows)
        (tmp_path / source / "README.md").write_text(f"---\n{card}\n---\n" if card else "")
        monkeypatch.setitem(SOURCES, source, replace(SOURCES[source], hub_id=str(tmp_path / source)))
        return open_source(source)

    return as_hub_set


def test_ultrachat_rows_convert(publish):
    messages = [user("Hi?"), assistant("Hello."), *TALK]
    row = {"prompt": "Hi?", "prompt_id": "f0e3", "messages": messages}
    files = {"data/train_sft-00000-of-00001.parquet": [row] * 2, "data/test_sft-00000-of-00001.parquet": [row]}
    rows = publish("ultrachat", files)
    assert conversations(rows) == [{"id": "f0e3", "conversations": messages}] * 2


def test_the_original_ultrachat_s_strings_alternate():
    row = {"id": "7", "data": ["Hi?", "Hello.", "Why?", "So."]}
    assert conversation_of(row) == {"id": "7", "conversations": [user("Hi?"), assistant("Hello."), *TALK]}


def test_sharegpt_rows_convert(publish):
    names = [("human", "user"), ("gpt", "assistant"), ("user", "user"), ("chatgpt", "assistant")]
    names += [("human", "user"), ("bing", "assistant"), ("human", "user"), ("bard", "assistant"), ("human", "user")]
    value = [{"from": name, "value": f"{index}"} for index, (name, _) in enumerate(names)]
    rows = publish("sharegpt", {"ShareGPT_split.json": [{"id": name, "conversations": value} for name in ("a_0", "a_1")]})
    expected = [{"role": role, "content": f"{index}"} for index, (_, role) in enumerate(names)]
    assert conversations(rows) == [{"id": name, "conversations": expected} for name in ("a_0", "a_1")]


def test_perfectblend_rows_convert(publish):
    value = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
    rows = publish("perfectblend", {TRAIN: [{"conversations": value, "source": "orca-math"}]})
    assert conversations(rows) == [{"conversations": [user("Be brief.", "system"), user("2 + 2?"), assistant("4")]}]


def test_magpie_rows_convert(publish):
    value = [{"from": "human", "value": "Name a prime."}, {"from": "gpt", "value": "Seven."}]
    row = {"uuid": "b-1", "instruction": "Name a prime.", "response": "Seven.", "conversations": value, "model": "llama"}
    rows = publish("magpie", {TRAIN: [row]})
    assert conversations(rows) == [{"id": "b-1", "conversations": [user("Name a prime."), assistant("Seven.")]}]


def test_opencodeinstruct_rows_convert(publish):
    row = {"id": "c3", "input": "Add two numbers.", "output": "def add(a, b): ...", "domain": "generic", "unit_tests": "[]"}
    rows = publish("opencodeinstruct", {TRAIN: [row]})
    assert conversations(rows) == [{"id": "c3", "conversations": [user("Add two numbers."), assistant("def add(a, b): ...")]}]


def test_gsm8k_rows_convert_without_calculator_notes(publish):
    row = {"question": "Half of 48?", "answer": "Half is 48/2 = <<48/2=24>>24 clips.\n#### 24"}
    other = {"question": "socratic", "answer": "none"}
    config = "- config_name: {0}\n  data_files:\n  - split: train\n    path: {0}/train-*\n"
    card = "configs:\n" + config.format("main") + config.format("socratic")
    files = {"main/train-00000-of-00001.parquet": [row], "socratic/train-00000-of-00001.parquet": [other]}
    rows = publish("gsm8k", files, card)
    answer = "Half is 48/2 = 24 clips.\n#### 24"
    assert conversations(rows) == [{"conversations": [user("Half of 48?"), assistant(answer)]}]


@pytest.mark.parametrize(
    "row, question, answer",
    [
        ({"instruction": "Translate.", "input": "chat", "output": "cat"}, "Translate.\n\nchat", "cat"),
        ({"instruction": "Translate.", "input": "", "output": "cat"}, "Translate.", "cat"),
        ({"instruction": "Translate.", "input": None, "response": "cat"}, "Translate.", "cat"),
        ({"problem": "1 + 1", "solution": "It is 2.", "answer": "2"}, "1 + 1", "It is 2."),
        ({"query": "Why?", "response": "So.", "type": "x"}, "Why?", "So."),
        ({"question": "Code?", "answer": "cout << 1; // <<48/2=24>>"}, "Code?", "cout << 1; // <<48/2=24>>"),
        ({"prompt": "Why?", "completion": "So.", "messages": None}, "Why?", "So."),
    ],
)
def test_a_question_and_its_answer_are_found_by_their_columns(row, question, answer):
    assert conversation_of(row) == {"conversations": [user(question), assistant(answer)]}


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_column_of_system_prompts_opens_the_conversation(column):
    row = {"question": "Why?", "response": "So.", column: "Be brief."}
    assert conversation_of(row)["conversations"] == [user("Be brief.", "system"), user("Why?"), assistant("So.")]
    assert conversation_of({**row, column: ""})["conversations"][0] == user("Why?")
    own = [{"from": "system", "value": "Be long."}, {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    assert conversation_of({"conversations": own, column: "Be brief."})["conversations"][0] == user("Be long.", "system")


def test_what_arrow_fills_in_is_gone(write):
    call = [{"function": {"name": "f", "arguments": {"x": 1, "y": None}}}]
    rows = [
        {"id": 1, "messages": [user("Why?"), assistant("So.", reasoning_content="Hm.")], "tools": None},
        {"id": 2, "messages": [user("Why?"), assistant(None, tool_calls=call)], "tools": [{"name": "f", "z": None}]},
        {"id": None, "messages": TALK, "tools": [{"name": "g", "z": 3}]},
    ]
    found = conversations(open_source(write("rows.parquet", rows)))
    called = assistant("", tool_calls=[{"function": {"name": "f", "arguments": {"x": 1}}}])
    assert found == [
        {"id": 1, "conversations": [user("Why?"), assistant("So.", reasoning_content="Hm.")]},
        {"id": 2, "conversations": [user("Why?"), called], "tools": [{"name": "f"}]},
        {"conversations": TALK, "tools": [{"name": "g", "z": 3}]},
    ]


def test_nulls_that_json_spells_out_are_kept():
    called = assistant("", tool_calls=[{"function": {"name": "f", "arguments": {"x": None}}}])
    row = {"conversations": [user("Why?"), called | {"content": None, "name": None}]}
    assert conversation_of(json.dumps(row).encode())["conversations"] == [user("Why?"), called]


def test_tools_and_calls_kept_as_json_text_are_parsed():
    calls = [{"function": {"name": "f", "arguments": "{}"}}]
    tools = [{"name": "f"}]
    messages = [user("Why?"), assistant("", tool_calls=json.dumps(calls)), {"role": "tool", "content": "3"}, assistant("So.")]
    found = conversation_of({"messages": messages, "tools": json.dumps(tools)})
    assert found["tools"] == tools and found["conversations"][1]["tool_calls"] == [{"function": {"name": "f", "arguments": {}}}]
    assert "tools" not in conversation_of({"messages": messages, "tools": ""})
    assert conversation_of({"messages": json.dumps(messages)})["conversations"] == found["conversations"]
    assert conversation_of({"messages": list(map(json.dumps, messages))})["conversations"] == found["conversations"]


def test_only_what_chat_templates_read_is_kept_of_a_turn():
    row = {"conversation": [{**user("Why?"), "timestamp": 3, "hashed_ip": "f00"}, assistant("So.", thinking="Hm.")]}
    assert conversation_of(row)["conversations"] == [user("Why?"), assistant("So.", thinking="Hm.")]


def test_reasoning_is_kept_under_the_name_that_templates_read():
    row = {"messages": [user("Why?"), assistant("So.", reasoning="Hm.")]}
    assert conversation_of(row)["conversations"] == [user("Why?"), assistant("So.", reasoning_content="Hm.")]


def test_a_converted_conversation_is_read_as_it_is():
    row = {"id": 3, "conversations": [{"from": "Human", "value": "Why?"}, {"from": "GPT", "value": "So."}], "tools": [{"a": 1}]}
    found = conversation_of(row)
    assert read_messages(found) == (found["conversations"], {"tools": [{"a": 1}]})
    assert conversation_of(found) == found


@pytest.mark.parametrize("roles", ["ua", "uau", "sua", "uata", "uatta", "uaua", "ussa", "sutua", "dua", "sdua"])
def test_turns_that_alternate_are_taken(roles):
    assert [turn["role"][0] for turn in conversation_of(turns(roles))["conversations"]] == list(roles)


REFUSED = {
    "starts with the assistant": [turns("aua"), turns("sa")],
    "starts with the tool": [turns("ta")],
    "roles do not alternate": [turns("uua"), turns("uaa")],
    "no assistant turn": [turns("u"), turns("")],
    "unknown role": [{"messages": [user("0", "alien"), *turns("ua")["messages"]]}],
    "empty turn": [
        {"messages": [user(" "), assistant("So.")]},
        {"question": "Why?", "answer": None},
        {"instruction": "", "input": "", "output": "So."},
    ],
    "content is not text": [{"question": "Why?", "answer": 3}, {"instruction": "Why?", "input": {"a": 1}, "output": "So."}],
    "has images": [
        {**turns("ua"), "images": ["cat.png"]},
        {"messages": [user([{"type": "image_url"}]), assistant("So.")]},
        {"messages": [{**user("Why?"), "image": "cat.png"}, assistant("So.")]},
    ],
    "not a conversation": [{"conversations": {"from": "human"}}, {"conversations": [3]}, ["Why?", "So."]],
    "unknown columns": [{"text": "Why? So."}, {"question": "Why?"}, {}],
    "not JSON": [b"{", b"[" * 100_000, {"messages": "Why?"}, {**turns("ua"), "tools": "a hammer"}],
    "not UTF-8": ['{"messages": "café"}'.encode("latin-1")],
}


@pytest.mark.parametrize("row, expected", [(row, expected) for expected, rows in REFUSED.items() for row in rows])
def test_what_cannot_be_used_is_refused_by_reason(row, expected):
    assert reason(row) == expected


def test_unknown_columns_are_named():
    with pytest.raises(BadSample, match="found text, score; expected one of conversations"):
        conversation_of({"text": "Why?", "score": 1})


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_lines_are_named_and_a_bad_one_costs_no_other(name, tmp_path):
    line = json.dumps(ROW).encode()
    content = b"\n".join([b"\xef\xbb\xbf" + line, b"", b'{"\xff"', b"{", line])
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    rows = open_source(str(path))
    placed = list(rows)
    assert [place for place, _ in placed] == [f"{path}:{number}" for number in (1, 3, 4, 5)]
    assert conversation_of(placed[0][1]) == conversation_of(placed[3][1]) == EXPECTED
    assert [reason(row) for _, row in placed[1:3]] == ["not UTF-8", "not JSON"]
    assert rows.done == rows.total == path.stat().st_size


@pytest.mark.parametrize("start, between, end", [("[", ", ", "]"), ("[\n", ",\n  ", "\n]\n"), ("", "\n", "\n")])
def test_items_of_json_are_read_one_by_one(start, between, end, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.conversations.published_sets.CHUNK_CHARACTERS", 16)
    path = tmp_path / "rows.json"
    rows = [ROW, {"question": "Why?", "answer": [{"type": "text", "text": "So. " * 30}]}, ROW]
    path.write_text(start + between.join(map(json.dumps, rows)) + end)
    found = open_source(str(path))
    assert [(place, row) for place, row in found] == [(f"{path} row {number}", row) for number, row in enumerate(rows, 1)]
    assert found.done == found.total == path.stat().st_size


@pytest.mark.parametrize("content", ['[{"a": 1}, {"a": ', '[{"a": 1}, oops, {"a": 2}]'])
def test_damaged_json_is_named(content, tmp_path):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ValueError, match=r"rows\.json: not JSON after row 1"):
        list(open_source(str(tmp_path / "rows.json")))


def test_a_file_cut_short_is_named(tmp_path, write):
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW).encode() * 99)[:-9])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz: cannot be unpacked after line"):
        list(open_source(str(tmp_path / "rows.jsonl.gz")))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"rows\.parquet: cannot be read: .*; fetch it again") as error:
        open_source(str(tmp_path / "rows.parquet"))
    assert "\n" not in str(error.value)


def test_parquet_is_read_with_the_number_of_its_rows(write):
    path = write("rows.parquet", [ROW] * 5)
    rows = open_source(path)
    placed = list(rows)
    assert [place for place, _ in placed] == [f"{path} row {number}" for number in range(1, 6)]
    assert rows.done == rows.total == 5
    assert conversation_of(placed[4][1]) == EXPECTED


def test_a_folder_and_a_glob_are_read_file_by_file(tmp_path, write):
    paths = [tmp_path / "set" / name for name in ("a.jsonl", "b.json", "c.jsonl")]
    paths[0].parent.mkdir()
    for path in (*paths, tmp_path / "set" / "notes.txt"):
        path.write_text(json.dumps(ROW))
    folder = open_source(str(tmp_path / "set"))
    pattern = open_source(str(tmp_path / "set" / "*.jsonl"))
    assert conversations(folder) == [EXPECTED] * 3 and folder.done == folder.total
    assert conversations(pattern) == [EXPECTED] * 2
    write("set/d.parquet", [ROW])
    mixed = open_source(str(tmp_path / "set"))
    assert mixed.total is None and conversations(mixed) == [EXPECTED] * 4


def test_a_set_of_the_hub_is_named_with_config_and_split(write, monkeypatch):
    """The hub is stood in for by what `datasets` is asked for, as no name below a folder looks like a hub id."""
    import datasets

    path = write("rows.parquet", [ROW])
    asked = []
    load = datasets.load_dataset

    def local(*arguments, **options):
        asked.append((*arguments, options.pop("split")))
        return load("parquet", data_files=[path], split="train", **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    for name in ("owner/name", "owner/name:main", "owner/name:main:test", "owner/name::test"):
        assert list(open_source(name))[0][0] == f"{name} row 1"
    expected = [(None, "train"), ("main", "train"), ("main", "test"), (None, "test")]
    assert asked == [("owner/name", *rest) for rest in expected]


def test_the_size_of_a_set_is_taken_from_its_card(publish):
    card = "dataset_info:\n  features:\n  - name: question\n    dtype: string\n  - name: answer\n    dtype: string\n"
    card += "  splits:\n  - name: train\n    num_examples: 2"
    rows = publish("perfectblend", {TRAIN: [{"question": "Why?", "answer": "So."}] * 2}, card)
    assert rows.total == 2 and len(list(rows)) == rows.done == 2


def test_a_missing_split_is_said_in_one_line(publish):
    with pytest.raises(ValueError, match=r"ultrachat: cannot be read: .*train_sft.*owner/name:config:split") as error:
        publish("ultrachat", {TRAIN: [ROW]})
    assert "\n" not in str(error.value)


def test_an_unknown_source_is_named_with_the_nearest_that_is_known(tmp_path):
    with pytest.raises(ValueError, match="ultrachatt: no such file, .* did you mean 'ultrachat'"):
        open_source("ultrachatt")
    for name in ("no/such.jsonl", "no/*.jsonl", "./no/such", "/no/such", "such", "a/b/c"):
        with pytest.raises(ValueError, match="no such file"):
            open_source(name)


@pytest.mark.parametrize(
    "name, problem",
    [("rows.csv", r"rows\.csv: expected a file that ends in"), (".", "holds no file that"), ("a.jsonl", "the file is empty")],
)
def test_a_file_of_no_use_is_refused_before_anything_is_read(name, problem, tmp_path):
    if name != ".":
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=problem):
        open_source(str(tmp_path / name))


def test_a_missing_package_is_named_with_its_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets: pip install 'draftspeed\[data\]'"):
        open_source("gsm8k")
