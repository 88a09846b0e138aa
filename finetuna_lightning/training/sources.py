"""Reading: from a file of text, records or chat messages (or a quickstart domain) to a list of ``Document``.

Everything that can be wrong with a file is found here, before a tokenizer or a backbone is needed, and is reported in
one line with the file, the line (or row) number and the remedy.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from finetuna_lightning.configs import DataConfig
from finetuna_lightning.errors import DataError, did_you_mean, one_of

QUICKSTART = "quickstart:"
SUFFIXES = (".txt", ".jsonl", ".parquet")
_ROWS_CHECKED = 20
_PIECE_CHARACTERS = 4000

Label = str | int


@dataclass(slots=True)
class Document:
    """One unit of a source, and of its split into training and held-out parts.

    Args:
        number: its line (``.jsonl``), row (``.parquet``) or position in the source, from 1.
        text: the text; the prompt of a prompt and completion.
        completion: what answers the prompt.
        messages: of a chat, each with ``role`` and ``content``.
        label: of a classified text.
        ends: whether an end-of-sequence token follows; not so for a piece of a longer document.
    """

    number: int
    text: str = ""
    completion: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    label: Label | None = None
    ends: bool = True


@dataclass(slots=True)
class Source:
    """The documents of one path, and their kind: ``text``, ``prompt``, ``chat`` or ``classification``."""

    path: str
    kind: str
    documents: list[Document]


def read_documents(config: DataConfig, path: str | None = None, *, kind: str | None = None) -> Source:
    """Read ``path`` (of ``config`` by default) through ``datasets``, streaming: nothing is written to any cache.

    - ``.txt``: UTF-8 text; form feeds separate documents, so a file without one is a single document
      (``split_document`` cuts it where a part must be held out).
    - ``.jsonl``: one JSON object a line; blank lines are skipped. ``.parquet``: one record a row.
    - ``quickstart:<domain>``: the texts of a domain of the quickstart.

    Args:
        config: its fields' names, its labels, and ``limit``, which keeps only the first documents.
        path: another file of the same layout, for example ``config.val_path``.
        kind: what the documents must be, where that is known already; ``config.kind`` by default.

    Raises:
        DataError: for a file that is missing, empty, of an unknown type or not UTF-8; a line that is not a JSON object;
            a field that is missing or has the wrong type; a label not among ``config.labels``; an unknown domain.
    """
    path = config.path if path is None else path
    kind = config.kind if kind is None else kind
    if _is_plain(path):
        if kind not in ("auto", "text"):
            raise DataError(f"{path} holds plain text: data.kind must be 'text' or 'auto', not {kind!r}")
        texts = (text for text in enumerate(_plain_texts(path), start=1) if text[1].strip())
        found = [Document(number, text) for number, text in islice(texts, config.limit)]
        kind = "text"
    else:
        kind, found = _read_rows(config, _file(path), kind, config.limit)
    if not found:
        raise DataError(f"{path} holds no text; give a file with at least one non-blank document")
    return Source(path, kind, found)


def check_files(config: DataConfig) -> None:
    """The checks of ``read_documents`` that cost next to nothing: every path of ``config`` exists and is not empty, and
    its first lines have the fields that they must have."""
    for path in (config.path, config.val_path, config.test_path):
        if path is None:
            continue
        if path.startswith(QUICKSTART):
            _domain(path)
            continue
        file = _file(path)
        if not _is_plain(path):
            _read_rows(config, file, config.kind, _ROWS_CHECKED)


def split_document(document: Document) -> list[Document]:
    """Cut one long text into contiguous pieces of whole paragraphs (of whole lines where it has a single paragraph), so
    that a part of it can be held out. A piece has about 4,000 characters, less in a text too short for ten of them.
    Only the last piece ends the document. A text of one line is returned whole."""
    parts = re.split(r"(?<=\n)(?=[^\S\n]*\n)", document.text)
    if sum(bool(part.strip()) for part in parts) < 2:
        parts = document.text.splitlines(keepends=True)
    size = max(1, min(_PIECE_CHARACTERS, len(document.text) // 10))
    pieces: list[str] = []
    for part in parts:
        if not pieces or len(pieces[-1].strip()) >= size:
            pieces.append(part)
        else:
            pieces[-1] += part
    if not pieces[-1].strip():
        blank = pieces.pop()
        pieces[-1] += blank
    last = len(pieces)
    return [Document(number, piece, ends=number == last) for number, piece in enumerate(pieces, start=1)]


def label_index(label: Label, labels: list[str]) -> int | None:
    """The class of ``label``: its position among ``labels``, an integer label that is no name being a position itself.
    None where it is neither."""
    if str(label) in labels:
        return labels.index(str(label))
    if isinstance(label, int) and 0 <= label < len(labels):
        return label
    return None


def label_names(documents: Iterable[Document]) -> list[str]:
    """The labels met, sorted: as numbers where all are, else as text."""
    met = {document.label for document in documents if document.label is not None}
    numbers = sorted(label for label in met if isinstance(label, int))
    if len(numbers) == len(met):
        return [str(label) for label in numbers]
    return sorted({str(label) for label in met})


def _is_plain(path: str) -> bool:
    return path.startswith(QUICKSTART) or Path(path).suffix.lower() == ".txt"


def _domain(path: str) -> str:
    """The domain's name, checked."""
    from finetuna_lightning.quickstart.domains import DOMAINS

    name = path.removeprefix(QUICKSTART)
    if name not in DOMAINS:
        raise DataError(one_of("a quickstart domain", name, DOMAINS))
    return name


