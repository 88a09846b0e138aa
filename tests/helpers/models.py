"""Tiny models with random weights: one of each architecture that the package runs, and one that is no transformer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

from finetuna_lightning.backbone import AUTO_CLASSES

VOCAB_SIZE = 99
LABELS = 3

_LLAMA = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_GPT2 = dict(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
_BERT = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}

_CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": lambda **more: transformers.LlamaConfig(**_LLAMA | more),
    "qwen3": lambda **more: transformers.Qwen3Config(**_LLAMA | {"head_dim": 8} | more),
    "gemma3": lambda **more: transformers.Gemma3TextConfig(**_LLAMA | {"head_dim": 8} | more),
    "mistral": lambda **more: transformers.MistralConfig(**_LLAMA | more),
    "gpt2": lambda **more: transformers.GPT2Config(**_GPT2 | more),
    "gptj": lambda **more: transformers.GPTJConfig(**_GPT2 | {"rotary_dim": 4} | more),
    "opt": lambda **more: transformers.OPTConfig(**_BERT | {"ffn_dim": 48, "word_embed_proj_dim": 32} | more),
    "falcon": lambda **more: transformers.FalconConfig(**_BERT | more),
    "bert": lambda **more: transformers.BertConfig(**_BERT | {"num_labels": LABELS} | more),
    "t5": lambda **more: transformers.T5Config(
        **dict(vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
        | more
    ),
    "mixtral": lambda **more: transformers.MixtralConfig(**_LLAMA | {"num_local_experts": 4} | more),
    "qwen3_moe": lambda **more: transformers.Qwen3MoeConfig(
        **_LLAMA | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} | more
    ),
}
ARCHITECTURES = tuple(_CONFIGS)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def task_of(name: str) -> str:
    """The task under which architecture ``name`` is tested."""
    return {"bert": "sequence-classification", "t5": "seq2seq-lm"}.get(name, "causal-lm")


def tiny_config(name: str, **more: Any) -> PretrainedConfig:
    """The configuration of architecture ``name``, two layers of 32 features; ``more`` are fields of it."""
    return _CONFIGS[name](**more)


def tiny_model(name: str, seed: int = 0, scale: float = 1.0, **more: Any) -> nn.Module:
    """A random model. ``scale`` multiplies its matrices: initial weights of 0.02 make every layer nearly nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = AUTO_CLASSES[task_of(name)].from_config(tiny_config(name, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and scale != 1.0:
                parameter.mul_(scale)
    return model.eval()


def tiny_folder(path: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> str:
    """Save a random model under ``path`` as a Hugging Face folder; the folder's name."""
    shard = {"max_shard_size": more.pop("max_shard_size")} if "max_shard_size" in more else {}
    tiny_model(name, **more).to(dtype).save_pretrained(path, **shard)
    return str(path)


def tiny_inputs(name: str, rows: int = 4, length: int = 10, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens for ``rows`` sequences, as the model takes them."""
    ids = torch.randint(3, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, : length // 2]} if name == "t5" else {})


def cut(inputs: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    """Some rows of a batch."""
    return {key: value[rows] for key, value in inputs.items()}


class PlainNet(nn.Module):
    """No transformer: an embedding, a block of two linear layers, a tied pair, and a head, over bags of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB_SIZE, 24)
        self.block = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))
        self.first = nn.Linear(24, 24, bias=False)
        self.second = nn.Linear(24, 24, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, LABELS)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids).mean(1)
        x = x + self.block(x)
        return self.head(self.norm(self.second(torch.tanh(self.first(x)))))  # type: ignore[no-any-return]


def plain_net(seed: int = 0) -> PlainNet:
    """A random ``PlainNet``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PlainNet().eval()


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's output for a batch, whichever form it comes in."""
    out = model(**inputs)
    return out if isinstance(out, Tensor) else out.logits


def excite(module: nn.Module, seed: int = 0, std: float = 0.2) -> None:
    """Give every parameter of an adapter (or bank) a random value: a new delta is zero and would hide any mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
