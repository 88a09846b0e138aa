"""Tokenising: documents to examples, with the loss only where it belongs.

================  =================================  ==============================================
kind              input_ids                          labels
================  =================================  ==============================================
text              blocks of the documents' tokens    the same
prompt            prompt + completion + eos          -100 on the prompt
prompt (seq2seq)  prompt                             completion + eos
chat              the chat template's rendering      -100 outside the assistant's turns
classification    text                               the class, an integer
================  =================================  ==============================================

Labels are aligned with ``input_ids``, not shifted.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetuna_lightning.backbone import BackboneInfo
from finetuna_lightning.errors import DataError
from finetuna_lightning.training.sources import Document, label_index

IGNORED = -100
DEFAULT_LENGTH = 1024
_CHUNK = 256  # documents per call of the tokenizer, between two reports of progress
_KINDS = {"causal-lm": ("text", "prompt", "chat"), "seq2seq-lm": ("prompt",)}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Progress = Callable[[int], None]


@dataclass(slots=True, eq=False)
class Example:
    """One row: ``input_ids`` [T] int64, and ``labels`` [T] int64 (-100 where ignored), [U] for a sequence-to-sequence
    model, or the class as an int."""

    input_ids: Tensor
    labels: Tensor | int


def check_kind(kind: str, task: str) -> None:
    """Raise a ``DataError`` unless data of ``kind`` can train a model of ``task``; one of another task, such as a plain
    module, takes any."""
    if task == "sequence-classification" and kind != "classification":
        raise DataError(
            f"the data is {kind!r} but backbone.task is {task!r}: give each record a text and a label "
            "(data.text_field, data.label_field), or set backbone.task=causal-lm"
        )
    allowed = _KINDS.get(task, (kind,))
    if kind not in allowed:
        remedy = "; or set backbone.task=sequence-classification" if kind == "classification" else ""
        raise DataError(
            f"the data is {kind!r} but backbone.task is {task!r}: "
            f"set data.kind to {' or '.join(repr(name) for name in allowed)}{remedy}"
        )


def sequence_length(max_length: int | None, max_positions: int | None) -> int:
    """Tokens per sequence: ``max_length``, at most the model's positions; by default those, 1,024 at most.

    Raises:
        DataError: naming both numbers.
    """
    if max_length is None:
        return min(DEFAULT_LENGTH, max_positions or DEFAULT_LENGTH)
    if max_positions is not None and max_length > max_positions:
        raise DataError(
            f"data.max_length is {max_length} but the backbone has {max_positions} positions: "
            f"set data.max_length to {max_positions} or less"
        )
    return max_length


def pad_token_id(tokenizer: Any) -> int:
    """The token that fills up short rows: any will do, since the attention mask hides it. A tokenizer without a pad
    token lends its end-of-sequence token, else token 0."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def tokenise(
    documents: Sequence[Document],
    kind: str,
    info: BackboneInfo,
    *,
    max_length: int | None = None,
    labels: Sequence[str] = (),
    where: str = "the data",
    progress: Progress | None = None,
) -> list[Example]:
    """Turn ``documents`` of one kind into examples for the model that ``info`` describes.

    Args:
        documents: as read by ``read_documents``.
        kind: ``text``, ``prompt``, ``chat`` or ``classification``.
        info: tokenizer, task and limits.
        max_length: tokens per sequence (``sequence_length``); longer examples are cut, plain text is chunked.
        labels: class names in order, for ``classification``.
        where: what a warning calls these documents.
        progress: called now and then with the number of documents done.

    Raises:
        DataError: when ``max_length`` exceeds the model's positions, a token its vocabulary, a label ``labels``; when
            chats meet a tokenizer without a chat template, or one that hides where answers stand; and when cutting
            leaves no example with a label. If it leaves some, the others are dropped with one warning that counts them.
    """
    check_kind(kind, info.task)
    length = sequence_length(max_length, info.max_positions)
    chunks = _chunks(documents, progress)
    seq2seq = info.task == "seq2seq-lm"
    if kind == "text":
        examples = _text(chunks, info.tokenizer, length)
    elif kind == "prompt":
        make = _prompt_seq2seq if seq2seq else _prompt
        rows = [row for chunk in chunks for row in make(chunk, info.tokenizer, length)]
        examples = _labelled(rows, documents, length, where, shifted=not seq2seq)
    elif kind == "chat":
        rows = [_chat(document, info.tokenizer, length) for chunk in chunks for document in chunk]
        examples = _labelled(rows, documents, length, where, shifted=True)
    else:
        rows = [row for chunk in chunks for row in _classified(chunk, info.tokenizer, length, list(labels))]
        examples = _labelled(rows, documents, length, where, shifted=False)
    if info.vocab_size is not None:
        _check_vocabulary(examples, info.tokenizer, info.vocab_size)
    return examples


