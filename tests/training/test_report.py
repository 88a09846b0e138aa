"""Every adapter on every data set, and how a run's figures are shown and kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from finetuna_lightning.configs import AdapterConfig, BackboneConfig
from finetuna_lightning.errors import ConfigError
from finetuna_lightning.training import report
from finetuna_lightning.training.module import MultiAdapterModule
from finetuna_lightning.training.plots import smooth
from finetuna_lightning.training.report import (
    evaluate_on_every_set,
    human_bytes,
    memory_table,
    metric_of,
    perplexity_table,
    plot_report,
    sample_table,
    write_report,
)
from finetuna_lightning.training.tokenizing import Example
from tests.helpers.tiny import VOCAB_SIZE, tiny_module

NAMES = ["sql", "legal"]


class Sets:
    """Stands in for a data module: examples of uneven lengths."""

    def __init__(self, counts: dict[str, int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sets: dict[str, list[Example]] = {}
        for name, count in counts.items():
            lengths = [3 + index % 5 for index in range(count)]
            rows = [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in lengths]
            self.sets[name] = [Example(ids, ids.clone()) for ids in rows]

    def evaluation_sets(self, split: str = "val") -> dict[str, list[Example]]:
        assert split == "val"
        return self.sets


@pytest.fixture
def module(tmp_path: Path) -> MultiAdapterModule:
    """Two adapters that do something: a new one would leave the backbone as it is."""
    module = tiny_module(tmp_path, {name: {"rank": 4} for name in NAMES})
    generator = torch.Generator().manual_seed(1)
    for parameter in module.adapters.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return module


def perplexity_by_hand(module: MultiAdapterModule, adapter: str | None, examples: list[Example]) -> float:
    """One unpadded sequence after the other."""
    total, count = 0.0, 0
    for example in examples:
        ids = example.input_ids[None]
        with torch.no_grad(), module.adapters.bare() if adapter is None else module.adapters.route([adapter]):
            assert module.backbone is not None
            logits = module.backbone(ids).logits
        total += float(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return math.exp(total / count)


@pytest.mark.parametrize("budget", [2**28, 1])
def test_every_row_is_its_adapter_on_each_set(
    module: MultiAdapterModule, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """Whether the adapters' rows go together or, with no room for logits, one adapter after the other."""
    monkeypatch.setattr(report, "_LOGITS_BYTES", budget)
    passes: list[list[str]] = []
    original = MultiAdapterModule.forward

    def forward(self: MultiAdapterModule, batch: dict[str, Any], training: bool = False, bare: bool = False) -> Any:
        if not bare:
            passes.append(batch["adapters"])
        return original(self, batch, training, bare)

    monkeypatch.setattr(MultiAdapterModule, "forward", forward)
    sets = Sets({"sql": 7, "legal": 4})
    matrix = evaluate_on_every_set(module, sets, batch_size=3)
    assert list(matrix) == ["backbone", "sql", "legal"]
    for row, values in matrix.items():
        for name, examples in sets.sets.items():
            by_hand = perplexity_by_hand(module, None if row == "backbone" else row, examples)
            assert values[name] == pytest.approx(by_hand, rel=1e-4)
    assert len({round(values["sql"], 3) for values in matrix.values()}) == 3
    assert passes[:2] == ([["sql", "legal"]] * 2 if budget > 1 else [["sql"], ["legal"]])


def test_only_so_many_batches_are_read(module: MultiAdapterModule) -> None:
    sets = Sets({"sql": 7})
    matrix = evaluate_on_every_set(module, sets, batch_size=2, max_batches=2)
    assert matrix["sql"]["sql"] == pytest.approx(perplexity_by_hand(module, "sql", sets.sets["sql"][:4]), rel=1e-4)
    assert len(sets.sets["sql"]) == 7
    assert [len(example.input_ids) for example in sets.sets["sql"][:3]] == [3, 4, 5]  # the caller's order stays


