"""What a whole run needs, in a folder: a tiny language model with a tokenizer, and a short text for each adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers import tokenizer as byte_level


def language_model(path: Path, seed: int = 0, **more: float) -> str:
    """Save a random two-layer Llama with a tokenizer of one token a byte in ``path``; its name."""
    config = LlamaConfig(
        **dict(
            vocab_size=byte_level.VOCAB_SIZE,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
        | more
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(path)
    byte_level.byte_tokenizer().save_pretrained(path)
    return str(path)


def text_file(path: Path, word: str = "select", lines: int = 40) -> str:
    """Write a text of about ``30 * lines`` characters in paragraphs; its name."""
    path.write_text("\n\n".join(f"{word} {i} from the table {i * 7 % 11}" for i in range(lines)), encoding="utf-8")
    return str(path)