def _chunks(documents: Sequence[Document], progress: Progress | None) -> Iterator[Sequence[Document]]:
    for start in range(0, len(documents), _CHUNK):
        yield documents[start : start + _CHUNK]
        if progress is not None:
            progress(min(start + _CHUNK, len(documents)))


def _encode(tokenizer: Any, texts: list[str], **options: Any) -> list[list[int]]:
    # verbose: we cut, so the tokenizer need not say that a document is longer than the model's positions
    encoded = tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]
    return [list(ids) for ids in encoded]


def _tensor(ids: list[int]) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def _with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _without_eos(ids: list[int], tokenizer: Any) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _text(chunks: Iterator[Sequence[Document]], tokenizer: Any, length: int) -> list[Example]:
    """All documents end to end, in blocks of ``length``; the last block may be short, but one token trains nothing."""
    parts: list[Tensor] = []
    for chunk in chunks:
        for document, ids in zip(chunk, _encode(tokenizer, [document.text for document in chunk]), strict=True):
            parts.append(_tensor(_with_eos(ids, tokenizer) if document.ends else ids))
    stream = torch.cat(parts) if parts else _tensor([])
    blocks = [stream[start : start + length] for start in range(0, len(stream), length)]
    return [Example(block, block) for block in blocks if len(block) >= 2]


def _prompt(chunk: Sequence[Document], tokenizer: Any, length: int) -> Iterator[Example]:
    # the two are tokenised apart, as they are when the fine-tune is asked to answer a prompt
    prompts = _encode(tokenizer, [document.text for document in chunk])
    completions = _encode(tokenizer, [document.completion for document in chunk], add_special_tokens=False)
    for prompt, completion in zip(prompts, completions, strict=True):
        prompt = _without_eos(prompt, tokenizer)
        completion = _with_eos(completion, tokenizer)
        labels = [IGNORED] * len(prompt) + completion
        yield Example(_tensor((prompt + completion)[:length]), _tensor(labels[:length]))


def _prompt_seq2seq(chunk: Sequence[Document], tokenizer: Any, length: int) -> Iterator[Example]:
    prompts = _encode(tokenizer, [document.text for document in chunk], truncation=True, max_length=length)
    completions = _encode(tokenizer, [document.completion for document in chunk], add_special_tokens=False)
    for prompt, completion in zip(prompts, completions, strict=True):
        yield Example(_tensor(prompt), _tensor(_with_eos(completion, tokenizer)[:length]))


def _classified(chunk: Sequence[Document], tokenizer: Any, length: int, labels: list[str]) -> Iterator[Example]:
    # the tokenizer cuts, so that a closing token such as [SEP] is kept
    texts = _encode(tokenizer, [document.text for document in chunk], truncation=True, max_length=length)
    for document, ids in zip(chunk, texts, strict=True):
        label = None if document.label is None else label_index(document.label, labels)
        if label is None:
            raise DataError(f"example {document.number}: label {document.label!r} is not one of {', '.join(labels)}")
        yield Example(_tensor(ids), label)


def _chat(document: Document, tokenizer: Any, length: int) -> Example:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            "the tokenizer has no chat template: set tokenizer.chat_template (a file chat_template.jinja in the "
            "backbone's folder), or give prompts and completions and data.kind=prompt"
        )
    if not tokenizer.is_fast:
        raise DataError("chat data needs a fast tokenizer, which knows where its tokens stand; use data.kind=prompt")
    where = f"example {document.number}"
    if _GENERATION.search(tokenizer.get_chat_template()):
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        encoded = _apply(tokenizer, document.messages, where, tokenize=True, **options)
        keep = torch.tensor(encoded["assistant_masks"], dtype=torch.bool)
    else:
        text = _render(tokenizer, document.messages, where)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = torch.tensor([start for start, _ in encoded["offset_mapping"]])
        keep = torch.zeros(len(starts), dtype=torch.bool)
        for start, end in _answers(tokenizer, document.messages, text, where):
            keep |= (starts >= start) & (starts < end)
    ids = _tensor(encoded["input_ids"])
    return Example(ids[:length], torch.where(keep, ids, IGNORED)[:length])


