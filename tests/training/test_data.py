"""The data module: checks, splits and loaders, with and without a trainer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import FSDPStrategy

from finetuna_lightning.backbone import BackboneInfo
from finetuna_lightning.configs import DataConfig
from finetuna_lightning.errors import ConfigError, DataError
from finetuna_lightning.training.data import AdapterDataModule, split_indices
from finetuna_lightning.training.loader import JointLoader
from finetuna_lightning.training.tokenizing import Example
from tests.helpers.tokenizer import VOCAB_SIZE, byte_tokenizer

# lightning 2.6 on torch 2.13, in CombinedLoader's use of pytrees
pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")


class Module(pl.LightningModule):
    """What the data module asks of a LightningModule, and a number to train."""

    def __init__(self, names: list[str], **info: Any) -> None:
        super().__init__()
        self.adapter_names = names
        limits = {"max_positions": None, "vocab_size": None, "num_labels": 2}
        self.info = BackboneInfo(**{"tokenizer": byte_tokenizer(), "task": "causal-lm", **limits, **info})
        self.asked = 0
        self.obstacle: str | None = "it is a number"
        self.packed: set[bool] = set()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[dict[str, list[str]]]] = {"train": [], "val": [], "test": [], "predict": []}

    def backbone_info(self) -> BackboneInfo:
        self.asked += 1
        return self.info

    def adapter_seed(self, name: str) -> int:
        return sum(name.encode())

    def packing_obstacle(self) -> str | None:
        return self.obstacle

    def keep(self, split: str, batch: Any) -> None:
        self.packed.add("lengths" in batch)
        ids = batch["input_ids"][0].split(batch["lengths"]) if "lengths" in batch else batch["input_ids"]
        rows = self.info.tokenizer.batch_decode(ids, skip_special_tokens=True)
        ends = torch.tensor(batch["rows"]).cumsum(0).tolist()
        parts = {
            name: rows[end - count : end]
            for name, end, count in zip(batch["adapters"], ends, batch["rows"], strict=True)
        }
        self.seen[split].append(parts)

    def training_step(self, batch: Any) -> torch.Tensor:
        self.keep("train", batch)
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch: Any) -> None:
        self.keep("val", batch)

    def test_step(self, batch: Any) -> None:
        self.keep("test", batch)

    def predict_step(self, batch: Any) -> torch.Tensor:
        self.keep("predict", batch)
        return self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def prompts(path: Path, count: int = 10, tag: str = "") -> str:
    """A file of ``count`` examples, each its own document."""
    path.write_text(
        "".join(json.dumps({"prompt": f"{tag}{number}:", "completion": "x"}) + "\n" for number in range(count))
    )
    return str(path)


def shown(examples: list[Example]) -> list[str]:
    tokenizer = byte_tokenizer()
    return [tokenizer.decode(example.input_ids, skip_special_tokens=True) for example in examples]


def trainer_of(folder: Path, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def test_without_a_trainer(tmp_path: Path) -> None:
    sources = {
        "a": DataConfig(prompts(tmp_path / "a.jsonl"), batch_size=3, val_fraction=0.2),
        "b": DataConfig(prompts(tmp_path / "b.jsonl"), val_fraction=0.2),
    }
    data = AdapterDataModule(sources, batch_size=2, eval_batch_size=1, tokenizer=byte_tokenizer(pad=False))
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert (batch["adapters"], batch["rows"]) == (["a", "b"], [3, 2])
    val = data.val_dataloader()
    assert isinstance(val, JointLoader)
    assert [batch["rows"] for batch in val] == [[1, 1], [1, 1]]
    assert [batch["rows"] for batch in data.predict_dataloader()] == [[1, 1], [1, 1]]
    assert data.test_dataloader() == []
    other = AdapterDataModule({"b": sources["b"]}, batch_size=2, tokenizer=byte_tokenizer())
    other.setup()
    alone = next(iter(other.train_dataloader()))["input_ids"]
    assert torch.equal(batch["input_ids"][3:], alone)


def test_the_tokenizer_pads(tmp_path: Path) -> None:
    config = DataConfig(prompts(tmp_path / "a.jsonl", 11), val_fraction=0)
    data = AdapterDataModule({"a": config}, batch_size=11, tokenizer=byte_tokenizer(pad=False))
    data.setup()
    batch = next(iter(data.train_dataloader()))
    padding = batch["input_ids"][batch["attention_mask"] == 0]
    assert len(padding) == 10
    assert set(padding.tolist()) == {1}  # eos


def test_seed_makes_the_order_and_the_split(tmp_path: Path) -> None:
    path = prompts(tmp_path / "a.jsonl", 40)

    def drawn(seed: int | None) -> tuple[list[str], list[str]]:
        sources = {"a": DataConfig(path, val_fraction=0), "b": DataConfig(path)}
        data = AdapterDataModule(sources, batch_size=40, seed=seed, tokenizer=byte_tokenizer())
        data.setup()
        (batch,) = data.train_dataloader()
        return byte_tokenizer().batch_decode(batch["input_ids"][:40]), shown(data.evaluation_sets("val")["b"])

    assert drawn(None) == drawn(0)
    assert drawn(1)[0] != drawn(0)[0]
    assert drawn(1)[1] != drawn(0)[1]


def test_split_is_by_document_without_overlap(tmp_path: Path) -> None:
    config = DataConfig(prompts(tmp_path / "a.jsonl", 20), val_fraction=0.2, test_fraction=0.1)
    data = AdapterDataModule({"a": config, "b": config}, tokenizer=byte_tokenizer())
    data.setup()
    sets = {split: shown(data.evaluation_sets(split)["a"]) for split in ("train", "val", "test")}
    assert {split: len(items) for split, items in sets.items()} == {"train": 14, "val": 4, "test": 2}
    assert sorted(sum(sets.values(), [])) == sorted(f"{number}:x" for number in range(20))  # noqa: RUF017
    # what is held out of a file is held out for every adapter
    assert shown(data.evaluation_sets("val")["b"]) == sets["val"]


def test_split_indices() -> None:
    assert split_indices(10, 0, 0) == (list(range(10)), [], [])
    assert [len(part) for part in split_indices(2, 0.1, 0)] == [1, 1, 0]
    assert [len(part) for part in split_indices(2, 0.1, 0.1)] == [1, 1, 0]
    assert [len(part) for part in split_indices(3, 0.01, 0.01)] == [1, 1, 1]
    assert [len(part) for part in split_indices(1, 0.5, 0.4)] == [1, 0, 0]
    assert [len(part) for part in split_indices(10, 0.95, 0.04)] == [1, 9, 0]
    assert split_indices(50, 0.1, 0.1) == split_indices(50, 0.1, 0.1)
    assert split_indices(50, 0.1, 0.1) != split_indices(50, 0.1, 0.1, seed=1)


def test_files_of_their_own_for_validation_and_test(tmp_path: Path) -> None:
    config = DataConfig(
        prompts(tmp_path / "train.jsonl", 4, "train"),
        val_path=prompts(tmp_path / "val.jsonl", 2, "val"),
        test_path=prompts(tmp_path / "test.jsonl", 1, "test"),
        val_fraction=0.5,
        test_fraction=0.25,
    )
    data = AdapterDataModule({"a": config}, tokenizer=byte_tokenizer())
    data.setup()
    assert shown(data.evaluation_sets("train")["a"]) == [f"train{number}:x" for number in range(4)]
    assert shown(data.evaluation_sets("val")["a"]) == ["val0:x", "val1:x"]
    assert shown(data.evaluation_sets("test")["a"]) == ["test0:x"]
    (batch,) = data.predict_dataloader()
    assert byte_tokenizer().batch_decode(batch["input_ids"]) == ["test0:x<eos>"]


def test_a_single_document_is_split_by_position(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"paragraph {number} of the book.\n\n" for number in range(100)))
    data = AdapterDataModule({"a": DataConfig(str(path), max_length=32)}, tokenizer=byte_tokenizer())
    data.setup()
    sets = {split: "".join(shown(data.evaluation_sets(split)["a"])) for split in ("train", "val")}
    assert sum(text.count("book.") for text in sets.values()) == 100
    assert 5 <= sets["val"].count("book.") <= 20
    # a held-out piece is contiguous
    held = [number for number in range(100) if f"paragraph {number} of" in sets["val"]]
    assert held == list(range(held[0], held[-1] + 1))
    whole = AdapterDataModule({"a": DataConfig(str(path), max_length=32, val_fraction=0)}, tokenizer=byte_tokenizer())
    whole.setup()
    assert "".join(shown(whole.evaluation_sets("train")["a"])) == path.read_text()


def test_several_documents_stay_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\f".join(f"one {number}\n\ntwo {number}\n" for number in range(5)))
    data = AdapterDataModule({"a": DataConfig(str(tmp_path / "a.txt"))}, tokenizer=byte_tokenizer())
    data.setup()
    (train,), (val,) = (shown(data.evaluation_sets(split)["a"]) for split in ("train", "val"))
    assert (train.count("one"), train.count("two"), val.count("one"), val.count("two")) == (4, 4, 1, 1)


@pytest.mark.parametrize(("large", "terminal"), [(True, True), (True, False), (False, True)])
def test_progress_is_shown_for_large_data_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], large: bool, terminal: bool
) -> None:
    monkeypatch.setattr("finetuna_lightning.training.data._LARGE", 10 if large else 1_000_000)
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    data = AdapterDataModule({"a": DataConfig(prompts(tmp_path / "a.jsonl"))}, tokenizer=byte_tokenizer())
    data.setup()
    assert ("tokenising: adapter 'a', train" in capsys.readouterr().err) == (large and terminal)


def test_what_cannot_be_split_is_said(tmp_path: Path) -> None:
    data = AdapterDataModule({"a": DataConfig(prompts(tmp_path / "a.jsonl", 1))}, tokenizer=byte_tokenizer())
    with pytest.warns(UserWarning, match=r"a\.jsonl has one document, so nothing is held out; set data\.val_path"):
        data.setup()
    assert data.val_dataloader() == []
    assert data.predict_dataloader() == []


@pytest.mark.parametrize("packed", [False, True])
def test_fit_validate_test_and_predict(tmp_path: Path, packed: bool) -> None:
    sources = {
        "a": DataConfig(prompts(tmp_path / "a.jsonl", 8), val_fraction=0.25, test_fraction=0.25),
        "b": DataConfig(prompts(tmp_path / "b.jsonl", 4), val_fraction=0.25),
    }
    module, data = Module(["b", "a"]), AdapterDataModule(sources, batch_size=2)
    module.obstacle = None if packed else "it is a number"
    trainer = trainer_of(tmp_path, max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=data)
    assert trainer.train_dataloader is data.train_dataloader()
    trainer.validate(module, datamodule=data)
    trainer.test(module, datamodule=data)
    trainer.predict(module, datamodule=data)
    assert [list(parts) for parts in module.seen["train"]] == [["a", "b"]] * 4
    assert [list(parts) for parts in module.seen["val"]] == [["a", "b"]] * 3
    assert module.seen["test"] == module.seen["predict"] == [{"a": shown(data.evaluation_sets("test")["a"])}]
    assert module.packed == {packed}


def test_packing_follows_the_setting_and_the_model(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    config = DataConfig(prompts(tmp_path / "a.jsonl", 8), val_fraction=0.25)

    def seen(packing: bool | None, obstacle: str | None) -> set[bool]:
        module = Module(["a"])
        module.obstacle = obstacle
        data = AdapterDataModule({"a": config}, packing=packing)
        trainer_of(tmp_path, max_epochs=1).fit(module, datamodule=data)
        return module.packed

    assert seen(None, None) == seen(True, None) == {True}
    assert seen(False, None) == seen(None, "it cannot") == {False}
    assert not [str(found.message) for found in recwarn if "packing" in str(found.message)]
    with pytest.warns(UserWarning, match=r"packing is on, but the batches are padded rows: it cannot") as said:
        assert seen(True, "it cannot") == {False}
    assert len([found for found in said if "packing" in str(found.message)]) == 1
    alone = AdapterDataModule({"a": config}, tokenizer=byte_tokenizer())  # no model to ask
    alone.setup()
    assert "lengths" not in next(iter(alone.train_dataloader()))
    alone = AdapterDataModule({"a": config}, tokenizer=byte_tokenizer(), packing=True)
    alone.setup()
    assert "lengths" in next(iter(alone.train_dataloader()))


def test_a_token_budget_is_the_source_s_or_the_module_s(tmp_path: Path) -> None:
    path = prompts(tmp_path / "a.jsonl", 12)
    sources = {
        "own": DataConfig(path, val_fraction=0.5, max_tokens=50),
        "shared": DataConfig(path, val_fraction=0.5),
        "counted": DataConfig(path, val_fraction=0.5, batch_size=3),
    }

    def counts(loader: Any) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for batch in loader:
            for name, rows in zip(batch["adapters"], batch["rows"], strict=True):
                found.setdefault(name, []).append(rows)
        return found

    data = AdapterDataModule(sources, max_tokens=70, tokenizer=byte_tokenizer())
    data.setup()
    lengths = {name: [len(e.input_ids) for e in sets] for name, sets in data.evaluation_sets("val").items()}
    for name, budget in (("own", 50), ("shared", 70)):
        at = 0
        for rows in counts(data.val_dataloader())[name]:
            assert sum(lengths[name][at : at + rows]) <= budget < sum(lengths[name][at : at + rows + 1]) or (
                at + rows == len(lengths[name])
            )
            at += rows
    assert counts(data.val_dataloader())["counted"] == [3, 3]
    data = AdapterDataModule(sources, max_tokens=70, eval_batch_size=4, tokenizer=byte_tokenizer())
    data.setup()
    assert set(map(tuple, counts(data.val_dataloader()).values())) == {(4, 2)}
    assert counts(data.train_dataloader())["own"] != [4, 2]


def test_order_follows_the_adapters_seed(tmp_path: Path) -> None:
    config = DataConfig(prompts(tmp_path / "a.jsonl", 8), val_fraction=0)

    def order(name: str, seed: int | None = None) -> list[str]:
        module = Module([name])
        trainer = trainer_of(tmp_path, max_epochs=1, limit_val_batches=0)
        trainer.fit(module, datamodule=AdapterDataModule({name: config}, batch_size=8, seed=seed))
        return module.seen["train"][0][name]

    assert order("ab") == order("ba")  # the same sum of bytes, so the same seed
    assert order("ab") != order("cd")
    assert order("ab", seed=1) != order("ba", seed=1)


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")  # Lightning: was it the intention?
def test_fit_without_validation_data(tmp_path: Path) -> None:
    config = DataConfig(prompts(tmp_path / "a.jsonl", 8), val_fraction=0)
    module = Module(["a"])
    trainer_of(tmp_path, max_epochs=1).fit(module, datamodule=AdapterDataModule({"a": config}))
    assert len(module.seen["train"]) == 2
    assert module.seen["val"] == []


def test_a_second_fit_starts_anew_and_tokenises_no_second_time(tmp_path: Path) -> None:
    data = AdapterDataModule({"a": DataConfig(prompts(tmp_path / "a.jsonl", 8), val_fraction=0)})
    first, second = Module(["a"]), Module(["a"])
    second.info = first.info
    settings: dict[str, Any] = {"max_steps": 3, "limit_val_batches": 0}
    trainer_of(tmp_path, **settings).fit(first, datamodule=data)
    examples = data.evaluation_sets("train")["a"]
    trainer_of(tmp_path, **settings).fit(second, datamodule=data)
    assert second.seen["train"] == first.seen["train"]
    assert data.evaluation_sets("train")["a"] is examples
    third = Module(["a"], max_positions=3)
    trainer_of(tmp_path, **settings).fit(third, datamodule=data)
    assert data.evaluation_sets("train")["a"] is not examples


def test_reloading_the_loader_within_a_fit_keeps_its_position(tmp_path: Path) -> None:
    data = AdapterDataModule({"a": DataConfig(prompts(tmp_path / "a.jsonl", 8), val_fraction=0)}, batch_size=8)
    module = Module(["a"])
    trainer_of(tmp_path, max_epochs=2, reload_dataloaders_every_n_epochs=1, limit_val_batches=0).fit(
        module, datamodule=data
    )
    first, second = (batch["a"] for batch in module.seen["train"])
    assert sorted(first) == sorted(second)
    assert first != second


def test_all_files_are_checked_before_the_backbone_is_asked(tmp_path: Path) -> None:
    sources = {"a": DataConfig(prompts(tmp_path / "a.jsonl")), "b": DataConfig(str(tmp_path / "b.jsonl"))}
    module = Module(["a", "b"])
    with pytest.raises(DataError, match=r"adapter 'b': .*b\.jsonl does not exist; did you mean 'a\.jsonl'"):
        trainer_of(tmp_path, max_steps=1).fit(module, datamodule=AdapterDataModule(sources))
    assert module.asked == 0


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["sql", "legal"], "adapter 'legal' has no data: data.sources has 'sql', 'leagl'; did you mean 'leagl'"),
        (["sql"], "data.sources has 'leagl', but the adapters are 'sql': add one, or drop it"),
    ],
)
def test_sources_and_adapters_must_match(tmp_path: Path, names: list[str], complaint: str) -> None:
    path = prompts(tmp_path / "a.jsonl")
    data = AdapterDataModule({"sql": DataConfig(path), "leagl": DataConfig(path)})
    with pytest.raises(ConfigError, match=complaint):
        trainer_of(tmp_path, max_steps=1).fit(Module(names), datamodule=data)


def test_a_strategy_that_shards_weights_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    data = AdapterDataModule({"a": DataConfig(str(tmp_path / "gone.jsonl"))})
    data.trainer = trainer_of(tmp_path)
    data.trainer._accelerator_connector.strategy = FSDPStrategy()
    with pytest.raises(ConfigError, match=r"FSDPStrategy is not supported"):
        data.setup("fit")


def test_a_process_of_several_gets_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = AdapterDataModule({"a": DataConfig(prompts(tmp_path / "a.jsonl"), shuffle=False)}, batch_size=4)
    module = Module(["a"])
    data.trainer = trainer_of(tmp_path)
    data.trainer.strategy.connect(module)
    data.setup("fit")
    whole = next(iter(data.train_dataloader()))["input_ids"]
    data.setup("fit")
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    monkeypatch.setattr(pl.Trainer, "global_rank", 1)
    loader = data.train_dataloader()
    assert torch.equal(next(iter(loader))["input_ids"], whole[1::2, : int(whole.shape[1])])


@pytest.mark.parametrize(
    ("settings", "info", "complaint"),
    [
        ({"max_length": 65}, {"max_positions": 64}, "adapter 'a': data.max_length is 65 but the backbone has 64"),
        ({"max_length": 2}, {}, "adapter 'a': all 9 examples, example . the first, have no token or no label left"),
        ({}, {"vocab_size": 30}, r"adapter 'a': token \d+ .* is beyond the backbone's vocabulary of 30"),
        ({}, {"task": "sequence-classification"}, "adapter 'a': the data is 'prompt' but backbone.task is"),
        ({}, {"tokenizer": None}, r"there is no tokenizer: .* AdapterDataModule\(tokenizer=...\)"),
    ],
)
def test_data_that_does_not_fit_the_model(
    tmp_path: Path, settings: dict[str, Any], info: dict[str, Any], complaint: str
) -> None:
    data = AdapterDataModule({"a": DataConfig(prompts(tmp_path / "a.jsonl"), **settings)})
    with pytest.raises(DataError, match=complaint):
        trainer_of(tmp_path, max_steps=1).fit(Module(["a"], **info), datamodule=data)


def test_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    data = AdapterDataModule({"a": DataConfig(prompts(tmp_path / "a.jsonl"))}, tokenizer=byte_tokenizer(bos=True))
    module = Module(["a"], tokenizer=None, vocab_size=VOCAB_SIZE)
    data.trainer = trainer_of(tmp_path)
    data.trainer.strategy.connect(module)
    data.setup("fit")
    assert data.evaluation_sets("train")["a"][0].input_ids[0] == 2  # bos


def test_a_file_of_one_character(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    data = AdapterDataModule(
        {"a": DataConfig(str(tmp_path / "a.txt"), val_fraction=0)}, tokenizer=byte_tokenizer(eos=False)
    )
    with pytest.raises(DataError, match=r"adapter 'a': .*a\.txt gives no example to train on"):
        data.setup()


def test_classification_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"text {number}", "label": ["good", "bad", "ugly"][number % 3]} for number in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = {"task": "sequence-classification", "num_labels": 3}
    module, data = Module(["a"], **info), AdapterDataModule({"a": DataConfig(str(path))}, batch_size=9)
    trainer_of(tmp_path, max_steps=1, limit_val_batches=0).fit(module, datamodule=data)
    assert data.label_names == {"a": ["bad", "good", "ugly"]}
    examples = data.evaluation_sets("train")["a"] + data.evaluation_sets("val")["a"]
    assert sorted(item.labels for item in examples) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    ordered = DataConfig(str(path), labels=["ugly", "good", "bad"])
    data = AdapterDataModule({"a": ordered}, tokenizer=byte_tokenizer())
    data.setup()
    assert data.label_names == {"a": ["ugly", "good", "bad"]}
    data = AdapterDataModule({"a": ordered})
    complaint = r"3 labels \(ugly, good, bad\) but backbone.num_labels is 2: set backbone.num_labels=3"
    with pytest.raises(DataError, match=complaint):
        trainer_of(tmp_path, max_steps=1).fit(Module(["a"], **{**info, "num_labels": 2}), datamodule=data)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"sources": {}}, "data.sources is empty"),
        ({"sources": {"../x": {"path": "a.txt"}}}, "adapter name '../x' is not allowed"),
        ({"sources": {"a": {"pth": "a.txt"}}}, "DataConfig has no field 'pth'; did you mean 'path'?"),
        ({"sources": {"a": {"zzz": 1}}}, "DataConfig has no field 'zzz'; it has path, kind, "),
        ({"sources": {"a": "a.txt"}}, "the source of adapter 'a' must be a DataConfig or a mapping"),
        ({"sources": {"a": {"path": "a.txt"}}, "batch_size": 0}, "data.batch_size must be an integer >= 1, not 0"),
        ({"sources": {"a": {"path": "a.txt"}}, "batch_size": True}, "data.batch_size must be .* not True"),
        ({"sources": {"a": {"path": "a.txt"}}, "eval_batch_size": 2.5}, "data.eval_batch_size must be .* not 2.5"),
    ],
)
def test_arguments_that_cannot_work(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        AdapterDataModule(**arguments)


def test_evaluation_sets_of_no_split_and_before_setup(tmp_path: Path) -> None:
    data = AdapterDataModule({"a": DataConfig(prompts(tmp_path / "a.jsonl"))})
    with pytest.raises(ConfigError, match="call setup"):
        data.evaluation_sets()
    with pytest.raises(ConfigError, match="one of train, val, test, not 'dev'"):
        data.evaluation_sets("dev")


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # lightning 2.6's calls
def test_it_is_made_from_yaml_by_lightning_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "trainer: {accelerator: cpu, logger: false, enable_checkpointing: false}\n"
        "data:\n  batch_size: 2\n"
        "  sources:\n    a: {path: a.jsonl, batch_size: 3, labels: [x, y]}\n    b: {path: b.txt}\n"
    )
    monkeypatch.setattr(sys, "argv", ["finetuna-cli", "--config", str(config), "--data.eval_batch_size=5"])
    settings: dict[str, Any] = {"save_config_callback": None, "seed_everything_default": False}
    cli = LightningCLI(BoringModel, AdapterDataModule, run=False, **settings)
    sources = {"a": DataConfig("a.jsonl", batch_size=3, labels=["x", "y"]), "b": DataConfig("b.txt")}
    assert cli.datamodule.sources == sources
    assert (cli.datamodule.batch_size, cli.datamodule.eval_batch_size) == (2, 5)


def test_sources_may_be_plain_mappings() -> None:
    data = AdapterDataModule({"a": {"path": "a.jsonl", "batch_size": 3}})  # type: ignore[dict-item]
    assert data.sources == {"a": DataConfig("a.jsonl", batch_size=3)}
