"""The finetuna API beside peft 0.21: the same model, weights and batches give the same losses, adapters and files; and
the base in 8 bits is bitsandbytes' own.

What "the same" means: after twenty steps of AdamW every trained tensor is within 1e-6 of peft's in relative norm, and
every element within 1e-6 of the tensor's largest. Adam divides a gradient by its own size, so where the true gradient
is zero (a bias on GPT-2's keys, which softmax does not see) each step's direction is rounding error, and only a
forward that rounds as peft's does can agree."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetuna_lightning.finetuned import (
    EmbeddingAdapterConfig,
    LinearAdapterConfig,
    adapter_of,
    load_finetuned,
    load_state_dict,
    new_finetuned,
    prepare_base_model,
    state_dict,
)
from finetuna_lightning.nn.quantized import QuantizedEmbedding, QuantizedLinear, is_conv1d
from tests.helpers.models import VOCAB_SIZE, excite, logits_of, tiny_inputs, tiny_model

STEPS = 20
CLOSE = 1e-6
BLOCK = 256
EMBEDDINGS = {"embed_tokens", "wte", "wpe"}
ATTENTION = dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj"], (4, 2.0))
LLAMA = ATTENTION | dict.fromkeys(["gate_proj", "up_proj", "down_proj"], (4, 2.0))
OPT = dict.fromkeys(["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], (4, 2.0))
GPT2 = dict.fromkeys(["c_attn", "c_proj", "c_fc"], (4, 2.0))
GPT2_RANKS = {"c_attn": (2, 4.0), "attn.c_proj": (3, 1.5), "c_fc": (5, 5.0), "mlp.c_proj": (6, 1.5)}

pytestmark = [
    pytest.mark.filterwarnings("ignore:" + text)
    for text in (
        "`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft 0.21 with transformers 5.23
        "Setting `save_embedding_layers` to `True`",
        "Could not find a config file in",  # a model made from a configuration has no name
        "fan_in_fan_out is set to False but the target module is `Conv1D`",
        "Model has `tie_word_embeddings=True`",
        "Adapter 'default'.*LoRA tensor.*have invalid shape.*lora_B.bias",  # peft of its own biases
    )
]


class Case(NamedTuple):
    """``adapt``: rank and alpha by name. ``model``: fields of the configuration. ``first``: the lowest token drawn."""

    architecture: str
    adapt: dict[str, tuple[int, float]]
    bias: bool = False
    plain: tuple[str, ...] = ()
    dropout: float = 0.0
    model: dict[str, Any] = {}  # noqa: RUF012
    first: int = 3
    dtype: torch.dtype = torch.float32

    def scaled(self, factor: float) -> Case:
        """All alphas times ``factor``."""
        return self._replace(adapt={name: (r, alpha * factor) for name, (r, alpha) in self.adapt.items()})


BIASED = {"attention_bias": True, "mlp_bias": True}
CASES = {
    "llama": Case("llama", LLAMA | {"embed_tokens": (4, 2.0)}),
    "llama, padding": Case("llama", LLAMA | {"embed_tokens": (4, 2.0)}, first=0),
    "llama, head": Case("llama", LLAMA | {"embed_tokens": (3, 6.0)}, plain=("lm_head",)),
    "llama, tied head": Case("llama", LLAMA, plain=("lm_head",), model={"tie_word_embeddings": True}),
    "llama, bias": Case("llama", LLAMA, bias=True, model=BIASED),
    "llama, bias, dropout": Case("llama", LLAMA, bias=True, dropout=0.1, plain=("lm_head",), model=BIASED),
    "llama, adapted head": Case("llama", {"q_proj": (2, 4.0), "lm_head": (5, 2.5)}),
    "gpt2": Case("gpt2", GPT2 | {"wte": (4, 2.0), "wpe": (4, 2.0)}),
    "gpt2, ranks, head": Case("gpt2", GPT2_RANKS | {"wte": (3, 3.0), "wpe": (7, 3.5)}, plain=("lm_head",)),
    "gpt2, bias": Case("gpt2", GPT2_RANKS, bias=True),
    "gpt2, bias, dropout": Case("gpt2", GPT2, bias=True, dropout=0.1, plain=("lm_head",)),
    "opt": Case("opt", OPT | {"embed_tokens": (3, 6.0)}, plain=("lm_head",)),
    "opt, bias": Case("opt", OPT, bias=True),
    # Gemma scales its embeddings by the root of their width: peft table and delta apart, we their sum. 8 is exact.
    "gemma3": Case("gemma3", LLAMA | {"embed_tokens": (4, 2.0)}, model={"hidden_size": 64}),
}
SCALED = {"gemma3, root of 32": CASES["gemma3"]._replace(model={"hidden_size": 32})}
# Above, every alpha / r is a power of two, by which products are exact. Here none is; float64 hides who rounds when.
DOUBLE = {f"{name}, float64": case.scaled(1.5)._replace(dtype=torch.float64) for name, case in (CASES | SCALED).items()}
ROUNDED = {f"{name}, rounded": case.scaled(1.5) for name, case in CASES.items()}
ALL = CASES | DOUBLE | ROUNDED


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# ---- one of each ----------------------------------------------------------------------------------------------------


def model_of(case: Case) -> nn.Module:
    return tiny_model(case.architecture, scale=3.0, **case.model).to(case.dtype)


def our_model(case: Case, base: nn.Module) -> nn.Module:
    linear = {n: LinearAdapterConfig(*own, case.dropout, case.bias) for n, own in case.adapt.items()}
    tables = {n: EmbeddingAdapterConfig(*case.adapt[n]) for n in case.adapt.keys() & EMBEDDINGS}
    return new_finetuned(
        base, adapt_layers=case.adapt, plain_layers=case.plain, do_not_quantize=True, embedding_config=tables,
        linear_config={n: own for n, own in linear.items() if n not in EMBEDDINGS},
    )  # fmt: skip


def pefts_model(case: Case, base: nn.Module) -> nn.Module:
    rank, alpha = next(iter(case.adapt.values()))
    ranks = {name: r for name, (r, _) in case.adapt.items() if r != rank}
    alphas: Any = {name: a for name, (_, a) in case.adapt.items() if a != alpha}
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas, target_modules=list(case.adapt),  # type: ignore[arg-type]
        modules_to_save=list(case.plain) or None, lora_dropout=case.dropout, lora_bias=case.bias,
    )  # fmt: skip
    return peft.get_peft_model(base, config).eval()


def trained_by_peft(theirs: Any, path: str) -> dict[str, Tensor]:
    """What peft trains of the layer ``path``, by our names."""
    layer = theirs.base_model.model.get_submodule(path)
    if hasattr(layer, "modules_to_save"):
        return dict(layer.modules_to_save["default"].named_parameters())
    if "default" in layer.lora_embedding_A:
        return {kind: getattr(layer, kind)["default"] for kind in ("lora_embedding_A", "lora_embedding_B")}
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    return {"lora_A": down.weight, "lora_B": up.weight} | ({} if up.bias is None else {"lora_bias": up.bias})


def pairs(ours: nn.Module, theirs: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Every trained tensor, ours and peft's, by name: all that either has."""
    adapter = adapter_of(ours)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for key, module in (*adapter.deltas.items(), *adapter.plain.items()):
        mine, other = dict(module.named_parameters()), trained_by_peft(theirs, key.replace("/", "."))
        assert mine.keys() == other.keys()
        found |= {f"{key}.{name}": (mine[name], other[name]) for name in mine}
    assert {id(mine) for mine, _ in found.values()} == {id(p) for p in ours.parameters()}
    assert {id(other) for _, other in found.values()} == {id(p) for p in theirs.parameters() if p.requires_grad}
    return found


