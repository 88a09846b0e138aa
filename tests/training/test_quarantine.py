"""Faults that stay with the adapter that has them: the others are bit-identical to a run without."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from finetuna_lightning.configs import AdapterConfig, BackboneConfig
from finetuna_lightning.training.callbacks.checkpoint import AdapterCheckpoint
from finetuna_lightning.training.module import MultiAdapterModule
from finetuna_lightning.training.optim import AdapterOptimizers, Turn
from finetuna_lightning.training.quarantine import guarded
from finetuna_lightning.training.report import training_table
from tests.helpers.joint import EIGHT, At, Weights, of, run, same, settings
from tests.helpers.models import tiny_folder
from tests.helpers.tiny import VOCAB_SIZE, Batches, tiny_batches, tiny_fit, tiny_module

BAD, STEPS, FIRST = "a3", 8, 3  # the faulty adapter; the first bad batch, counted from 1
OTHERS = [name for name in EIGHT if name != BAD]


def planted(key: str, value: int, batches: int | None = None) -> Batches:
    """A token or label of the faulty adapter is ``value`` in every batch from ``FIRST`` on, or in so many."""
    found = tiny_batches(EIGHT, STEPS)
    last = STEPS if batches is None else FIRST - 1 + batches
    for batch in found.batches[FIRST - 1 : last]:
        batch[key] = batch[key].clone()
        batch[key][2 * EIGHT.index(BAD) + 1, 4] = value
    return found


def infinite(trainer: Trainer, module: MultiAdapterModule) -> None:
    with torch.no_grad():
        next(iter(module.adapters[BAD].deltas.values())).lora_A[0, 0] = torch.inf  # type: ignore[union-attr, index]


def explode(trainer: Trainer, module: MultiAdapterModule) -> None:
    with torch.no_grad():
        for parameter in module.adapters[BAD].parameters():
            parameter.mul_(1e30)


FAULTS: dict[str, tuple[Callable[[], Batches], list[Any]]] = {
    "a label beyond the vocabulary": (lambda: planted("labels", VOCAB_SIZE), []),
    "a label below zero": (lambda: planted("labels", -7), []),
    "a token beyond the vocabulary": (lambda: planted("input_ids", VOCAB_SIZE + 5), []),
    "infinity in a delta": (lambda: tiny_batches(EIGHT, STEPS), [infinite]),
    "exploding weights": (lambda: tiny_batches(EIGHT, STEPS), [explode]),
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    weights = Weights()
    run(tmp_path_factory.mktemp("clean"), settings(), weights, batches=tiny_batches(EIGHT, STEPS))
    return weights


@pytest.mark.filterwarnings("ignore:AdapterCheckpoint.*holds NaN or infinity:UserWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_of_eight_leaves_the_other_seven_bit_identical(
    tmp_path: Path, clean: Weights, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    batches, changes = FAULTS[fault]
    weights = Weights()
    saving = AdapterCheckpoint(str(tmp_path / "adapters"), every_n_steps=1)
    with caplog.at_level(logging.INFO):
        module, _ = run(
            tmp_path, settings(), *(At(FIRST, do, before=True) for do in changes), weights, saving, batches=batches()
        )
    for step in range(STEPS):
        assert all(same(of(weights.taken[step], name), of(clean.taken[step], name)) for name in OTHERS), step
    assert module.retired == {BAD}
    assert {name: row["skipped"] for name, row in module.adapter_report().items()} == {
        name: 3 if name == BAD else 0 for name in EIGHT
    }
    if not changes:  # its weights are those before the first bad step
        assert same(of(weights.taken[-1], BAD), of(clean.taken[FIRST - 2], BAD))
    on_disk = load_file(tmp_path / "adapters" / BAD / "last" / "adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in on_disk.values())
    if fault != "exploding weights":  # which were finite when they were saved
        one = "deltas.model/layers/0/mlp/up_proj.lora_A"
        assert torch.equal(
            on_disk["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"],
            clean.taken[FIRST - 2][f"{BAD}.{one}"],
        )
    lines = [record.getMessage() for record in caplog.records if "in quarantine" in record.getMessage()]
    assert len(lines) == 1
    assert f"adapter '{BAD}' is in quarantine, with its weights of step {FIRST - 1}" in lines[0]
    console = Console(width=150, file=io.StringIO())
    console.print(training_table(module.adapter_report()))
    (row,) = [line for line in console.file.getvalue().splitlines() if "quarantine" in line]  # type: ignore[attr-defined]
    assert row.split()[:3] == [BAD, str(FIRST - 1), "3"]


def test_one_bad_batch_is_skipped_and_the_adapter_goes_on(tmp_path: Path, clean: Weights) -> None:
    """Weights, optimizer state and schedule as if the batch had not been: compared with the run whose bad batch is
    given no step by hand."""
    weights = Weights()
    module, _ = run(tmp_path, settings(), weights, batches=planted("labels", VOCAB_SIZE, batches=1))
    row = module.adapter_report()[BAD]
    assert (row["steps"], row["skipped"], module.retired) == (STEPS - 1, 1, set())
    assert same(of(weights.taken[FIRST - 1], BAD), of(weights.taken[FIRST - 2], BAD))
    assert not same(of(weights.taken[FIRST], BAD), of(weights.taken[FIRST - 1], BAD))
    group = next(group for group in module.optimizer.param_groups if group["name"] == BAD)
    assert group["lr"] == module.optimizer.rate(BAD)
    states = [module.optimizer.state[p]["step"] for p in module.adapters[BAD].parameters()]
    assert {int(step) for step in states} == {STEPS - 1}
    assert all(same(of(weights.taken[-1], name), of(clean.taken[-1], name)) for name in OTHERS)


def test_only_bad_steps_in_a_row_count(tmp_path: Path) -> None:
    batches = tiny_batches(EIGHT, STEPS)
    for index in (0, 1, 3, 4):
        batches.batches[index]["labels"][2 * EIGHT.index(BAD), 3] = VOCAB_SIZE
    configs = settings(a3={"max_bad_steps": 3})
    module, _ = run(tmp_path, configs, batches=batches)
    assert (module.retired, module.adapter_report()[BAD]["skipped"]) == (set(), 4)
    module, _ = run(tmp_path / "two", settings(a3={"max_bad_steps": 2}), batches=batches)
    assert (module.retired, module.adapter_report()[BAD]["steps"]) == ({BAD}, 0)


def test_a_bad_batch_spoils_the_step_that_it_is_accumulated_in(tmp_path: Path) -> None:
    """Batches 3 and 4 make one step of it."""
    weights = Weights()
    module, _ = run(tmp_path, settings(a3={"accumulate": 2}), weights, batches=planted("labels", VOCAB_SIZE, batches=1))
    assert module.adapter_report()[BAD] == {"steps": 3, "skipped": 1, "state": "trained to the end"}
    moved = [not same(of(a, BAD), of(b, BAD)) for a, b in zip(weights.taken[1:], weights.taken, strict=False)]
    assert moved == [True, False, False, False, True, False, True]  # after batches 2, 6 and 8


def test_the_run_ends_when_all_are_in_quarantine(tmp_path: Path) -> None:
    batches = tiny_batches(["x", "y"], 9)
    for batch in batches:
        batch["labels"][0, 3] = batch["labels"][2, 3] = VOCAB_SIZE
    module = tiny_module(tmp_path, {"x": {}, "y": {"max_bad_steps": 4}})
    trainer = tiny_fit(module, batches)
    assert (trainer.global_step, module.retired) == (4, {"x", "y"})


def test_quarantine_lasts_over_a_resume(tmp_path: Path) -> None:
    batches = planted("labels", VOCAB_SIZE)
    save = At(6, lambda trainer, _: trainer.save_checkpoint(tmp_path / "at.ckpt"))
    _, weights = run(tmp_path, settings(), save, batches=batches)
    module = tiny_module(tmp_path, settings())
    tiny_fit(module, Batches(batches.batches[6:]), ckpt_path=str(tmp_path / "at.ckpt"), max_epochs=2)
    assert module.retired == {BAD}
    assert module.adapter_report()[BAD]["skipped"] == 3
    assert same(of(dict(module.adapters.named_parameters()), BAD), of(weights, BAD))


def test_a_validation_with_a_bad_label_shows_it_and_goes_on(tmp_path: Path) -> None:
    val = tiny_batches(["x", "y"], 1)
    val.batches[0]["labels"][0, 3] = VOCAB_SIZE
    trainer = tiny_fit(tiny_module(tmp_path, {"x": {}, "y": {}}), tiny_batches(["x", "y"], 1), val=val)
    assert trainer.callback_metrics["val/x/loss"].isnan()
    assert trainer.callback_metrics["val/y/loss"].isfinite()


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_bad_label_of_a_classifier_or_a_decoder_is_the_adapter_s_own(tmp_path: Path, name: str) -> None:
    task = {"bert": "sequence-classification", "t5": "seq2seq-lm"}[name]
    config = BackboneConfig(tiny_folder(tmp_path / name, name), task=task, num_labels=3)
    module = MultiAdapterModule(config, {key: AdapterConfig(rank=2) for key in ("x", "y")})
    batches = tiny_batches(["x", "y"], 2)
    for batch in batches:
        batch["labels"] = batch["labels"] if name == "t5" else batch["labels"][:, 0] % 3
        batch["labels"].view(-1)[0] = 1_000
    tiny_fit(module, batches)
    assert {key: (row["steps"], row["skipped"]) for key, row in module.adapter_report().items()} == {
        "x": (0, 2),
        "y": (2, 0),
    }


# ---- the parts -------------------------------------------------------------------------------------------------------


def test_guarded_selects_and_says_who() -> None:
    batch = {
        "input_ids": torch.tensor([[1, 9], [2, 3], [-1, 4]]),
        "labels": torch.tensor([[-100, 1], [2, 5], [3, 4]]),
        "adapters": ["x", "y", "z"],
        "rows": [1, 1, 1],
    }
    new, fit = guarded(batch, 9, 5)
    assert new["input_ids"].tolist() == [[1, 0], [2, 3], [0, 4]]
    assert new["labels"].tolist() == [[-100, 1], [2, -100], [3, 4]]
    assert {name: bool(flag) for name, flag in fit.items()} == {"x": False, "y": False, "z": False}
    assert batch["input_ids"][0, 1] == 9  # the batch that was given is as it was
    _, fit = guarded(batch, 10, None)
    assert {name: bool(flag) for name, flag in fit.items()} == {"x": True, "y": True, "z": False}
    new, fit = guarded(batch, None, None)
    assert torch.equal(new["input_ids"], batch["input_ids"]) and all(bool(flag) for flag in fit.values())


def one(fused: bool) -> tuple[nn.Parameter, AdapterOptimizers]:
    parameter = nn.Parameter(torch.ones(4))
    group = {"params": [parameter], "name": "x", "lr": 0.1, "max_grad_norm": None}
    return parameter, AdapterOptimizers({"x": torch.optim.AdamW([group], fused=fused)}, {"x": Turn(max_bad_steps=2)})


def test_a_verdict_on_the_device_has_the_same_effect_a_step_later() -> None:
    """The fused kernels of a GPU are there on the CPU too: no value is asked for in the step that it belongs to."""
    (late, waiting), (now, asking) = one(True), one(False)
    for index, value in enumerate([1.0, torch.nan, 2.0, torch.inf, torch.nan, 3.0]):
        for parameter, optimizer in ((late, waiting), (now, asking)):
            before = parameter.detach().clone()
            parameter.grad = torch.full((4,), value)
            optimizer.step()
            moved = not torch.equal(before, parameter.detach())
            assert moved == (value in (1.0, 2.0, 3.0)), index
    assert (waiting.turns["x"].steps, asking.turns["x"].steps) == (3, 3)
    waiting.step()
    for optimizer in (waiting, asking):
        optimizer.settle()
        turn = optimizer.turns["x"]
        assert (turn.skipped, turn.quarantined) == (3, False)
    assert int(waiting.state[late]["step"]) == waiting.turns["x"].steps
