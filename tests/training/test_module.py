"""The LightningModule: joint training as if each adapter were alone, checkpoints without a backbone, every loop."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric
from torch import Tensor
from torch.nn import functional as F
from transformers import BertModel

from finetuna_lightning.adapters import AdapterBank
from finetuna_lightning.backbone import quantize_model_, quantized_layers
from finetuna_lightning.configs import AdapterConfig, BackboneConfig, DataConfig, OptimConfig
from finetuna_lightning.errors import CheckpointError, ConfigError, FinetunaError, TargetError
from finetuna_lightning.training.data import AdapterDataModule
from finetuna_lightning.training.module import MultiAdapterModule
from finetuna_lightning.training.optim import optimizer_bytes
from finetuna_lightning.training.precision import EightBitPrecision
from tests.helpers.models import LABELS, excite, plain_net, tiny_config
from tests.helpers.runs import language_model, text_file
from tests.helpers.tiny import Batches, tiny_batches, tiny_fit, tiny_module

State = dict[str, Tensor]
SQL: dict[str, Any] = {
    "rank": 4,
    "dropout": 0.2,
    "lr": 1e-2,
    "schedule": "constant",
    "target_modules": ["q_proj", "up_proj"],
}
LEGAL: dict[str, Any] = {"rank": 2, "dropout": 0.1, "lr": 1e-2, "bias": True, "plain_modules": ["lm_head"]}
BOTH = {"sql": SQL, "legal": LEGAL}


def only(batches: Batches, name: str) -> Batches:
    """The rows of one adapter, cut to its own longest row."""
    found = []
    for batch in batches:
        at = batch["adapters"].index(name)
        rows = slice(sum(batch["rows"][:at]), sum(batch["rows"][: at + 1]))
        length = int(batch["attention_mask"][rows].sum(1).max())
        tensors = {key: batch[key][rows, :length] for key in ("input_ids", "attention_mask", "labels")}
        found.append(tensors | {"adapters": [name], "rows": [batch["rows"][at]]})
    return Batches(found)


def ragged(steps: int) -> Batches:
    """Joint batches in which the first adapter's rows are shorter, so that it is padded because of its company."""
    batches = tiny_batches(["sql", "legal"], steps, rows=[2, 3])
    for batch in batches:
        for row, length in enumerate((5, 8)):
            batch["input_ids"][row, length:] = 0
            batch["attention_mask"][row, length:] = 0
            batch["labels"][row, length:] = -100
        batch["labels"][3, :4] = -100
    return batches


class Recorder(Callback):
    """The gradients after clipping and the weights, after every batch."""

    def __init__(self) -> None:
        self.gradients: list[State] = []
        self.weights: list[State] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        named = dict(pl_module.adapters.named_parameters())
        self.gradients.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
        self.weights.append({name: p.detach().clone() for name, p in named.items()})


def of(state: Mapping[str, Tensor], name: str) -> State:
    return {key: value for key, value in state.items() if key.startswith(name + ".")}


def assert_close(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    assert mine.keys() == theirs.keys() != set()
    for key, value in mine.items():
        assert torch.allclose(value, theirs[key], rtol=tolerance, atol=tolerance * 0.1), key


def assert_equal(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys() != set()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]), key


# ---- joint as if alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sql", "legal"])
@pytest.mark.parametrize("padded", [True, False])
def test_gradients_and_steps_in_company_are_those_alone(tmp_path: Path, name: str, padded: bool) -> None:
    """With different ranks, targets and label counts; padded because of the company, or with dropout."""
    batches = ragged(3) if padded else tiny_batches(["sql", "legal"], 3, rows=[2, 3])
    configs = {key: fields | ({"dropout": 0.0} if padded else {}) for key, fields in BOTH.items()}
    joint, alone = Recorder(), Recorder()
    tiny_fit(tiny_module(tmp_path / "joint", configs), batches, joint)
    tiny_fit(tiny_module(tmp_path / "alone", {name: configs[name]}), only(batches, name), alone)
    for step in range(3):
        assert_close(of(joint.gradients[step], name), of(alone.gradients[step], name), 1e-4)
        assert_close(of(joint.weights[step], name), of(alone.weights[step], name), 1e-4)