def _plain_texts(path: str) -> list[str]:
    if path.startswith(QUICKSTART):
        from finetuna_lightning.quickstart.domains import documents

        return list(documents(_domain(path)))
    return [text for row in _stream(_file(path)) for text in row["text"].split("\f")]


def _file(path: str) -> Path:
    """The file at ``path``, found to exist, to have content and to be of a known type."""
    file = Path(path).expanduser()
    if not file.exists():
        folder = file.parent
        if not folder.is_dir():
            raise DataError(f"{path} does not exist: there is no folder {str(folder)!r}; set data.path to a file")
        near = did_you_mean(file.name, sorted(item.name for item in folder.iterdir() if item.is_file()))
        raise DataError(f"{path} does not exist{near or '; set data.path to a .txt, .jsonl or .parquet file'}")
    if not file.is_file():
        raise DataError(f"{path} is a folder; set data.path to one .txt, .jsonl or .parquet file")
    if file.suffix.lower() not in SUFFIXES:
        extra = "; write one JSON object a line and name it .jsonl" if file.suffix.lower() == ".json" else ""
        raise DataError(f"{path} has the extension {file.suffix!r}, which must be one of {', '.join(SUFFIXES)}{extra}")
    if file.stat().st_size == 0:
        raise DataError(f"{path} is empty; give a file with at least one document")
    return file


