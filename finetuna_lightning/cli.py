"""``finetuna-cli``: LightningCLI over the same classes.

    finetuna-cli fit --config run.yaml
    finetuna-cli fit --print_config > run.yaml
"""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from finetuna_lightning.errors import FinetunaError
from finetuna_lightning.training.callbacks.checkpoint import AdapterCheckpoint
from finetuna_lightning.training.callbacks.freeze import FreezeQuantizedWeights
from finetuna_lightning.training.callbacks.memory import AdapterMemoryMonitor
from finetuna_lightning.training.callbacks.progress import AdapterProgress
from finetuna_lightning.training.data import AdapterDataModule
from finetuna_lightning.training.module import MultiAdapterModule
from finetuna_lightning.training.precision import EightBitPrecision


class FinetunaCLI(LightningCLI):
    """LightningCLI with this package's plugin and callbacks as defaults, each of which a configuration can replace."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults(
            {
                "trainer.plugins": {"class_path": f"{EightBitPrecision.__module__}.EightBitPrecision"},
                "trainer.callbacks": [
                    {"class_path": f"{callback.__module__}.{callback.__name__}"}
                    for callback in (FreezeQuantizedWeights, AdapterMemoryMonitor, AdapterCheckpoint, AdapterProgress)
                ],
                "trainer.max_steps": 500,
                "trainer.devices": 1,
                "trainer.num_sanity_val_steps": 0,
                "trainer.enable_model_summary": False,
            }
        )


def run(arguments: list[str] | None = None) -> LightningCLI:
    """Run one subcommand (``fit``, ``validate``, ``test``, ``predict``) as the command line would."""
    options: dict[str, Any] = {"save_config_kwargs": {"overwrite": True}, "seed_everything_default": 0}
    return FinetunaCLI(MultiAdapterModule, AdapterDataModule, args=arguments, **options)


def main() -> None:
    """Entry point: a mistake is one line and exit code 1."""
    try:
        run()
    except FinetunaError as error:
        print(f"finetuna-cli: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
