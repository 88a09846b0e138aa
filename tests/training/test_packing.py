"""Packed as padded, joint as alone: losses, gradients, runs, resumes; a neighbour's NaN; the deterministic mode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from finetuna_lightning.backbone import enable_checkpointing, quantize_model_
from finetuna_lightning.configs import AdapterConfig, BackboneConfig, DataConfig
from finetuna_lightning.errors import ConfigError
from finetuna_lightning.training.batches import Batch, by_adapter, collate
from finetuna_lightning.training.data import AdapterDataModule
from finetuna_lightning.training.module import MultiAdapterModule
from finetuna_lightning.training.tokenizing import IGNORED, Example
from tests.helpers.models import VOCAB_SIZE, excite, plain_net, task_of, tiny_model
from tests.helpers.runs import language_model, text_file

Gradients = dict[str, Tensor]

# What each adapter changes, by architecture: deltas on linear layers and embeddings, and private copies of a head, of a
# whole layer (attention and all) and of an embedding.
LLAMA: dict[str, dict[str, Any]] = {
    "lora": dict(rank=4, dropout=0.3, target_modules=["q_proj", "up_proj", "embed_tokens"]),
    "head": dict(rank=2, dropout=0.5, bias=True, target_modules=["o_proj"], plain_modules=["lm_head"]),
    "layer": dict(rank=2, target_modules=["embed_tokens", "layers.0.mlp.down_proj"], plain_modules=["layers.1"]),
    "embed": dict(rank=3, dropout=0.1, target_modules=["all-linear"], plain_modules=["embed_tokens"]),
}
GPT2: dict[str, dict[str, Any]] = {
    "lora": dict(rank=4, dropout=0.3, target_modules=["c_attn", "wte", "wpe"]),  # Conv1D, positions
    "head": dict(rank=2, dropout=0.5, bias=True, target_modules=["c_proj"], plain_modules=["lm_head"]),
    "layer": dict(rank=2, target_modules=["wpe", "h.0.mlp.c_fc"], plain_modules=["h.1"]),
    "embed": dict(rank=3, dropout=0.1, target_modules=["all-linear"], plain_modules=["wpe"]),
}
ADAPTERS = {"llama": LLAMA, "qwen3": LLAMA, "gpt2": GPT2}
LENGTHS = {"lora": [7, 1, 13], "head": [3, 3], "layer": [20, 5, 1, 5], "embed": [11]}


def module_of(name: str, scheme: str | None = None, recompute: bool = False, **options: Any) -> MultiAdapterModule:
    model = tiny_model(name, scale=3.0)
    if scheme:
        quantize_model_(model, scheme, 64, [])
    if recompute:
        enable_checkpointing(model)
    configs = {key: AdapterConfig(**fields) for key, fields in ADAPTERS[name].items()}
    module = MultiAdapterModule(model, configs, **options)
    excite(module.adapters, std=0.1)
    return module.train()


def groups(names: dict[str, list[int]] = LENGTHS) -> dict[str, list[Example]]:
    generator = torch.Generator().manual_seed(3)
    made = {}
    for name, lengths in LENGTHS.items():
        ids = [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in lengths]
        made[name] = [Example(row, row.clone()) for row in ids]
    made["lora"][2].labels[:6] = IGNORED  # type: ignore[index]
    return {name: made[name] for name in names}


def step(module: MultiAdapterModule, batch: Any) -> tuple[dict[str, Tensor], Gradients]:
    """Each adapter's mean loss and gradients in training."""
    losses = {name: total / count for name, total, count, _ in module.losses(module(batch, training=True), batch)}
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: p.grad for name, p in module.adapters.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def apart(one: Tensor, other: Tensor) -> float:
    """The distance in the Frobenius norm, as a part of the second's."""
    return float((one - other).double().norm() / other.double().norm())


def of(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in state.items() if key.startswith(name + ".")}


def whole(state: dict[str, Tensor]) -> Tensor:
    """All of an adapter's tensors as one vector."""
    return torch.cat([value.flatten() for value in state.values()])


def assert_agree(mine: Gradients, theirs: Gradients, name: str) -> None:
    """An adapter's gradients as one vector to 1e-6 of its norm, and each tensor to 5e-6 of its own."""
    own, other = of(mine, name), of(theirs, name)
    assert own.keys() == other.keys() != set()
    assert apart(whole(own), whole(other)) < 1e-6, name
    far = {key: apart(own[key], other[key]) for key in own}
    assert max(far.values()) < 5e-6, max(far, key=far.__getitem__)