def _stream(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file as ``datasets`` reads them. Streaming writes no data, and the lock file that it still takes
    goes to a folder that is removed, not to the user's home."""
    import datasets
    import pyarrow.parquet

    suffix = file.suffix.lower()
    with tempfile.TemporaryDirectory(prefix="finetuna-") as cache:
        try:
            if suffix == ".parquet":
                # datasets refuses a file without rows, and logs what it cannot read
                if pyarrow.parquet.read_metadata(file).num_rows == 0:
                    return
                yield from datasets.IterableDataset.from_parquet(str(file), cache_dir=cache)
            else:
                unit = "document" if suffix == ".txt" else "line"
                yield from datasets.IterableDataset.from_text(
                    str(file), cache_dir=cache, sample_by=unit, encoding="utf-8-sig"
                )
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 text ({error.reason}); convert it, for example with iconv") from error
        except pyarrow.ArrowException as error:
            raise DataError(
                f"{file} cannot be read as {suffix}: {str(error).splitlines()[0]}; write it anew"
            ) from error


def _records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record with its line or row number."""
    for number, row in enumerate(_stream(file), start=1):
        if file.suffix.lower() == ".parquet":
            yield number, row
            continue
        if not row["text"].strip():
            continue
        try:
            record = json.loads(row["text"])
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file}, line {number} is not JSON ({error.msg} at column {error.colno}); "
                "each line must be one whole JSON object"
            ) from error
        except RecursionError as error:
            raise DataError(
                f"{file}, line {number} is nested too deeply; each line must be a flat JSON object"
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{file}, line {number} is a JSON {type(record).__name__}, not an object; "
                f'write it as {{"text": ...}}, one object a line'
            )
        yield number, record


def _read_rows(config: DataConfig, file: Path, kind: str, limit: int | None) -> tuple[str, list[Document]]:
    unit = "row" if file.suffix.lower() == ".parquet" else "line"
    found: list[Document] = []
    for number, record in _records(file):
        where = f"{file}, {unit} {number}"
        if kind == "auto":
            kind = _kind_of(config, record, where)
        document = _document(config, kind, record, where)
        document.number = number
        if kind != "text" or document.text.strip():
            found.append(document)
        if len(found) == limit:
            break
    return kind, found


def _kind_of(config: DataConfig, record: dict[str, Any], where: str) -> str:
    """What a record is, told by its fields."""
    if config.messages_field in record:
        return "chat"
    if config.prompt_field in record and config.completion_field in record:
        return "prompt"
    if config.text_field in record:
        return "classification" if config.label_field in record else "text"
    near = did_you_mean(config.text_field, record)
    raise DataError(
        f"{where} has no text field: expected {config.text_field!r}, or {config.prompt_field!r} and "
        f"{config.completion_field!r}, or {config.messages_field!r}; its fields are {_listed(record)}"
        f"{near or '; set data.text_field'}"
    )


def _document(config: DataConfig, kind: str, record: dict[str, Any], where: str) -> Document:
    if kind == "chat":
        return Document(0, messages=_messages(record, config.messages_field, where))
    if kind == "prompt":
        prompt = _string(record, "prompt_field", config.prompt_field, where)
        return Document(0, prompt, _string(record, "completion_field", config.completion_field, where))
    text = _string(record, "text_field", config.text_field, where)
    if kind == "text":
        return Document(0, text)
    return Document(0, text, label=_label(config, record, where))


def _value(record: dict[str, Any], setting: str, name: str, where: str) -> Any:
    if name not in record:
        near = did_you_mean(name, record)
        raise DataError(
            f"{where} has no field {name!r}; its fields are {_listed(record)}{near or f'; set data.{setting}'}"
        )
    return record[name]


def _string(record: dict[str, Any], setting: str, name: str, where: str) -> str:
    value = _value(record, setting, name, where)
    if not isinstance(value, str):
        raise DataError(
            f"{where}: field {name!r} must be a string, not {_shown(value)}; set data.{setting} to a field of text"
        )
    return value


def _label(config: DataConfig, record: dict[str, Any], where: str) -> Label:
    value = _value(record, "label_field", config.label_field, where)
    if isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str | int):
        raise DataError(
            f"{where}: field {config.label_field!r} must be a string or an integer, not {_shown(value)}; "
            "set data.label_field to the field of the class"
        )
    if config.labels and label_index(value, config.labels) is None:
        raise DataError(f"{where}: {one_of('the label', value, config.labels)}; data.labels lists what is allowed")
    return value


def _messages(record: dict[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    """The messages of a chat, without the null fields with which a parquet file pads them."""
    value = _value(record, "messages_field", name, where)
    wanted = 'a list of messages such as {"role": "user", "content": "..."}'
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: field {name!r} must be {wanted}, not {_shown(value)}")
    messages: list[dict[str, Any]] = []
    for position, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f"{where}: message {position} must have a role and a content, not {_shown(message)}")
        if not isinstance(message["content"], str | list | None):
            raise DataError(
                f"{where}: the content of message {position} must be a string, not {_shown(message['content'])}"
            )
        messages.append({key: item for key, item in message.items() if item is not None or key == "content"})
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(repr(message["role"]) for message in messages)
        raise DataError(
            f"{where}: no message has the role 'assistant' (roles: {roles}): there is no answer to train on"
        )
    return messages


def _listed(record: dict[str, Any]) -> str:
    return ", ".join(repr(name) for name in record) or "none"


def _shown(value: object) -> str:
    """A value and its type, short enough for a line."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
