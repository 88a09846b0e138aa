"""Which models take packed rows: found out by trying, on the models that do and on ones made to fail."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetuna_lightning.attention import enable_packing, packed_inputs
from finetuna_lightning.backbone import quantize_model_
from finetuna_lightning.errors import RouteError
from finetuna_lightning.nn.packing import packed_pass
from tests.helpers.models import ARCHITECTURES, VOCAB_SIZE, plain_net, task_of, tiny_config, tiny_model

PACKED = {"llama", "qwen3", "gemma3", "mistral", "gpt2", "opt", "mixtral", "qwen3_moe"}
LENGTHS = (9, 1, 13, 9, 2)


def tokens(length: int = sum(LENGTHS), seed: int = 0) -> Tensor:
    return torch.randint(VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(seed))


def packed_logits(model: nn.Module, ids: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    with packed_pass(lengths), torch.no_grad():
        return model(input_ids=ids, use_cache=False, **packed_inputs(lengths, ids.device)).logits  # type: ignore[no-any-return]


def assert_each_alone(model: nn.Module, lengths: tuple[int, ...] = LENGTHS) -> None:
    ids = tokens(sum(lengths))
    found = packed_logits(model, ids, lengths).split(lengths, 1)
    for own, part in zip(ids.split(lengths, 1), found, strict=True):
        with torch.no_grad():
            assert torch.allclose(part, model(input_ids=own, use_cache=False).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if task_of(name) == "causal-lm"])
def test_architectures(name: str, scale: float) -> None:
    model = tiny_model(name, scale=scale)
    before, logits = model.config._attn_implementation, model(input_ids=tokens(9), use_cache=False).logits
    obstacle = enable_packing(model)
    assert (obstacle is None) == (name in PACKED), obstacle
    assert torch.equal(model(input_ids=tokens(9), use_cache=False).logits, logits)  # padded passes are what they were
    if obstacle is None:
        assert model.config._attn_implementation == f"finetuna_{before}"
        assert enable_packing(model) is None
        assert_each_alone(model)
    else:
        assert "its forward refuses a packed row: " in obstacle
        assert {part.config._attn_implementation for part in model.modules() if hasattr(part, "config")} == {before}


@pytest.mark.parametrize("name", sorted(PACKED))
def test_eager_attention_is_packed_too(name: str) -> None:
    model = tiny_model(name, attn_implementation="eager", scale=4.0)
    assert enable_packing(model) is None
    assert_each_alone(model)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_sliding_window_is_that_of_each_sequence(name: str, implementation: str) -> None:
    model = tiny_model(name, attn_implementation=implementation, scale=4.0, sliding_window=4)
    assert enable_packing(model) is None
    assert_each_alone(model)
    wide = tiny_model(name, attn_implementation=implementation, scale=4.0, sliding_window=40)
    assert enable_packing(wide) is None
    assert not torch.allclose(packed_logits(model, tokens()), packed_logits(wide, tokens()), atol=1e-3)


def test_quantised_and_16_bit_models() -> None:
    model = tiny_model("qwen3", scale=4.0)
    quantize_model_(model, "int8", 64, [])
    assert enable_packing(model) is None
    assert_each_alone(model)
    assert enable_packing(tiny_model("llama", scale=4.0).bfloat16()) is None


class Sinful(nn.Module):
    """A model around a good one, which does one thing wrong."""

    def __init__(self, sin: str) -> None:
        super().__init__()
        self.inner: Any = tiny_model("gpt2" if sin == "positions" else "llama", scale=4.0)
        self.config, self.sin = self.inner.config, sin

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()  # type: ignore[no-any-return]

    def forward(self, input_ids: Tensor, position_ids: Any = None, attention_mask: Any = None, **more: Any) -> Any:
        if self.sin == "positions":
            position_ids = None
        if self.sin == "mask":
            attention_mask = torch.ones(1, 1, *input_ids.shape[1:] * 2).tril().bool()
        if self.sin == "refusal" and attention_mask is not None:
            raise ValueError("no masks here\nnever")
        out = self.inner(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, **more)
        if self.sin == "leak":  # what a recurrent layer does; too small to show in the logits
            out.logits = out.logits + 1e-12 * out.logits.cumsum(1)
        if self.sin == "nan":
            out.logits = out.logits * torch.nan
        return out


@pytest.mark.parametrize(
    ("sin", "complaint"),
    [
        ("positions", "packed sequences get other logits than alone"),
        (
            "mask",
            r"its forward refuses a packed row: RouteError: LlamaAttention attends without the mask of a packed row",
        ),
        ("leak", "what one sequence holds reaches the others"),
        ("refusal", "its forward refuses a packed row: ValueError: no masks here$"),
        ("nan", "numbers that are not finite"),
    ],
)
def test_a_model_that_would_be_wrong_is_found_out_and_left_as_it_was(sin: str, complaint: str) -> None:
    model = Sinful(sin)
    obstacle = enable_packing(model)
    assert obstacle is not None
    assert re.search(complaint, obstacle), obstacle
    assert model.config._attn_implementation == "sdpa"
    assert {hook for part in model.modules() for hook in part._forward_hooks} == set()


def test_a_model_without_positions_is_not_trusted() -> None:
    """A rotary model that ignores them computes the same up to rounding, and could not be told from one with absolute
    ones on a longer row."""
    model = Sinful("none")
    model.forward = lambda position_ids=None, **more: Sinful.forward(model, **more)  # type: ignore[method-assign]
    assert enable_packing(model) == "it takes no notice of position_ids"


def test_other_attention_and_other_models_are_refused_by_name() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = "flex_attention"
    assert enable_packing(model) == "its attention is 'flex_attention'; 'sdpa' and 'eager' are known to work packed"
    assert enable_packing(plain_net()) == "PlainNet is no model of transformers"


def test_a_row_that_is_not_what_was_said_is_an_error() -> None:
    model = tiny_model("llama")
    assert enable_packing(model) is None
    with pytest.raises(RouteError, match="a packed row of 33 tokens was asked for the mask of 1 rows of 34 tokens"):
        packed_logits(model, tokens(), (*LENGTHS[:-1], 1))


def test_a_configuration_is_saved_without_the_name(tmp_path: Any) -> None:
    model: Any = tiny_model("llama")
    assert enable_packing(model) is None
    model.save_pretrained(tmp_path)
    assert "finetuna" not in (tmp_path / "config.json").read_text()
    assert tiny_config("llama")._attn_implementation is None