def test_the_losses_are_each_adapter_s_own_mean(tmp_path: Path) -> None:
    module = tiny_module(tmp_path, BOTH)
    excite(module.adapters)
    batch = next(iter(ragged(1)))
    with torch.no_grad():
        output = module(batch)
    logits = output.logits
    found = {name: (float(total / count), int(count)) for name, total, count, _ in module.losses(output, batch)}
    for name, rows in (("sql", slice(0, 2)), ("legal", slice(2, 5))):
        labels = batch["labels"][rows, 1:]
        loss = F.cross_entropy(logits[rows, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
        assert found[name] == (pytest.approx(float(loss), rel=1e-5), int((labels != -100).sum()))


def test_clipping_is_by_the_adapter_s_own_norm(tmp_path: Path) -> None:
    """The company's gradients are a thousand times as large: its alpha is."""
    configs = {"sql": {"rank": 2, "max_grad_norm": 1e-3}, "legal": {"rank": 2, "alpha": 16000.0, "max_grad_norm": None}}
    recorder = Recorder()
    module = tiny_module(tmp_path, configs)
    trainer = tiny_fit(module, tiny_batches(list(configs), 1), recorder)
    norms = {
        name: float(torch.cat([g.flatten() for g in of(recorder.gradients[0], name).values()]).norm())
        for name in configs
    }
    assert norms["sql"] == pytest.approx(1e-3, rel=1e-3)
    assert float(trainer.callback_metrics["train/sql/grad_norm"]) > 2e-3  # before clipping
    assert norms["legal"] == pytest.approx(float(trainer.callback_metrics["train/legal/grad_norm"]), rel=1e-5)
    assert norms["legal"] > 100 * float(trainer.callback_metrics["train/sql/grad_norm"])


def test_random_streams_depend_on_seed_and_name_alone(tmp_path: Path) -> None:
    joint = tiny_module(tmp_path / "a", BOTH)
    alone = tiny_module(tmp_path / "b", {"legal": LEGAL})
    assert joint.adapter_seed("legal") == alone.adapter_seed("legal") != joint.adapter_seed("sql")
    torch.manual_seed(123)
    assert_equal(of(joint.adapters.state_dict(), "legal"), alone.adapters.state_dict())
    own = tiny_module(tmp_path / "c", {"sql": SQL | {"seed": 7}, "legal": LEGAL | {"seed": 7}})
    assert own.adapter_seed("sql") == own.adapter_seed("legal") == 7
    other = MultiAdapterModule(BackboneConfig(), {"legal": AdapterConfig()}, seed=1)
    assert other.adapter_seed("legal") != joint.adapter_seed("legal")


def test_accumulated_batches_are_averaged(tmp_path: Path) -> None:
    configs = {name: fields | {"dropout": 0.0, "max_grad_norm": None} for name, fields in BOTH.items()}
    two, recorder, whole = tiny_batches(list(configs), 2, rows=2), Recorder(), Recorder()
    first, second = two
    joined = {
        key: torch.cat([batch[key][rows] for rows in (slice(0, 2), slice(2, 4)) for batch in (first, second)])
        for key in ("input_ids", "attention_mask", "labels")
    }
    one = Batches([joined | {"adapters": list(configs), "rows": [4, 4]}])
    tiny_fit(tiny_module(tmp_path / "a", configs), two, recorder, accumulate_grad_batches=2)
    tiny_fit(tiny_module(tmp_path / "b", configs), one, whole)
    assert_close(recorder.gradients[1], whole.gradients[0], 1e-4)


def test_recomputing_activations_changes_nothing(tmp_path: Path) -> None:
    kept, again = Recorder(), Recorder()
    tiny_fit(tiny_module(tmp_path / "a", BOTH), ragged(2), kept)
    module = tiny_module(tmp_path / "b", BOTH, gradient_checkpointing=True)
    calls: list[bool] = []
    assert module.adapters.backbone is module.backbone is not None
    assert module.fused_loss_obstacle() is None  # found out in passes of its own, before any is counted
    module.backbone.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(True))
    tiny_fit(module, ragged(2), again)
    assert len(calls) == 4  # each step's forward, and once more in its backward
    for step in range(2):
        assert_equal(kept.gradients[step], again.gradients[step])
        assert_equal(kept.weights[step], again.weights[step])


# ---- modes and bytes ------------------------------------------------------------------------------------------------


def test_the_backbone_and_private_copies_of_it_stay_in_evaluation_mode(tmp_path: Path) -> None:
    module = tiny_module(tmp_path, BOTH)
    for mode in (True, False, True):
        module.adapters.train(mode)
        module.train(mode)
        assert module.backbone is not None
        plain = [part for name in BOTH for part in module.adapters[name].plain.modules()]
        assert not any(part.training for part in (*module.backbone.modules(), *plain))
        assert len(plain) > len(BOTH) and all(module.adapters[name].deltas.training is mode for name in BOTH)


@pytest.mark.parametrize("scheme", ["int8", "int8-blockwise", "fp8", "none"])
def test_eight_adapters_cost_the_backbone_once_and_their_own_bytes(tmp_path: Path, scheme: str) -> None:
    targets = {"q_proj": (32, 32), "up_proj": (32, 48)}
    adapters = {f"a{rank}": {"rank": rank, "target_modules": list(targets)} for rank in range(1, 9)}
    module = tiny_module(tmp_path, adapters, scheme=scheme)
    tiny_fit(module, tiny_batches(list(adapters), 1), val=tiny_batches(list(adapters), 1))
    bank, layers = module.adapters, 2
    own = {f"a{rank}": layers * 4 * rank * sum(i + o for i, o in targets.values()) for rank in range(1, 9)}
    assert {adapter.name: adapter.nbytes for adapter in bank.adapters()} == own
    total = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    assert total == bank.backbone_nbytes + sum(own.values())
    state = optimizer_bytes(module.trainer.optimizers[0])
    tensors = layers * 2 * len(targets)
    assert state == {name: 2 * size + 4 * tensors for name, size in own.items()}


# ---- loops ----------------------------------------------------------------------------------------------------------


def evaluator(**options: Any) -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, **options)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_every_adapter_is_evaluated_on_its_own_rows(tmp_path: Path, stage: str) -> None:
    module = tiny_module(tmp_path, BOTH)
    excite(module.adapters)
    trainer, batches = evaluator(), ragged(2)
    (logged,) = getattr(trainer, stage)(module, batches, verbose=False)
    prefix = {"validate": "val", "test": "test"}[stage]
    for name in BOTH:
        sums = [(total, count) for b in batches for n, total, count, _ in module.losses(module(b), b) if n == name]
        loss = sum(float(total.detach()) for total, _ in sums) / sum(int(count) for _, count in sums)
        assert logged[f"{prefix}/{name}/loss"] == pytest.approx(loss, rel=1e-5)
        assert logged[f"{prefix}/{name}/perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)
    mean = (logged[f"{prefix}/sql/loss"] + logged[f"{prefix}/legal/loss"]) / 2
    assert logged[f"{prefix}/loss"] == pytest.approx(mean)
    (again,) = getattr(trainer, stage)(module, only(batches, "sql"), verbose=False)  # the metrics were reset
    assert set(again) == {f"{prefix}/sql/loss", f"{prefix}/sql/perplexity", f"{prefix}/loss"}


def test_an_adapter_without_validation_data_logs_nothing(tmp_path: Path) -> None:
    (logged,) = evaluator().validate(tiny_module(tmp_path, BOTH), only(ragged(1), "sql"), verbose=False)
    assert set(logged) == {"val/sql/loss", "val/sql/perplexity", "val/loss"}


def test_predicting_gives_a_row_for_each_row(tmp_path: Path) -> None:
    module = tiny_module(tmp_path, BOTH)
    excite(module.adapters)
    (batch,) = ragged(1)
    (rows,) = evaluator().predict(module, Batches([batch])) or []
    assert [row["adapter"] for row in rows] == ["sql", "sql", "legal", "legal", "legal"]
    with torch.no_grad():
        logits = module(batch).logits
    for index, row in enumerate(rows):
        loss = F.cross_entropy(logits[index, :-1], batch["labels"][index, 1:], ignore_index=-100)
        assert row["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert row["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)


def classified(steps: int, names: Sequence[str] = ("sql", "legal")) -> Batches:
    batches = tiny_batches(names, steps, rows=3)
    for batch in batches:
        batch["labels"] = batch["input_ids"][:, 0] % LABELS
    return batches


def test_a_classifier_trains_its_own_head_and_reports_accuracy_and_f1(tmp_path: Path) -> None:
    bert = BertModel(tiny_config("bert"))
    bert.save_pretrained(tmp_path / "bert")  # without a head
    config = BackboneConfig(str(tmp_path / "bert"), task="sequence-classification", num_labels=LABELS)
    fields = {"target_modules": ["query", "value"], "lr": 1e-2, "schedule": "constant"}
    module = MultiAdapterModule(
        config, {"sql": AdapterConfig(rank=2, **fields), "legal": AdapterConfig(rank=4, **fields)}
    )
    trainer = tiny_fit(module, classified(6), val=classified(2), max_epochs=3)
    metrics = trainer.callback_metrics
    for name in ("sql", "legal"):
        adapter = module.adapters[name]
        assert "classifier" in adapter.plain
        assert {key for key in metrics if key.startswith(f"val/{name}/")} == {
            f"val/{name}/{what}" for what in ("loss", "accuracy", "f1")
        }
    with torch.no_grad():
        answers = torch.cat([module(batch).logits.argmax(-1) for batch in classified(2)])
    labels = torch.cat([batch["labels"] for batch in classified(2)])
    right = (answers == labels).reshape(2, 2, 3).float().mean((0, 2))
    assert [float(metrics[f"val/{name}/accuracy"]) for name in ("sql", "legal")] == pytest.approx(right.tolist())
    heads = [module.adapters[name].plain["classifier"].weight for name in ("sql", "legal")]
    assert not torch.equal(*heads)
    (rows,) = evaluator().predict(module, classified(1)) or []
    assert [row["label"] for row in rows] == answers[:6].tolist()
    assert all(sum(row["probabilities"]) == pytest.approx(1) and len(row["probabilities"]) == LABELS for row in rows)


def bag_loss(output: Tensor, batch: dict[str, Any]) -> Tensor:
    return F.cross_entropy(output, batch["labels"])


def test_a_module_that_is_no_transformer_trains_through_the_plugin() -> None:
    configs = {"sql": AdapterConfig(rank=2, lr=1e-2), "legal": AdapterConfig(rank=4, lr=1e-2, plain_modules=["head"])}
    joint, alone = Recorder(), Recorder()
    batches = classified(3)
    for batch in batches:
        del batch["attention_mask"]
    module = MultiAdapterModule(plain_net(), configs, loss=bag_loss)
    trainer = tiny_fit(module, batches, joint, val=batches, plugins=[EightBitPrecision()])
    assert module.task == "custom"
    assert module.backbone is not None
    assert len(quantized_layers(module.backbone)) == 5  # the tied pair is one
    assert {"val/sql/loss", "val/legal/loss"} < set(trainer.callback_metrics)
    single = Batches(
        [
            {"input_ids": b["input_ids"][3:], "labels": b["labels"][3:], "adapters": ["legal"], "rows": [3]}
            for b in batches
        ]
    )
    tiny_fit(MultiAdapterModule(plain_net(), {"legal": configs["legal"]}, loss=bag_loss), single, alone,
             plugins=[EightBitPrecision()])  # fmt: skip
    assert_close(of(joint.weights[-1], "legal"), of(alone.weights[-1], "legal"), 1e-4)
    (rows,) = evaluator().predict(module, Batches([next(iter(batches))])) or []
    assert [row["adapter"] for row in rows] == ["sql"] * 3 + ["legal"] * 3


def test_a_loss_of_one_number_may_have_any_shape_and_of_several_is_refused() -> None:
    def fitted(loss: Any) -> Recorder:
        batches, recorder = classified(3), Recorder()
        for batch in batches:
            del batch["attention_mask"]
        module = MultiAdapterModule(
            plain_net(), {"sql": AdapterConfig(rank=2), "legal": AdapterConfig(rank=3)}, loss=loss
        )
        tiny_fit(module, batches, recorder, plugins=[EightBitPrecision()])
        return recorder

    wanted = fitted(bag_loss)
    for shape in ((1,), (1, 1)):
        found = fitted(lambda output, batch, shape=shape: bag_loss(output, batch).reshape(shape))
        assert_equal(found.weights[-1], wanted.weights[-1])
    with pytest.raises(ConfigError, match=r"the loss of adapter 'sql' has the shape \(3,\).*must return one number"):
        fitted(lambda output, batch: F.cross_entropy(output, batch["labels"], reduction="none"))


def test_a_plain_module_without_a_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a plain PlainNet needs a loss: loss\(output, batch\)"):
        MultiAdapterModule(plain_net(), {"a": AdapterConfig()})


# ---- what a step does without ---------------------------------------------------------------------------------------


def test_gradients_go_past_autograd_in_a_training_step_of_ours_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in an evaluation, with several processes, whose gradients hooks of autograd's send, or by hand."""
    seen: list[bool] = []
    follow = AdapterBank.follow

    def watched(self: AdapterBank, route: Any, **options: Any) -> Any:
        seen.append(route.gradients is not None)
        return follow(self, route, **options)

    monkeypatch.setattr(AdapterBank, "follow", watched)
    module, batches = tiny_module(tmp_path, BOTH), tiny_batches(["sql", "legal"], 2)
    tiny_fit(module, batches, val=batches)
    assert seen == [True] * 2 + [False] * 2

    def of_a_step() -> list[bool]:
        seen.clear()
        module._for_losses(dict(next(iter(batches))), training=True)
        return list(seen)

    assert of_a_step() == [True]
    module.automatic_optimization = False
    assert of_a_step() == [False]
    module.automatic_optimization = True
    monkeypatch.setattr(Trainer, "world_size", 2)
    assert of_a_step() == [False]


def test_what_stays_is_frozen_for_python_s_collector_during_a_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And thawed at its end, or where a fit before it failed."""
    calls: list[str] = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append("freeze"))
    monkeypatch.setattr(gc, "unfreeze", lambda: calls.append("unfreeze"))
    tiny_fit(tiny_module(tmp_path, {"a": {}}), tiny_batches(["a"], 1))
    assert calls == ["unfreeze", "freeze", "unfreeze"]


def test_logged_values_are_moved_once_in_a_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    move = _ResultMetric.to

    def to(self: _ResultMetric, *args: Any, **kwargs: Any) -> Any:
        moved.append(self.meta.name)
        return move(self, *args, **kwargs)

    monkeypatch.setattr(_ResultMetric, "to", to)
    tiny_fit(tiny_module(tmp_path, BOTH), tiny_batches(["sql", "legal"], 4))
    assert {"train/sql/loss", "train/legal/grad_norm"} < set(moved)
    assert moved.count("train/sql/loss") == moved.count("train/legal/grad_norm") <= 2  # at first, and as the fit ends


# ---- steps of one's own ---------------------------------------------------------------------------------------------


def text_data(folder: Path, **more: Any) -> AdapterDataModule:
    sources = {
        name: DataConfig(text_file(folder / f"{name}.txt", name, lines=30), max_length=16, **more) for name in BOTH
    }
    return AdapterDataModule(sources, batch_size=2)


def text_module(folder: Path, seed: int = 0, **changes: Any) -> MultiAdapterModule:
    config = BackboneConfig(language_model(folder / f"llama{seed}", seed))
    return MultiAdapterModule(
        config, {name: AdapterConfig(**fields | changes.get(name, {})) for name, fields in BOTH.items()}
    )


class SaveAt(Callback):
    """A checkpoint in the middle of a run."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def text_fit(
    folder: Path, max_steps: int, *callbacks: Callback, ckpt: str | None = None, seed: int = 0, **changes: Any
) -> tuple[MultiAdapterModule, Trainer]:
    module = text_module(folder, seed, **changes)
    trainer = evaluator(
        max_steps=max_steps, callbacks=[Recorder(), *callbacks], enable_checkpointing=False, limit_val_batches=0
    )
    trainer.fit(module, datamodule=text_data(folder), ckpt_path=ckpt)
    return module, trainer


