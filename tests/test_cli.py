"""What a person meets at the command line: settings that build, and mistakes told in one line."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from lsm_lightning.__main__ import main as started
from lsm_lightning.pretrained import load_model

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
OVERLAYS = [path for path in CONFIGS if "tasks" not in yaml.safe_load(path.read_text()).get("data", {})]
"""Laid over the quickstart, as they say in their first lines."""
ONE_CPU = "--trainer.accelerator cpu --trainer.devices 1 --trainer.strategy auto --trainer.precision 32-true"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was about to be trained."""
    built: list[Any] = []
    monkeypatch.setattr(Trainer, "fit", lambda self, model, datamodule=None, **_: built.extend((model, datamodule)))
    return built


def write(settings: dict[str, Any], folder: Path) -> list[str]:
    """The arguments of a run with these settings."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(path)]


# ---- settings that build --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=[str(path.relative_to(ROOT / "configs")) for path in CONFIGS])
def test_every_shipped_configuration_builds(path, run, built, monkeypatch, tmp_path):
    """Nothing is loaded or downloaded for that."""
    monkeypatch.chdir(tmp_path)
    base = ["--config", str(ROOT / "configs" / "quickstart.yaml")] if path in OVERLAYS else []
    assert run("fit", *base, "--config", str(path), *ONE_CPU.split()) == 0
    model, data = built
    assert model.teachers.keys() == data.tasks.keys()


def test_the_seed_is_one_setting(settings, run, built, tmp_path):
    assert run(*write(settings, tmp_path), "--seed_everything", "17") == 0
    model, data = built
    assert model.seed == data.seed == 17


def test_settings_can_be_given_on_the_command_line(settings, run, built, tmp_path):
    assert run(*write(settings, tmp_path), "--model.objective.init_args.k", "5", "--data.prompts_per_step", "3") == 0
    model, data = built
    assert model.objective.teacher_tokens == 5
    assert data.prompts_per_step == {"sums": 3}


def test_a_run_can_do_without_its_progress_line(settings, run, built, tmp_path):
    assert run(*write(settings, tmp_path), "--trainer.enable_progress_bar", "false") == 0


# ---- settings that train --------------------------------------------------------------------------------------------

WIDTHS = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64": torch.float64, "64-true": torch.float64}
WIDTHS |= {"32": torch.float32, "bf16-mixed": torch.float32}


@pytest.mark.parametrize("precision", WIDTHS)
def test_every_precision_trains_and_validates(settings, run, tmp_path, precision):
    """And the weights are of its type; half precision moves weights that larger steps reach."""
    settings["model"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    settings["summary"] = {"evaluate": False}
    more = ("--trainer.precision", precision, "--checkpoint.dirpath", str(tmp_path))
    assert run(*write(settings, tmp_path), *more, "--trainer.val_check_interval", "1") == 0
    weights = torch.load(tmp_path / "last.ckpt")["state_dict"]
    before = load_model(settings["model"]["student"], "float32").state_dict()
    assert {weight.dtype for weight in weights.values()} == {WIDTHS[precision]}
    changed = [
        name for name, w in before.items() if not torch.equal(weights[f"student.{name}"], w.to(WIDTHS[precision]))
    ]
    assert len(changed) > len(before) / 2


# ---- the first seconds ----------------------------------------------------------------------------------------------


class Interrupted(ModuleType):
    """A module during whose import Ctrl-C is pressed."""

    def __getattr__(self, name: str) -> Any:
        raise KeyboardInterrupt


def test_ctrl_c_during_the_imports_is_told_in_one_line(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "lsm_lightning.cli", Interrupted("lsm_lightning.cli"))
    assert started() == 130
    assert capfd.readouterr().err == "Interrupted before training began; nothing to save.\n"


# ---- mistakes -------------------------------------------------------------------------------------------------------

Settings = dict[str, Any]


def unknown_key(settings: Settings) -> None:
    settings["model"]["micro_batch_tokns"] = 5


def unknown_init_arg(settings: Settings) -> None:
    settings["model"]["objective"]["init_args"]["kk"] = 5


def unknown_class(settings: Settings) -> None:
    settings["model"]["objective"]["class_path"] = "lsm_lightning.objectives.NoSuchObjective"


def unknown_module(settings: Settings) -> None:
    settings["data"]["tasks"]["sums"]["class_path"] = "no_such_package.Task"


def class_of_another_kind(settings: Settings) -> None:
    settings["model"]["objective"] = {"class_path": "lsm_lightning.teacher.LocalTeacher", "init_args": {"path": "x"}}


def bad_literal(settings: Settings) -> None:
    settings["model"]["mask"] = "taggs"


def bad_literal_inside(settings: Settings) -> None:
    settings["model"]["objective"]["init_args"]["support"] = "renormalize"


def bad_number(settings: Settings) -> None:
    settings["data"]["prompts_per_step"] = "many"


def k_of_one(settings: Settings) -> None:
    settings["model"]["objective"]["init_args"]["k"] = 1


def k_too_large(settings: Settings) -> None:
    settings["model"]["objective"]["init_args"]["k"] = 1234


def bad_top_p(settings: Settings) -> None:
    settings["model"]["sampling"] = {"top_p": 1.5}


def no_tasks(settings: Settings) -> None:
    settings["data"]["tasks"] = {}


def missing_student(settings: Settings) -> None:
    settings["model"]["student"] = "./no/such/student"


def missing_teacher(settings: Settings) -> None:
    settings["model"]["teachers"]["sums"]["init_args"]["path"] = "./no/such/teacher"


def unknown_embedded(settings: Settings) -> None:
    settings["model"]["student"] = "embedded:professor"


def task_without_teacher(settings: Settings) -> None:
    settings["data"]["tasks"]["chess"] = settings["data"]["tasks"]["sums"]


def teacher_without_task(settings: Settings) -> None:
    settings["model"]["teachers"]["chess"] = settings["model"]["teachers"]["sums"]


def unknown_scheduled_task(settings: Settings) -> None:
    pattern = {"pattern": ["sums", "poetry"]}
    settings["data"]["schedule"] = {"class_path": "lsm_lightning.schedules.Repeating", "init_args": pattern}


def numbers_for_another_task(settings: Settings) -> None:
    settings["data"]["prompts_per_step"] = {"chess": 3}


def no_end_in_sight(settings: Settings) -> None:
    del settings["trainer"]["max_steps"]


def prompt_beyond_the_context(settings: Settings) -> None:
    settings["data"]["tasks"]["sums"]["init_args"]["max_new_tokens"] = 4000


def gpus_that_are_not_there(settings: Settings) -> None:
    settings["trainer"] |= {"accelerator": "gpu", "devices": 99}


MISTAKES: list[tuple[Callable[[Settings], None], str]] = [
    (unknown_key, "micro_batch_tokns"),
    (unknown_init_arg, "kk"),
    (unknown_class, "NoSuchObjective"),
    (unknown_module, "no_such_package"),
    (class_of_another_kind, "LocalTeacher"),
    (bad_literal, "taggs"),
    (bad_literal_inside, "renormalize"),
    (bad_number, "many"),
    (k_of_one, "k=1"),
    (k_too_large, "k=1234"),
    (bad_top_p, "top_p=1.5"),
    (no_tasks, "data.tasks"),
    (missing_student, "./no/such/student"),
    (missing_teacher, "./no/such/teacher"),
    (unknown_embedded, "embedded:professor"),
    (task_without_teacher, "chess"),
    (teacher_without_task, "chess"),
    (unknown_scheduled_task, "poetry"),
    (numbers_for_another_task, "chess"),
    (no_end_in_sight, "max_steps"),
    (prompt_beyond_the_context, "max_new_tokens=4000"),
    (gpus_that_are_not_there, "gpu"),
]


def assert_one_error_line(stderr: str, names: str) -> None:
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    assert names in lines[0]


@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
@pytest.mark.parametrize(("spoil", "names"), MISTAKES, ids=[spoil.__name__ for spoil, _ in MISTAKES])
def test_a_mistake_is_told_in_one_line_that_names_it(settings, run, spoil, names, tmp_path, capfd):
    arguments = ["--summary.evaluate", "false"] if spoil in (k_too_large, prompt_beyond_the_context) else []
    spoil(settings)
    assert run(*write(settings, tmp_path), *arguments) == 2
    assert_one_error_line(capfd.readouterr().err, names)


@pytest.mark.parametrize("command", ["fit", "plan"])
@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ({"layers_pattern": "layers"}, "peft.LoraConfig: When `layers_pattern` is specified"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "peft.LoraConfig: The argument lora_bias=True"),
        ({"init_lora_weights": "milora"}, "Given value: milora"),
        ({"init_lora_weights": "pissa"}, "model.lora.init_lora_weights='pissa'"),
        ({"r": "x"}, "Parser key \"r\": Expected a <class 'int'>. Got value: x"),
        ({"no_such": 3}, "'no_such' is not accepted"),
        ({"bias": "all"}, "model.lora.bias='all'"),
        ({"kasa_config": {}}, "model.lora.kasa_config=KasaConfig"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_adapters_that_cannot_work_are_told_in_a_short_line(settings, run, tmp_path, capfd, command, lora, told):
    settings["model"]["lora"] = {"target_modules": ["q_proj"], **lora}
    assert run(command, *write(settings, tmp_path)[1:]) == 2
    stderr = capfd.readouterr().err
    assert_one_error_line(stderr, told)
    assert len(stderr) < 300
    assert "Union" not in stderr
    assert "Namespace" not in stderr


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["fit", "--config", "no/such/run.yaml"], "no/such/run.yaml"),
        (["fit", "--model.student"], "student"),
        (["fit", "--modl.student", "x"], "modl.student"),
        (["tune"], "tune"),
        (["fit"], "student"),
        ([], "fit"),
    ],
    ids=["missing file", "no value", "unknown option", "unknown command", "nothing set", "no command"],
)
def test_a_mistake_on_the_command_line_is_told_in_one_line(run, arguments, names, capfd):
    assert run(*arguments) == 2
    assert_one_error_line(capfd.readouterr().err, names)


def test_a_broken_file_is_named(run, tmp_path, capfd):
    (tmp_path / "broken.yaml").write_text("model: {student: [unclosed\n")
    assert run("fit", "--config", str(tmp_path / "broken.yaml")) == 2
    assert_one_error_line(capfd.readouterr().err, "broken.yaml")


SHARDED = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}


@pytest.mark.parametrize(
    ("trainer", "named"),
    [
        ({"strategy": {**SHARDED, "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1}}}, "size=2"),
        ({"strategy": SHARDED, "devices": 3}, "tensor_parallel_size=3"),
        ({"strategy": "model_parallel"}, "model_parallel"),
        ({"strategy": "fsdp"}, "fsdp"),
        ({"devices": -1}, "devices"),
        ({"devices": [0]}, "devices"),
        ({"devices": 0}, "devices"),
        ({"num_nodes": 0}, "num_nodes"),
        ({"accelerator": "tpu"}, ""),
        ({"precision": "transformer-engine"}, "transformer"),
        ({"barebones": True}, "barebones"),
        ({"overfit_batches": 1}, "overfit_batches"),
        ({"check_val_every_n_epoch": 1}, "val_check_interval"),
        ({"val_check_interval": 0}, "val_check_interval=0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_trainer_that_cannot_run_is_told_in_one_line(settings, run, tmp_path, capfd, trainer, named):
    """A plan refuses what a run would."""
    settings["trainer"] |= trainer
    arguments = write(settings, tmp_path)[1:]
    for command in ("fit", "plan"):
        assert run(command, *arguments) == 2, command
        assert_one_error_line(capfd.readouterr().err, named)


@pytest.mark.parametrize("name", ["best", "hpc", "registry"])
def test_lightnings_names_of_checkpoints_are_told_in_one_line(settings, run, tmp_path, capfd, name):
    assert run(*write(settings, tmp_path), "--ckpt_path", name) == 2
    assert_one_error_line(capfd.readouterr().err, f"ckpt_path: {name}")


# ---- as a program ---------------------------------------------------------------------------------------------------


def program(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "lsm_lightning", *arguments], capture_output=True, text=True, cwd=ROOT)


def test_a_mistake_ends_the_program_with_status_two_and_no_traceback(settings, tmp_path):
    task_without_teacher(settings)
    finished = program(*write(settings, tmp_path))
    assert finished.returncode == 2
    assert_one_error_line(finished.stderr, "chess")


def test_help_is_there():
    finished = program("fit", "--help")
    assert finished.returncode == 0
    for option in ("--model.student", "--data.tasks", "--trainer.max_steps", "--seed_everything"):
        assert option in finished.stdout
    assert "Traceback" not in finished.stderr


def test_importing_the_package_is_light():
    heavy = "torch", "transformers", "lightning", "matplotlib"
    code = f"import sys, lsm_lightning; assert not sys.modules.keys() & set({heavy!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