# ---- packed as padded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [None, "int8"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_packed_and_padded_give_the_same_losses_and_gradients(name: str, scheme: str | None) -> None:
    """To 1e-6 of the norm, dropout masks included, in fp32."""
    losses, gradients = step(module_of(name, scheme), collate(groups()))
    packed_losses, packed_gradients = step(module_of(name, scheme), collate(groups(), packed=True))
    assert gradients.keys() == dict(module_of(name).adapters.named_parameters()).keys()
    for adapter in ADAPTERS[name]:
        assert apart(packed_losses[adapter], losses[adapter]) < 1e-6, adapter
        assert_agree(packed_gradients, gradients, adapter)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_joint_is_alone(name: str, packed: bool) -> None:
    losses, gradients = step(module_of(name), collate(groups(), packed=packed))
    for adapter in ADAPTERS[name]:
        own, own_gradients = step(module_of(name), collate({adapter: groups()[adapter]}, packed=packed))
        assert apart(losses[adapter], own[adapter]) < 1e-6
        assert own_gradients.keys() == of(own_gradients, adapter).keys()
        assert_agree(gradients, own_gradients, adapter)


def test_a_private_copy_of_the_whole_model_beneath_the_head() -> None:
    """It makes its own masks: of its own sequences, while the others' are made in the backbone."""
    configs = {
        "lora": AdapterConfig(rank=2, target_modules=["q_proj"]),
        "whole": AdapterConfig(rank=2, target_modules=["lm_head"], plain_modules=["model"]),
        "head": AdapterConfig(rank=2, target_modules=["v_proj"]),
    }
    examples = {"lora": groups()["lora"], "whole": groups()["layer"], "head": groups()["head"]}
    found = []
    for packed in (False, True):
        module = MultiAdapterModule(tiny_model("llama", scale=3.0), configs)
        excite(module.adapters, std=0.1)
        found.append(step(module.train(), collate(examples, packed=packed)))
    (losses, gradients), (packed_losses, packed_gradients) = found
    for name in configs:
        assert apart(packed_losses[name], losses[name]) < 1e-6
        assert_agree(packed_gradients, gradients, name)


def test_an_adapter_whose_sequences_stand_apart_draws_its_own_masks() -> None:
    """Its second segment goes on where the first one ended."""
    parts = groups()["lora"]
    whole: dict[str, Any] = {**collate({"lora": parts}, packed=True)}
    _, gradients = step(module_of("llama"), whole)
    split = whole | {"adapters": ["lora", "lora"], "rows": [1, 2]}
    module = module_of("llama")
    totals = [(total, count) for _, total, count, _ in module.losses(module(split, training=True), split)]
    (sum(total for total, _ in totals) / sum(count for _, count in totals)).backward()  # type: ignore[union-attr]
    again = {name: p.grad for name, p in module.adapters.named_parameters() if p.grad is not None}
    assert all(torch.equal(again[key], gradients[key]) for key in gradients)


def test_a_sequence_s_last_token_predicts_nothing_of_the_next() -> None:
    module = module_of("llama")
    batch = collate(groups(), packed=True)
    with torch.no_grad():
        found = {name: (total, int(count)) for name, total, count, _ in module.losses(module(batch), batch)}
        for name, examples in groups().items():
            total, targets = torch.zeros(()), 0
            for example in examples:
                alone = collate({name: [example]})
                labels = alone["labels"][0, 1:]
                total += F.cross_entropy(module(alone).logits[0, :-1], labels, reduction="sum")
                targets += int((labels != IGNORED).sum())
            assert found[name][1] == targets
            assert apart(found[name][0], total) < 1e-6