def test_an_adapter_stops_after_its_own_steps_and_the_others_go_on(tmp_path: Path) -> None:
    module, trainer = text_fit(tmp_path, 4, sql={"max_steps": 2})
    recorder = trainer.callbacks[0]
    assert isinstance(recorder, Recorder)
    assert trainer.global_step == 4
    assert module.retired == {"sql"}
    assert of(recorder.gradients[3], "sql") == {}
    assert_equal(of(recorder.weights[3], "sql"), of(recorder.weights[1], "sql"))
    legal = of(recorder.weights[3], "legal"), of(recorder.weights[1], "legal")
    assert not all(torch.equal(legal[0][key], legal[1][key]) for key in legal[0])


def test_the_run_ends_with_the_last_adapter(tmp_path: Path) -> None:
    module, trainer = text_fit(tmp_path, 50, sql={"max_steps": 2}, legal={"max_steps": 3})
    assert trainer.global_step == 3
    assert module.retired == {"sql", "legal"}


def test_steps_are_optimizer_steps(tmp_path: Path) -> None:
    module, recorder = (
        tiny_module(tmp_path, {"sql": SQL | {"max_steps": 2}, "legal": LEGAL | {"max_steps": 2}}),
        Recorder(),
    )
    trainer = tiny_fit(module, ragged(9), recorder, accumulate_grad_batches=2)
    assert (trainer.global_step, len(recorder.weights)) == (2, 4)


