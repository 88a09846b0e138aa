"""``finetuna-train``: one run, or a multirun, from the Hydra tree in ``conf/``.

finetuna-train experiment=quickstart
finetuna-train backbone.name_or_path=./llama data.path=./chats.jsonl
finetuna-train -m adapter.rank=4,8,16 adapter.lr=1e-4,3e-4 data.path=./chats.jsonl
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetuna_lightning.errors import CheckpointError, ConfigError, FinetunaError, did_you_mean


class _Noise(logging.Filter):
    """Drops what Lightning says at every start and a user of this program cannot act on."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("\U0001f4a1", "TPU available", "GPU available"))


def _quiet() -> None:
    """One line a message: Hydra's handlers serve, on the terminal and in the job's log file; Lightning's own go."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
    for handler in logging.getLogger().handlers:
        handler.addFilter(_Noise())
    warnings.filterwarnings("ignore", message="Experiment logs directory")  # what was in it is kept: see _keep_metrics


_MISTAKES = (FinetunaError, HydraException, OmegaConfBaseException)
_WHAT = ("backbone", "adapter", "adapters", "data", "seed")  # the settings that say what is trained on what


def train(config: DictConfig) -> float | None:
    """Run what ``config`` says; returns the logged value called ``config.metric``.

    Raises:
        FinetunaError: for anything in the configuration or data that cannot work.
    """
    import lightning.pytorch as pl  # late: `--help` and a misspelt override need not wait for torch
    from hydra.utils import instantiate

    from finetuna_lightning.build import build_data, build_module, check_samples

    _quiet()
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    started = time.monotonic()
    ckpt_path = _resume_path(plain)
    _keep_metrics(Path(plain["output_dir"]) / "logs")
    check_samples(plain)
    module, data = build_module(plain), build_data(plain)
    pl.seed_everything(plain["seed"], verbose=False)
    callbacks = [instantiate(callback) for callback in config.callbacks.values()]
    logger = instantiate(config.logger) if config.logger else False
    trainer: pl.Trainer = instantiate(config.trainer, callbacks=callbacks, logger=logger)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    if trainer.interrupted:
        return None
    if plain["report"] and trainer.is_global_zero:
        _report(plain, trainer, started)
    return _metric(trainer, plain["metric"])


def _resume_path(plain: dict[str, Any]) -> str | None:
    """The checkpoint that ``ckpt_path`` stands for: a file, the newest good one of a run's folder, or, for ``last``, of
    this run's folder or else of the newest run beside it with the same backbone, adapters and data.

    Raises:
        CheckpointError: for a file or folder that is not there, or a folder without a good checkpoint.
    """
    from finetuna_lightning.training.checkpoint_io import newest_checkpoint

    given = plain["ckpt_path"]
    if given is None or "://" in str(given):
        return None if given is None else str(given)
    if given == "last":
        runs = [Path(plain["output_dir"]), *_runs_like(plain)]
        newest = next((found for run in runs if (found := newest_checkpoint(run / "checkpoints"))), None)
        what = f"going on from {newest}" if newest else f"starting anew: there is no state in {runs[0]}/checkpoints"
        logging.getLogger(__name__).info("ckpt_path=last: %s", what)
        return None if newest is None else str(newest)
    path = Path(str(given))
    if not path.exists():
        raise CheckpointError(f"ckpt_path: there is no checkpoint {str(given)!r}")
    if path.is_dir():
        newest = newest_checkpoint(path) or newest_checkpoint(path / "checkpoints")
        if newest is None:
            raise CheckpointError(f"ckpt_path: there is no good checkpoint in {str(given)!r}")
        path = newest
    return str(path)


def _keep_metrics(logs: Path) -> None:
    """Give the metrics of the part of a run that came before a resume in the same folder a name of their own:
    Lightning's CSVLogger would delete them."""
    if (logs / "metrics.csv").exists():
        number = next(number for number in itertools.count(1) if not (logs / f"metrics-{number}.csv").exists())
        (logs / "metrics.csv").rename(logs / f"metrics-{number}.csv")


