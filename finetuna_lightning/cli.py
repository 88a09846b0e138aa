"""``finetuna-cli``: LightningCLI over the same classes.

finetuna-cli fit --config run.yaml
finetuna-cli fit --print_config > run.yaml
"""

from __future__ import annotations

import sys
from argparse import ArgumentError

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from finetuna_lightning.configs import AdapterConfig, BackboneConfig, OptimConfig
from finetuna_lightning.errors import FinetunaError
from finetuna_lightning.training.callbacks.checkpoint import AdapterCheckpoint
from finetuna_lightning.training.callbacks.freeze import FreezeQuantizedWeights
from finetuna_lightning.training.callbacks.memory import AdapterMemoryMonitor
from finetuna_lightning.training.callbacks.progress import AdapterProgress
from finetuna_lightning.training.callbacks.trainer_state import TrainerCheckpoint
from finetuna_lightning.training.data import AdapterDataModule
from finetuna_lightning.training.module import MultiAdapterModule
from finetuna_lightning.training.precision import EightBitPrecision

_OPTIM = OptimConfig()
_SUBCOMMANDS = ("fit", "validate", "test", "predict")


class ConfiguredModule(MultiAdapterModule):
    # What a file can describe. Given `BackboneConfig | nn.Module`, jsonargparse's help lists every nn.Module there is;
    # given `OptimConfig | None`, it buries the message of a wrong OptimConfig.
    __doc__ = MultiAdapterModule.__doc__

    def __init__(
        self,
        backbone: BackboneConfig,
        adapters: dict[str, AdapterConfig],
        optim: OptimConfig = _OPTIM,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, adapters, optim, seed)


class FinetunaCLI(LightningCLI):
    """LightningCLI with this package's plugin and callbacks as defaults, each of which a configuration can replace."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults(
            {
                "trainer.plugins": {"class_path": f"{EightBitPrecision.__module__}.EightBitPrecision"},
                "trainer.callbacks": [
                    {"class_path": f"{callback.__module__}.{callback.__name__}"}
                    for callback in (
                        FreezeQuantizedWeights,
                        AdapterMemoryMonitor,
                        AdapterCheckpoint,
                        AdapterProgress,
                        TrainerCheckpoint,
                    )
                ],
                "trainer.max_steps": 500,
                "trainer.devices": 1,
                "trainer.num_sanity_val_steps": 0,
                "trainer.enable_model_summary": False,
            }
        )


def run(arguments: list[str] | None = None) -> LightningCLI:
    """Run one subcommand (``fit``, ``validate``, ``test``, ``predict``) as the command line would.

    Raises:
        FinetunaError, MisconfigurationException, ArgumentError: for a mistake in the configuration.
    """
    raising = {"exit_on_error": False}  # jsonargparse would print the usage, seventy lines, before the mistake
    return FinetunaCLI(
        ConfiguredModule,
        AdapterDataModule,
        args=arguments,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,  # an optimizer from the command line would have no group for each adapter
        parser_kwargs={**raising, **{name: raising for name in _SUBCOMMANDS}},
    )


def main() -> None:
    """Entry point: a mistake is one line and exit code 1."""
    try:
        run()
    except (FinetunaError, MisconfigurationException, ArgumentError) as error:
        print(f"finetuna-cli: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