@pytest.mark.parametrize("at", [2, 3])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path: Path, at: int) -> None:
    """Weights, optimizer, schedule, dropout, data order, and who has retired."""
    changes = {"sql": {"max_steps": 2}, "legal": {"schedule": "cosine", "warmup_steps": 2, "max_steps": 6}}
    whole, _ = text_fit(tmp_path, 6, SaveAt(at, tmp_path / "at.ckpt"), **changes)
    resumed, trainer = text_fit(tmp_path, 6, ckpt=str(tmp_path / "at.ckpt"), **changes)
    assert trainer.global_step == 6
    assert resumed.retired == {"sql", "legal"}
    assert_equal(resumed.adapters.state_dict(), whole.adapters.state_dict())


def test_a_retired_adapter_that_is_given_more_steps_comes_back(tmp_path: Path) -> None:
    _, trainer = text_fit(tmp_path, 3, sql={"max_steps": 2})
    trainer.save_checkpoint(tmp_path / "at.ckpt")
    module, trainer = text_fit(tmp_path, 5, ckpt=str(tmp_path / "at.ckpt"), sql={"max_steps": 4})
    recorder = trainer.callbacks[0]
    assert isinstance(recorder, Recorder)
    assert [of(gradients, "sql") != {} for gradients in recorder.gradients] == [True, True]  # two steps of its own
    assert module.retired == {"sql"}


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_adapters_and_who_the_backbone_is(tmp_path: Path) -> None:
    module, trainer = text_fit(tmp_path, 2)
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert_equal(saved["state_dict"], {f"adapters.{key}": value for key, value in module.adapters.state_dict().items()})
    assert module.backbone is not None
    codes = {q.codes.numel() for q in quantized_layers(module.backbone).values()}
    mine = sum(tensor.nbytes for tensor in saved["state_dict"].values())
    assert mine == sum(adapter.nbytes for adapter in module.adapters.adapters())
    assert max(codes) > 0
    assert path.stat().st_size < 3 * mine + 400 * len(saved["state_dict"]) * 3 + 50_000  # weights, two moments, names
    identity = saved["finetuna"]["backbone"]
    assert identity["backbone"] == str(tmp_path / "llama0")
    assert (identity["scheme"], len(identity["fingerprint"])) == ("int8", 16)
    assert saved["finetuna"]["calls"] == {"sql": 2, "legal": 2}