class Run(NamedTuple):
    ours: nn.Module
    theirs: nn.Module
    losses: Tensor  # [2, steps]
    moved: float


@cache
def run(name: str) -> Run:
    case = ALL[name]
    ours, theirs = (make(case, model_of(case)).to(case.dtype) for make in (our_model, pefts_model))
    excite(adapter_of(ours), std=0.1)  # no weight is zero
    before = {key: mine.detach().clone() for key, (mine, _) in pairs(ours, theirs).items()}
    with torch.no_grad():
        for mine, other in pairs(ours, theirs).values():
            other.copy_(mine)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (ours, theirs)]
    stream, losses = torch.Generator().manual_seed(1), torch.empty(2, STEPS, dtype=case.dtype)
    for model in (ours, theirs):
        model.train(case.dropout > 0)
    for step in range(STEPS):
        ids = torch.randint(case.first, VOCAB_SIZE, (4, 12), generator=stream)
        for row, (model, optimizer) in enumerate(zip((ours, theirs), optimizers, strict=True)):
            torch.manual_seed(step)  # of the dropout masks
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses[row, step] = loss.detach()
    after = pairs(ours, theirs)
    moved = min(float((after[key][0].detach() - tensor).norm() / tensor.norm()) for key, tensor in before.items())
    return Run(ours.eval(), theirs.eval(), losses, moved)


