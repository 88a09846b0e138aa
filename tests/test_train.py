"""``finetuna-train``: one run, a sweep, and every mistake in one line before the backbone is loaded."""

from __future__ import annotations

import csv
import gc
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf

from finetuna_lightning import train
from tests.helpers.runs import language_model, text_file

LOGGERS = ("", "lightning", "lightning.pytorch", "lightning.fabric")
Main = Callable[..., int]

# Hydra lets go of each job's log file without closing it.
pytestmark = pytest.mark.filterwarnings(r"ignore:unclosed file .*train\.log:ResourceWarning")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny backbone and a text, as the overrides that name them."""
    folder = tmp_path_factory.mktemp("files")
    return [
        f"backbone.name_or_path={language_model(folder / 'llama')}",
        f"data.path={text_file(folder / 'sql.txt', lines=30)}",
        "data.max_length=16",
        "data.batch_size=2",
        "trainer.accelerator=cpu",
        "trainer.max_steps=2",
    ]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Main]:
    """The program, called with its arguments; the exit code. What it does to this process is undone."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    before = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).level) for name in LOGGERS}

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["finetuna-train", *arguments])
        try:
            train.main()
        except SystemExit as error:
            return int(error.code or 0)
        return 0

    yield run
    HydraConfig.instance().cfg = None
    for name, (handlers, level) in before.items():
        logging.getLogger(name).handlers[:] = handlers
        logging.getLogger(name).setLevel(level)
    gc.collect()  # the log files, while their warning is still expected


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a backbone fails the test."""
    monkeypatch.setattr("finetuna_lightning.training.module.load_backbone", lambda *_, **__: pytest.fail("loaded"))


def values(folder: Path, name: str) -> list[float]:
    """A column of the run's metrics.csv."""
    with (folder / "logs/metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def complete(folder: Path, *names: str) -> bool:
    weights = [
        folder / "adapters" / name / kind / "adapter_model.safetensors" for name in names for kind in ("best", "last")
    ]
    others = [
        ".hydra/config.yaml",
        "report.json",
        "report.png",
        "logs/metrics.csv",
        "checkpoints/last.ckpt",
        "train.log",
    ]
    return all(path.is_file() for path in [*weights, *(folder / other for other in others)])


# ---- one run --------------------------------------------------------------------------------------------------------


def test_one_file_and_a_backbone_are_enough(main: Main, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(*files, "hydra.run.dir=out", "samples={sql: select}") == 0
    folder = Path("out")
    assert complete(folder, "sql")
    out = capsys.readouterr().out
    for said in ("step 2/2", "held-out perplexity", "memory", "adapters  ", "done      2 steps"):
        assert said in out
    report = json.loads((folder / "report.json").read_text())
    assert report["steps"] == 2
    assert [sample["prompt"] for sample in report["samples"]] == ["select"]
    assert sorted(path.name for path in Path().iterdir()) == ["out"]  # nothing beside


def test_the_messages_are_said_once_and_kept_in_the_log(
    main: Main, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*files, "hydra.run.dir=out", "report=false", "metric=null") == 0
    captured = capsys.readouterr()
    stopped = "`Trainer.fit` stopped: `max_steps=2` reached."
    assert (captured.out + captured.err).count(stopped) == 1
    assert (Path("out") / "train.log").read_text().count(stopped) == 1
    assert "litlogger" not in captured.out + captured.err
    assert not Path("out/report.json").exists()


@pytest.mark.parametrize("steps", [2, 20])
def test_the_metric_is_returned_even_where_the_run_ends_before_a_validation(
    main: Main, files: list[str], monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    returned: list[float | None] = []
    monkeypatch.setattr(train, "train", lambda config, inner=train.train: returned.append(inner(config)))
    assert main(*files, f"trainer.max_steps={steps}", "hydra.run.dir=out", "report=false", "callbacks=none") == 0
    assert returned == [pytest.approx(values(Path("out"), "val/loss")[-1])]


@pytest.mark.parametrize("metric", ["null", "train/loss"])
def test_without_held_out_data_the_metric_is_another_or_none(main: Main, files: list[str], metric: str) -> None:
    assert main(*files, "data.val_fraction=0", "hydra.run.dir=out", "callbacks=none", f"metric={metric}") == 0


def test_a_run_goes_on_from_its_checkpoint(main: Main, files: list[str]) -> None:
    rest = [*files, "report=false", "metric=null", "adapter.schedule=constant"]
    assert main(*rest, "hydra.run.dir=whole", "trainer.max_steps=4") == 0
    assert main(*rest, "hydra.run.dir=first") == 0
    assert main(*rest, "hydra.run.dir=second", "trainer.max_steps=4", "ckpt_path=first/checkpoints/last.ckpt") == 0
    weights = [Path(f"{run}/adapters/sql/last/adapter_model.safetensors").read_bytes() for run in ("whole", "second")]
    assert weights[0] == weights[1]


def step_of(path: str) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def test_last_goes_on_in_a_folder_that_was_used_before(
    main: Main, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One command, to be repeated after every interruption."""
    rest = [*files, "report=false", "metric=null", "hydra.run.dir=mine", "ckpt_path=last"]
    assert main(*rest) == 0
    assert "starting anew: there is no state in" in capsys.readouterr().out
    Path("mine/checkpoints/last.ckpt").write_bytes(b"half")
    metrics = Path("mine/logs/metrics.csv").read_text()
    assert step_of("mine/checkpoints/previous.ckpt") == 1
    assert main(*rest, "trainer.max_steps=4") == 0
    assert "going on from" in (said := capsys.readouterr().out) and "previous.ckpt" in said
    assert step_of("mine/checkpoints/last.ckpt") == 4
    assert Path("mine/logs/metrics-1.csv").read_text() == metrics  # Lightning's logger would delete them


def test_last_finds_the_newest_run_of_the_same_thing(
    main: Main, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rest = [*files, "report=false", "metric=null"]
    for run in ("a", "b"):
        assert main(*rest, f"hydra.run.dir=outputs/day/{run}") == 0
    assert main(*rest, "adapter.rank=2", "hydra.run.dir=outputs/day/other") == 0
    capsys.readouterr()
    assert main(*rest, "hydra.run.dir=outputs/day/new", "ckpt_path=last", "trainer.max_steps=3") == 0
    said = capsys.readouterr().out
    assert "ckpt_path=last: going on from" in said and "outputs/day/b/checkpoints/last.ckpt" in said
    assert step_of("outputs/day/new/checkpoints/last.ckpt") == 3


@pytest.mark.parametrize("inside", ["", "/checkpoints"])
def test_a_run_s_folder_stands_for_its_newest_state(main: Main, files: list[str], inside: str) -> None:
    rest = [*files, "report=false", "metric=null"]
    assert main(*rest, "hydra.run.dir=first") == 0
    assert main(*rest, "hydra.run.dir=second", f"ckpt_path=first{inside}", "trainer.max_steps=3") == 0
    assert step_of("second/checkpoints/previous.ckpt") == 3


def test_a_sweep_s_jobs_do_not_go_on_from_one_another(main: Main, files: list[str]) -> None:
    rest = [*files, "report=false", "metric=null", "ckpt_path=last", "hydra.sweep.dir=swept"]
    assert main("-m", *rest, "data.shuffle=true,true") == 0
    for job in (0, 1):
        assert step_of(f"swept/{job}/checkpoints/previous.ckpt") == 1


def test_a_damaged_checkpoint_is_one_line_that_names_the_good_one(
    main: Main, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rest = [*files, "report=false", "metric=null"]
    assert main(*rest, "hydra.run.dir=first") == 0
    last = Path("first/checkpoints/last.ckpt")
    last.write_bytes(last.read_bytes()[:3000])
    capsys.readouterr()
    assert main(*rest, f"ckpt_path={last}") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("finetuna-train: error: checkpoint first/checkpoints/last.ckpt is damaged or half written")
    assert line.endswith("the newest good one beside it is first/checkpoints/previous.ckpt")


def test_sigterm_ends_a_run_with_143_and_the_same_command_goes_on(files: list[str]) -> None:
    """As a program, as an orchestrator runs it."""
    again = ["hydra.run.dir=mine", "ckpt_path=last", "trainer.max_steps=100000", "+callbacks.progress.every_n_steps=1"]
    command = [sys.executable, "-m", "finetuna_lightning.train", *files, "report=false", "metric=null", *again]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        step = next(line for line in process.stdout if line.startswith("step 3/"))
        process.terminate()
        rest = process.stdout.read()
        assert process.wait(60) == 143
    done = max(int(line.split()[1].split("/")[0]) for line in [step, *rest.splitlines()] if line.startswith("step "))
    assert step_of("mine/checkpoints/last.ckpt") >= done


def test_a_user_s_own_experiment_file(main: Main, files: list[str]) -> None:
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/two.yaml").write_text(
        "# @package _global_\nadapters: {a: {rank: 2}, b: {rank: 3}}\nreport: false\nmetric: val/b/loss\n"
    )
    assert (
        main("--config-dir=mine", "experiment=two", *files, "hydra.run.dir=out", "callbacks.memory.every_n_steps=1")
        == 0
    )
    for name, rank in (("a", 2), ("b", 3)):
        assert json.loads(Path(f"out/adapters/{name}/last/adapter_config.json").read_text())["r"] == rank


# ---- a sweep --------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the launcher hands the sweeper."""
    returned: list[Any] = []
    instantiate = Plugins.instantiate_launcher

    def listening(self: Plugins, *args: Any, **kwargs: Any) -> Launcher:
        launcher = instantiate(self, *args, **kwargs)
        launch = launcher.launch

        def launched(*args: Any, **kwargs: Any) -> Sequence[JobReturn]:
            jobs = launch(*args, **kwargs)
            returned.extend(job.return_value for job in jobs)
            return jobs

        monkeypatch.setattr(launcher, "launch", launched)
        return launcher

    monkeypatch.setattr(Plugins, "instantiate_launcher", listening)
    return returned


def test_two_by_two_jobs_leave_four_complete_folders(main: Main, files: list[str], results: list[Any]) -> None:
    assert main("-m", *files, "adapter.rank=2,4", "adapter.lr=1e-3,1e-2", "hydra.sweep.dir=sweep") == 0
    folders = sorted(path for path in Path("sweep").iterdir() if path.is_dir())
    assert [folder.name for folder in folders] == ["0", "1", "2", "3"]
    assert all(complete(folder, "sql") for folder in folders)
    settings = [OmegaConf.load(folder / ".hydra/config.yaml").adapter for folder in folders]
    assert {(setting.rank, setting.lr) for setting in settings} == {(2, 1e-3), (2, 1e-2), (4, 1e-3), (4, 1e-2)}
    assert results == [pytest.approx(values(folder, "val/loss")[-1]) for folder in folders]
    assert len(set(results)) == 4


def test_a_failing_job_does_not_take_the_others_with_it(
    main: Main, files: list[str], results: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = ["adapter.rank=2,1000,0,4", "hydra.sweep.dir=sweep", "report=false", "~callbacks.progress"]
    assert main("-m", *files, *jobs) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("finetuna-train: error: ")]
    assert ["rank 1000" in lines[0], "not 0" in lines[1], len(lines)] == [True, True, 2]
    assert [result is None for result in results] == [False, True, True, False]
    weights = sorted(path.parts[1] for path in Path("sweep").glob("*/adapters/sql/last/adapter_model.safetensors"))
    assert weights == ["0", "3"]


# ---- mistakes -------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no data": (["data.path=null"], "there is no data: set data.path=FILE"),
    "target": (["adapter.target_modules=[q_porj]"], "adapter 'sql': no layer matches 'q_porj'; did you mean 'q_proj'?"),
    "second target": (["adapter.target_modules=[q_proj,k_porj]"], "no layer matches 'k_porj'; did you mean 'k_proj'?"),
    "plain module": (["adapter.plain_modules=[lm_haed]"], "no module matches 'lm_haed'; did you mean 'lm_head'?"),
    "rank 0": (["adapter.rank=0"], "adapter.rank must be an integer >= 1, not 0"),
    "rank 2.5": (["adapter.rank=2.5"], "adapter.rank must be an integer >= 1, not 2.5"),
    "rank too large": (["adapter.rank=17"], "adapter.rank 17 is larger than layer 'model.layers.0.self_attn.q_proj'"),
    "dotted name": (["adapters={a.b: {}}"], "adapter name 'a.b' is not allowed"),
    "path name": (["adapters={../x: {}}"], "adapter name '../x' is not allowed"),
    "attribute name": (["adapters={forward: {}}"], "adapter name 'forward' is not allowed"),
    "scheme": (["backbone.scheme=int7"], "backbone.scheme must be one of int8, int8-blockwise, fp8, none, not 'int7'"),
    "missing file": (["data.path=no/such.txt"], "no/such.txt does not exist"),
    "empty file": (["data.path=empty.jsonl"], "empty.jsonl is empty"),
    "line that is no JSON": (["data.path=broken.jsonl"], "broken.jsonl, line 2"),
    "no text field": (["data.path=fields.jsonl"], "fields.jsonl"),
    "backbone": (["backbone.name_or_path=./no-such"], "backbone folder './no-such' does not exist"),
    "unnamed backbone": (["backbone=large", "backbone.name_or_path=null"], "backbone.name_or_path must be a hub name"),
    "override": (["adapter.rnk=2"], "Could not override 'adapter.rnk'"),
    "override without a value": (["adapter.rank"], "Error parsing override 'adapter.rank'"),
    "group": (["optim=sgd"], "Could not find 'optim/sgd'"),
    "experiment": (["experiment=nope"], "Could not find 'experiment/nope'"),
    "missing value": (["adapter.rank=???"], "Missing mandatory value"),
    "interpolation": (["adapter.rank=${nowhere}"], "nowhere"),
    "adapter's field": (["adapters={x: {rnk: 2}}"], "adapters.x has no field 'rnk'; did you mean 'rank'?"),
    "adapter that is no mapping": (["adapters={x: 2}"], "adapters.x must be a mapping of settings, not 2"),
    "source of no adapter": (
        ["adapters={sql: {}}", "data.sources={sqll: {path: a.txt}}"],
        "data.sources has 'sqll', which is no adapter; did you mean 'sql'?",
    ),
    "sample of no adapter": (["samples={sqll: x}"], "samples has 'sqll', which is no adapter; did you mean 'sql'?"),
    "joint clipping": (["+trainer.gradient_clip_val=0.5"], "set max_grad_norm=0.5 in AdapterConfig"),
    "fp8 on the CPU": (["+trainer.plugins.0.compute=fp8"], "compute='fp8' needs a CUDA GPU"),
    "plugin's setting": (
        ["+trainer.plugins.0.compute=fp9"],
        "compute must be one of auto, 16bit, int8, fp8, not 'fp9'",
    ),
    "callback's setting": (["+callbacks.adapters.mode=low"], "AdapterCheckpoint.mode must be one of min, max"),
    "trainer's setting": (["+trainer.max_stepz=3"], "max_stepz"),
    "trainer against its callbacks": (["+trainer.enable_progress_bar=false"], "found `AdapterProgress`"),
    "seed": (["seed=x"], "seed must be an integer >= 0, not 'x'"),
    "checkpoint": (["ckpt_path=gone.ckpt"], "ckpt_path: there is no checkpoint 'gone.ckpt'"),
    "batch size": (["data.batch_size=0"], "data.batch_size must be an integer >= 1, not 0"),
    "length": (["data.max_length=33"], "data.max_length is 33 but the backbone has 32 positions"),
}  # fmt: skip


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_the_backbone_is_loaded(
    main: Main, files: list[str], mistake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.jsonl").touch()
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("fields.jsonl").write_text('{"body": "a"}\n')
    overrides, message = MISTAKES[mistake]
    assert main(*files, *overrides) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("finetuna-train: error: ")
    assert message in line
    assert "Traceback" not in captured.out
    assert not list(Path().rglob("*.safetensors"))


@pytest.mark.usefixtures("unloadable")
def test_an_empty_name_can_only_come_from_a_file(
    main: Main, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/bad.yaml").write_text('# @package _global_\nadapters: {"": {}}\n')
    assert main("--config-dir=mine", "experiment=bad", *files) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("finetuna-train: error: adapter name '' is not allowed")


def test_a_metric_that_was_not_logged_is_named_after_the_run(
    main: Main, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*files, "metric=val/los", "hydra.run.dir=out") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith(
        "finetuna-train: error: metric 'val/los' was not logged; did you mean 'val/loss'? (there are: "
    )
    assert complete(Path("out"), "sql")


@pytest.mark.usefixtures("unloadable")
def test_a_mistake_does_not_stick(main: Main, files: list[str]) -> None:
    for _ in range(2):
        assert main(*files, "adapter.rank=0") == 1
    assert main(*files, "--cfg", "job") == 0


@pytest.mark.usefixtures("unloadable")
def test_the_traceback_is_there_for_who_asks(main: Main, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from finetuna_lightning.errors import ConfigError

    monkeypatch.setattr(sys, "argv", ["finetuna-train", *files, "adapter.rank=0"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigError, match="rank"):
        train.main()


# ---- as a program ---------------------------------------------------------------------------------------------------

HELP = """
import sys
from finetuna_lightning import train
sys.argv = ["finetuna-train", "--help"]
try:
    train.main()
finally:
    print("heavy:", [name for name in ("torch", "lightning", "transformers", "matplotlib") if name in sys.modules])
"""


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=250)


def test_help_names_the_groups_and_waits_for_nothing() -> None:
    done = program("-c", HELP)
    assert (done.returncode, done.stderr) == (0, "")
    for group in (
        "adapter: attention, lora",
        "backbone: ",
        "callbacks: ",
        "data: ",
        "experiment: ",
        "logger: ",
        "optim: ",
    ):
        assert group in done.stdout
    assert "finetuna-train -m adapter.rank=4,8,16" in done.stdout
    assert done.stdout.rstrip().endswith("heavy: []")


def test_a_misspelt_override_is_one_line_and_exit_code_1() -> None:
    done = program("-m", "finetuna_lightning.train", "adapter.rnk=2")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.startswith("finetuna-train: error: Could not override 'adapter.rnk'.")
    assert done.stderr.endswith("did you mean 'rank'?\n")


def test_a_misspelt_override_names_the_nearest_of_its_own_group() -> None:
    done = program("-m", "finetuna_lightning.train", "trainer.max_step=3")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.endswith("did you mean 'max_steps'?\n")


def test_a_missing_file_is_one_line_and_exit_code_1() -> None:
    done = program("-m", "finetuna_lightning.train", "data.path=gone.txt", "trainer.accelerator=cpu")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.startswith("finetuna-train: error: adapter 'gone': gone.txt does not exist")
