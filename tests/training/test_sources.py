"""Reading: every layout of a file, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from finetuna_lightning.configs import DataConfig
from finetuna_lightning.errors import DataError
from finetuna_lightning.training.sources import (
    Document,
    check_files,
    label_index,
    label_names,
    read_documents,
    split_document,
)

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def write_jsonl(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def message_of(path: str, **settings: Any) -> str:
    """The one line that reading ``path`` fails with."""
    with pytest.raises(DataError) as caught:
        read_documents(DataConfig(path, **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("record", "kind", "document"),
    [
        ({"text": "abc"}, "text", Document(1, "abc")),
        ({"prompt": "p", "completion": "c"}, "prompt", Document(1, "p", "c")),
        ({"prompt": "p", "completion": "c", "text": "t"}, "prompt", Document(1, "p", "c")),
        ({"prompt": "p", "text": "t"}, "text", Document(1, "t")),
        ({"completion": "c", "text": "t"}, "text", Document(1, "t")),
        ({"messages": CHAT, "text": "t"}, "chat", Document(1, messages=CHAT)),
        ({"text": "t", "label": "good"}, "classification", Document(1, "t", label="good")),
        ({"text": "t", "label": True}, "classification", Document(1, "t", label="True")),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_kinds_are_told_by_the_fields(
    tmp_path: Path, record: dict[str, Any], kind: str, document: Document, suffix: str
) -> None:
    path = tmp_path / f"data{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, record)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), path)
    source = read_documents(DataConfig(str(path)))
    assert source.kind == kind
    assert source.documents == [document]


def test_given_kind_and_field_names_win_over_detection(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "t", "label": 1, "body": "b"})
    assert read_documents(DataConfig(path, kind="text")).documents == [Document(1, "t")]
    assert read_documents(DataConfig(path, text_field="body", kind="text")).documents == [Document(1, "b")]
    assert read_documents(DataConfig(path), kind="text").kind == "text"


def test_jsonl_numbers_are_line_numbers_and_blank_lines_and_texts_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n\n{"text": " "}\n{"text": "c"}')
    documents = read_documents(DataConfig(str(path))).documents
    assert documents == [Document(1, "a\u2028b"), Document(4, "c")]


def test_limit_keeps_the_first_documents(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": str(number)} for number in range(5)))
    assert [item.text for item in read_documents(DataConfig(path, limit=2)).documents] == ["0", "1"]
    (tmp_path / "a.txt").write_text("a\fb\fc")
    assert len(read_documents(DataConfig(str(tmp_path / "a.txt"), limit=2)).documents) == 2


def test_txt_is_split_at_form_feeds(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\nstill one\f \n\ftwo", encoding="utf-8")
    source = read_documents(DataConfig(str(path)))
    assert (source.kind, [item.text for item in source.documents]) == ("text", ["one\n\nstill one", "two"])


def test_quickstart_domain() -> None:
    domains = pytest.importorskip("finetuna_lightning.quickstart.domains")
    name = next(iter(domains.DOMAINS))
    documents = read_documents(DataConfig(f"quickstart:{name}", limit=3)).documents
    assert [item.text for item in documents] == domains.documents(name)[:3]
    check_files(DataConfig(f"quickstart:{name}"))
    with pytest.raises(DataError, match=f"did you mean {name!r}"):
        check_files(DataConfig(f"quickstart:{name}s"))
    assert f"did you mean {name!r}" in message_of(f"quickstart:{name}s")


def test_nothing_is_written_to_home_or_beside_the_file(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "data"
    home.mkdir()
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}]), folder / "a.parquet")
    write_jsonl(folder / "a.jsonl", {"text": "a"})
    script = (
        "import sys; from finetuna_lightning.configs import DataConfig as C;"
        "from finetuna_lightning.training.sources import read_documents as r;"
        "[r(C(path)) for path in sys.argv[1:]]"
    )
    paths = [str(folder / "a.parquet"), str(folder / "a.jsonl")]
    # HF_HOME and its like would lead the caches away from this home
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script, *paths], env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert [path for path in home.rglob("*") if path.is_file()] == []
    assert {path.name for path in folder.iterdir()} == {"a.parquet", "a.jsonl"}


def test_missing_file(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("x")
    assert message_of(str(tmp_path / "trian.jsonl")).endswith("does not exist; did you mean 'train.jsonl'?")
    assert "set data.path" in message_of(str(tmp_path / "other.txt"))
    assert "there is no folder" in message_of(str(tmp_path / "nowhere" / "a.txt"))
    assert "is a folder" in message_of(str(tmp_path))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert "a.txt is empty".replace("a.txt", name) in message_of(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", " \n\f\n"), ("a.jsonl", "\n\n"), ("b.jsonl", '{"text": ""}\n')]
)
def test_file_without_text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert f"{name} holds no text" in message_of(str(tmp_path / name))


def test_parquet_without_rows_and_broken_parquet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert "holds no text" in message_of(str(path))
    path.write_bytes(b"not parquet at all")
    assert "cannot be read as .parquet" in message_of(str(path))
    assert caplog.records == []  # one line, and no other beside it


def test_unknown_extension(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "a.csv").write_text("a,b")
    assert "one JSON object a line and name it .jsonl" in message_of(str(tmp_path / "a.json"))
    assert "'.csv', which must be one of .txt, .jsonl, .parquet" in message_of(str(tmp_path / "a.csv"))


def test_line_that_is_not_json_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": b}\n')
    assert "a.jsonl, line 3 is not JSON (Expecting value at column 10)" in message_of(str(path))
    path.write_text('{"text": "a"}\n["b"]\n')
    assert "a.jsonl, line 2 is a JSON list, not an object" in message_of(str(path))
    path.write_text('{"text": "a"}\n' + "[" * 100_000 + "\n")
    assert "a.jsonl, line 2" in message_of(str(path))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_file_that_is_not_utf8(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": "\xff\xfe"}')
    assert f"{name} is not UTF-8" in message_of(str(tmp_path / name))


def test_no_text_field_lists_the_fields_that_are_there(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"body": "a", "id": 1})
    message = message_of(path)
    assert "line 1 has no text field" in message
    assert "its fields are 'body', 'id'; set data.text_field" in message
    path = write_jsonl(tmp_path / "b.jsonl", {"texts": "a"})
    assert "did you mean 'texts'?" in message_of(path)
    path = write_jsonl(tmp_path / "c.jsonl", {"text": "a"}, {"body": "b"})
    assert "c.jsonl, line 2 has no field 'text'; its fields are 'body'; set data.text_field" in message_of(path)
    path = write_jsonl(tmp_path / "d.jsonl", {"text": "a"})
    assert "no field 'label'" in message_of(path, kind="classification")


def test_wrong_types(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": 5})
    assert "line 2: field 'text' must be a string, not 5 (int)" in message_of(path)
    path = write_jsonl(tmp_path / "b.jsonl", {"prompt": "a", "completion": None})
    assert "line 1: field 'completion' must be a string, not None (NoneType)" in message_of(path)
    path = write_jsonl(tmp_path / "c.jsonl", {"text": "a", "label": 0.5})
    assert "line 1: field 'label' must be a string or an integer, not 0.5 (float)" in message_of(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "d.parquet")
    assert "row 1: field 'text' must be a string" in message_of(str(tmp_path / "d.parquet"))
    (tmp_path / "e.txt").write_text("plain")
    assert "must be 'text' or 'auto', not 'chat'" in message_of(str(tmp_path / "e.txt"), kind="chat")


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("hello", "must be a list of messages"),
        ([], "must be a list of messages"),
        ([{"content": "a"}], "message 1 must have a role and a content"),
        ([CHAT[0], {"role": "assistant"}], "message 2 must have a role and a content"),
        ([{"role": "assistant", "content": 3}], "content of message 1 must be a string, not 3 (int)"),
        ([CHAT[0]], "no message has the role 'assistant' (roles: 'user')"),
    ],
)
def test_malformed_chats(tmp_path: Path, messages: object, complaint: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": messages})
    message = message_of(path)
    assert "line 2" in message
    assert complaint in message


def test_label_outside_the_given_labels(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a", "label": "good"}, {"text": "b", "label": "goood"})
    message = message_of(path, labels=["bad", "good"])
    assert "line 2: the label must be one of bad, good, not 'goood'; did you mean 'good'?" in message


def test_labels() -> None:
    assert label_index("b", ["a", "b"]) == 1
    assert label_index(1, ["a", "b"]) == 1
    assert label_index(1, ["0", "2", "1"]) == 2
    assert label_index(2, ["a", "b"]) is None
    assert label_index(-1, ["a", "b"]) is None
    assert label_names([Document(1, label=label) for label in (10, 9, 10)]) == ["9", "10"]
    assert label_names([Document(1, label=label) for label in ("b", "a", 3)]) == ["3", "a", "b"]


def test_check_files_sees_what_the_first_lines_show(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", *[{"text": "a"}] * 30, {"text": 1})
    check_files(DataConfig(good))  # the bad line is past those looked at
    bad = write_jsonl(tmp_path / "bad.jsonl", {"text": 1})
    (tmp_path / "empty.txt").touch()
    for path in (bad, str(tmp_path / "empty.txt"), str(tmp_path / "missing.txt")):
        for settings in ({"path": path}, {"path": good, "val_path": path}, {"path": good, "test_path": path}):
            with pytest.raises(DataError, match=Path(path).name):
                check_files(DataConfig(**settings))


@pytest.mark.parametrize("gap", ["\n\n", "\n \n\n", "\n"])
def test_one_long_document_is_cut_into_contiguous_pieces(gap: str) -> None:
    document = Document(1, gap.join(f"paragraph {number} " + "x" * 40 for number in range(40)) + "\n\n")
    pieces = split_document(document)
    assert "".join(piece.text for piece in pieces) == document.text
    assert 8 <= len(pieces) <= 11
    assert all(piece.text.lstrip().startswith("paragraph") for piece in pieces)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    long = split_document(Document(1, document.text * 100))
    assert all(len(piece.text) < 5000 for piece in long)


def test_blank_lines_make_no_piece() -> None:
    pieces = split_document(Document(1, "\n\n" + "a" * 50 + "\n\n" + "b" * 50 + "\n\n\n"))
    assert [piece.text.strip()[:1] for piece in pieces] == ["a", "b"]


def test_a_document_of_one_line_stays_whole() -> None:
    assert split_document(Document(1, "one line")) == [Document(1, "one line")]
