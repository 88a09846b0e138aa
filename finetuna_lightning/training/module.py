"""The LightningModule: one frozen backbone, a bank of adapters, trained side by side."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from finetuna_lightning.adapters import (
    Adapter,
    AdapterBank,
    check_fit,
    layer_shape,
    output_head,
    resolve_plain,
    resolve_targets,
)
from finetuna_lightning.attention import enable_packing
from finetuna_lightning.backbone import (
    BackboneInfo,
    cast_,
    enable_checkpointing,
    fingerprint,
    load_backbone,
    quantize_model_,
    read_config,
    read_info,
    recompute_in_training,
    skeleton,
)
from finetuna_lightning.configs import (
    AdapterConfig,
    BackboneConfig,
    DataConfig,
    OptimConfig,
    as_config,
    check_adapter_names,
)
from finetuna_lightning.errors import CheckpointError, ConfigError, TargetError, did_you_mean
from finetuna_lightning.finetuned import adapter_of, finetuned_from_bank, is_prepared, shares_base
from finetuna_lightning.fusing import fuse_
from finetuna_lightning.nn.gradients import Gradients
from finetuna_lightning.nn.packing import packed_pass
from finetuna_lightning.seeds import stream_seed
from finetuna_lightning.training import checkpoint_io, distributed, live, resume
from finetuna_lightning.training.batches import Separate, by_adapter, cut_output, route_of, sequences
from finetuna_lightning.training.head import FusedHead
from finetuna_lightning.training.losses import Loss, adapter_losses
from finetuna_lightning.training.metrics import AdapterMetrics, stay_in_place
from finetuna_lightning.training.optim import AdapterOptimizers, AdapterSchedules, build_optimizer, check_optimizer
from finetuna_lightning.training.precision import EightBitPrecision, refuse_joint_clipping, resolve_dtype
from finetuna_lightning.training.quarantine import guarded
from finetuna_lightning.training.tokenizing import pad_token_id
from finetuna_lightning.training.waiting import are_read

_STATE_PREFIX = "adapters."
_NOT_INPUTS = ("adapters", "rows", "labels", "lengths", "numbers")
_EXPECTED_WARNINGS = (
    r"Found \d+ module\(s\) in eval mode",  # the frozen backbone
    r".*LeafSpec.* is deprecated",  # lightning 2.6 with torch 2.13
    "Total length of `list` across ranks is zero",  # nothing is held out
    "Precision 8-bit is not supported by the model summary",
)


class MultiAdapterModule(LightningModule):
    """Trains every adapter on its own data in one pass over the shared backbone.

    Args:
        backbone: what to load, or a plain module, which ``EightBitPrecision`` quantises.
        adapters: by name. An adapter's gradients, steps and random streams depend on its own configuration, data and
            name alone.
        optim: the optimizer that they share.
        seed: of the run; adapters without a seed of their own derive theirs from it and their name.
        loss: for a plain module: ``loss(output, batch) -> scalar`` for one adapter's rows.
        finetuned: by adapter name, fine-tuned models (``new_finetuned``) over this backbone: the adapter is the
            model's, whose parameters are trained in place; its rank, targets and so on replace the configuration's.
        deterministic: one pass for each adapter, at the shapes that it would have alone, so that on the CPU a joint run
            is bit for bit each adapter's solo run (in one pass, other shapes round in another way); it costs the speed
            of joint passes. None: as ``Trainer(deterministic=...)`` says.

    The Lightning checkpoint holds adapters, optimizer, loader and the backbone's identity; never its weights. It is
    written whole or not at all (``SafeCheckpointIO``), and a run that is resumed from it goes on bit for bit on the
    CPU, also in the middle of an accumulation. Adapters are matched by name: one that the checkpoint lacks starts
    fresh, one that is here no more is passed over.

    Runs on one device, or on several processes under Lightning's DDP, which then sends the adapters' gradients alone.
    """

    def __init__(
        self,
        backbone: BackboneConfig | nn.Module,
        adapters: dict[str, AdapterConfig],
        optim: OptimConfig | None = None,
        seed: int = 0,
        loss: Loss | None = None,
        finetuned: dict[str, nn.Module] | None = None,
        deterministic: bool | None = None,
    ) -> None:
        super().__init__()
        given = backbone if isinstance(backbone, nn.Module) else as_config(BackboneConfig, backbone, "backbone")
        self.backbone_config = None if isinstance(given, nn.Module) else given
        self.adapter_configs = {
            name: as_config(AdapterConfig, config, f"adapter {name!r}") for name, config in adapters.items()
        }
        self._finetuned = self._take(finetuned or {})
        self.optim_config = as_config(OptimConfig, optim or OptimConfig(), "optim")
        self.seed, self.custom_loss, self._deterministic = seed, loss, deterministic
        if not adapters:
            raise ConfigError("there are no adapters: give at least one name with an AdapterConfig")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"seed must be an integer >= 0, not {seed!r}")
        check_adapter_names(list(adapters))
        for name, config in self.adapter_configs.items():
            check_optimizer(name, config, self.optim_config)
        if isinstance(given, nn.Module) and loss is None and not hasattr(given, "config"):
            raise ConfigError(f"a plain {type(given).__name__} needs a loss: loss(output, batch) -> scalar")
        self.save_hyperparameters(
            {
                "backbone": asdict(self.backbone_config) if self.backbone_config else type(given).__name__,
                "adapters": {name: asdict(config) for name, config in self.adapter_configs.items()},
                "optim": asdict(self.optim_config),
                "seed": seed,
            }
        )
        self.backbone: nn.Module | None = None
        self._plain_backbone: tuple[nn.Module, ...] = (given,) if isinstance(given, nn.Module) else ()
        self._bank: AdapterBank | None = None
        self._info: BackboneInfo | None = None
        self._obstacle: str | None = None
        self._packing_tried = False
        self._head: FusedHead | None = None
        self._headless = False  # whether the pass under way may leave the output head out
        self._gradients: Gradients | None = None  # and where its gradients go, past autograd
        self._told: set[str] = set()
        self.val_metrics = nn.ModuleDict()
        self.retired: set[str] = set()
        self.stopped: dict[str, str] = {}
        self._new_modules: list[str] = []
        self._resumed: dict[str, Any] = {}  # what is put back when training starts

    # ---- what others ask ----

    @property
    def adapters(self) -> AdapterBank:
        """The bank; loads the backbone when that has not happened yet."""
        if self._bank is None:
            self.configure_model()
        assert self._bank is not None
        return self._bank

    @property
    def adapter_names(self) -> list[str]:
        """Names in row order."""
        return list(self.adapter_configs if self._bank is None else self._bank)

    @property
    def backbone_is_prepared(self) -> bool:
        """Whether the backbone came through a ``BackboneConfig`` or ``prepare_base_model``, or holds 8-bit layers."""
        return self.backbone is not None and (self.backbone_config is not None or is_prepared(self.backbone))

    @property
    def tokenizer(self) -> Any:
        """The backbone's tokenizer, or None."""
        return self.backbone_info().tokenizer

    @property
    def task(self) -> str:
        """``causal-lm``, ``sequence-classification``, ``seq2seq-lm``, or ``custom`` with a loss of the user's."""
        if self.custom_loss is not None:
            return "custom"
        return self.backbone_config.task if self.backbone_config else "causal-lm"

    def config_of(self, name: str) -> AdapterConfig:
        """The configuration of an adapter; of one that was put into the bank by hand, that of its deltas, and the
        defaults for its training."""
        if name not in self.adapter_configs:
            live.adopt(self, name)
        return self.adapter_configs[name]

    @property
    def deterministic(self) -> bool:
        """Whether each adapter has a pass of its own (see ``deterministic`` above)."""
        return torch.are_deterministic_algorithms_enabled() if self._deterministic is None else self._deterministic

    def packing_obstacle(self) -> str | None:
        """Why batches for this model cannot be packed into one row without pads; None where they can. Found out by
        trying, once."""
        if self.task != "causal-lm":
            return f"the task is {self.task!r}, and only causal language models are packed"
        if not self._packing_tried:
            bank = self.adapters
            with bank.bare():
                self._obstacle = enable_packing(bank.backbone, bank)
            self._packing_tried = True
        return self._obstacle

    def fused_loss_obstacle(self) -> str | None:
        """Why training and evaluation compute the loss from the model's own logits instead of fusing it with the output
        head; None where they do not. Found out by trying, once. (An adapter that changes the head has logits of its
        own rows in any case.)"""
        if self.task != "causal-lm":
            return f"the task is {self.task!r}, and only causal language models' losses are fused with their heads"
        return self._fused_head().obstacle()

    def _fused_head(self) -> FusedHead:
        if self._head is None:
            bank = self.adapters
            self._head = FusedHead(bank.backbone, bank)
        return self._head

    def adapter_seed(self, name: str) -> int:
        """The seed of an adapter's random streams: its own, or derived from the run's seed and its name."""
        own = self.config_of(name).seed
        return stream_seed(self.seed, "adapter", name) if own is None else own

    def backbone_info(self) -> BackboneInfo:
        """Tokenizer and limits; reads only the checkpoint's small files."""
        if self._info is None:
            config = self.backbone_config
            if config is None:
                inner = getattr(self._plain_backbone[0], "config", None)
                self._info = BackboneInfo(
                    None,
                    self.task,
                    getattr(inner, "max_position_embeddings", None),
                    getattr(inner, "vocab_size", None),
                    0,
                )
            else:
                self._info = read_info(
                    config.name_or_path, config.task, config.num_labels, config.revision, config.trust_remote_code
                )
        return self._info

    # ---- building ----

    def setup(self, stage: str) -> None:
        """Refuse, before anything is loaded, what would couple the adapters."""
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        refuse_joint_clipping(self.trainer.gradient_clip_val)
        for name in self.adapter_names:
            self.config_of(name)
        distributed.prepare_strategy(self.trainer)
        checkpoint_io.install(self.trainer.strategy)

    def configure_model(self) -> None:
        """Load the backbone into 8 bits and attach the adapters. A second call does nothing."""
        if self._bank is not None:
            return
        with torch.device("cpu"):  # Lightning calls this under the run's device, which is named where it is wanted
            config = self.backbone_config
            self._new_modules = self._prepare_plain() if config is None else self._load(config)
            assert self.backbone is not None
            plugin, device = self._plugin(), self._root_device()
            if plugin is not None and plugin.fuse:
                fuse_(self.backbone, device, next(self.backbone.parameters()).dtype)
            bank = AdapterBank(self.backbone, self.backbone_identity())
            for name in self.adapter_configs:
                self.attach(bank, name)
        self._bank = bank
        self._ddp_params_and_buffers_to_ignore = distributed.never_sent(self, "backbone")
        info = self.backbone_info()
        self.val_metrics = nn.ModuleDict({name: AdapterMetrics(self.task, info.num_labels) for name in bank})
        self.train()

    def attach(self, bank: AdapterBank, name: str) -> Adapter:
        """Add the adapter ``name`` to ``bank`` as its configuration says, or as the fine-tuned model that it is."""
        config = self.adapter_configs[name]
        if name in self._finetuned:
            return bank.adopt(name, self._own(name))
        return bank.add(
            name, rank=config.rank, alpha=config.alpha, dropout=config.dropout, bias=config.bias,
            targets=config.target_modules, plain=[*config.plain_modules, *self._new_modules],
            seed=self.adapter_seed(name),
        )  # fmt: skip

    def _prepare_plain(self) -> list[str]:
        """Quantise a backbone that came as a module, as the precision plugin says."""
        self.backbone = self._plain_backbone[0]
        plugin, device = self._plugin(), self._root_device()
        if plugin is not None and not is_prepared(self.backbone):
            plugin.check_device(device, plugin.scheme)
            quantize_model_(self.backbone, plugin.scheme, plugin.block_size, plugin.skip_modules)
            cast_(self.backbone, resolve_dtype(plugin.dtype, device))
        return []

    def _load(self, config: BackboneConfig) -> list[str]:
        """Load a checkpoint; the names of modules that it lacks, which every adapter trains in full."""
        plugin, device = self._plugin(), self._root_device()
        if plugin is not None:
            plugin.check_device(device, config.scheme)
        self.check_targets()
        dtype = plugin.dtype if plugin is not None and config.dtype == "auto" else config.dtype
        self.backbone = load_backbone(
            config.name_or_path, scheme=config.scheme, block_size=config.block_size, task=config.task,
            num_labels=config.num_labels, dtype=resolve_dtype(dtype, device), skip=config.skip_modules, device=device,
            revision=config.revision, attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )  # fmt: skip
        if config.gradient_checkpointing:
            enable_checkpointing(self.backbone)
        inner: Any = self.backbone.config
        if config.task == "sequence-classification" and inner.pad_token_id is None:
            inner.pad_token_id = pad_token_id(self.tokenizer)  # decoders find a row's last token by it
        return list(self.backbone.finetuna_new_modules)  # type: ignore[arg-type]

    def check_targets(self) -> None:
        """Resolve every adapter's modules on the architecture alone, before any weight is read.

        Raises:
            TargetError, ConfigError: as ``AdapterBank.add`` would, naming the adapter.
        """
        config = self.backbone_config
        if config is None:
            return
        architecture = read_config(config.name_or_path, config.revision, config.trust_remote_code)
        model = skeleton(architecture, config.task, config.num_labels, config.trust_remote_code)
        for name, adapter in self.adapter_configs.items():
            try:
                plain = resolve_plain(model, adapter.plain_modules)
                heads = _classification_heads(model) if config.task == "sequence-classification" else []
                targets = (
                    resolve_targets(model, adapter.target_modules, [*plain, *heads]) if adapter.target_modules else {}
                )
                check_fit(adapter.rank, targets, plain)
            except (ConfigError, TargetError) as error:
                raise type(error)(f"adapter {name!r}: {error}") from error

    def _take(self, finetuned: dict[str, nn.Module]) -> dict[str, tuple[nn.Module]]:
        """The fine-tuned models to train, hidden from ``named_modules``; their shapes go into the configurations."""
        for name, model in finetuned.items():
            if name not in self.adapter_configs:
                near = did_you_mean(name, self.adapter_configs)
                raise ConfigError(f"finetuned has {name!r}, but adapters has no AdapterConfig of that name{near}")
            own = adapter_of(model)
            self.adapter_configs[name] = replace(
                self.adapter_configs[name], rank=own.rank, alpha=own.alpha, dropout=own.dropout, bias=own.bias,
                target_modules=list(own.target_modules), plain_modules=list(own.plain_modules),
            )  # fmt: skip
        return {name: (model,) for name, model in finetuned.items()}

    def _own(self, name: str) -> Adapter:
        (model,) = self._finetuned[name]
        assert self.backbone is not None
        if not shares_base(model, self.backbone):
            raise ConfigError(f"finetuned[{name!r}] stands over another base than this module's backbone")
        return adapter_of(model)

    def finetuned(self, name: str) -> nn.Module:
        """Adapter ``name`` as a stand-alone model, which shares the backbone and the adapter's parameters."""
        return finetuned_from_bank(self.adapters, name)

    def backbone_identity(self) -> dict[str, str | None]:
        """Task, name, revision and fingerprint of the backbone: what a checkpoint keeps of it."""
        assert self.backbone is not None
        config = self.backbone_config
        return {
            "task": self.task,
            "backbone": config.name_or_path if config else type(self.backbone).__name__,
            "revision": config.revision if config else None,
            "scheme": config.scheme if config else None,
            "fingerprint": fingerprint(self.backbone),
        }

    def _plugin(self) -> EightBitPrecision | None:
        plugin = self._trainer.precision_plugin if self._trainer is not None else None
        return plugin if isinstance(plugin, EightBitPrecision) else None

    def _root_device(self) -> torch.device:
        return self._trainer.strategy.root_device if self._trainer is not None else torch.device("cpu")

    def train(self, mode: bool = True) -> MultiAdapterModule:
        """The backbone stays in evaluation mode: it is frozen, and its dropout would couple the adapters, by the stream
        that it draws from. So do the private copies of its modules."""
        super().train(mode)
        copies = [] if self._bank is None else [adapter.plain for adapter in self._bank.adapters()]
        for part in (self.backbone, *copies):
            if part is not None:
                part.eval()
                recompute_in_training(part, mode)
        return self

    # ---- one batch ----

    def forward(self, batch: dict[str, Any], training: bool = False, bare: bool = False) -> Any:
        """The backbone's output for ``batch``, whose sequences belong to ``batch["adapters"]``, ``batch["rows"]`` of
        each; a batch with ``lengths`` is packed (see ``batches.Batch``).

        ``training`` turns the adapters' dropout on; ``bare`` leaves all adapters out. In the deterministic mode the
        result is a ``Separate``: an output for each adapter.

        Raises:
            ConfigError: for a packed batch where the model does not take one.
        """
        if self.deterministic and not bare:
            parts = by_adapter(batch, aligned=self.task != "seq2seq-lm")
            return Separate([(self._pass(part, training), part) for part in parts], batch)
        return self._pass(batch, training, bare)

    def _pass(self, batch: dict[str, Any], training: bool, bare: bool = False) -> Any:
        bank = self.adapters
        assert self.backbone is not None
        inputs = {key: value for key, value in batch.items() if key not in _NOT_INPUTS}
        if self.task == "seq2seq-lm":
            inputs["decoder_input_ids"] = self.backbone.prepare_decoder_input_ids_from_labels(batch["labels"])  # type: ignore[operator]
        if self.task in ("causal-lm", "seq2seq-lm"):
            inputs["use_cache"] = False
        if "lengths" in batch:
            if (obstacle := self.packing_obstacle()) is not None:
                raise ConfigError(f"the batch is packed, which this model does not take: {obstacle}")
            inputs["attention_mask"] = torch.ones_like(batch["input_ids"])  # without it the model looks for sequences
        with (
            packed_pass(batch.get("lengths")),
            bank.bare()
            if bare
            else bank.follow(replace(route_of(batch), gradients=self._gradients), training=training),
        ):
            if self._headless and not bare and self._fused_head().suits(batch["adapters"]):
                return self._fused_head().run(inputs)
            return self.backbone(**inputs)

    def losses(self, output: Any, batch: dict[str, Any]) -> Iterator[tuple[str, Tensor, Tensor, slice]]:
        """For each adapter of the batch: name, summed loss, number of targets, and which of the batch's sequences are
        its. Each is normalised by its own count."""
        return adapter_losses(output, batch, self.task, self.custom_loss)

    def _for_losses(self, batch: dict[str, Any], training: bool = False) -> Any:
        """The output for ``losses``: where that can be, of a model without its head, which the loss is fused with."""
        obstacle = self.fused_loss_obstacle()
        if self.task == "causal-lm" and obstacle is not None and obstacle not in self._told:
            self._told.add(obstacle)
            rank_zero_info(f"the loss is computed from whole logits, which takes more memory: {obstacle}")
        self._headless = obstacle is None
        trainer = self._trainer
        # with several processes gradients are sent by hooks of autograd's; by hand, anything may be asked of it
        alone = trainer is not None and trainer.world_size == 1
        if trainer is not None and training and alone and self.automatic_optimization:
            read = are_read(trainer, self, MultiAdapterModule, self.optimizer)
            self._gradients = Gradients(wait=not read and self.optimizer.may_wait)
            self.optimizer.expect(self._gradients)
        try:
            return self(batch, training=training)
        finally:
            self._headless, self._gradients = False, None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """The sum of the adapters' mean losses, each divided by its ``accumulate``. No parameter is shared, so each
        gets the gradient of its own alone. One that has left the training has no part, should its rows still come."""
        optimizer = self.optimizer
        batch, fit = self._guarded(batch)
        output = self._for_losses(batch, training=True)
        # the value on Lightning's own bars is fetched from the device every step; AdapterProgress does without
        bar = isinstance(self.trainer.progress_bar_callback, TQDMProgressBar | RichProgressBar)
        pieces = distributed.over_all_ranks(self._trainer, self.adapter_names, self.losses(output, batch))
        found = [piece for piece in pieces if piece[0] not in self.retired]
        if not found:
            return None
        names, totals, counts, cuts = zip(*found, strict=True)
        means = torch.stack(totals) / torch.stack(counts)
        shown = torch.where(torch.stack([fit[name] for name in names]), means.detach(), math.nan)
        for name, own, finite, cut in zip(names, shown.unbind(), shown.isfinite().unbind(), cuts, strict=True):
            optimizer.note(name, finite)
            self.log(f"train/{name}/loss", own, batch_size=cut.stop - cut.start)
        self.log("train/loss", shown.nanmean(), prog_bar=bar, batch_size=len(names))
        accumulate = [float(self.config_of(name).accumulate) for name in names]
        if any(batches != 1 for batches in accumulate):
            means = torch.stack([mean / batches for mean, batches in zip(means.unbind(), accumulate, strict=True)])
        return means.sum()

    def _guarded(self, batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The batch with tokens and labels that the backbone has, and by adapter whether its own were such."""
        if self.task == "custom":
            return batch, {name: torch.ones((), dtype=torch.bool, device=self.device) for name in batch["adapters"]}
        backbone: Any = self.backbone
        config = backbone.config
        table, head = backbone.get_input_embeddings(), output_head(backbone)
        tokens = table.num_embeddings if isinstance(table, nn.Embedding) else None
        if self.task == "sequence-classification":
            classes = config.num_labels
        else:
            classes = tokens if head is None else layer_shape(head)[1]
        return guarded(batch, tokens, classes)

    def _evaluate(self, batch: dict[str, Any]) -> None:
        batch, fit = self._guarded(batch)
        output = self._for_losses(batch)
        for name, total, count, cut in self.losses(output, batch):
            metrics = self.val_metrics[name]
            assert isinstance(metrics, AdapterMetrics)
            if self.trainer.world_size > 1 and not count:
                continue  # a row that only fills the batch of a process without any
            total = torch.where(fit[name], total, math.nan)
            classes = self.task == "sequence-classification"
            metrics.update(
                total, count, output.logits[cut] if classes else None, batch["labels"][cut] if classes else None
            )

    def _log_metrics(self, stage: str) -> None:
        losses, several = [], self.trainer.world_size > 1
        sets = {name: metrics for name, metrics in self.val_metrics.items() if isinstance(metrics, AdapterMetrics)}
        met = distributed.on_any_rank(self.trainer, {name: metrics.has_data for name, metrics in sets.items()})
        for name, metrics in sets.items():
            values = metrics.compute(elsewhere=met[name])
            for what, value in values.items():
                self.log(f"{stage}/{name}/{what}", value, sync_dist=several)
            losses += [values["loss"]] if values else []
            metrics.reset()
        if losses:
            self.log(f"{stage}/loss", torch.stack(losses).mean(), prog_bar=True, sync_dist=several)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add to each adapter's metrics."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/<adapter>/<metric>``, and ``val/loss``, their mean."""
        self._log_metrics("val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add to each adapter's metrics."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Log ``test/<adapter>/<metric>``."""
        self._log_metrics("test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """One dictionary a row: its adapter, and the mean loss and perplexity of a language model, or the label and
        probabilities of a classifier."""
        output = self(batch)
        parts = output.parts if isinstance(output, Separate) else [(output, batch)]
        return [row for own, part in parts for row in self._predictions(own, part)]

    def _predictions(self, output: Any, batch: dict[str, Any]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for name, one, start, stop in sequences(batch):
            if self.task == "sequence-classification":
                chances = output.logits[start].float().softmax(-1)
                rows.append({"adapter": name, "label": int(chances.argmax()), "probabilities": chances.tolist()})
                continue
            own = cut_output(output, slice(start, stop), packed="lengths" in batch)
            (_, total, count, _) = next(self.losses(own, one))
            loss = float(total / count)
            rows.append({"adapter": name, "loss": loss, "perplexity": float(torch.tensor(loss).exp())})
        return rows

    # ---- optimisation ----

    def configure_optimizers(self) -> Any:
        """One optimizer with a named group for each adapter, one scheduler that knows each adapter's own steps."""
        bank = self.adapters
        configs = {name: self.config_of(name) for name in bank}
        parameters = {adapter.name: adapter.parameters() for adapter in bank.adapters()}
        total = live.total_steps(self.trainer)
        optimizer = build_optimizer(parameters, configs, self.optim_config, total)
        # LearningRateMonitor then draws lr/<adapter>
        scheduler = {"scheduler": AdapterSchedules(optimizer), "interval": "step", "name": "lr"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    @property
    def optimizer(self) -> AdapterOptimizers:
        """The optimizer of the fit that runs, or of the last one.

        Raises:
            ConfigError: when there was none, or ``configure_optimizers`` was replaced and gave another.
        """
        found = self._trainer.optimizers if self._trainer is not None else []
        for optimizer in found:
            if isinstance(optimizer, AdapterOptimizers):
                return optimizer
        raise ConfigError("there is no fit with the optimizer of MultiAdapterModule.configure_optimizers")

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip each adapter's own norm to its ``max_grad_norm``, when its step is due."""
        refuse_joint_clipping(gradient_clip_val)
        for name, norm in self.optimizer.clip().items():
            self.log(f"train/{name}/grad_norm", norm)

    def on_validation_model_zero_grad(self) -> None:
        """Free the gradients that were used; those that an adapter accumulates stay."""
        self.optimizer.zero_grad()

    def on_fit_start(self) -> None:
        """Raise BackboneError where the processes of a distributed run loaded different backbones."""
        distributed.check_same_backbone(self.trainer, self.adapters.origin["fingerprint"])

    def on_train_start(self) -> None:
        """After a resume: what Lightning's checkpoint lacks is put back, an adapter that was given more steps comes
        back, and a run that is done stays done."""
        resumed, self._resumed = self._resumed, {}
        resume.load_positions(self.trainer)
        if resumed.get("random") and self.trainer.world_size == 1:
            resume.set_random_states(resumed["random"])
        live.warn_of_joint_accumulation(self)
        live.retire(self)
        gc.unfreeze()  # of a fit that failed
        gc.collect()
        gc.freeze()  # or Python now and then looks for garbage among all that stays, while the GPU waits

    def on_train_end(self) -> None:
        """Python's collector looks at everything again."""
        gc.unfreeze()

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        """An adapter whose ``max_steps`` are done leaves the batches; when all have, the run ends."""
        live.retire(self)
        stay_in_place((self.trainer._results or {}).values())
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, AdapterOptimizers):
                optimizer.release()

    # ---- who trains ----

    def stop_adapter(self, name: str, reason: str) -> None:
        """Take an adapter out of the training of this fit, with its weights as they are; the others do not notice.
        ``reason`` stands in the final table. The fit ends with its last adapter."""
        self._known(name)
        self.stopped[name] = reason
        live.retire(self)

    def add_adapter(self, name: str, config: AdapterConfig | None = None, data: DataConfig | None = None) -> Adapter:
        """Add an adapter, also while a fit runs, between two batches: from a callback's ``on_train_batch_end``, say, or
        after an epoch. The others' weights, optimizer state, schedules and data do not notice.

        Args:
            name: of the new adapter.
            config: of it.
            data: its source, in a fit with an ``AdapterDataModule``. A loader of one's own brings its rows itself.

        Raises:
            ConfigError: for a name that is taken or not allowed, a fit of several processes, or data without an
                ``AdapterDataModule`` (or the reverse).
            TargetError, DataError: as at the start of a fit; nothing is changed then.
        """
        return live.join(self, name, config or AdapterConfig(), data)

    def remove_adapter(self, name: str) -> Adapter:
        """Take an adapter out of the module, also while a fit runs, between two batches; the others do not notice.
        Returns it, so that its weights can be saved.

        Raises:
            ConfigError: for a name that there is not, the last adapter, or a fit of several processes.
        """
        self._known(name)
        return live.leave(self, name)

    def adapter_report(self) -> dict[str, dict[str, Any]]:
        """By adapter: ``steps`` taken, ``skipped`` ones, and in words its ``state``."""
        return live.report(self)

    def _known(self, name: str) -> None:
        if name not in self.adapters:
            raise ConfigError(
                f"there is no adapter {name!r}{did_you_mean(name, self.adapters)} (there are: "
                f"{', '.join(self.adapters)})"
            )

    # ---- checkpoints ----

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapters' weights alone, as ``adapters.<name>.<parameter>``."""
        return {f"{_STATE_PREFIX}{key}": value for key, value in self.adapters.state_dict().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take the weights of the adapters that are in both, by name, and say which are in one only.

        Raises:
            CheckpointError: when none is in both, or one has other parameters or shapes.
        """
        state = {key.removeprefix(_STATE_PREFIX): value for key, value in state_dict.items()}
        theirs, mine = {key.split(".")[0] for key in state}, set(self.adapters)
        if not theirs & mine:
            raise CheckpointError(
                f"the checkpoint holds adapters {_listed(theirs)}; this module has {_listed(mine)}: none in common"
            )
        if mine - theirs:
            rank_zero_info(f"not in the checkpoint, so starting fresh: {_listed(mine - theirs)}")
        if theirs - mine:
            rank_zero_info(f"in the checkpoint but not in this run, so passed over: {_listed(theirs - mine)}")
        wanted = {key: value for key, value in state.items() if key.split(".")[0] in mine}
        own = self.adapters.state_dict()
        wanted |= {key: value for key, value in own.items() if key.split(".")[0] not in theirs}
        try:
            return self.adapters.load_state_dict(wanted, strict=strict, assign=assign)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise CheckpointError("the checkpoint's adapters have other shapes: " + " ".join(lines[1:3])) from error

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the backbone's identity, the adapters' positions in their dropout streams, and what Lightning leaves
        out."""
        trainer = self._trainer
        checkpoint["finetuna"] = {
            "backbone": {
                key: self.adapters.origin.get(key) for key in ("backbone", "revision", "scheme", "fingerprint")
            },
            "calls": {adapter.name: adapter.calls for adapter in self.adapters.adapters()},
            "retired": sorted(self.retired),
        }
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        checkpoint["finetuna"]["random"] = resume.random_states()
        resume.repeat_unfinished_validation(trainer, checkpoint)
        resume.leave_finished_epoch(trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise CheckpointError for a checkpoint of another backbone; else take the stream positions."""
        saved = checkpoint.get("finetuna")
        if saved is None:
            raise CheckpointError(
                "this is no checkpoint of a MultiAdapterModule: it does not say which backbone it is of"
            )
        theirs, mine = saved["backbone"], self.adapters.origin
        if theirs["fingerprint"] != mine["fingerprint"]:
            raise CheckpointError(
                f"the checkpoint is of backbone {theirs['backbone']} in {theirs['scheme']} (fingerprint "
                f"{theirs['fingerprint']}), but this run has {mine['backbone']} in {mine.get('scheme')} (fingerprint "
                f"{mine['fingerprint']})"
            )
        for name, calls in saved["calls"].items():
            if name in self.adapters:
                self._adapter(name).calls = calls
        self.retired = set(saved["retired"]) & set(self.adapters)
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._resumed = {key: saved[key] for key in ("random",) if key in saved}

    # ---- use ----

    def _adapter(self, name: str) -> Adapter:
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        adapters: Sequence[str] | str | None = None,
        max_new_tokens: int = 64,
        **options: Any,
    ) -> list[str]:
        """Continue every prompt with its own adapter, all in one batch.

        Args:
            prompts: texts.
            adapters: one name for each prompt, one for all, or None for the bare backbone.
            max_new_tokens: at most so many tokens each.
            options: for transformers' ``generate`` (``do_sample``, ``temperature``, ...).

        Returns:
            The continuations, without the prompts.
        """
        bank, tokenizer = self.adapters, self.tokenizer
        assert self.backbone is not None
        if tokenizer is None:
            raise ConfigError(
                "this backbone has no tokenizer: call module.backbone.generate within module.adapters.route(...)"
            )
        names = [adapters] * len(prompts) if isinstance(adapters, str) else adapters
        if names is not None and len(names) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts need as many adapters, not {len(names)}")
        for name in names or ():
            self._known(name)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        device = next(self.backbone.parameters()).device
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(device)
        inputs.pop("token_type_ids", None)
        was_training = self.training
        self.eval()
        try:
            with bank.bare() if names is None else bank.route(names):
                out = self.backbone.generate(  # type: ignore[operator]
                    **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **options
                )
        finally:
            self.train(was_training)
        start = 0 if self.task == "seq2seq-lm" else inputs["input_ids"].shape[1]
        return [str(text) for text in tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _classification_heads(model: nn.Module) -> list[str]:
    """Names of top-level modules that stand on the base model: a new head, trained in full."""
    base = getattr(model, "base_model_prefix", "")
    head = output_head(model)
    return [name for name, child in model.named_children() if name != base and child is not head]