def test_a_module_comes_back_from_its_checkpoint_alone(tmp_path: Path) -> None:
    module, trainer = text_fit(tmp_path, 2, sql={"max_steps": 1})
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    back = MultiAdapterModule.load_from_checkpoint(tmp_path / "run.ckpt")
    assert back.adapter_configs == module.adapter_configs
    assert (back.backbone_config, back.optim_config, back.seed) == (
        module.backbone_config,
        module.optim_config,
        module.seed,
    )
    assert back.retired == {"sql"}
    assert_equal(back.adapters.state_dict(), module.adapters.state_dict())
    (batch,) = tiny_batches(["sql", "legal"], 1)
    assert torch.equal(back(batch).logits, module(batch).logits)


def test_a_plain_backbone_comes_back_with_the_module_and_loss_it_is_given(tmp_path: Path) -> None:
    (batch,) = classified(1, ["a"])
    del batch["attention_mask"]
    module = MultiAdapterModule(plain_net(), {"a": AdapterConfig(rank=2, lr=0.1)}, loss=bag_loss)
    trainer = tiny_fit(module, Batches([batch]), plugins=[EightBitPrecision()])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(CheckpointError, match="backbone PlainNet"):  # not quantised, so it is another
        MultiAdapterModule.load_from_checkpoint(tmp_path / "run.ckpt", backbone=plain_net(), loss=bag_loss)
    back = MultiAdapterModule.load_from_checkpoint(
        tmp_path / "run.ckpt", backbone=quantize_model_(plain_net()), loss=bag_loss
    )
    assert torch.equal(back(batch), module(batch))


