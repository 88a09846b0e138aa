"""The joint loader: what a batch holds, that company changes no one's batches, that a resume repeats none."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from finetuna_lightning.errors import ConfigError, DataError
from finetuna_lightning.training.batches import collate
from finetuna_lightning.training.loader import JointLoader, deal, dealt_numbers
from finetuna_lightning.training.tokenizing import IGNORED, Example

# lightning 2.6 on torch 2.13, in CombinedLoader's use of pytrees
pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")

SIZES = {"a": 7, "b": 4, "c": 1}
BATCH_SIZES = {"a": 2, "b": 3, "c": 2}
SEEDS = {"a": 11, "b": 12, "c": 13}


def example(*ids: int) -> Example:
    return Example(torch.tensor(ids), torch.tensor(ids))


def make(names: str = "abc", **changes: Any) -> JointLoader:
    """A loader whose example i of an adapter is the two tokens (i, i)."""
    settings: dict[str, Any] = {"seeds": SEEDS, **changes}
    sizes = settings.pop("sizes", SIZES)
    batch_sizes = settings.pop("batch_sizes", BATCH_SIZES)
    return JointLoader({name: [example(i, i) for i in range(sizes[name])] for name in names}, batch_sizes, **settings)


def shown(batch: Any) -> dict[str, list[int]]:
    """The examples of each adapter in a batch."""
    firsts = batch["input_ids"][batch["position_ids"] == 0] if "lengths" in batch else batch["input_ids"][:, 0]
    rows = firsts.split(batch["rows"])
    return {name: row.tolist() for name, row in zip(batch["adapters"], rows, strict=True)}


def take(loader: JointLoader, count: int) -> list[dict[str, list[int]]]:
    """The next ``count`` batches, over as many passes as that takes."""
    batches: list[dict[str, list[int]]] = []
    while len(batches) < count:
        for batch in loader:
            batches.append(shown(batch))
            if len(batches) == count:
                break
    return batches


def test_collate_pads_on_the_right_and_keeps_each_adapters_rows_together() -> None:
    long = Example(torch.tensor([4, 5, 6]), torch.tensor([IGNORED, 5, 6]))
    batch = collate({"b": [example(7)], "a": [long, example(8, 9)]}, pad_token_id=3)
    assert batch["input_ids"].tolist() == [[7, 3, 3], [4, 5, 6], [8, 9, 3]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[7, IGNORED, IGNORED], [IGNORED, 5, 6], [8, 9, IGNORED]]
    assert (batch["adapters"], batch["rows"]) == (["b", "a"], [1, 2])
    assert {batch[key].dtype for key in ("input_ids", "attention_mask", "labels")} == {torch.int64}  # type: ignore[literal-required]


def test_collate_of_classes_and_of_targets_of_another_length() -> None:
    assert collate({"a": [Example(torch.tensor([1, 2]), 1), Example(torch.tensor([3]), 0)]})["labels"].tolist() == [
        1,
        0,
    ]
    targets = collate({"a": [Example(torch.tensor([1]), torch.tensor([2, 3])), example(4)]})
    assert targets["input_ids"].shape == (2, 1)
    assert targets["labels"].tolist() == [[2, 3], [4, IGNORED]]
    with pytest.raises(DataError, match="'a', 'b' mix classification"):
        collate({"a": [example(1)], "b": [Example(torch.tensor([1]), 0)]})


def test_collate_packs_into_one_row() -> None:
    long = Example(torch.tensor([4, 5, 6]), torch.tensor([IGNORED, 5, 6]))
    batch = collate({"b": [example(7)], "a": [long, example(8, 9)]}, packed=True)
    assert batch["input_ids"].tolist() == [[7, 4, 5, 6, 8, 9]]
    assert batch["labels"].tolist() == [[7, IGNORED, 5, 6, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 0, 1, 2, 0, 1]]
    assert (batch["adapters"], batch["rows"], batch["lengths"]) == (["b", "a"], [1, 2], [1, 3, 2])
    assert "attention_mask" not in batch
    for other in (Example(torch.tensor([1, 2]), 0), Example(torch.tensor([1]), torch.tensor([2, 3]))):
        with pytest.raises(DataError, match="only examples with a label for each token can be packed"):
            collate({"a": [other]}, packed=True)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_packed_batches_hold_the_same_sequences(mode: str) -> None:
    padded, packed = make("abc", mode=mode), make("abc", mode=mode, packed=True)
    assert [shown(batch) for batch in packed] == [shown(batch) for batch in padded]


# ---- token budgets --------------------------------------------------------------------------------------------------

LENGTHS = {"a": [5, 1, 7, 2, 2, 9, 3, 1, 1, 8, 4, 6], "b": [3, 3, 3, 3, 3], "c": [10]}
BUDGETS = {"a": 10, "b": 6, "c": 10}


def ragged(names: str = "abc", **changes: Any) -> JointLoader:
    """Example i of an adapter is as many tokens i as ``LENGTHS`` says."""
    settings: dict[str, Any] = {"seeds": SEEDS, "max_tokens": BUDGETS, "lengths": LENGTHS, **changes}
    lengths = settings.pop("lengths")
    examples = {name: [example(*[i] * length) for i, length in enumerate(lengths[name])] for name in names}
    return JointLoader(examples, {}, **settings)


def test_a_budget_is_filled_and_kept() -> None:
    for mode in ("train", "eval"):
        loader = ragged("a", mode=mode)
        batches = [shown(batch)["a"] for batch in loader]
        assert sorted(chain(*batches)) == list(range(12))
        for index, rows in enumerate(batches):
            tokens = sum(LENGTHS["a"][row] for row in rows)
            assert 0 < tokens <= 10
            if index + 1 < len(batches):  # the next one would not have fitted
                assert tokens + LENGTHS["a"][batches[index + 1][0]] > 10
    assert [shown(batch)["b"] for batch in ragged("b", shuffle=False)] == [[0, 1], [2, 3], [4]]


def test_every_epoch_under_a_budget_has_every_example_once() -> None:
    """Each in as many batches as its own order takes."""
    rows = list(chain(*(batch["a"] for batch in take(ragged("a"), 60))))
    epochs = [rows[start : start + 12] for start in range(0, len(rows) - 11, 12)]
    assert len(epochs) > 7 and all(sorted(epoch) == list(range(12)) for epoch in epochs)
    stream = ragged("a")._streams["a"]
    counts = {len(stream.cuts) for _ in range(8) if stream._start(stream.epoch + 1) is None}
    assert len(counts) > 1


def test_budgets_do_not_depend_on_company() -> None:
    together = take(ragged("abc"), 20)
    for name in "abc":
        assert [batch[name] for batch in together] == [batch[name] for batch in take(ragged(name), 20)]


def test_budgets_and_batch_sizes_side_by_side() -> None:
    examples = {name: [example(*[i] * 3) for i in range(8)] for name in "ab"}
    loader = JointLoader(examples, {"b": 3}, seeds=SEEDS, max_tokens={"a": 7}, shuffle=False)
    assert take(loader, 2) == [{"a": [0, 1], "b": [0, 1, 2]}, {"a": [2, 3], "b": [3, 4, 5]}]


@pytest.mark.parametrize("stop", range(0, 24, 3))
def test_state_restores_the_position_with_budgets(stop: int) -> None:
    whole = take(ragged("abc"), 30)
    loader = ragged("abc")
    if stop:
        take(loader, stop)
    resumed = ragged("abc")
    resumed.load_state_dict(loader.state_dict())
    assert take(resumed, 30 - stop) == whole[stop:]


@pytest.mark.parametrize(
    "change", [{"max_tokens": {"a": 11}}, {"lengths": {"a": [5, 2, 7, 2, 2, 9, 3, 1, 1, 8, 4, 6]}}]
)
def test_a_position_under_another_budget_is_not_used(change: dict[str, Any]) -> None:
    loader = ragged("a")
    take(loader, 8)
    resumed = ragged("a", **change)
    with pytest.warns(UserWarning, match="token budget or seed of adapter 'a' changed"):
        resumed.load_state_dict(loader.state_dict())


def test_a_sequence_longer_than_the_budget_is_an_error() -> None:
    with pytest.raises(ConfigError, match="adapter 'a' has a sequence of 9 tokens but a budget of 8 a step: set"):
        ragged("ab", max_tokens={"a": 8, "b": 6})


def test_an_adapter_with_a_budget_and_no_examples_is_not_evaluated() -> None:
    assert list(ragged("a", mode="eval", lengths={"a": []})) == []


# ---- epochs ---------------------------------------------------------------------------------------------------------


def test_a_train_epoch_has_every_example_once_and_the_next_is_ordered_anew() -> None:
    loader = make("a")
    assert len(loader) == 4
    first, second = ([shown(batch)["a"] for batch in loader] for _ in range(2))
    for epoch in (first, second):
        assert [len(rows) for rows in epoch] == [2, 2, 2, 1]
        assert sorted(chain(*epoch)) == list(range(7))
    assert first != second
    assert list(chain(*first)) != list(range(7))


def test_an_adapters_batches_do_not_depend_on_its_company() -> None:
    together = take(make("abc"), 12)
    assert all(list(batch) == ["a", "b", "c"] for batch in together)
    for name in "abc":
        assert [batch[name] for batch in together] == [batch[name] for batch in take(make(name), 12)]
        assert [batch[name] for batch in together] == [batch[name] for batch in take(make("cba"), 12)]


def test_short_adapters_wrap_to_their_own_next_epoch() -> None:
    batches = [batch["b"] for batch in take(make("abc"), 4)]
    assert [len(rows) for rows in batches] == [3, 1, 3, 1]
    assert sorted(batches[0] + batches[1]) == sorted(batches[2] + batches[3]) == [0, 1, 2, 3]


def test_length_is_that_of_the_longest() -> None:
    assert len(make("abc")) == 4
    assert len(make("bc")) == 2
    assert len(list(make("abc"))) == 4


def test_the_seed_makes_the_order() -> None:
    assert take(make("a"), 8) == take(make("a"), 8)
    assert take(make("a"), 8) != take(make("a", seeds={"a": 1}), 8)


@pytest.mark.parametrize("shuffle", [False, {"a": False, "b": True}])
def test_shuffling_is_a_setting(shuffle: Any) -> None:
    batches = take(make("ab", shuffle=shuffle, sizes={"a": 4, "b": 40}), 2)
    assert [batch["a"] for batch in batches] == [[0, 1], [2, 3]]
    assert (batches[0]["b"] == [0, 1, 2]) == (shuffle is False)


def test_a_pass_that_is_cut_short_goes_on_where_it_stopped() -> None:
    whole = take(make("abc"), 8)
    loader = make("abc")
    cut = take(loader, 3)
    iter(loader)  # moves nothing
    assert cut + take(loader, 5) == whole


def test_eval_goes_once_through_everything_in_order() -> None:
    loader = make("abc", mode="eval")
    expected = [
        {"a": [0, 1], "b": [0, 1, 2], "c": [0]},
        {"a": [2, 3], "b": [3]},
        {"a": [4, 5]},
        {"a": [6]},
    ]
    assert [shown(batch) for batch in loader] == expected
    assert [shown(batch) for batch in loader] == expected
    assert len(loader) == 4


def test_pad_token_reaches_the_batch() -> None:
    loader = JointLoader({"a": [example(1), example(2, 3)]}, {"a": 2}, seeds={"a": 0}, pad_token_id=9, mode="eval")
    assert next(iter(loader))["input_ids"].tolist() == [[1, 9], [2, 3]]


def test_retired_adapters_leave_the_batches_to_come() -> None:
    loader = make("abc")
    alone = take(make("b"), 6)
    batches = iter(loader)
    assert list(shown(next(batches))) == ["a", "b", "c"]
    loader.retire("a")
    assert list(shown(next(batches))) == ["b", "c"]
    assert (loader.active, loader.adapters, len(loader)) == (["b", "c"], ["a", "b", "c"], 4)
    loader.retire("c")
    assert [batch["b"] for batch in take(loader, 2)] == [batch["b"] for batch in alone[2:4]]
    loader.reinstate("a")
    assert shown(next(iter(loader)))["a"] == take(make("a"), 2)[1]["a"]
    for name in "abc":
        loader.retire(name)
    assert list(loader) == []
    for change in (loader.retire, loader.reinstate):
        with pytest.raises(ConfigError, match="no adapter 'bb'"):
            change("bb")


def test_an_adapter_without_examples_is_not_evaluated() -> None:
    loader = make("ab", mode="eval", sizes={"a": 0, "b": 1})
    assert [shown(batch) for batch in loader] == [{"b": [0]}]
    assert list(make("a", mode="eval", sizes={"a": 0})) == []


def test_an_adapter_joins_and_leaves_between_two_batches() -> None:
    """The others' batches are as they were, and the pass as long."""
    plain, loader = take(make("ab"), 6), make("ab")
    batches = iter(loader)
    shown_ = [shown(next(batches))]
    loader.join("c", [example(i, i) for i in range(40)], 2, SEEDS["c"])
    assert (loader.adapters, len(loader)) == (["a", "b", "c"], len(make("ab")))
    shown_ += [shown(next(batches)), shown(next(batches))]
    loader.leave("a")
    shown_.append(shown(next(batches)))
    assert [list(batch) for batch in shown_] == [["a", "b"], ["a", "b", "c"], ["a", "b", "c"], ["b", "c"]]
    assert [batch["b"] for batch in shown_] == [batch["b"] for batch in plain[:4]]
    assert [batch["a"] for batch in shown_[:3]] == [batch["a"] for batch in plain[:3]]
    state = loader.state_dict()
    assert set(state["positions"]) == {"b", "c"}
    with pytest.raises(ConfigError, match="'b' already"):
        loader.join("b", [example(1)], 1, 0)
    with pytest.raises(DataError, match="'d' has no example"):
        loader.join("d", [], 1, 0)
    with pytest.raises(ConfigError, match="no adapter 'a'"):
        loader.leave("a")


