"""Tokenising: which tokens each kind of document gives, and which of them carry a label."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetuna_lightning.backbone import BackboneInfo
from finetuna_lightning.errors import DataError
from finetuna_lightning.training.sources import Document
from finetuna_lightning.training.tokenizing import (
    IGNORED,
    Example,
    check_kind,
    pad_token_id,
    sequence_length,
    tokenise,
)
from tests.helpers.tokenizer import CHAT_TEMPLATE, VOCAB_SIZE, byte_tokenizer

EOS_ID, BOS_ID = 1, 2
# of the default template of the helper, with the answers marked
GENERATION_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<eos>\n{% endgeneration %}{% else %}{{ message.content }}<eos>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# as Qwen3's: the last answer has an empty reasoning block, which is dropped once the user asks again
THINKING_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}<eos>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# as many a template that trims or rewrites what was said before
SHOUTING_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{{ message.content if loop.last else message.content | upper }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COUNTING_TEMPLATE = "{{ messages | length }}" + CHAT_TEMPLATE
REFUSING_TEMPLATE = "{{ raise_exception('roles must alternate') }}"

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "é?"},
    {"role": "assistant", "content": "bye"},
]


def info_of(tokenizer: Any, task: str = "any", **limits: Any) -> BackboneInfo:
    return BackboneInfo(tokenizer, task, **{"max_positions": None, "vocab_size": None, "num_labels": 2, **limits})


def decoded(example: Example, tokenizer: Any) -> tuple[str, str]:
    """All of the example as text, and the labelled part of it."""
    assert isinstance(example.labels, torch.Tensor)
    assert example.input_ids.dtype == example.labels.dtype == torch.int64
    return (tokenizer.decode(example.input_ids), tokenizer.decode(example.labels[example.labels != IGNORED]))


def texts(*values: str) -> list[Document]:
    return [Document(number, value) for number, value in enumerate(values, start=1)]


def test_text_is_joined_with_eos_and_cut_into_blocks() -> None:
    tokenizer = byte_tokenizer()
    examples = tokenise(texts("abcd", "ef", "gh"), "text", info_of(tokenizer), max_length=4)
    assert [tokenizer.decode(example.input_ids) for example in examples] == ["abcd", "<eos>ef<eos>", "gh<eos>"]
    assert all(torch.equal(example.input_ids, example.labels) for example in examples)


def test_a_last_block_of_one_token_is_left_out() -> None:
    examples = tokenise(texts("abcd"), "text", info_of(byte_tokenizer()), max_length=4)
    assert [len(example.input_ids) for example in examples] == [4]
    assert tokenise([], "text", info_of(byte_tokenizer())) == []


def test_pieces_of_a_document_are_joined_without_eos() -> None:
    tokenizer = byte_tokenizer()
    documents = [Document(1, "ab", ends=False), Document(2, "cd")]
    (example,) = tokenise(documents, "text", info_of(tokenizer))
    assert tokenizer.decode(example.input_ids) == "abcd<eos>"


def test_text_of_a_tokenizer_with_bos_and_of_one_without_eos() -> None:
    tokenizer = byte_tokenizer(bos=True)
    (example,) = tokenise(texts("ab", "c"), "text", info_of(tokenizer))
    assert tokenizer.decode(example.input_ids) == "<bos>ab<eos><bos>c<eos>"
    tokenizer = byte_tokenizer(eos=False)
    (example,) = tokenise(texts("ab", "c"), "text", info_of(tokenizer))
    assert tokenizer.decode(example.input_ids) == "abc"


def test_prompt_has_labels_on_the_completion_alone() -> None:
    tokenizer = byte_tokenizer(bos=True)
    (example,) = tokenise([Document(1, "2+2=", "4")], "prompt", info_of(tokenizer, "causal-lm"))
    assert decoded(example, tokenizer) == ("<bos>2+2=4<eos>", "4<eos>")
    assert isinstance(example.labels, torch.Tensor)
    assert torch.equal(example.labels[-2:], example.input_ids[-2:])  # aligned, not shifted


def test_prompt_that_ends_in_eos_is_not_closed_before_its_completion() -> None:
    tokenizer = byte_tokenizer()
    (example,) = tokenise([Document(1, "q<eos>", "a<eos>")], "prompt", info_of(tokenizer))
    assert decoded(example, tokenizer) == ("qa<eos>", "a<eos>")


def test_prompt_for_seq2seq_has_the_completion_as_labels_of_its_own() -> None:
    tokenizer = byte_tokenizer()
    info = info_of(tokenizer, "seq2seq-lm")
    (example,) = tokenise([Document(1, "long prompt", "short")], "prompt", info, max_length=6)
    assert decoded(example, tokenizer) == ("long p", "short<eos>")
    (example,) = tokenise([Document(1, "q", "")], "prompt", info)
    assert decoded(example, tokenizer) == ("q", "<eos>")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, GENERATION_TEMPLATE])
def test_chat_has_labels_on_the_answers_alone(template: str) -> None:
    tokenizer = byte_tokenizer(bos=True, chat_template=template)
    (example,) = tokenise([Document(1, messages=CHAT)], "chat", info_of(tokenizer, "causal-lm"))
    text, labelled = decoded(example, tokenizer)
    assert (
        text
        == "<|system|>be brief<eos>\n<|user|>hi<eos>\n<|assistant|>yo<eos>\n<|user|>é?<eos>\n<|assistant|>bye<eos>\n"
    )
    assert labelled == "yo<eos>\nbye<eos>\n"


def test_chat_whose_template_drops_the_reasoning_block_of_earlier_answers() -> None:
    tokenizer = byte_tokenizer(chat_template=THINKING_TEMPLATE)
    (example,) = tokenise([Document(1, messages=CHAT)], "chat", info_of(tokenizer))
    assert decoded(example, tokenizer)[1] == "yo<eos>\n<think>\n\n</think>\n\nbye<eos>\n"


def test_chat_is_cut() -> None:
    tokenizer = byte_tokenizer()
    (example,) = tokenise([Document(1, messages=CHAT[1:3])], "chat", info_of(tokenizer), max_length=26)
    assert decoded(example, tokenizer) == ("<|user|>hi<eos>\n<|assistant|>y", "y")


@pytest.mark.parametrize(
    ("template", "messages", "complaint"),
    [
        (None, CHAT, "the tokenizer has no chat template: set tokenizer.chat_template"),
        (COUNTING_TEMPLATE, CHAT, r"example 7: the chat template renders message 3 differently .* \{% generation %\}"),
        (SHOUTING_TEMPLATE, [{"role": "user", "content": "HI"}, *CHAT[2:4]], "renders message 2 differently"),
        (THINKING_TEMPLATE, [CHAT[1], CHAT[2] | {"content": ""}, CHAT[1]], "renders message 2 differently"),
        (REFUSING_TEMPLATE, CHAT, r"example 7: the chat template refuses the messages \(roles must alternate\)"),
        (CHAT_TEMPLATE, CHAT[2:], "example 7 begins with the assistant"),
    ],
)
def test_chats_that_cannot_be_rendered(template: str | None, messages: list[dict[str, Any]], complaint: str) -> None:
    tokenizer = byte_tokenizer(chat_template=template)
    with pytest.raises(DataError, match=complaint):
        tokenise([Document(7, messages=messages)], "chat", info_of(tokenizer))


@pytest.mark.parametrize("by_name", [False, True])
def test_chat_template_that_marks_answers_needs_no_prefixes(by_name: bool) -> None:
    tokenizer = byte_tokenizer()
    template = "{{ messages | length }}" + GENERATION_TEMPLATE
    tokenizer.chat_template = {"default": template} if by_name else template
    (example,) = tokenise([Document(1, messages=CHAT)], "chat", info_of(tokenizer))
    assert decoded(example, tokenizer)[1] == "yo<eos>\nbye<eos>\n"


def test_chat_with_a_slow_tokenizer() -> None:
    class Slow:
        chat_template = CHAT_TEMPLATE
        is_fast = False

    with pytest.raises(DataError, match="needs a fast tokenizer"):
        tokenise([Document(1, messages=CHAT)], "chat", info_of(Slow()))


def test_classification() -> None:
    info = info_of(byte_tokenizer(bos=True), "sequence-classification")
    documents = [Document(1, "abc", label="b"), Document(2, "d", label=0)]
    first, second = tokenise(documents, "classification", info, labels=["a", "b"], max_length=3)
    assert (first.labels, second.labels) == (1, 0)
    assert info.tokenizer.decode(first.input_ids) == "<bos>ab"
    with pytest.raises(DataError, match="example 3: label 'c' is not one of a, b"):
        tokenise([Document(3, "abc", label="c")], "classification", info, labels=["a", "b"])


def test_classified_text_without_a_token_is_dropped() -> None:
    documents = [Document(1, "abc", label="a"), Document(2, "", label="a")]
    with pytest.warns(UserWarning, match="1 of 2 examples, example 2 the first, are dropped"):
        examples = tokenise(documents, "classification", info_of(byte_tokenizer()), labels=["a"])
    assert len(examples) == 1


def test_examples_without_a_label_are_dropped_and_counted_once() -> None:
    documents = [Document(1, "p", "c"), Document(2, "a long prompt", "c"), Document(5, "another long one", "c")]
    with pytest.warns(UserWarning, match="dropped") as caught:
        examples = tokenise(documents, "prompt", info_of(byte_tokenizer()), max_length=8, where="adapter 'a', train")
    assert len(examples) == 1
    assert [str(warning.message) for warning in caught] == [
        "adapter 'a', train: 2 of 3 examples, example 2 the first, are dropped: no token or no label is left after "
        "cutting to 8 tokens; raise data.max_length or shorten the prompts"
    ]


def test_all_labels_masked_is_an_error() -> None:
    documents = [Document(4, "a long prompt", "c"), Document(5, "another long one", "c")]
    with pytest.raises(DataError, match=r"all 2 examples, example 4 the first, .* to 8 tokens: raise data.max_length"):
        tokenise(documents, "prompt", info_of(byte_tokenizer()), max_length=8)
    # a label on the first token alone is no label either: nothing stands before it to predict it from
    with pytest.raises(DataError, match="all 1 examples"):
        tokenise([Document(1, "", "")], "prompt", info_of(byte_tokenizer()))


@pytest.mark.parametrize("kind", ["text", "prompt", "classification"])
def test_token_beyond_the_vocabulary(kind: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    documents = [Document(1, "a<new>", "b", label="x")]
    complaint = rf"token {VOCAB_SIZE} \('<new>'\) is beyond the backbone's vocabulary of {VOCAB_SIZE}: "
    with pytest.raises(DataError, match=complaint):
        tokenise(documents, kind, info_of(tokenizer, vocab_size=VOCAB_SIZE), labels=["x"])
    assert tokenise(documents, kind, info_of(tokenizer, vocab_size=VOCAB_SIZE + 1), labels=["x"])


def test_token_beyond_the_vocabulary_in_a_seq2seq_completion() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    info = info_of(tokenizer, "seq2seq-lm", vocab_size=VOCAB_SIZE)
    with pytest.raises(DataError, match="'<new>'"):
        tokenise([Document(1, "q", "<new>")], "prompt", info)


def test_max_length_over_the_positions() -> None:
    with pytest.raises(
        DataError, match=r"max_length is 65 but the backbone has 64 positions: set data\.max_length to 64"
    ):
        tokenise(texts("a"), "text", info_of(byte_tokenizer(), max_positions=64), max_length=65)
    (first, *_) = tokenise(texts("a" * 200), "text", info_of(byte_tokenizer(), max_positions=64))
    assert len(first.input_ids) == 64


def test_default_length() -> None:
    assert sequence_length(None, None) == sequence_length(None, 4096) == 1024
    assert sequence_length(None, 512) == 512
    assert sequence_length(2048, 4096) == sequence_length(2048, None) == 2048


def test_a_document_longer_than_the_tokenizer_expects_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 8
    tokenise(texts("a" * 20), "text", info_of(tokenizer), max_length=8)
    tokenise([Document(1, messages=CHAT)], "chat", info_of(tokenizer))
    assert caplog.records == []


def test_pad_token() -> None:
    assert pad_token_id(byte_tokenizer()) == 0
    assert pad_token_id(byte_tokenizer(pad=False)) == EOS_ID
    assert pad_token_id(byte_tokenizer(pad=False, eos=False)) == 0


@pytest.mark.parametrize(
    ("kind", "task", "remedy"),
    [
        ("classification", "causal-lm", "backbone.task=sequence-classification"),
        ("text", "sequence-classification", "data.label_field"),
        ("text", "seq2seq-lm", "set data.kind to 'prompt'"),
        ("chat", "seq2seq-lm", "set data.kind to 'prompt'"),
    ],
)
def test_data_of_another_task(kind: str, task: str, remedy: str) -> None:
    with pytest.raises(DataError, match=remedy):
        check_kind(kind, task)
    with pytest.raises(DataError, match=remedy):
        tokenise([Document(1, "a")], kind, info_of(byte_tokenizer(), task))
    check_kind(kind, "any")


def test_progress_counts_documents() -> None:
    seen: list[int] = []
    tokenise(texts(*["a"] * 300), "text", info_of(byte_tokenizer()), progress=seen.append)
    assert seen == [256, 300]
