"""The data module: one source an adapter, read, split by document, tokenised, and handed out by joint loaders."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from finetuna_lightning.backbone import BackboneInfo
from finetuna_lightning.configs import DataConfig, check_adapter_names
from finetuna_lightning.errors import ConfigError, DataError, did_you_mean
from finetuna_lightning.seeds import stream_seed
from finetuna_lightning.training.distributed import check_strategy
from finetuna_lightning.training.loader import JointLoader
from finetuna_lightning.training.sources import Document, check_files, label_names, read_documents, split_document
from finetuna_lightning.training.tokenizing import Example, Progress, pad_token_id, tokenise

SPLITS = ("train", "val", "test")
_NO_BACKBONE = BackboneInfo(tokenizer=None, task="any", max_positions=None, vocab_size=None, num_labels=0)
_LARGE = 2_000_000  # characters: below, tokenising is over before a progress bar is drawn


class AdapterDataModule(LightningDataModule):
    """Data for every adapter, in joint batches (``loader.Batch``).

    The split into train, validation and test is by document, and the same for every adapter that reads the same file,
    so that no adapter trains on what another is evaluated on.

    Args:
        sources: by adapter name.
        batch_size: sequences of each adapter in a training step, over all devices, where its ``DataConfig`` has
            neither these nor a token budget of its own.
        eval_batch_size: the same in evaluation, for all; None: as in training.
        max_tokens: instead of ``batch_size``, a token budget: as many sequences as have at most so many tokens.
        packing: put all sequences of a step into one row without pads. None: where the model allows it; True: the same,
            with a warning where it does not; False: padded rows. The sequences and losses are the same either way.
        seed: of orders and splits; None: each adapter's own seed for its order, and 0 for the splits.
        tokenizer: instead of the backbone's.

    Raises:
        ConfigError: for no source, a name that cannot name an adapter, a setting that ``DataConfig`` does not have.

    Example:
        >>> data = AdapterDataModule({"sql": DataConfig("sql.jsonl")}, tokenizer=tokenizer)  # doctest: +SKIP
        >>> data.setup()  # doctest: +SKIP
        >>> next(iter(data.train_dataloader()))["input_ids"].shape  # doctest: +SKIP
    """

    def __init__(
        self,
        sources: dict[str, DataConfig],
        batch_size: int = 4,
        eval_batch_size: int | None = None,
        seed: int | None = None,
        tokenizer: Any = None,
        max_tokens: int | None = None,
        packing: bool | None = None,
    ) -> None:
        super().__init__()
        if not sources:
            raise ConfigError("data.sources is empty: give each adapter a DataConfig under its name")
        check_adapter_names(list(sources))
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "max_tokens": max_tokens}
        for what, size in sizes.items():
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ConfigError(f"data.{what} must be an integer >= 1, not {size!r}")
        if packing not in (None, True, False):
            raise ConfigError(f"data.packing must be true, false or null, not {packing!r}")
        self.sources = {name: _config(name, source) for name, source in sources.items()}
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_tokens = max_tokens
        self.packing = packing
        self.seed = seed
        self.tokenizer = tokenizer
        self.label_names: dict[str, list[str]] = {}
        self._sets: dict[str, dict[str, list[Example]]] = {}
        self._prepared_for: BackboneInfo | None = None
        self._train_loader: JointLoader | None = None
        self._said_padded = False

    def setup(self, stage: str | None = None) -> None:
        """Check all files, then read, split and tokenise them, once for a tokenizer and its model.

        Raises:
            ConfigError: when sources and adapters do not match, or under a strategy other than DDP.
            DataError: naming the adapter, and the file and line, at fault.
        """
        module: Any = None if self.trainer is None else self.trainer.lightning_module
        if self.trainer is not None:
            check_strategy(self.trainer)
        if module is not None:
            _check_company(list(self.sources), list(module.adapter_names))
        for name, config in self.sources.items():
            with _named(name):
                check_files(config)
        if stage in (None, "fit"):
            self._train_loader = None  # a fit starts at the beginning, unless its checkpoint says otherwise
        info = self._info(module)
        if self._prepared_for != info:
            for name, config in self.sources.items():
                with _named(name):
                    self._sets[name] = self._prepare(name, config, info)
            self._prepared_for = info

    def evaluation_sets(self, split: str = "val") -> dict[str, list[Example]]:
        """The examples of every adapter that has any in ``split`` (``train``, ``val`` or ``test``), for evaluating each
        adapter on each other's data."""
        if split not in SPLITS:
            raise ConfigError(f"a split must be one of {', '.join(SPLITS)}, not {split!r}")
        if self._prepared_for is None:
            raise ConfigError("the data is not set up: call setup() first, or let the trainer do it")
        return {name: sets[split] for name, sets in self._sets.items() if sets[split]}

    def join(self, name: str, source: DataConfig, info: BackboneInfo) -> None:
        """Take in the data of one more adapter; in a fit its rows come with the next batch.

        Raises:
            ConfigError: for an adapter that has data already.
            DataError: naming the adapter, and the file and line, at fault. Nothing is changed then.
        """
        if name in self.sources:
            raise ConfigError(f"adapter {name!r} has data already")
        config = _config(name, source)
        if self.tokenizer is not None:
            info = replace(info, tokenizer=self.tokenizer)
        with _named(name):
            check_files(config)
            sets = self._prepare(name, config, info)
        self.sources[name], self._sets[name] = config, sets
        if self._train_loader is not None:
            size = config.batch_size or self.batch_size
            seed = self._order_seed(name)
            self._train_loader.join(name, sets["train"], size, seed, config.shuffle, config.max_tokens)

    def leave(self, name: str) -> None:
        """Let the data of an adapter go."""
        del self.sources[name], self._sets[name]
        self.label_names.pop(name, None)
        if self._train_loader is not None:
            self._train_loader.leave(name)

    def train_dataloader(self) -> JointLoader:
        """One loader for the whole fit, so that reloading it between epochs loses no position."""
        if self._train_loader is None:
            self._train_loader = self._loader("train", "train")
        return self._train_loader

    def val_dataloader(self) -> JointLoader | list[Any]:
        """An empty list where no adapter has validation data: Lightning then skips the loop."""
        return self._loader("val", "eval") if self.evaluation_sets("val") else []

    def test_dataloader(self) -> JointLoader | list[Any]:
        return self._loader("test", "eval") if self.evaluation_sets("test") else []

    def predict_dataloader(self) -> JointLoader | list[Any]:
        """The test split, or the validation split where there is none."""
        return self.test_dataloader() or self.val_dataloader()

    def _loader(self, split: str, mode: str) -> JointLoader:
        sets = self.evaluation_sets(split)
        sizes = {name: config.batch_size or self.batch_size for name, config in self.sources.items()}
        budgets = {
            name: config.max_tokens or self.max_tokens for name, config in self.sources.items() if not config.batch_size
        }
        if mode == "eval" and self.eval_batch_size is not None:
            sizes, budgets = dict.fromkeys(sizes, self.eval_batch_size), {}
        assert self._prepared_for is not None
        return JointLoader(
            sets,
            sizes,
            seeds={name: self._order_seed(name) for name in sets},
            max_tokens={name: budget for name, budget in budgets.items() if budget is not None},
            shuffle={name: config.shuffle for name, config in self.sources.items()},
            pad_token_id=pad_token_id(self._prepared_for.tokenizer),
            mode=mode,
            packed=self._packs(),
            rank=0 if self.trainer is None else self.trainer.global_rank,
            world_size=1 if self.trainer is None else self.trainer.world_size,
        )

    def _packs(self) -> bool:
        """Whether batches are packed; says so where that was asked for and cannot be."""
        if self.packing is False or (self.packing is None and self.trainer is None):
            return False
        if self.trainer is None:
            return True
        module: Any = self.trainer.lightning_module
        obstacle = module.packing_obstacle()
        if obstacle is not None and self.packing and not self._said_padded:
            self._said_padded = True
            warnings.warn(f"data.packing is on, but the batches are padded rows: {obstacle}", stacklevel=2)
        return obstacle is None

    def _order_seed(self, name: str) -> int:
        if self.seed is None and self.trainer is not None:
            module: Any = self.trainer.lightning_module
            return int(module.adapter_seed(name))
        return stream_seed(self.seed or 0, name)

    def _info(self, module: Any) -> BackboneInfo:
        """What is known of the model; of its tokenizer alone, where there is no trainer."""
        info: BackboneInfo = module.backbone_info() if module is not None else _NO_BACKBONE
        if self.tokenizer is not None:
            info = replace(info, tokenizer=self.tokenizer)
        if info.tokenizer is None:
            raise DataError(
                "there is no tokenizer: the backbone has none, so give AdapterDataModule(tokenizer=...) one"
            )
        return info

    def _prepare(self, name: str, config: DataConfig, info: BackboneInfo) -> dict[str, list[Example]]:
        """Read, split and tokenise one adapter's source."""
        kind, documents = _read(config, self.seed or 0)
        names: list[str] = []
        if kind == "classification":
            names = config.labels or label_names(item for items in documents.values() for item in items)
            if info.task == "sequence-classification" and len(names) > info.num_labels:
                raise DataError(
                    f"the data has {len(names)} labels ({', '.join(names)}) but backbone.num_labels is "
                    f"{info.num_labels}: set backbone.num_labels={len(names)}"
                )
            self.label_names[name] = names
        sets: dict[str, list[Example]] = {}
        for split in SPLITS:
            rows = documents[split]
            where = f"adapter {name!r}, {split}"
            with _progress(f"tokenising: {where}", rows) as progress:
                length = config.max_length
                sets[split] = tokenise(
                    rows, kind, info, max_length=length, labels=names, where=where, progress=progress
                )
        if not sets["train"]:
            raise DataError(f"{config.path} gives no example to train on: a sequence needs at least 2 tokens")
        return sets