@pytest.mark.parametrize("by", ["resume", "load"])
def test_a_checkpoint_of_another_backbone_is_refused_and_both_are_named(tmp_path: Path, by: str) -> None:
    _, trainer = text_fit(tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(CheckpointError) as caught:
        if by == "resume":
            text_fit(tmp_path, 2, ckpt=str(tmp_path / "run.ckpt"), seed=1)
        else:
            other = {"name_or_path": language_model(tmp_path / "llama1", 1)}
            MultiAdapterModule.load_from_checkpoint(tmp_path / "run.ckpt", backbone=other)
    message = str(caught.value)
    assert str(tmp_path / "llama0") in message
    assert str(tmp_path / "llama1") in message
    assert message.count("fingerprint") == 2


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path: Path) -> None:
    trained = tiny_module(tmp_path / "a", BOTH)
    tiny_fit(trained, tiny_batches(["sql", "legal"], 1)).save_checkpoint(tmp_path / "run.ckpt")
    others = tiny_module(tmp_path / "a", {"third": SQL})
    with pytest.raises(CheckpointError, match="holds adapters legal, sql; this module has third: none in common"):
        tiny_fit(others, tiny_batches(["third"], 2), ckpt_path=str(tmp_path / "run.ckpt"))
    larger = tiny_module(tmp_path / "a", BOTH | {"sql": SQL | {"rank": 8}})
    with pytest.raises(CheckpointError, match=r"other shapes: .*lora"):
        tiny_fit(larger, tiny_batches(["sql", "legal"], 2), ckpt_path=str(tmp_path / "run.ckpt"))


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    module = tiny_module(tmp_path, BOTH)
    with pytest.raises(CheckpointError, match="no checkpoint of a MultiAdapterModule"):
        module.on_load_checkpoint({"state_dict": {}})