def test_the_slices_of_losses_are_the_sequences() -> None:
    module = module_of("llama")
    for packed in (False, True):
        batch = collate(groups(), packed=packed)
        cuts = [cut for *_, cut in module.losses(module(batch), batch)]
        assert cuts == [slice(0, 3), slice(3, 5), slice(5, 9), slice(9, 10)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_recomputing_activations_changes_nothing_packed(name: str) -> None:
    losses, gradients = step(module_of(name), collate(groups(), packed=True))
    again, recomputed = step(module_of(name, recompute=True), collate(groups(), packed=True))
    assert all(torch.equal(losses[key], again[key]) for key in losses)
    assert all(torch.equal(gradients[key], recomputed[key]) for key in gradients)


def test_prediction_and_evaluation_packed_are_those_padded() -> None:
    module = module_of("llama").eval()
    with torch.no_grad():
        padded, packed = (module.predict_step(collate(groups(), packed=way), 0) for way in (False, True))
    assert len(padded) == len(packed) == 10
    for one, other in zip(packed, padded, strict=True):
        assert one["adapter"] == other["adapter"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5, nan_ok=True)  # one token: no target
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    logged = [
        trainer.validate(module, torch.utils.data.DataLoader([collate(groups(), packed=way)], batch_size=None))[0]  # type: ignore[arg-type]
        for way in (False, True)
    ]
    assert logged[1] == pytest.approx(logged[0], rel=1e-5) and len(logged[0]) == 9


# ---- what cannot be packed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "t5", "falcon", "gptj"])
def test_other_models_say_why_and_take_padded_rows(name: str) -> None:
    model = tiny_model(name)
    loss = None if task_of(name) == "causal-lm" else (lambda output, batch: output.logits.square().mean())
    targets = {"bert": ["query"], "t5": ["q"], "falcon": ["query_key_value"], "gptj": ["q_proj"]}[name]
    module = MultiAdapterModule(model, {"a": AdapterConfig(rank=2, target_modules=targets)}, loss=loss)
    obstacle = module.packing_obstacle()
    assert obstacle and ("'custom'" in obstacle if loss else "refuses a packed row" in obstacle)
    example = Example(torch.tensor([5, 6, 7]), torch.tensor([5, 6, 7]))
    with pytest.raises(ConfigError, match="the batch is packed, which this model does not take: "):
        module(collate({"a": [example]}, packed=True))
    if loss is None:
        assert module(collate({"a": [example]})).logits.shape == (1, 3, VOCAB_SIZE)


def test_a_module_that_is_no_transformer_is_not_packed() -> None:
    module = MultiAdapterModule(plain_net(), {"a": AdapterConfig(rank=2)}, loss=lambda output, batch: output.sum())
    assert "'custom'" in str(module.packing_obstacle())


# ---- a neighbour's NaN ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("culprit", ["lora", "head", "layer", "embed"])
def test_a_neighbours_nan_changes_no_bit_of_the_others(name: str, culprit: str, packed: bool) -> None:
    """In all its weights: deltas of every kind, and private copies of a head, of a layer and of an embedding."""
    batch = collate(groups(), packed=packed)
    losses, gradients = step(module_of(name), batch)
    module = module_of(name)
    with torch.no_grad():
        for parameter in module.adapters[culprit].parameters():
            parameter.fill_(torch.nan)
    spoilt_losses, spoilt = step(module, batch)
    assert bool(spoilt_losses[culprit].isnan())
    for other in LENGTHS.keys() - {culprit}:
        assert torch.equal(spoilt_losses[other], losses[other])
        assert all(torch.equal(spoilt[key], gradients[key]) for key in of(gradients, other)), other


# ---- whole runs -----------------------------------------------------------------------------------------------------

FITS: dict[str, dict[str, Any]] = {
    "sql": dict(rank=4, dropout=0.2, target_modules=["q_proj", "up_proj"], lr=5e-3),
    "legal": dict(rank=2, dropout=0.5, bias=True, plain_modules=["lm_head"], lr=2e-3, schedule="constant"),
    "code": dict(rank=1, target_modules=["embed_tokens", "down_proj"], lr=1e-2, schedule="cosine", warmup_steps=3),
    "notes": dict(rank=8, dropout=0.1, max_grad_norm=0.1, lr=5e-3),
}
SOURCES: dict[str, dict[str, Any]] = {
    "sql": dict(max_length=31, batch_size=3),
    "legal": dict(max_length=17, max_tokens=60),
    "code": dict(max_length=32, batch_size=1),
    "notes": dict(max_length=9, batch_size=5),
}


class Curves(Callback):
    """Every adapter's loss, step by step."""

    def __init__(self) -> None:
        self.losses: dict[str, list[Tensor]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for name in batch["adapters"]:
            self.losses.setdefault(name, []).append(trainer.callback_metrics[f"train/{name}/loss"].clone())


def fit(
    folder: Path,
    names: list[str],
    steps: int = 22,
    packing: bool = True,
    resume: str | None = None,
    callbacks: Sequence[Callback] = (),
    deterministic: bool | None = None,
    **options: Any,
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor], Trainer]:
    """Losses, final weights and the trainer of a run of ``names``."""
    if not (folder / "model").exists():
        language_model(
            folder / "model", initializer_range=0.3
        )  # at 0.02 all gradients are near nothing, and Adam's noise
        for name in FITS:
            text_file(folder / f"{name}.txt", name, lines=9 + 4 * len(name))
    sources = {
        name: DataConfig(str(folder / f"{name}.txt"), val_fraction=0.2, **{"batch_size": None} | SOURCES[name])
        for name in names
    }
    module = MultiAdapterModule(
        BackboneConfig(str(folder / "model"), scheme="none"),
        {name: AdapterConfig(**FITS[name]) for name in names},
        deterministic=deterministic,
    )
    curves = Curves()
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=1, callbacks=[curves, *callbacks],
        **options,
    )  # fmt: skip
    data = AdapterDataModule(sources, batch_size=2, packing=packing)
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    assert ("lengths" in next(iter(data.val_dataloader()))) is packing
    weights = {name: parameter.detach() for name, parameter in module.adapters.named_parameters()}
    return curves.losses, weights, trainer