def _read(config: DataConfig, seed: int) -> tuple[str, dict[str, list[Document]]]:
    """The kind of a source, and its documents by split: files of their own, else parts of ``config.path``."""
    source = read_documents(config)
    documents = dict.fromkeys(SPLITS, source.documents[:0])
    held_out = {"val": config.val_fraction, "test": config.test_fraction}
    for split, path in (("val", config.val_path), ("test", config.test_path)):
        if path is not None:
            held_out[split] = 0.0
            documents[split] = read_documents(config, path, kind=source.kind).documents
    rows = source.documents
    if any(held_out.values()) and len(rows) == 1:
        if source.kind == "text":
            rows = split_document(rows[0])[: config.limit]
        if len(rows) == 1:
            warnings.warn(f"{config.path} has one document, so nothing is held out; set data.val_path", stacklevel=2)
    parts = split_indices(len(rows), held_out["val"], held_out["test"], seed)
    for split, part in zip(SPLITS, parts, strict=True):
        documents[split] = documents[split] or [rows[index] for index in part]
    return source.kind, documents


def split_indices(
    count: int, val_fraction: float, test_fraction: float, seed: int = 0
) -> tuple[list[int], list[int], list[int]]:
    """Positions of the training, validation and test documents among ``count``, each in ascending order, drawn by a
    permutation that depends on ``count`` and ``seed`` alone. A fraction above 0 gets at least one document, as long as
    one is left to train on; validation is served first."""
    generator = torch.Generator().manual_seed(stream_seed(seed, "split"))
    order = torch.randperm(count, generator=generator).tolist()
    spare = max(count - 1, 0)
    val = min(max(1, round(count * val_fraction)), spare) if val_fraction else 0
    test = min(max(1, round(count * test_fraction)), spare - val) if test_fraction else 0
    return sorted(order[val + test :]), sorted(order[:val]), sorted(order[val : val + test])


