"""Resuming with one adapter more or fewer, by name, and what Lightning's checkpoint lacks."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetuna_lightning.errors import CheckpointError
from finetuna_lightning.training import resume
from tests.resilience.runs import Diary, SaveAt, data_of, differences, module_of, state_of, trainer_of

AT = 6  # a batch in the middle of an accumulation


def run(folder: Path, names: list[str], *callbacks: Any, ckpt: Path | None = None, **options: Any) -> Any:
    """A run of the adapters ``names``, with a constant rate: the schedule of a new one counts the run's steps."""
    diary = Diary()
    trainer = trainer_of(folder / "-".join(names), diary, *callbacks, max_steps=6, limit_val_batches=0, **options)
    module = module_of(folder, names, schedule="constant", max_steps=None, warmup_steps=0)
    trainer.fit(module, datamodule=data_of(folder, names), ckpt_path=None if ckpt is None else str(ckpt))
    return state_of(trainer), diary.train, trainer


def of(state: dict[str, Any], name: str) -> dict[str, Any]:
    """What belongs to one adapter: weights, optimizer with its counts, position in its dropout stream."""
    return {
        "weights": {key: value for key, value in state["weights"].items() if key.startswith(f"adapters.{name}.")},
        "optimizer": state["optimizer"]["adapters"][name],
        "calls": state["calls"][name],
    }


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["sql", "legal"], ["sql", "legal", "chat"]),
        (["sql", "legal"], ["chat", "sql", "legal"]),  # not at the end, so that every position moves
        (["sql", "legal", "chat"], ["legal", "chat"]),
        (["sql", "legal", "chat"], ["chat", "sql"]),
        (["sql", "legal"], ["legal", "sql"]),
    ],
    ids="-".join,
)
def test_adapters_in_both_go_on_bit_for_bit(
    tmp_path: Path, before: list[str], after: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    saver = SaveAt(tmp_path / "states", lambda hook, batch: (hook, batch) == ("batch", AT))
    whole, losses, _ = run(tmp_path, before, saver)
    ((_, _, path),) = saver.saved
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        again, more, _ = run(tmp_path, after, ckpt=path)
    for name in set(before) & set(after):
        assert differences(of(again, name), of(whole, name)) == [], name
        assert {at: loss for at, loss in more.items() if at[1] == name} == {
            at: loss for at, loss in losses.items() if at[1] == name and at[0] > AT
        }
    for new in set(after) - set(before):
        fresh = module_of(tmp_path, after).adapters.state_dict()
        assert again["calls"][new] == 11 - AT
        assert of(again, new)["optimizer"]["state"][0]["step"] == 3
        changed = [key for key in fresh if key.startswith(f"{new}.") and not torch.equal(
            again["weights"][f"adapters.{key}"], fresh[key])]  # fmt: skip
        assert changed
    said = [record.message for record in caplog.records if "so starting fresh" in record.message]
    assert said == [f"not in the checkpoint, so starting fresh: {n}" for n in set(after) - set(before)]
    said = [record.message for record in caplog.records if "so passed over" in record.message]
    gone = sorted(set(before) - set(after))
    assert said == [f"in the checkpoint but not in this run, so passed over: {n}" for n in gone]


def test_an_adapter_with_other_layers_is_no_longer_the_same(tmp_path: Path) -> None:
    saver = SaveAt(tmp_path / "states", lambda hook, batch: (hook, batch) == ("batch", AT))
    run(tmp_path, ["chat"], saver)
    ((_, _, path),) = saver.saved
    trainer = trainer_of(tmp_path / "again", max_steps=6, limit_val_batches=0)
    names = ["chat", "legal"]
    module = module_of(tmp_path, names, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"other shapes: Unexpected key.*chat.deltas"):
        trainer.fit(module, datamodule=data_of(tmp_path, names), ckpt_path=str(path))


def test_a_module_that_is_only_loaded_takes_no_gradients_along(tmp_path: Path) -> None:
    saver = SaveAt(tmp_path / "states", lambda hook, batch: (hook, batch) == ("batch", AT))
    _, _, trainer = run(tmp_path, ["sql"], saver)
    module = type(trainer.lightning_module).load_from_checkpoint(saver.saved[0][2])
    assert module._resumed == {}


def test_random_states_come_back() -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), random.gauss(0, 1), float(torch.rand(()))

    random.gauss(0, 1)  # which keeps the second of a pair
    states = resume.random_states()
    path_safe = {key: value for key, value in states.items() if key != "cuda"}
    first = drawn()
    assert drawn() != first
    resume.set_random_states(path_safe | {"cuda": []})
    assert drawn() == first


class NoisyHead(nn.Module):
    """A plain module whose own dropout draws from torch's global stream."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.linear = nn.Dropout(0.5), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.drop(x))  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), NoisyHead()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.body(input_ids))  # type: ignore[no-any-return]


def test_dropout_inside_a_module_trained_in_full_goes_on_too(tmp_path: Path) -> None:
    from finetuna_lightning.configs import AdapterConfig
    from finetuna_lightning.training.module import MultiAdapterModule
    from tests.helpers.tiny import Batches, tiny_fit

    batches = Batches([{"input_ids": torch.ones(3, 4), "adapters": ["a"], "rows": [3]}] * 6)

    def fit(*callbacks: Any, ckpt: Path | None = None) -> MultiAdapterModule:
        torch.manual_seed(0)
        config = AdapterConfig(rank=2, target_modules=["body"], plain_modules=["head"], lr=1e-2, schedule="constant")
        module = MultiAdapterModule(Net(), {"a": config}, loss=lambda output, batch: output.square().mean())
        tiny_fit(module, batches, *callbacks, max_steps=6, max_epochs=-1, ckpt_path=ckpt and str(ckpt))
        return module

    saver = SaveAt(tmp_path, lambda hook, batch: (hook, batch) == ("batch", 2))
    whole = fit(saver).adapters.state_dict()
    with pytest.warns(UserWarning, match="your dataloader is not resumable"):
        again = fit(ckpt=saver.saved[0][2]).adapters.state_dict()
    assert differences(again, whole) == []
