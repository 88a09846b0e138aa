"""A tokenizer of one token a byte, made in a moment: what it gives can be written down by hand."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

EOS = "<eos>"
PAD = "<pad>"
BOS = "<bos>"
VOCAB_SIZE = 259

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(
    *, pad: bool = True, eos: bool = True, bos: bool = False, chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """Ids 0, 1 and 2 are ``<pad>``, ``<eos>`` and ``<bos>`` (named as such on request), then come the 256 bytes.

    With ``bos`` every sequence begins with ``<bos>``, as a Llama tokenizer's does.
    """
    names = [PAD, EOS, BOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 2)])
    special = {"pad_token": PAD if pad else None, "eos_token": EOS if eos else None, "bos_token": BOS if bos else None}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{key: value for key, value in special.items() if value is not None}
    )
    tokenizer.chat_template = chat_template
    return tokenizer