def logits(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return logits_of(model, tiny_inputs(ALL[name].architecture))


def distance(mine: Tensor, other: Tensor) -> float:
    """In relative norm, or of the farthest element relative to the largest, whichever is more."""
    other = other.detach()
    gap = mine.detach() - other
    return max(float(gap.norm() / other.norm()), float(gap.abs().max() / other.abs().max()))


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_training(name: str) -> None:
    ours, theirs, losses, moved = run(name)
    assert moved > 1e-4
    assert ((losses[0] - losses[1]).abs() <= CLOSE * losses[1]).all()
    far = {key: distance(*pair) for key, pair in pairs(ours, theirs).items()}
    assert max(far.values()) <= CLOSE, max(far.items(), key=lambda item: item[1])


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_our_folder_in_peft(name: str, tmp_path: Path) -> None:
    trained = run(name)
    trained.ours.save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    again = peft.PeftModel.from_pretrained(model_of(ALL[name]), str(tmp_path / "adapter")).eval()
    assert distance(logits(again, name), logits(trained.ours, name)) <= CLOSE


@pytest.mark.parametrize("name", CASES)
def test_pefts_folder_here(name: str, tmp_path: Path) -> None:
    trained = run(name)
    trained.theirs.save_pretrained(str(tmp_path))  # type: ignore[operator]
    again = load_finetuned(prepare_base_model(model_of(ALL[name]), do_not_quantize=True), tmp_path)
    assert distance(logits(again, name), logits(trained.theirs, name)) <= CLOSE
    for mine, other in pairs(again, trained.theirs).values():
        assert torch.equal(mine, other)


# ---- 8 bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["generic", "float32"])
@pytest.mark.parametrize("name", ["llama", "llama, bias", "gpt2", "opt", "opt, bias", "gemma3"])
def test_blockwise_base_is_bitsandbytes(name: str, kernel: str) -> None:
    """bitsandbytes' generic kernel takes the nearest code, and its codes are ours. Its CPU kernel for float32 takes a
    farther one for a value in 700, and for zero another than zero: there ours are replaced by its."""
    case = CASES[name]._replace(plain=())  # the head in 8 bits too, and what is tied to it
    twin, base = model_of(case), model_of(case)
    ours = our_model(case, prepare_base_model(base, (), scheme="int8-blockwise", block_size=BLOCK))
    layers = {p: m for p, m in ours.named_modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)}
    assert len(layers) >= len(case.adapt)
    for path, layer in layers.items():
        own: Any = twin.get_submodule(path)
        turned = is_conv1d(own)  # blocks run over [out, in]
        matrix = (own.weight.detach().t() if turned else own.weight.detach()).contiguous()
        codes, state = bnb.quantize_blockwise(matrix, blocksize=BLOCK)
        if kernel == "generic":
            codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(matrix.double(), state.code, BLOCK)
            assert torch.equal(absmax, state.absmax)
        else:
            layer.quantized.codes.copy_(codes)
        assert torch.equal(layer.quantized.codes, codes) and torch.equal(layer.quantized.scale, state.absmax)
        weight = bnb.dequantize_blockwise(codes, state)
        own.weight = nn.Parameter(weight.t() if turned else weight)
        if isinstance(own, nn.Embedding):
            assert torch.equal(layer.quantized.dequantize(), weight)
        else:
            x = torch.randn(2, 5, weight.shape[1])
            assert torch.equal(layer(x), F.linear(x, weight, own.bias))
    assert torch.equal(logits(ours, name), logits(twin, name))
    beside = our_model(case, twin)
    excite(adapter_of(ours), std=0.1)
    load_state_dict(beside, state_dict(ours))
    assert torch.equal(logits(ours, name), logits(beside, name))