def test_retired_adapters_are_not_evaluated() -> None:
    loader = make("abc", mode="eval")
    loader.retire("a")
    assert [list(shown(batch)) for batch in loader] == [["b", "c"], ["b"]]


@pytest.mark.parametrize("stop", range(10))
def test_state_restores_the_position_anywhere(stop: int) -> None:
    whole = take(make("abc"), 14)
    loader = make("abc")
    if stop:
        take(loader, stop)
    resumed = make("abc")
    resumed.load_state_dict(loader.state_dict())
    assert resumed.state_dict() == loader.state_dict()
    assert take(resumed, 14 - stop) == whole[stop:]


def test_state_restores_with_adapters_added_and_removed() -> None:
    loader = make("ab")
    take(loader, 5)
    loader.retire("b")
    resumed = make("bc")
    resumed.load_state_dict(loader.state_dict())
    assert resumed.active == ["c"]
    resumed.reinstate("b")
    batches = take(resumed, 4)
    assert [batch["b"] for batch in batches] == [batch["b"] for batch in take(make("b"), 9)[5:]]
    assert [batch["c"] for batch in batches] == [batch["c"] for batch in take(make("c"), 4)]


def test_state_is_plain_data(tmp_path: Path) -> None:
    torch.save(make("abc").state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == make("abc").state_dict()


@pytest.mark.parametrize(
    "change", [{"seeds": {"a": 5}}, {"batch_sizes": {"a": 3}}, {"sizes": {"a": 8}}, {"shuffle": False}]
)
def test_a_position_in_other_data_is_not_used(change: dict[str, Any]) -> None:
    loader = make("a")
    take(loader, 5)  # in epoch 1
    resumed, expected = make("a", **change), make("a", **change)
    with pytest.warns(UserWarning, match="adapter 'a' changed since the checkpoint"):
        resumed.load_state_dict(loader.state_dict())
    assert take(resumed, 2) == take(expected, 2 * len(expected) + 2)[-2:]


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"mode": "validate"}, ConfigError, "must be one of train, eval"),
        ({"batch_sizes": {"a": 0}}, ConfigError, "batch size of adapter 'a' must be at least 1, not 0"),
        ({"batch_sizes": {}}, ConfigError, "adapter 'a' has examples but no batch size"),
        ({"seeds": {}}, ConfigError, "adapter 'a' has examples but no batch size or no seed"),
        ({"sizes": {"a": 0}}, DataError, "adapter 'a' has no example to train on"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        make("a", **changes)


class Recorder(pl.LightningModule):
    """Trains one number and keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[dict[str, list[int]]] = []
        self.validated: list[dict[str, list[int]]] = []

    def training_step(self, batch: Any) -> torch.Tensor:
        self.seen.append(shown(batch))
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch: Any) -> None:
        self.validated.append(shown(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(loader: JointLoader, folder: Path, steps: int, resume: str | None = None, **settings: Any) -> Recorder:
    module = Recorder()
    trainer = pl.Trainer(
        max_steps=steps,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"limit_val_batches": 0, **settings},
    )
    trainer.fit(module, loader, make("abc", mode="eval"), ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module


# Lightning 2.6 resumes a checkpoint saved after a fit that stopped at the end of an epoch with an epoch of one batch,
# whatever the loader: the batches are the right ones, but an optimizer step that accumulates gets one of them, not two.
@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        ({}, [1, 3, 4, 6, 8, 9]),
        ({"limit_train_batches": 3}, [1, 3, 4, 6, 8, 9]),
        ({"accumulate_grad_batches": 2}, [1, 3, 5]),
    ],
)
def test_a_resumed_fit_sees_the_batches_it_would_have_seen(
    tmp_path: Path, settings: dict[str, Any], stops: list[int]
) -> None:
    """Stopped within the first pass of 4 batches, at its end, and later; also where Lightning cuts the pass short."""
    whole = fit(make("abc"), tmp_path, 11, **settings).seen
    assert whole == take(make("abc"), len(whole))
    for stop in stops:
        before = fit(make("abc"), tmp_path, stop, **settings).seen
        after = fit(make("abc"), tmp_path, 11, resume=str(tmp_path / f"{stop}.ckpt"), **settings).seen
        assert before == whole[: len(before)]
        assert before + after == whole


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_from_a_checkpoint_saved_between_two_steps_of_a_run_that_went_on(
    tmp_path: Path, accumulate: int
) -> None:
    """The position saved is that of the batches trained on, and of none that a loop may have fetched ahead."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            path = tmp_path / f"step{trainer.global_step}.ckpt"
            if trainer.global_step and not path.exists():
                trainer.save_checkpoint(path)

    settings = {"limit_val_batches": 1.0, "val_check_interval": 2, "accumulate_grad_batches": accumulate}
    whole = fit(make("abc"), tmp_path, 7, callbacks=[Save()], **settings)
    assert whole.validated
    for step in range(1, 7):
        resumed = fit(make("abc"), tmp_path, 7, resume=str(tmp_path / f"step{step}.ckpt"), **settings)
        assert resumed.seen == whole.seen[step * accumulate :]


def test_resume_with_another_company(tmp_path: Path) -> None:
    fit(make("ab"), tmp_path, 3)
    resumed = fit(make("bc"), tmp_path, 6, resume=str(tmp_path / "3.ckpt")).seen
    assert [batch["b"] for batch in resumed] == [batch["b"] for batch in take(make("b"), 6)[3:]]
    assert [batch["c"] for batch in resumed] == [batch["c"] for batch in take(make("c"), 3)]


def test_retiring_within_a_fit(tmp_path: Path) -> None:
    class Retire(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.train_dataloader.retire("a")

    seen = fit(make("abc"), tmp_path, 10, callbacks=[Retire()]).seen
    assert len(seen) == 10
    assert all("a" in batch for batch in seen[:3])
    assert not any("a" in batch for batch in seen[3:])
    assert [batch["b"] for batch in seen] == [batch["b"] for batch in take(make("b"), 10)]


# ---- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_rows_are_dealt_once_each_and_evenly(world_size: int) -> None:
    groups = {name: [example(row, row) for row in range(count)] for name, count in (("a", 5), ("b", 2), ("c", 1))}
    numbers = [dealt_numbers(groups, rank, world_size) for rank in range(world_size)]
    for rank in range(world_size):
        mine = deal(groups, rank, world_size)
        for name, rows in groups.items():
            assert [id(row) for row in mine[name]] == [id(rows[number]) for number in numbers[rank][name]]
    parts = [deal(groups, rank, world_size) for rank in range(world_size)]
    for name, rows in groups.items():
        dealt = [row for part in parts for row in part[name]]
        assert sorted(map(id, dealt)) == sorted(map(id, rows))
    sizes = [sum(len(rows) for rows in part.values()) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("labels", [torch.tensor([1, 2]), 1])
def test_a_process_without_a_row_gets_one_that_counts_for_nothing(labels: Any) -> None:
    row = Example(torch.tensor([1, 2]), labels)
    (mine,) = deal({"a": [row]}, 1, 2)["a"]
    assert torch.equal(mine.input_ids, row.input_ids)
    assert bool((torch.as_tensor(mine.labels) == -100).all())
    assert deal({"a": [row]}, 0, 2)["a"] == [row]