def _apply(tokenizer: Any, messages: list[dict[str, Any]], where: str, **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        raise DataError(
            f"{where}: the chat template refuses the messages ({error}); change their roles or order"
        ) from error


def _render(tokenizer: Any, messages: list[dict[str, Any]], where: str, *, answer: bool = False) -> str:
    """The chat as text; with ``answer``, up to where the assistant starts to write."""
    return str(_apply(tokenizer, messages, where, tokenize=False, add_generation_prompt=answer))


def _answers(tokenizer: Any, messages: list[dict[str, Any]], text: str, where: str) -> Iterator[tuple[int, int]]:
    """Where the assistant's turns stand in ``text``, in characters: each from the end of the rendering of what came
    before it to the end of the rendering that has it too, both of which must be prefixes of the whole."""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise DataError(f"{where} begins with the assistant: put a message of the user or the system before it")
        before = _render(tokenizer, messages[:turn], where, answer=True)
        upto = _render(tokenizer, messages[: turn + 1], where)
        end = len(upto) if text.startswith(upto) else _end_of_turn(text, len(before), upto, message["content"])
        if not text.startswith(before) or end is None:
            raise DataError(
                f"{where}: the chat template renders message {turn + 1} differently when more follows, so its answer "
                "cannot be found: mark answers with {% generation %} in the template, or keep one answer, the last"
            )
        yield len(before), end


def _end_of_turn(text: str, start: int, upto: str, content: object) -> int | None:
    """The end of a turn whose rendering changes once more follows (a template may drop its empty reasoning block): its
    content at ``start``, and whatever closed it when it stood last, such as ``<|im_end|>``."""
    answer = content.strip() if isinstance(content, str) else ""
    closing = upto[upto.rfind(answer) + len(answer) :]
    spot = start + len(text[start:]) - len(text[start:].lstrip())
    return spot + len(answer) + len(closing) if answer and text.startswith(answer + closing, spot) else None


def _labelled(
    rows: list[Example], documents: Sequence[Document], length: int, where: str, *, shifted: bool
) -> list[Example]:
    """The rows that have something to learn from. ``shifted``: the first label has no token before it to predict it."""
    empty = [position for position, row in enumerate(rows) if not _trains(row, shifted)]
    if not empty:
        return rows
    first = documents[empty[0]].number
    remedy = "raise data.max_length or shorten the prompts"
    if len(empty) == len(rows):
        raise DataError(
            f"all {len(rows)} examples, example {first} the first, have no token or no label left after cutting "
            f"to {length} tokens: {remedy}"
        )
    warnings.warn(
        f"{where}: {len(empty)} of {len(rows)} examples, example {first} the first, are dropped: "
        f"no token or no label is left after cutting to {length} tokens; {remedy}",
        stacklevel=3,
    )
    dropped = set(empty)
    return [row for position, row in enumerate(rows) if position not in dropped]


def _trains(row: Example, shifted: bool) -> bool:
    if len(row.input_ids) == 0:
        return False
    if isinstance(row.labels, int):
        return True
    return bool((row.labels[1 if shifted else 0 :] != IGNORED).any())


def _check_vocabulary(examples: Sequence[Example], tokenizer: Any, vocab_size: int) -> None:
    for example in examples:
        for row in (example.input_ids, example.labels):
            if isinstance(row, int):
                continue
            token = int(row.max()) if len(row) else 0
            if token >= vocab_size:
                raise DataError(
                    f"token {token} ({tokenizer.convert_ids_to_tokens(token)!r}) is beyond the backbone's vocabulary "
                    f"of {vocab_size}: the tokenizer belongs to another model; use the one of the backbone's own folder"
                )
