"""The storage schemes against bitsandbytes and their own error bounds; the fingerprint against every small change."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from finetuna_lightning.ops import reference

SCHEMES = ("int8", "int8-blockwise", "fp8")
ODD = [(1, 1), (1, 77), (77, 1), (37, 53), (3, 4097), (64, 64)]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def round_trip(weight: Tensor, scheme: str, block_size: int = 64) -> Tensor:
    return reference.dequantize(*reference.quantize(weight, scheme, block_size), scheme, block_size, weight.dtype)


# ---- against bitsandbytes -------------------------------------------------------------------------------------------


def test_dynamic_tree_is_bitsandbytes() -> None:
    tree = torch.tensor(reference.dynamic_tree())
    assert torch.equal(tree, bnb.create_dynamic_map()) and len(tree) == 256


@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("shape", ODD)
def test_blockwise_reads_bitsandbytes_codes_exactly(shape: tuple[int, int], block_size: int) -> None:
    codes, state = bnb.quantize_blockwise(gaussian(*shape), blocksize=block_size)
    assert state.absmax.shape == reference.scale_shape(shape, "int8-blockwise", block_size)
    ours = reference.dequantize(codes, state.absmax, "int8-blockwise", block_size, torch.float32)
    assert torch.equal(ours, bnb.dequantize_blockwise(codes, state))


@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("shape", ODD)
def test_blockwise_quantises_as_bitsandbytes_does(shape: tuple[int, int], block_size: int) -> None:
    weight = gaussian(*shape)
    codes, scale = reference.quantize(weight, "int8-blockwise", block_size)
    theirs, state = bnb.quantize_blockwise(weight, blocksize=block_size)
    assert torch.equal(scale, state.absmax)
    assert (codes.int() - theirs.int()).abs().max() <= 1
    ours = reference.dequantize(codes, scale, "int8-blockwise", block_size, torch.float32)
    assert bool(((ours - weight).abs() <= (bnb.dequantize_blockwise(theirs, state) - weight).abs() + 1e-7).all())


# ---- what the schemes say of themselves -----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", ODD)
@pytest.mark.parametrize("block_size", [64, 256])
def test_one_byte_an_element_and_float32_scales(shape: tuple[int, int], scheme: str, block_size: int) -> None:
    codes, scale = reference.quantize(gaussian(*shape), scheme, block_size)
    assert codes.shape == shape and codes.dtype == reference.code_dtype(scheme) and codes.itemsize == 1
    blocks = -(-shape[0] * shape[1] // block_size)
    assert scale.shape == ((blocks,) if scheme == "int8-blockwise" else (shape[0],)) and scale.dtype == torch.float32


@pytest.mark.parametrize(
    ("scheme", "low", "high"), [("int8", 0.003, 0.012), ("int8-blockwise", 0.003, 0.012), ("fp8", 0.015, 0.04)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_relative_error_on_gaussian_weights(scheme: str, low: float, high: float, dtype: torch.dtype) -> None:
    weight = gaussian(64, 512, dtype=dtype)
    error = (round_trip(weight, scheme).double() - weight.double()).norm() / weight.double().norm()
    assert low < error < high


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_error_of_each_element_is_within_half_a_step(scheme: str) -> None:
    weight = gaussian(20, 300)
    codes, scale = reference.quantize(weight, scheme)
    error = (reference.dequantize(codes, scale, scheme, 64, torch.float32) - weight).abs()
    if scheme == "int8":
        step = scale[:, None].expand_as(weight) / 2
    else:  # three mantissa bits: half a step is 1/16 of the value, and 2**-10 of the scale among the subnormals
        step = torch.maximum(weight.abs() / 16, scale[:, None] * 2**-10)
    assert bool((error <= step * 1.0001).all())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_largest_of_a_row_or_block_survives(scheme: str) -> None:
    weight = gaussian(5, 64)
    at = weight.abs().argmax(1, keepdim=True)
    rtol = 0.01 if scheme == "int8-blockwise" else 1e-6  # the tree has +1, and -0.993 for its least value
    assert torch.allclose(round_trip(weight, scheme).gather(1, at), weight.gather(1, at), rtol=rtol)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_or_block_does_not_disturb_the_next(scheme: str) -> None:
    weight = gaussian(4, 64)
    loud = weight.clone()
    loud[2] *= 1e6
    keep = [0, 1, 3]
    assert torch.equal(round_trip(loud, scheme)[keep], round_trip(weight, scheme)[keep])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_rows_and_blocks_stay_zero(scheme: str) -> None:
    weight = gaussian(4, 64)
    weight[1] = 0
    back = round_trip(weight, scheme)
    assert bool((back[1] == 0).all()) and bool(back.isfinite().all()) and bool((back[0] != 0).any())
    assert bool((round_trip(torch.zeros(3, 70), scheme) == 0).all())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(scheme: str, bad: float) -> None:
    weight = gaussian(5, 70)
    weight[4, 69] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        reference.quantize(weight, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_row_looked_up_is_the_row_of_the_matrix(scheme: str, dtype: torch.dtype) -> None:
    codes, scale = reference.quantize(gaussian(37, 53), scheme, 64)
    ids = torch.tensor([[1, 36, 0], [7, 7, 2]])
    rows = reference.dequantize_rows(codes, scale, ids, scheme, 64, dtype)
    assert rows.dtype == dtype and rows.shape == (2, 3, 53)
    assert torch.equal(rows, reference.dequantize(codes, scale, scheme, 64, dtype)[ids])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_values_are_rounded_once(scheme: str, dtype: torch.dtype) -> None:
    codes, scale = reference.quantize(gaussian(37, 53), scheme, 64)
    once = reference.dequantize(codes, scale, scheme, 64, torch.float32).to(dtype)
    assert torch.equal(reference.dequantize(codes, scale, scheme, 64, dtype), once)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", ODD)
def test_pieces_give_what_the_whole_gives(scheme: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(*shape)
    whole = reference.quantize(weight, scheme, 64)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 128)
    pieces = []
    function = "_quantize_blocks" if scheme == "int8-blockwise" else "_quantize_rows"
    inner = getattr(reference, function)
    monkeypatch.setattr(reference, function, lambda piece, *rest: pieces.append(piece.numel()) or inner(piece, *rest))
    cut = reference.quantize(weight, scheme, 64)
    assert all(torch.equal(left, right) for left, right in zip(whole, cut, strict=True))
    assert max(pieces) <= max(128, shape[1] if scheme != "int8-blockwise" else 0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_transposed_view_quantises_as_its_copy(scheme: str) -> None:
    weight = gaussian(53, 37).t()
    for view, copy in zip(
        reference.quantize(weight, scheme), reference.quantize(weight.contiguous(), scheme), strict=True
    ):
        assert torch.equal(view, copy)


# ---- fingerprint ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 63, 64, 65])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float32])
def test_any_single_changed_element_shows(length: int, dtype: torch.dtype) -> None:
    tensor = (gaussian(length) * 50).to(dtype)
    mark = reference.fingerprint(tensor)
    assert reference.fingerprint(tensor.clone()) == mark
    for index in range(length):
        for change in (1, 64):
            other = tensor.clone()
            other[index] += change
            assert reference.fingerprint(other) != mark


@pytest.mark.parametrize("distance", [1, 7, 8, 16, 64, 512, 2048, 4096, 8192])
def test_any_swap_of_two_elements_shows(distance: int) -> None:
    """Also the swaps of the top byte of two words, whose difference a product modulo 2**64 can lose."""
    codes = torch.randint(-127, 128, (3 * 8192,), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    mark = reference.fingerprint(codes)
    for index in [*range(0, 16), *range(4096, 4104)]:
        left, right = int(codes[index]), int(codes[index + distance])
        if left != right:
            other = codes.clone()
            other[index], other[index + distance] = right, left
            assert reference.fingerprint(other) != mark, index


def test_opposite_changes_do_not_cancel() -> None:
    codes = torch.zeros(8 * 64, dtype=torch.int8)
    marks = {reference.fingerprint(codes)}
    for word in range(1, 64):
        other = codes.clone()
        other[7], other[7 + 8 * word] = -128, -128
        marks.add(reference.fingerprint(other))
    assert len(marks) == 64


def test_the_length_is_part_of_the_fingerprint() -> None:
    assert len({reference.fingerprint(torch.zeros(n, dtype=torch.int8)) for n in range(20)}) == 20


def test_a_fingerprint_is_of_values_in_order_and_not_of_strides() -> None:
    tensor = gaussian(6, 5)
    assert reference.fingerprint(tensor.t().contiguous()) == reference.fingerprint(tensor.t())
    assert reference.fingerprint(tensor) == reference.fingerprint(tensor.reshape(-1))


def test_a_fingerprint_is_a_known_number() -> None:
    """The same on every device, version and machine: it is written into adapter folders."""
    data = bytes(range(100)) + bytes(4)
    words = (int.from_bytes(data[at : at + 8], "little") + at // 8 * 0x1E3779B97F4A7C15 for at in range(0, 104, 8))
    expected = (100 + sum(map(splitmix64, words))) % 2**64
    assert reference.fingerprint(torch.arange(100, dtype=torch.uint8)) == expected == 288486113595060438


def splitmix64(word: int) -> int:
    word %= 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def test_large_tensors_are_read_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = gaussian(300)
    mark = reference.fingerprint(tensor)
    monkeypatch.setattr(reference, "FINGERPRINT_BYTES", 64)
    assert reference.fingerprint(tensor) == mark