@pytest.mark.parametrize("packing", [True, False])
def test_a_deterministic_joint_run_is_bit_for_bit_each_solo_run(tmp_path: Path, packing: bool) -> None:
    losses, weights, trainer = fit(tmp_path, list(FITS), packing=packing, deterministic=True)
    for name in FITS:
        own_losses, own_weights, own_trainer = fit(tmp_path, [name], packing=packing, deterministic=True)
        assert len(own_losses[name]) == len(losses[name]) == 22
        assert all(torch.equal(one, other) for one, other in zip(losses[name], own_losses[name], strict=True))
        assert own_weights.keys() == {key for key in weights if key.startswith(name + ".")}
        assert all(torch.equal(weights[key], own_weights[key]) for key in own_weights), name
        held_out = [run.validate(run.lightning_module, run.datamodule, verbose=False) for run in (trainer, own_trainer)]
        assert held_out[0][0][f"val/{name}/loss"] == held_out[1][0][f"val/{name}/loss"]


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[dict[str, list[Tensor]], dict[str, Tensor]]]:
    """Losses and final weights of the run of all, packed or not."""
    folder = tmp_path_factory.mktemp("joint")
    return {packing: fit(folder, list(FITS), packing=packing)[:2] for packing in (True, False)}


@pytest.mark.parametrize("packing", [True, False])
def test_a_joint_run_is_each_solo_run_to_rounding(tmp_path: Path, joint: dict[bool, Any], packing: bool) -> None:
    """Losses and final weights to 1e-5: of the loss, and of the norm of all of an adapter's weights."""
    losses, weights = joint[packing]
    for name in FITS:
        own_losses, own_weights, _ = fit(tmp_path, [name], packing=packing)
        assert apart(torch.stack(losses[name]), torch.stack(own_losses[name])) < 1e-5
        assert apart(whole(of(weights, name)), whole(own_weights)) < 1e-5, name


def test_packing_changes_no_run(joint: dict[bool, Any]) -> None:
    packed, padded = joint[True], joint[False]
    for name in FITS:
        assert apart(torch.stack(packed[0][name]), torch.stack(padded[0][name])) < 1e-5
        assert apart(whole(of(packed[1], name)), whole(of(padded[1], name))) < 1e-5


class Save(Callback):
    """A checkpoint after each of some optimizer steps."""

    def __init__(self, folder: Path, steps: list[int]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        path = self.folder / f"{trainer.global_step}.ckpt"
        if trainer.global_step in self.steps and not path.exists():
            trainer.save_checkpoint(path)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_with_budgets_resumes_mid_epoch_to_the_bit(tmp_path: Path, accumulate: int) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "steps": 11}
    losses, weights, trainer = fit(tmp_path, list(FITS), callbacks=[Save(tmp_path, [3, 6])], **options)
    assert len(trainer.train_dataloader) > 7
    for stop in (3, 6):
        rest, resumed, _ = fit(tmp_path, list(FITS), resume=str(tmp_path / f"{stop}.ckpt"), **options)
        for name in FITS:
            assert len(rest[name]) == (11 - stop) * accumulate
            later = losses[name][stop * accumulate :]
            assert all(torch.equal(one, other) for one, other in zip(rest[name], later, strict=True)), name
        assert all(torch.equal(weights[key], resumed[key]) for key in weights)


# ---- the deterministic mode -----------------------------------------------------------------------------------------