def test_hyperparameters_are_plain_values(tmp_path: Path) -> None:
    module = MultiAdapterModule(BackboneConfig("x"), {"a": AdapterConfig(rank=3)}, OptimConfig(eps=1e-6), seed=5)
    hparams = copy.deepcopy(dict(module.hparams))
    assert (hparams["backbone"]["name_or_path"], hparams["adapters"]["a"]["rank"]) == ("x", 3)
    assert (hparams["optim"]["eps"], hparams["seed"]) == (1e-6, 5)
    rebuilt = MultiAdapterModule(**hparams)
    assert (rebuilt.adapter_configs, rebuilt.optim_config) == (module.adapter_configs, module.optim_config)


# ---- generating -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> MultiAdapterModule:
    """Adapters that say different things, since they are random and large."""
    module = text_module(tmp_path_factory.mktemp("speaker"))
    excite(module.adapters, std=0.6)
    return module


PROMPTS = ["a", "of the table", "select"]


def test_mixed_adapters_in_one_batch_say_what_each_says_alone(speaker: MultiAdapterModule) -> None:
    """The prompts differ in length, so all but one are padded on the left."""
    names = ["sql", "legal", "sql"]
    together = speaker.generate(PROMPTS, adapters=names, max_new_tokens=8)
    each = [speaker.generate([p], adapters=[n], max_new_tokens=8)[0] for p, n in zip(PROMPTS, names, strict=True)]
    assert together == each
    assert len(set(together)) == 3
    assert speaker.generate(PROMPTS[:2], adapters="legal", max_new_tokens=8)[1] == together[1]
    assert speaker.generate(PROMPTS[:1], adapters="legal", max_new_tokens=8) != together[:1]