@pytest.mark.parametrize("training", [True, False])
def test_the_module_is_left_as_it_was(
    module: MultiAdapterModule, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    modes: list[bool] = []
    original = MultiAdapterModule.losses
    monkeypatch.setattr(
        MultiAdapterModule, "losses", lambda self, *args: (modes.append(self.training), original(self, *args))[1]
    )
    module.train(training)
    calls = [adapter.calls for adapter in module.adapters.adapters()]
    evaluate_on_every_set(module, Sets({"sql": 2}))
    assert module.training == training
    assert modes == [False, False]  # the backbone, and the adapters
    assert [adapter.calls for adapter in module.adapters.adapters()] == calls
    assert all(parameter.grad is None for parameter in module.parameters())


def test_progress_is_printed(module: MultiAdapterModule, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_on_every_set(module, Sets({"sql": 3, "legal": 2}), batch_size=2)
    out = capsys.readouterr().out.splitlines()
    assert [line.rsplit(",", 1)[0] for line in out] == [
        "evaluating on sql: batch 1/3",
        "evaluating on legal: batch 3/3",
    ]


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"max_batches": 0}])
def test_an_empty_batch_is_refused(module: MultiAdapterModule, settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        evaluate_on_every_set(module, Sets({"sql": 1}), **settings)


def test_a_classifier_is_measured_by_its_accuracy(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    backbone = BackboneConfig(str(tmp_path / "bert"), task="sequence-classification", num_labels=3)
    module = MultiAdapterModule(backbone, {"mood": AdapterConfig(rank=2, target_modules=["query"])})
    module.configure_model()
    sets = Sets({"mood": 9})
    module.eval()
    with torch.no_grad(), module.adapters.bare():
        assert module.backbone is not None
        answers = [int(module.backbone(example.input_ids[None]).logits.argmax()) for example in sets.sets["mood"]]
    sets.sets["mood"] = [
        Example(example.input_ids, answer if index < 6 else (answer + 1) % 3)
        for index, (example, answer) in enumerate(zip(sets.sets["mood"], answers, strict=True))
    ]
    assert metric_of(module) == "accuracy"
    matrix = evaluate_on_every_set(module, sets, batch_size=4)
    assert matrix["backbone"]["mood"] == matrix["mood"]["mood"] == pytest.approx(6 / 9)  # a new adapter changes nothing


MATRIX = {
    "backbone": {"sql": 100.0, "legal": 50.0},
    "sql": {"sql": 60.0, "legal": 55.0},
    "legal": {"sql": 120.0, "legal": math.inf},
}
MEMORY: dict[str, Any] = {
    "backbone": {"bytes": 8 * 2**20},
    "adapters": {
        name: {"weights": 2**19, "gradients": 2**19, "optimizer": 2**20, "activations": 2**25, "total": 2**21}
        for name in NAMES
    },
    "together": 12 * 2**20,
    "separate": 20 * 2**20,
    "saving": 8 * 2**20,
    "peak": 2**30,
    "peak_of": "process memory",
}
HISTORY = {name: [(step, 5 / step) for step in range(1, 30)] for name in NAMES}


def shown(table: Table) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    console.file.close()
    return console.export_text(styles=False)


def row(text: str, name: str) -> list[str]:
    """The cells of the last line that begins with ``name``."""
    return [line.split() for line in text.splitlines() if line.strip().startswith(name + " ")][-1]


def test_the_matrix_marks_the_best_and_the_change_on_the_own_data() -> None:
    text = shown(perplexity_table(MATRIX))
    assert row(text, "backbone") == ["backbone", "100.00", "50.00", "*"]
    assert row(text, "sql") == ["sql", "(-40.0%)", "60.00", "*", "55.00"]
    assert row(text, "legal")[-1] == "inf"
    higher = shown(perplexity_table({"backbone": {"sql": 0.5}, "sql": {"sql": 0.75}}, metric="accuracy"))
    assert row(higher, "sql") == ["sql", "(+50.0%)", "0.750", "*"]


def test_the_memory_table_fits_a_terminal_and_adds_up() -> None:
    text = shown(memory_table(MEMORY))
    assert row(text, "backbone,")[2:] == ["8.0", "MiB", "8.0", "MiB"]
    assert row(text, "sql")[1:] == ["512.0", "KiB", "512.0", "KiB", "1.0", "MiB", "2.0", "MiB", "32.0", "MiB"]
    assert row(text, "together")[1:] == ["12.0", "MiB", "64.0", "MiB"]
    assert row(text, "2 copies")[2:] == ["20.0", "MiB"]
    assert "8.0 MiB (40%)" in text
    assert "1.0 GiB" in text


def test_samples_are_shown_as_they_are() -> None:
    text = shown(sample_table([{"adapter": "sql", "prompt": "x = a[red]", "text": "\n[/] :smile: [bold]b[/bold]"}]))
    assert "x = a[red]" in text
    assert "[/] :smile: [bold]b[/bold]" in text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**41, "2.0 TiB")]
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_smoothing_starts_at_the_first_value_and_passes_over_nan() -> None:
    assert smooth([(1, 4.0), (2, math.nan), (3, 2.0)]) == [(1, 4.0), (3, pytest.approx((0.9 * 4 + 2) / 1.9))]
    assert smooth([]) == []


def test_the_report_is_written_whole_and_pyplot_is_left_alone(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    samples = [{"adapter": "sql", "prompt": "SELECT", "text": " 1"}]
    paths = write_report(
        tmp_path / "run", history=HISTORY, matrix=MATRIX, memory=MEMORY, val_history={"sql": [(29, 1.0)]},
        samples=samples, extra={"seconds": 1.5},
    )  # fmt: skip
    assert paths == {"json": tmp_path / "run/report.json", "png": tmp_path / "run/report.png"}
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["report.json", "report.png"]
    figures = json.loads(paths["json"].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert figures["matrix"]["sql"] == MATRIX["sql"]
    assert figures["matrix"]["legal"]["legal"] is None
    assert figures["memory"] == MEMORY
    assert figures["history"]["sql"][1] == [2, 2.5]
    assert figures["val_history"] == {"sql": [[29, 1.0]]}
    assert (figures["metric"], figures["samples"], figures["seconds"]) == ("perplexity", samples, 1.5)
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("count", [1, 3, 9])
def test_any_number_of_adapters_can_be_drawn(tmp_path: Path, count: int) -> None:
    names = [f"adapter{index}" for index in range(count)]
    matrix = {who: dict.fromkeys(names, 2.0) for who in ["backbone", *names]}
    part = MEMORY["adapters"]["sql"]
    path = plot_report(tmp_path / "x.png", {}, matrix, {**MEMORY, "adapters": dict.fromkeys(names, part)})
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_figure_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plot_report(tmp_path / "x.png", HISTORY, MATRIX, MEMORY)
    old = path.read_bytes()

    def half(self: Any, beside: Path, **_: Any) -> None:
        beside.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    with pytest.raises(OSError, match="no space"):
        plot_report(path, HISTORY, MATRIX, MEMORY)
    assert path.read_bytes() == old
    assert [item.name for item in tmp_path.iterdir()] == ["x.png"]