def _config(name: str, source: DataConfig | Mapping[str, Any]) -> DataConfig:
    """A source as a ``DataConfig``; a mapping has its fields."""
    if isinstance(source, DataConfig):
        return source
    if not isinstance(source, Mapping):
        raise ConfigError(
            f"the source of adapter {name!r} must be a DataConfig or a mapping of its fields, not {source!r}"
        )
    known = [item.name for item in fields(DataConfig)]
    for key in source:
        if key not in known:
            near = did_you_mean(str(key), known) or f"; it has {', '.join(known)}"
            raise ConfigError(f"the source of adapter {name!r}: DataConfig has no field {key!r}{near}")
    return DataConfig(**source)


def _check_company(sources: Sequence[str], adapters: Sequence[str]) -> None:
    """Every adapter needs a source, and every source an adapter."""
    for name in adapters:
        if name not in sources:
            near = did_you_mean(name, [other for other in sources if other not in adapters])
            raise ConfigError(f"adapter {name!r} has no data: data.sources has {_quoted(sources)}{near}")
    for name in sources:
        if name not in adapters:
            raise ConfigError(
                f"data.sources has {name!r}, but the adapters are {_quoted(adapters)}: add one, or drop it"
            )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say whose data is at fault."""
    try:
        yield
    except DataError as error:
        raise DataError(f"adapter {name!r}: {error}") from error


@contextmanager
def _progress(title: str, documents: Sequence[Document]) -> Iterator[Progress | None]:
    """A bar on a terminal, for data large enough to wait for."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    size = sum(len(document.text) + len(document.completion) + 100 * len(document.messages) for document in documents)
    if size < _LARGE or not console.is_terminal:
        yield None
        return
    with Bar(console=console, transient=True) as bar:
        task = bar.add_task(title, total=len(documents))
        yield lambda done: bar.update(task, completed=done)