def test_without_adapters_the_backbone_speaks(speaker: MultiAdapterModule) -> None:
    assert speaker.backbone is not None
    ids = speaker.tokenizer(PROMPTS[1], return_tensors="pt")
    with speaker.adapters.bare(), torch.no_grad():
        out = speaker.backbone.generate(input_ids=ids["input_ids"], max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    expected = speaker.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert speaker.generate(PROMPTS, max_new_tokens=8)[1] == expected


@pytest.mark.parametrize("mode", [True, False])
def test_generating_keeps_the_mode_and_draws_no_dropout(speaker: MultiAdapterModule, mode: bool) -> None:
    speaker.train(mode)
    calls = {adapter.name: adapter.calls for adapter in speaker.adapters.adapters()}
    modes: list[bool] = []
    assert speaker.backbone is not None
    hook = speaker.backbone.register_forward_pre_hook(lambda *_: modes.append(speaker.adapters.training))
    first = speaker.generate(PROMPTS, adapters="sql", max_new_tokens=4)
    hook.remove()
    assert set(modes) == {False}
    assert speaker.generate(PROMPTS, adapters="sql", max_new_tokens=4) == first
    assert speaker.training is mode
    assert {adapter.name: adapter.calls for adapter in speaker.adapters.adapters()} == calls


def test_a_wrong_adapter_is_named(speaker: MultiAdapterModule) -> None:
    with pytest.raises(ConfigError, match=r"no adapter 'sqll'; did you mean 'sql'\? \(there are: sql, legal\)"):
        speaker.generate(["a"], adapters=["sqll"])
    with pytest.raises(ConfigError, match="2 prompts need as many adapters, not 1"):
        speaker.generate(["a", "b"], adapters=["sql"])


def test_without_a_tokenizer_there_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer"):
        tiny_module(tmp_path, BOTH).generate(["a"])


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_porj"]}, "adapter 'bad': no layer matches 'q_porj'; did you mean 'q_proj'"),
        ({"target_modules": ["q_proj", "k_porj"]}, "adapter 'bad': no layer matches 'k_porj'"),
        ({"plain_modules": ["lm_haed"]}, "adapter 'bad': no module matches 'lm_haed'; did you mean 'lm_head'"),
        ({"rank": 33}, "adapter 'bad': adapter.rank 33 is larger than layer"),
    ],
)
def test_a_wrong_target_is_found_before_the_backbone_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("finetuna_lightning.training.module.load_backbone", lambda *_, **__: pytest.fail("loaded"))
    module = tiny_module(tmp_path, {"good": SQL, "bad": fields})
    with pytest.raises(FinetunaError, match=message) as caught:
        tiny_fit(module, tiny_batches(["good", "bad"], 1))
    assert isinstance(caught.value, ConfigError | TargetError)


def test_gradient_clip_val_on_the_trainer_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetuna_lightning.training.module.load_backbone", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=r"set max_grad_norm=0\.5 in AdapterConfig"):
        tiny_fit(tiny_module(tmp_path, BOTH), ragged(1), gradient_clip_val=0.5)


@pytest.mark.parametrize("seed", ["x", -1, 0.5, True])
def test_a_seed_is_a_number(seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed must be an integer >= 0"):
        MultiAdapterModule(BackboneConfig(), {"a": AdapterConfig()}, seed=seed)


@pytest.mark.parametrize("names", [[], ["a.b"], ["../x"], ["forward"], [""], ["Sql", "sql"]])
def test_adapters_need_names_that_can_be_used(names: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"no adapters|not allowed|duplicate"):
        MultiAdapterModule(BackboneConfig(), {name: AdapterConfig() for name in names})


def test_one_adapter_s_nan_stays_its_own(tmp_path: Path) -> None:
    module, recorder = tiny_module(tmp_path, BOTH), Recorder()
    with torch.no_grad():
        next(iter(module.adapters["legal"].parameters())).fill_(torch.nan)
    tiny_fit(module, ragged(2), recorder)
    assert all(bool(value.isfinite().all()) for value in of(recorder.weights[-1], "sql").values())
    assert not all(bool(value.isfinite().all()) for value in of(recorder.weights[-1], "legal").values())