def test_the_deterministic_mode_follows_the_trainer_unless_told(tmp_path: Path) -> None:
    module = MultiAdapterModule(BackboneConfig(), {"a": AdapterConfig()})
    assert not module.deterministic
    try:
        torch.use_deterministic_algorithms(True)
        assert module.deterministic
        assert not MultiAdapterModule(BackboneConfig(), {"a": AdapterConfig()}, deterministic=False).deterministic
    finally:
        torch.use_deterministic_algorithms(False)
    assert MultiAdapterModule(BackboneConfig(), {"a": AdapterConfig()}, deterministic=True).deterministic


@pytest.mark.parametrize("packed", [False, True])
def test_a_separate_pass_gives_what_a_joint_one_gives(packed: bool) -> None:
    batch = collate(groups(), packed=packed)
    joint, separate = module_of("llama"), module_of("llama", deterministic=True)
    with torch.no_grad():
        one, other = joint(batch).logits, separate(batch).logits
        assert one.shape == other.shape
        real = batch["attention_mask"] != 0 if not packed else torch.ones_like(batch["input_ids"], dtype=torch.bool)
        assert torch.allclose(one[real], other[real], atol=1e-5)
        assert joint.predict_step(batch, 0) == [
            row | {"loss": pytest.approx(row["loss"], rel=1e-5, nan_ok=True),
                   "perplexity": pytest.approx(row["perplexity"], rel=1e-4, nan_ok=True)}
            for row in separate.predict_step(batch, 0)
        ]  # fmt: skip
        cuts = [(name, cut) for name, *_, cut in separate.losses(separate(batch), batch)]
    assert cuts == [("lora", slice(0, 3)), ("head", slice(3, 5)), ("layer", slice(5, 9)), ("embed", slice(9, 10))]


def test_a_joint_batch_is_cut_to_what_each_adapter_would_have_alone() -> None:
    for packed in (False, True):
        parts = list(by_adapter(collate(groups(), packed=packed)))
        for part, (name, examples) in zip(parts, groups().items(), strict=True):
            alone: Batch = collate({name: examples}, packed=packed)
            assert part.keys() == alone.keys()
            for key, value in alone.items():
                assert torch.equal(part[key], value) if isinstance(value, Tensor) else part[key] == value, key


def test_targets_of_a_sequence_to_sequence_model_are_cut_to_their_own_length() -> None:
    """Inputs and targets as wide as each other: neither is cut by the other's length."""

    def example(length: int, targets: int) -> Example:
        return Example(torch.arange(1, length + 1), torch.arange(1, targets + 1))

    made = {"a": [example(2, 6)], "b": [example(6, 3), example(1, 2)]}
    for part, (name, examples) in zip(by_adapter(collate(made), aligned=False), made.items(), strict=True):
        alone = collate({name: examples})
        assert all(torch.equal(part[key], alone[key]) for key in ("input_ids", "attention_mask", "labels"))  # type: ignore[literal-required]


def test_classifiers_and_other_tasks_have_separate_passes_too() -> None:
    model = tiny_model("bert")
    config = {name: AdapterConfig(rank=2, target_modules=["query"]) for name in ("a", "b")}

    def loss(output: Any, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(output.logits, batch["labels"])

    examples = [Example(torch.arange(2, 2 + length), length % 3) for length in (4, 9, 2)]
    batch = collate({"a": examples[:1], "b": examples[1:]})
    joint = MultiAdapterModule(model, config, loss=loss)
    excite(joint.adapters)
    with torch.no_grad():
        one = [(name, float(total), int(count), cut) for name, total, count, cut in joint.losses(joint(batch), batch)]
        joint._deterministic = True
        output = joint(batch)
        assert output.logits.shape == (3, 3)
        other = [(name, float(total), int(count), cut) for name, total, count, cut in joint.losses(output, batch)]
    assert [row[0::3] for row in one] == [row[0::3] for row in other] == [("a", slice(0, 1)), ("b", slice(1, 3))]
    assert [row[1] for row in one] == pytest.approx([row[1] for row in other], rel=1e-5)


def test_no_adapter_s_dropout_is_drawn_from_the_global_stream() -> None:
    """GPT-2's layers have dropout of their own; in a private copy it stays off, as in the backbone."""
    module = module_of("gpt2")
    assert any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.adapters["layer"].plain.modules())
    before = torch.random.get_rng_state()
    step(module, collate(groups(), packed=True))
    assert torch.equal(before, torch.random.get_rng_state())