def _runs_like(plain: dict[str, Any]) -> list[Path]:
    """Folders of earlier runs of the same thing, newest first, where this one's lies in ``outputs/<day>/<time>`` as
    theirs. A folder that was named has none, nor have a sweep's jobs, whose neighbours differ."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.RUN:
        return []
    own = Path(plain["output_dir"]).absolute()
    if own.parents[1].name != "outputs" or not (own / ".hydra/config.yaml").exists():
        return []
    mine: Any = OmegaConf.load(own / ".hydra/config.yaml")
    found = []
    for file in own.parent.parent.glob("*/*/.hydra/config.yaml"):
        run = file.parent.parent
        theirs: Any = OmegaConf.load(file)
        if run != own and all(theirs.get(key) == mine.get(key) for key in _WHAT):
            found.append(run)
    return sorted(found, key=lambda run: (run / ".hydra/config.yaml").stat().st_mtime_ns, reverse=True)


def _metric(trainer: Any, name: str | None) -> float | None:
    if name is None:
        return None
    if name.startswith("val/") and name not in trainer.callback_metrics and trainer.datamodule.evaluation_sets("val"):
        trainer.validate(
            trainer.lightning_module, trainer.datamodule, verbose=False
        )  # the fit ended before it came to it
    logged = trainer.callback_metrics
    if name not in logged:
        known = sorted(key for key in logged if not key.startswith("memory/"))
        raise ConfigError(f"metric {name!r} was not logged{did_you_mean(name, known)} (there are: {', '.join(known)})")
    return float(logged[name])


def _report(plain: dict[str, Any], trainer: Any, started: float) -> None:
    """Tables on the terminal; ``report.json`` and ``report.png`` in the output folder."""
    from rich.console import Console

    from finetuna_lightning.training import report
    from finetuna_lightning.training.callbacks.checkpoint import AdapterCheckpoint
    from finetuna_lightning.training.callbacks.memory import AdapterMemoryMonitor
    from finetuna_lightning.training.callbacks.progress import AdapterProgress

    def first(kind: Any) -> Any:
        return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)

    console, folder = Console(), Path(plain["output_dir"])
    module, data = trainer.lightning_module, trainer.datamodule
    module.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
    memory, progress, saved = first(AdapterMemoryMonitor), first(AdapterProgress), first(AdapterCheckpoint)
    metric, matrix = report.metric_of(module), {}
    if data.evaluation_sets("val"):
        matrix = report.evaluate_on_every_set(module, data, max_batches=plain["report_batches"])
        console.print(report.perplexity_table(matrix, metric))
    training = module.adapter_report()
    console.print(report.training_table(training))
    samples = _samples(module, plain["samples"] or {})
    if samples:
        console.print(report.sample_table(samples))
    seconds = round(time.monotonic() - started, 1)
    figures = {"seconds": seconds, "steps": trainer.global_step, "training": training}
    if memory is not None and progress is not None and matrix:
        paths = report.write_report(
            folder, history=progress.history, matrix=matrix, memory=memory.report(), val_history=progress.val_history,
            metric=metric, samples=samples, extra=figures,
        )  # fmt: skip
        console.print(f"report    {paths['png']} and {paths['json'].name}", highlight=False, soft_wrap=True)
    if saved is not None:
        console.print(f"adapters  {saved.folder(trainer)}/<name>/best and last", highlight=False, soft_wrap=True)
    console.print(f"done      {trainer.global_step} steps, {seconds:.0f} s in all", highlight=False)


def _samples(module: Any, prompts: dict[str, str]) -> list[dict[str, str]]:
    """One greedy continuation for each adapter that has a prompt, all in one batch."""
    if not prompts or module.tokenizer is None or module.task == "sequence-classification":
        return []
    texts = module.generate(list(prompts.values()), adapters=list(prompts), max_new_tokens=48)
    return [
        {"adapter": name, "prompt": prompt, "text": text}
        for (name, prompt), text in zip(prompts.items(), texts, strict=True)
    ]


def _one_line(program: str, error: BaseException) -> str:
    """The message, with what caused it; Hydra wraps our own errors, which say all that there is to say."""
    cause = error.__cause__
    if isinstance(cause, FinetunaError) and not isinstance(error, FinetunaError):
        error, cause = cause, None
    more = f" ({cause})" if cause and str(cause) not in str(error) and not isinstance(error, FinetunaError) else ""
    near = ""
    if isinstance(cause, OmegaConfBaseException) and isinstance(cause.parent_node, DictConfig):
        near = did_you_mean(str(cause.key), map(str, cause.parent_node))  # Hydra only advises to append what was given
    return f"{program}: error: {' '.join(f'{error}{more}{near}'.split())}"


def run_program(program: str, config_name: str, do: Callable[[DictConfig], float | None]) -> None:
    """``do`` the configuration that the command line composes from ``conf/<config_name>.yaml``.

    A user's mistake is one line and exit code 1 (in a multirun the other jobs go on); HYDRA_FULL_ERROR=1 shows the
    traceback.
    """
    failed: list[Exception] = []

    def task(config: DictConfig) -> float | None:
        try:
            return do(config)
        except _MISTAKES as error:
            failed.append(error)
            print(_one_line(program, error), file=sys.stderr)
            return None

    full = os.environ.get("HYDRA_FULL_ERROR", "")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints and exits before the error gets here
    run = hydra.main(version_base="1.3", config_path="pkg://finetuna_lightning.conf", config_name=config_name)
    try:
        run(do if full else task)()
    except _MISTAKES as error:
        if full:
            raise
        print(_one_line(program, error), file=sys.stderr)
        sys.exit(1)
    finally:
        os.environ["HYDRA_FULL_ERROR"] = full
    if failed:
        sys.exit(1)


def main() -> None:
    """Entry point: see ``run_program``."""
    run_program("finetuna-train", "train", train)


if __name__ == "__main__":
    main()
