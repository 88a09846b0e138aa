"""The LightningModule: one frozen backbone, a bank of adapters, trained side by side."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F

from finetuna_lightning.adapters import Adapter, AdapterBank, check_fit, output_head, resolve_plain, resolve_targets
from finetuna_lightning.backbone import (
    BackboneInfo,
    cast_,
    enable_checkpointing,
    fingerprint,
    load_backbone,
    quantize_model_,
    quantized_layers,
    read_config,
    read_info,
    recompute_in_training,
    skeleton,
)
from finetuna_lightning.configs import AdapterConfig, BackboneConfig, OptimConfig, as_config, check_adapter_names
from finetuna_lightning.errors import CheckpointError, ConfigError, TargetError, did_you_mean
from finetuna_lightning.nn.routing import Route
from finetuna_lightning.seeds import stream_seed
from finetuna_lightning.training import checkpoint_io, distributed, resume
from finetuna_lightning.training.metrics import AdapterMetrics
from finetuna_lightning.training.optim import build_optimizer, build_scheduler, clip_each_group
from finetuna_lightning.training.precision import EightBitPrecision, refuse_joint_clipping, resolve_dtype
from finetuna_lightning.training.tokenizing import IGNORED, pad_token_id

Loss = Callable[[Any, dict[str, Any]], Tensor]
_STATE_PREFIX = "adapters."
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
    ) -> None:
        super().__init__()
        given = backbone if isinstance(backbone, nn.Module) else as_config(BackboneConfig, backbone, "backbone")
        self.backbone_config = None if isinstance(given, nn.Module) else given
        self.adapter_configs = {
            name: as_config(AdapterConfig, config, f"adapter {name!r}") for name, config in adapters.items()
        }
        self.optim_config = as_config(OptimConfig, optim or OptimConfig(), "optim")
        self.seed, self.custom_loss = seed, loss
        if not adapters:
            raise ConfigError("there are no adapters: give at least one name with an AdapterConfig")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"seed must be an integer >= 0, not {seed!r}")
        check_adapter_names(list(adapters))
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
        self.val_metrics = nn.ModuleDict()
        self.retired: set[str] = set()
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
        """Whether the backbone came through a ``BackboneConfig``, quantised as it says, or holds 8-bit layers
        already."""
        return self.backbone is not None and (self.backbone_config is not None or bool(quantized_layers(self.backbone)))

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

    def adapter_seed(self, name: str) -> int:
        """The seed of an adapter's random streams: its own, or derived from the run's seed and its name."""
        own = self.adapter_configs[name].seed
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
        distributed.prepare_strategy(self.trainer)
        checkpoint_io.install(self.trainer.strategy)

    def configure_model(self) -> None:
        """Load the backbone into 8 bits and attach the adapters. A second call does nothing."""
        if self._bank is not None:
            return
        with torch.device("cpu"):  # Lightning calls this under the run's device, which is named where it is wanted
            new = self._prepare_plain() if self.backbone_config is None else self._load(self.backbone_config)
            assert self.backbone is not None
            bank = AdapterBank(self.backbone, self.backbone_identity())
            for name, adapter in self.adapter_configs.items():
                bank.add(
                    name, rank=adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout, bias=adapter.bias,
                    targets=adapter.target_modules, plain=[*adapter.plain_modules, *new], seed=self.adapter_seed(name),
                )  # fmt: skip
        self._bank = bank
        self._ddp_params_and_buffers_to_ignore = distributed.never_sent(self, "backbone")
        info = self.backbone_info()
        self.val_metrics = nn.ModuleDict({name: AdapterMetrics(self.task, info.num_labels) for name in bank})
        self.train()

    def _prepare_plain(self) -> list[str]:
        """Quantise a backbone that came as a module, as the precision plugin says."""
        self.backbone = self._plain_backbone[0]
        plugin, device = self._plugin(), self._root_device()
        if plugin is not None and not quantized_layers(self.backbone):
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
        """The backbone stays in evaluation mode: it is frozen, and its dropout would couple the adapters."""
        super().train(mode)
        if self.backbone is not None:
            self.backbone.eval()
            recompute_in_training(self.backbone, mode)
        return self

    # ---- one batch ----

    def forward(self, batch: dict[str, Any], training: bool = False, bare: bool = False) -> Any:
        """The backbone's output for ``batch``, whose rows belong to ``batch["adapters"]``, ``batch["rows"]`` of each.

        ``training`` turns the adapters' dropout on; ``bare`` leaves all adapters out.
        """
        bank = self.adapters
        assert self.backbone is not None
        inputs = {key: value for key, value in batch.items() if key not in ("adapters", "rows", "labels")}
        if self.task == "seq2seq-lm":
            inputs["decoder_input_ids"] = self.backbone.prepare_decoder_input_ids_from_labels(batch["labels"])  # type: ignore[operator]
        if self.task in ("causal-lm", "seq2seq-lm"):
            inputs["use_cache"] = False
        route = Route(tuple(batch["adapters"]), tuple(batch["rows"]))
        with bank.bare() if bare else bank.follow(route, training=training):
            return self.backbone(**inputs)

    def losses(self, output: Any, batch: dict[str, Any]) -> Iterator[tuple[str, Tensor, Tensor, slice]]:
        """For each adapter of the batch: name, summed loss, number of targets, rows. Each is normalised by its own
        count."""
        sizes = list(batch["rows"])
        stops = list(itertools.accumulate(sizes))
        cuts = [slice(stop - rows, stop) for stop, rows in zip(stops, sizes, strict=True)]
        if self.custom_loss is not None:
            for name, cut in zip(batch["adapters"], cuts, strict=True):
                own = {k: v[cut] if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()}
                mean = self.custom_loss(_cut(output, cut), own)
                rows = cut.stop - cut.start
                yield name, mean * rows, torch.tensor(rows, device=mean.device), cut
            return
        pieces = zip(batch["adapters"], cuts, output.logits.split(sizes), batch["labels"].split(sizes), strict=True)
        for name, cut, logits, labels in pieces:
            if self.task == "causal-lm":  # the label of a position is the next token
                labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
            count = (labels != IGNORED).sum()
            flat = logits.reshape(-1, logits.shape[-1]).float()
            yield name, F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="sum"), count, cut

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The sum of the adapters' mean losses. No parameter is shared, so each gets the gradient of its own alone."""
        output = self(batch, training=True)
        means: list[Tensor] = []
        # the value on Lightning's own bars is fetched from the device every step; AdapterProgress does without
        bar = isinstance(self.trainer.progress_bar_callback, TQDMProgressBar | RichProgressBar)
        pieces = self.losses(output, batch)
        for name, total, count, cut in distributed.over_all_ranks(self._trainer, self.adapter_names, pieces):
            mean = total / count
            means.append(mean)
            rows = cut.stop - cut.start
            self.log(f"train/{name}/loss", mean.detach(), batch_size=rows)
        joint = torch.stack(means).sum()
        self.log("train/loss", joint.detach() / len(means), prog_bar=bar, batch_size=len(means))
        return joint

    def _evaluate(self, batch: dict[str, Any]) -> None:
        output = self(batch)
        for name, total, count, cut in self.losses(output, batch):
            metrics = self.val_metrics[name]
            assert isinstance(metrics, AdapterMetrics)
            if self.trainer.world_size > 1 and not count:
                continue  # a row that only fills the batch of a process without any
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
        rows: list[dict[str, Any]] = []
        names = [name for name, n in zip(batch["adapters"], batch["rows"], strict=True) for _ in range(n)]
        for index, name in enumerate(names):
            one = {k: v[index : index + 1] if isinstance(v, Tensor) else v for k, v in batch.items()}
            if self.task == "sequence-classification":
                chances = output.logits[index].float().softmax(-1)
                rows.append({"adapter": name, "label": int(chances.argmax()), "probabilities": chances.tolist()})
                continue
            one |= {"adapters": [name], "rows": [1]}
            (_, total, count, _) = next(self.losses(_cut(output, slice(index, index + 1)), one))
            loss = float(total / count)
            rows.append({"adapter": name, "loss": loss, "perplexity": float(torch.tensor(loss).exp())})
        return rows

    # ---- optimisation ----

    def configure_optimizers(self) -> Any:
        """One optimizer with a named group for each adapter, one scheduler with a function for each."""
        bank = self.adapters
        configs = {name: self.adapter_configs[name] for name in bank}
        parameters = {adapter.name: adapter.parameters() for adapter in bank.adapters()}
        optimizer = build_optimizer(parameters, configs, self.optim_config)
        scheduler = build_scheduler(optimizer, configs, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip each adapter's own norm to its ``max_grad_norm``."""
        refuse_joint_clipping(gradient_clip_val)
        for name, norm in clip_each_group(optimizer).items():
            self.log(f"train/{name}/grad_norm", norm)

    def on_fit_start(self) -> None:
        """Raise BackboneError where the processes of a distributed run loaded different backbones."""
        distributed.check_same_backbone(self.trainer, self.adapters.origin["fingerprint"])

    def on_train_start(self) -> None:
        """After a resume: what Lightning's checkpoint lacks is put back, an adapter that was given more steps comes
        back, and a run that is done stays done."""
        resumed, self._resumed = self._resumed, {}
        resume.load_positions(self.trainer)
        resume.put_gradients(self.adapters, resumed.get("gradients", {}))
        if resumed.get("random") and self.trainer.world_size == 1:
            resume.set_random_states(resumed["random"])
        self._retire()

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        """An adapter whose ``max_steps`` are done leaves the batches; when all have, the run ends."""
        self._retire()

    def _retire(self) -> None:
        limits = {name: self.adapter_configs[name].max_steps for name in self.adapter_names}
        done = {name for name, limit in limits.items() if limit is not None and self.global_step >= limit}
        loader = self.trainer.train_dataloader
        for changed, what in ((done - self.retired, "retire"), (self.retired - done, "reinstate")):
            for name in changed:
                if hasattr(loader, what):
                    getattr(loader, what)(name)
        self.retired = done
        if done >= set(limits):
            self.trainer.should_stop = True

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
        if resume.is_accumulating(trainer):
            checkpoint["finetuna"]["gradients"] = resume.gradients(self.adapters)
        checkpoint["finetuna"]["random"] = resume.random_states()
        resume.repeat_unfinished_validation(trainer, checkpoint)
        resume.leave_finished_epoch(trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise CheckpointError for a checkpoint of another backbone; else take the stream positions, and order the
        optimizer's state as the adapters are here."""
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
            self._resumed = {key: saved[key] for key in ("gradients", "random") if key in saved}
            self._order_by_name(checkpoint)

    def _order_by_name(self, checkpoint: dict[str, Any]) -> None:
        """Have the states of optimizer and schedule fit the adapters of this run. Not needed once both go by name."""
        states, names = checkpoint.get("optimizer_states"), list(self.adapters)
        if not states or "param_groups" not in states[0] or resume.group_names(states[0]) == names:
            return
        theirs = resume.group_names(states[0])
        parameters = {adapter.name: adapter.parameters() for adapter in self.adapters.adapters()}
        configs = {name: self.adapter_configs[name] for name in names}
        fresh = build_optimizer(parameters, configs, self.optim_config).state_dict()
        for group in fresh["param_groups"]:
            group["initial_lr"] = group["lr"]
        checkpoint["optimizer_states"] = [resume.optimizer_state_by_name(states[0], fresh)]
        rates = {name: config.lr for name, config in configs.items()}
        checkpoint["lr_schedulers"] = [
            resume.scheduler_state_by_name(state, theirs, rates) for state in checkpoint["lr_schedulers"]
        ]

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
            if name not in bank:
                raise ConfigError(
                    f"there is no adapter {name!r}{did_you_mean(name, bank)} (there are: {', '.join(bank)})"
                )
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


def _cut(output: Any, rows: slice) -> Any:
    """Rows of a model's output: a tensor, or a mapping or tuple of them."""
    if isinstance(output, Tensor):
        return output[rows]
    if hasattr(output, "logits"):
        return type(output)(logits=output.logits[rows])
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t[rows], output)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _classification_heads(model: nn.Module) -> list[str]:
    """Names of top-level modules that stand on the base model: a new head, trained in full."""
    base = getattr(model, "base_model_prefix", "")
    head = output_head(model)
    return [name for name, child in model.named_children() if name != base and child is not head]
