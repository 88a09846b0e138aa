"""What 8 bits cost the quickstart backbone, against the bf16 weights that it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.schemes import measure
from finetuna_lightning.backbone import QUICKSTART_FOLDER, fingerprint, load_backbone

SOURCE = Path(__file__).parent / "data" / "quickstart_bf16"
OUTPUT_ERROR = {"int8": 0.015, "int8-blockwise": 0.01, "fp8": 0.04}


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    return {row["scheme"]: row for row in measure(str(SOURCE), 4000)}


KNOWN = pytest.mark.xfail(
    reason="one v_proj of 42 layers has 1.07% in blocks of 64: see benchmarks/LOG.md", strict=True
)


@pytest.mark.parametrize("scheme", ["int8", pytest.param("int8-blockwise", marks=KNOWN), "fp8"])
def test_output_error_of_every_layer(rows: dict[str, dict[str, Any]], scheme: str) -> None:
    assert 0 < rows[scheme]["worst"] < OUTPUT_ERROR[scheme]


@pytest.mark.parametrize("scheme", OUTPUT_ERROR)
def test_mean_output_error(rows: dict[str, dict[str, Any]], scheme: str) -> None:
    assert 0 < rows[scheme]["mean"] < OUTPUT_ERROR[scheme]


def test_int8_perplexity_is_within_half_a_percent(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["bf16 original"]["perplexity"] < 20
    assert abs(rows["int8"]["change"]) < 0.005


def test_the_shipped_backbone_is_the_original_in_int8() -> None:
    shipped = fingerprint(load_backbone("quickstart"))
    assert shipped == fingerprint(load_backbone(str(SOURCE)))
    assert shipped == json.loads((QUICKSTART_FOLDER / "backbone.json").read_text())["fingerprint"]


def test_the_shipped_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in QUICKSTART_FOLDER.iterdir()) < 8_000_000
