"""Packed rows for transformers' models: the model's own attention function, called sequence by sequence.

``enable_packing`` puts a function before a model's own (``sdpa`` or ``eager``) in transformers' registry. Outside a
packed pass it hands everything on as it is. In one, ``create_causal_mask`` and its kin are answered with a
``PackedMask``, which asks transformers for the mask of one sequence alone, so that sliding windows and chunks are those
of an unpadded batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetuna_lightning.errors import RouteError
from finetuna_lightning.nn.packing import (
    PackedMask,
    attend_by_sequence,
    attend_causally,
    packed_lengths,
    packed_pass,
)
from finetuna_lightning.ops import cpu_attention

_PREFIX = "finetuna_"
_UNMASKED = "finetuna_unmasked_"  # has no function that makes a mask, so transformers makes none
_IMPLEMENTATIONS = ("sdpa", "eager")
_PROBE = (5, 1, 7, 5)  # tokens of the sequences that a model is tried with
_NOISE = {torch.float32: 1e-4, torch.float64: 1e-8}  # how far two shapes of one computation lie apart; else 5%


def _own_attention(implementation: str, module: nn.Module) -> Callable[..., Any]:
    """What the model would call; its eager attention stands in its own file."""
    if implementation in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[implementation]  # type: ignore[no-any-return]
    return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]


def _attention_of(implementation: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, Any]:
        own = _own_attention(implementation, module)
        if not isinstance(attention_mask, PackedMask):
            if packed_lengths() is not None:
                raise RouteError(f"{type(module).__name__} attends without the mask of a packed row")
            return own(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]

        plain = implementation == "sdpa" and getattr(module, "is_causal", False) and not options.get("dropout")
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        if plain and all(attention_mask.of(length) is None for length in set(attention_mask.lengths)):
            out = attend_causally(query, key, value, attention_mask.lengths, scale)
            if out is not None:
                return out, None

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            if plain and mask is None and cpu_attention.takes(q, k, v):
                return cpu_attention.attend(q, k, v, scale)
            return own(module, q, k, v, mask, **options)[0]  # type: ignore[no-any-return]

        return attend_by_sequence(attend, query, key, value, attention_mask), None

    return attention


def _mask_of(implementation: str) -> Callable[..., Any]:
    def mask(**given: Any) -> Any:
        make, lengths = ALL_MASK_ATTENTION_FUNCTIONS[implementation], packed_lengths()
        if lengths is None:
            return make(**given)
        if given["batch_size"] != 1 or not given["q_length"] == given["kv_length"] == sum(lengths):
            raise RouteError(
                f"a packed row of {sum(lengths)} tokens was asked for the mask of {given['batch_size']} rows of "
                f"{given['q_length']} tokens"
            )
        alone = given | {"attention_mask": None}  # there are no pads, and nothing to be read back from the device
        return PackedMask(lengths, lambda length: make(**alone | {"q_length": length, "kv_length": length}))

    return mask


for _name in _IMPLEMENTATIONS:
    ALL_ATTENTION_FUNCTIONS.register(_PREFIX + _name, _attention_of(_name))
    ALL_MASK_ATTENTION_FUNCTIONS.register(_PREFIX + _name, _mask_of(_name))
ALL_ATTENTION_FUNCTIONS.register(_UNMASKED + "sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"])


def enable_packing(model: nn.Module, *copies: nn.Module) -> str | None:
    """Make ``model`` take packed rows, in place; or say why it cannot, and leave it as it was. ``copies`` hold private
    copies of its modules, which have a configuration of their own.

    Whether it can is found out by trying, since models differ in what they do with ``position_ids`` and masks: some
    sequences are packed into one row, and the logits of each must be those of it alone, must stay so when another
    sequence is NaN, and must change with its positions.

    Returns:
        None, or the reason, to be shown to a user.
    """
    obstacle, changed, name = _switch(model, copies)
    if obstacle or not changed:
        return obstacle
    obstacle = "it was not tried"
    try:
        obstacle = _try(model)
    finally:
        if obstacle:
            for part in changed:
                part._attn_implementation_internal = name
    return obstacle


def assume_packing(model: nn.Module, *copies: nn.Module) -> str | None:
    """As ``enable_packing``, but nothing is tried: for a model without weights, which cannot be."""
    return _switch(model, copies)[0]


def assume_full_rows(model: nn.Module, longest: int) -> None:
    """Have ``model`` attend as it does to rows of ``longest`` tokens without pads: where it uses ``sdpa``, without a
    mask. transformers finds out by looking at the mask's values, which a model without storage does not have."""
    config: Any = model.config
    window = getattr(config.get_text_config(), "sliding_window", None)
    if getattr(config, "_attn_implementation", None) == "sdpa" and (window is None or longest < window):
        _switch(model, (), _UNMASKED)


