"""``finetuna-cli``: LightningCLI over the same classes; and the same run from a script, from Hydra and from here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from finetuna_lightning import cli
from finetuna_lightning.configs import AdapterConfig, BackboneConfig, DataConfig
from finetuna_lightning.training.callbacks.checkpoint import AdapterCheckpoint
from finetuna_lightning.training.callbacks.freeze import FreezeQuantizedWeights
from finetuna_lightning.training.callbacks.memory import AdapterMemoryMonitor
from finetuna_lightning.training.callbacks.progress import AdapterProgress
from finetuna_lightning.training.callbacks.trainer_state import TrainerCheckpoint
from finetuna_lightning.training.data import AdapterDataModule
from finetuna_lightning.training.module import MultiAdapterModule
from finetuna_lightning.training.precision import EightBitPrecision
from tests.helpers.runs import language_model, text_file
from tests.test_train import Main, main  # noqa: F401 (a fixture)

# What LightningCLI 2.6 calls of jsonargparse is deprecated there.
pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:unclosed file .*train\.log:ResourceWarning"),
]
ADAPTERS: dict[str, dict[str, Any]] = {
    "sql": {"rank": 4, "dropout": 0.2, "lr": 1e-2, "target_modules": ["q_proj", "up_proj"]},
    "legal": {"rank": 2, "dropout": 0.1, "lr": 1e-2, "plain_modules": ["lm_head"], "schedule": "cosine"},
}
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone, a text for each adapter, and the run's YAML."""
    folder = tmp_path_factory.mktemp("files")
    sources = {name: {"path": text_file(folder / f"{name}.txt", name, lines=20), "max_length": 16} for name in ADAPTERS}
    run = {
        "model": {"backbone": {"name_or_path": language_model(folder / "llama")}, "adapters": ADAPTERS},
        "data": {"sources": sources, "batch_size": 2},
        "trainer": {
            "max_steps": 6,
            "accelerator": "cpu",
            "val_check_interval": 3,
            "log_every_n_steps": 1,
            "logger": False,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    return folder


Run = Callable[..., Any]
Program = Callable[..., int]


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """One subcommand on the run's YAML; the LightningCLI object."""

    def run(subcommand: str, *more: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["finetuna-cli", subcommand, f"--config={folder / 'run.yaml'}", *more])
        return cli.run()

    return run


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    """The program with its arguments; the exit code."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["finetuna-cli", *arguments])
        try:
            cli.main()
        except SystemExit as error:
            return int(error.code or 0)
        return 0

    return run


# ---- the same run, three ways ---------------------------------------------------------------------------------------


def weights(folder: str) -> dict[str, bytes]:
    return {f"{name}/{kind}": Path(folder, "adapters", name, kind, FILE).read_bytes()
            for name in ADAPTERS for kind in ("best", "last")}  # fmt: skip


def test_a_script_hydra_and_lightningcli_write_the_same_bytes(folder: Path, run: Run, main: Main) -> None:  # noqa: F811
    paths = {name: str(folder / f"{name}.txt") for name in ADAPTERS}

    torch.manual_seed(99)  # of no account: every stream has a seed of its own
    module = MultiAdapterModule(
        backbone=BackboneConfig(str(folder / "llama")),
        adapters={name: AdapterConfig(**fields) for name, fields in ADAPTERS.items()},
    )
    data = AdapterDataModule({name: DataConfig(path, max_length=16) for name, path in paths.items()}, batch_size=2)
    trainer = Trainer(
        plugins=[EightBitPrecision()],
        callbacks=[FreezeQuantizedWeights(), AdapterMemoryMonitor(), AdapterCheckpoint("adapters")],
        max_steps=6, accelerator="cpu", val_check_interval=3, default_root_dir="script", logger=False,
        enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)

    sources = {name: {"path": path} for name, path in paths.items()}
    assert main(
        f"backbone.name_or_path={folder / 'llama'}", f"adapters={flow(ADAPTERS)}", f"data.sources={flow(sources)}",
        "data.max_length=16", "data.batch_size=2", "trainer.max_steps=6", "trainer.accelerator=cpu",
        "trainer.val_check_interval=3", "hydra.run.dir=hydra", "report=false",
    ) == 0  # fmt: skip

    run("fit", "--trainer.default_root_dir=cli", "--seed_everything=5")

    assert weights("script") == weights("hydra") == weights("cli")
    assert len(set(weights("script").values())) == 2  # the adapters differ; their last weights are the best


def test_saving_an_adapter_again_gives_the_same_bytes(folder: Path) -> None:
    module = MultiAdapterModule(BackboneConfig(str(folder / "llama")), {"sql": AdapterConfig(rank=2)})
    saved = {module.adapters["sql"].save_pretrained(f"{i}").joinpath(FILE).read_bytes() for i in range(8)}
    assert len(saved) == 1


# ---- the subcommands ------------------------------------------------------------------------------------------------


def test_fit_has_this_package_s_plugin_and_callbacks(run: Run) -> None:
    done = run("fit")
    assert isinstance(done.trainer.precision_plugin, EightBitPrecision)
    for kind in (FreezeQuantizedWeights, AdapterMemoryMonitor, AdapterCheckpoint, AdapterProgress, TrainerCheckpoint):
        assert sum(isinstance(callback, kind) for callback in done.trainer.callbacks) == 1
    assert isinstance(done.model, MultiAdapterModule)
    assert done.model.adapter_configs == {name: AdapterConfig(**fields) for name, fields in ADAPTERS.items()}
    assert [group["name"] for group in done.trainer.optimizers[0].param_groups] == list(ADAPTERS)
    assert done.trainer.global_step == 6
    assert all(Path("adapters", name, "best", FILE).is_file() for name in ADAPTERS)


def flow(value: Any) -> str:
    """``value`` as YAML on one line, which is what Hydra's overrides and LightningCLI's options take."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip()


class Rows(Callback):
    """Keeps what prediction gives."""

    kept: ClassVar[list[dict[str, Any]]] = []

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.kept.extend(outputs)


@pytest.fixture
def trained(run: Run) -> Iterator[str]:
    """A checkpoint of a short run."""
    run("fit", "--trainer.max_steps=2").trainer.save_checkpoint("run.ckpt")
    yield "--ckpt_path=run.ckpt"


def test_validate_test_and_predict_go_on_from_a_checkpoint(run: Run, trained: str) -> None:
    fresh = run("validate").trainer.callback_metrics
    metrics = run("validate", trained).trainer.callback_metrics
    assert {f"val/{name}/{what}" for name in ADAPTERS for what in ("loss", "perplexity")} < set(metrics)
    assert metrics["val/sql/loss"] < fresh["val/sql/loss"]
    test = run("test", trained, "--data.sources.sql.test_fraction=0.3").trainer.callback_metrics
    assert "test/sql/loss" in test
    rows = flow({"class_path": f"{__name__}.Rows"})
    run("predict", trained, f"--trainer.callbacks+={rows}")
    assert {row["adapter"] for row in Rows.kept} == set(ADAPTERS)
    assert all(row["perplexity"] > 1 for row in Rows.kept)


def test_the_printed_configuration_gives_the_same_adapters(
    folder: Path, program: Program, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program("fit", f"--config={folder / 'run.yaml'}", "--print_config") == 0
    printed = capsys.readouterr().out
    Path("printed.yaml").write_text(printed)
    values = yaml.safe_load(printed)
    assert values["model"]["adapters"]["sql"] == vars(AdapterConfig(**ADAPTERS["sql"]))
    assert values["model"]["backbone"] == vars(BackboneConfig(str(folder / "llama")))
    assert values["model"]["optim"]["name"] == "adamw"
    assert [callback["class_path"].rsplit(".", 1)[-1] for callback in values["trainer"]["callbacks"]] == [
        "FreezeQuantizedWeights", "AdapterMemoryMonitor", "AdapterCheckpoint", "AdapterProgress", "TrainerCheckpoint",
    ]  # fmt: skip
    run("fit", "--trainer.default_root_dir=first")
    assert program("fit", "--config=printed.yaml", "--trainer.default_root_dir=second") == 0
    assert weights("first") == weights("second")


def test_a_bare_print_config_is_a_start(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("fit", "--print_config") == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert values["model"]["backbone"] == vars(BackboneConfig())
    assert values["trainer"]["plugins"]["class_path"].endswith("EightBitPrecision")


def test_plugins_and_callbacks_come_by_class_path(run: Run) -> None:
    names = "[{class_path: finetuna_lightning.AdapterCheckpoint, init_args: {dirpath: kept, save_last: false}}]"
    plugin = "[{class_path: finetuna_lightning.EightBitPrecision, init_args: {dtype: bfloat16}}]"
    done = run("fit", f"--trainer.callbacks={names}", f"--trainer.plugins={plugin}", "--trainer.max_steps=3",
               "--trainer.enable_progress_bar=false")  # fmt: skip
    assert sorted(path.as_posix() for path in Path("kept").glob("*/*")) == ["kept/legal/best", "kept/sql/best"]
    assert not any(isinstance(callback, FreezeQuantizedWeights) for callback in done.trainer.callbacks)
    assert done.model.backbone.model.norm.weight.dtype is torch.bfloat16


def test_a_field_of_one_adapter_can_be_set(run: Run) -> None:
    done = run("fit", "--model.adapters.sql.rank=3", "--data.sources.legal.batch_size=1", "--model.optim.eps=1e-6",
               "--model.seed=3", "--trainer.max_steps=1")  # fmt: skip
    assert done.model.adapter_configs["sql"] == AdapterConfig(**ADAPTERS["sql"] | {"rank": 3})
    assert done.model.adapter_configs["legal"] == AdapterConfig(**ADAPTERS["legal"])
    assert (done.datamodule.sources["legal"].batch_size, done.datamodule.sources["sql"].batch_size) == (1, None)
    assert (done.model.optim_config.eps, done.model.seed) == (1e-6, 3)


def test_a_checkpoint_of_the_command_line_loads_as_the_public_class(run: Run, trained: str) -> None:
    back = MultiAdapterModule.load_from_checkpoint("run.ckpt")
    assert back.adapter_configs == {name: AdapterConfig(**fields) for name, fields in ADAPTERS.items()}


# ---- help and mistakes ----------------------------------------------------------------------------------------------


def test_help_shows_the_settings_and_not_every_module_there_is(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program("fit", "--help") == 0
    out = capsys.readouterr().out
    for setting in ("model.adapters", "model.backbone.scheme", "model.optim.name", "data.sources", "trainer.max_steps"):
        assert f"--{setting}" in out
    assert "Trains every adapter on its own data" in out
    assert "torch.nn" not in out
    assert "--optimizer" not in out  # it would replace the one with a group for each adapter


MISTAKES = {
    "rank 0": (["--model.adapters.sql.rank=0"], "adapter.rank must be an integer >= 1, not 0"),
    "rank 2.5": (["--model.adapters.sql.rank=2.5"], "2.5"),
    "rank too large": (["--model.adapters.sql.rank=17"], "adapter 'sql': adapter.rank 17 is larger than layer"),
    "adapter's field": (["--model.adapters.sql.rnk=2"], "'rnk' is not accepted"),
    "target": (["--model.adapters.sql.target_modules=[q_porj]"], "adapter 'sql': no layer matches 'q_porj'"),
    "name": (['--model.adapters={"a.b": {"rank": 2}}'], "adapter name 'a.b' is not allowed"),
    "scheme": (["--model.backbone.scheme=int7"], "backbone.scheme must be one of"),
    "optimizer": (["--model.optim.name=adamx"], "optim.name must be one of adamw, adamw8bit, paged_adamw8bit"),
    "missing file": (["--data.sources.sql.path=gone.txt"], "adapter 'sql': gone.txt does not exist"),
    "joint clipping": (["--trainer.gradient_clip_val=1"], "set max_grad_norm=1"),
    "trainer against its callbacks": (["--trainer.enable_progress_bar=false"], "found `AdapterProgress`"),
    "setting": (["--model.backbon.scheme=int8"], "model.backbon.scheme"),
    "config file": (["--config=gone.yaml"], "gone.yaml'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_the_backbone_is_loaded(
    folder: Path, program: Program, mistake: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("finetuna_lightning.training.module.load_backbone", lambda *_, **__: pytest.fail("loaded"))
    arguments, message = MISTAKES[mistake]
    assert program("fit", f"--config={folder / 'run.yaml'}", *arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("Seed set", "INFO: "))]
    (line,) = lines
    assert line.startswith("finetuna-cli: error: ")
    assert message in line


def test_what_is_missing_is_named(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("fit") == 1
    line = capsys.readouterr().err
    assert line.startswith("finetuna-cli: error: ")
    assert "model.adapters" in line
    assert "data.sources" in line