def _switch(model: nn.Module, copies: Sequence[nn.Module], prefix: str = _PREFIX) -> tuple[str | None, list[Any], str]:
    """Put ours before the model's own attention: why not, the configurations that were changed, and what they said."""
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_attn_implementation", None)
    if name is None:
        return f"{type(model).__name__} is no model of transformers", [], ""
    if name.startswith(_PREFIX):
        return None, [], name
    if name not in _IMPLEMENTATIONS:
        return (
            f"its attention is {name!r}; {' and '.join(map(repr, _IMPLEMENTATIONS))} are known to work packed",
            [],
            "",
        )
    parts = (part for whole in (model, *copies) for part in whole.modules())
    configs = {id(part.config): part.config for part in parts if hasattr(part, "config")}
    changed: list[Any] = [c for c in configs.values() if getattr(c, "_attn_implementation", None) == name]
    for part in changed:
        part._attn_implementation_internal = prefix + name
    return None, changed, name


@torch.no_grad()
def _try(model: nn.Module) -> str | None:
    """Why ``model``, evaluated under whatever routes are in force, does not treat packed sequences as it does alone."""
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = next(iter((*table.buffers(), *table.parameters()))).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(table.num_embeddings, 1000), (1, sum(_PROBE)), generator=generator).to(device)
    stops = torch.tensor(_PROBE).cumsum(0).tolist()
    cuts = [slice(stop - length, stop) for stop, length in zip(stops, _PROBE, strict=True)]
    try:
        packed = _packed_logits(model, ids)
        if not bool(packed.isfinite().all()):
            return "it gives numbers that are not finite"
        noise = _NOISE.get(packed.dtype, 0.05)
        for cut in cuts:
            alone = model(input_ids=ids[:, cut], use_cache=False).logits
            if not (error := _apart(packed[:, cut], alone)) <= noise:
                return f"packed sequences get other logits than alone ({error:.1e} of their norm)"
        for cut in cuts:
            with _nan_within(table, cut):
                spoilt = _packed_logits(model, ids)
            clean = torch.ones(ids.shape[1], dtype=torch.bool)
            clean[cut] = False
            if not _apart(spoilt[:, clean], packed[:, clean]) <= noise:
                return "what one sequence holds reaches the others"
        if torch.equal(packed, _packed_logits(model, ids, backwards=True)):
            return "it takes no notice of position_ids"
    except (RouteError, TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError) as error:
        lines = str(error).splitlines()
        return f"its forward refuses a packed row: {type(error).__name__}{': ' + lines[0] if lines else ''}"
    return None


def _apart(one: Tensor, other: Tensor) -> float:
    """The distance of two tensors as a part of the second's norm; NaN where one of them has a NaN."""
    return float((one - other).double().norm() / other.double().norm())


def packed_inputs(lengths: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """``position_ids`` [1, tokens] that start anew at each sequence, and ``attention_mask`` [1, tokens], all ones:
    without one, transformers looks for sequences of its own in the positions."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    return {"position_ids": positions, "attention_mask": torch.ones_like(positions)}


def _packed_logits(model: nn.Module, ids: Tensor, backwards: bool = False) -> Tensor:
    inputs = packed_inputs(_PROBE, ids.device)
    if backwards:
        inputs["position_ids"] = inputs["position_ids"].flip(1)
    with packed_pass(_PROBE):
        return model(input_ids=ids, use_cache=False, **inputs).logits  # type: ignore[no-any-return]


@contextmanager
def _nan_within(table: nn.Module, cut: slice) -> Iterator[None]:
    """Within, the embeddings of a cut of the row are NaN: whatever they reach is NaN too."""

    def spoil(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, cut] = torch.nan
        return out

    handle = table.register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()
