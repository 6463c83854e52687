"""What stops a run in order, and what a run must survive."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lsm_lightning import module as module_module
from lsm_lightning.datamodule import AlternatingTasks
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.module import SKIPPED_STEPS_ALLOWED, OnPolicyDistillation
from lsm_lightning.pretrained import load_tokenizer
from lsm_lightning.tasks.math import AdditionProblems
from lsm_lightning.teacher import LocalTeacher


@pytest.fixture
def arguments(settings: dict[str, Any], tmp_path: Path) -> list[str]:
    """Of a small run that logs, evaluates and ends with a table."""
    settings["trainer"] |= {"max_steps": 2, "devices": 1, "logger": True}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(path)]


def test_the_trained_student_is_left_in_transformers_format(run, arguments, tmp_path, capsys):
    assert run(*arguments) == 0
    folder = tmp_path / "version_0"
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    exported = AutoModelForCausalLM.from_pretrained(folder / "student").state_dict()
    assert all(torch.equal(saved[f"student.{name}"], value) for name, value in exported.items())
    assert AutoTokenizer.from_pretrained(folder / "student").chat_template
    for name in ("summary.json", "curves.png"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()
    assert str(folder / "student") in capsys.readouterr().out


def test_a_run_that_learns_nothing_ends(run, arguments, monkeypatch, capsys):
    """With the progress line, which a skipped step prints past."""
    right = module_module.loss_mask

    def nothing(*arguments):
        mask = right(*arguments)
        mask.keep[:] = False
        return mask

    monkeypatch.setattr(module_module, "loss_mask", nothing)
    assert run(*arguments, "--summary.evaluate", "false") == 2
    told = capsys.readouterr()
    assert told.out.count("Skipped a step") == SKIPPED_STEPS_ALLOWED
    assert told.err.startswith("error: The mask 'tags' left no position")


def test_a_run_that_diverges_stops_in_one_line_and_keeps_its_last_checkpoint(run, arguments, tmp_path, capsys):
    assert run(*arguments) == 0
    before = (tmp_path / "version_0" / "checkpoints" / "last.ckpt").read_bytes()
    capsys.readouterr()
    wild = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "1e38", "--trainer.max_steps", "9"]
    assert run(*arguments, *wild, "--model.gradient_clip", "1e9", "--checkpoint.dirpath", str(tmp_path / "wild")) == 1
    assert capsys.readouterr().err.startswith("stopped: ")
    assert not (tmp_path / "wild" / "last.ckpt").exists()
    assert (tmp_path / "version_0" / "checkpoints" / "last.ckpt").read_bytes() == before


def test_going_on_with_another_student_or_other_tasks_is_refused(run, arguments, tmp_path, teacher_folder, capsys):
    assert run(*arguments, "--summary.evaluate", "false") == 0
    checkpoint = str(tmp_path / "version_0" / "checkpoints" / "last.ckpt")
    assert run(*arguments, "--model.student", str(teacher_folder), "--ckpt_path", checkpoint) == 2
    assert "The checkpoint is of the student" in capsys.readouterr().err
    tasks = yaml.safe_load(Path(arguments[2]).read_text())
    tasks["data"]["tasks"]["more"] = tasks["data"]["tasks"].pop("sums")
    tasks["model"]["teachers"]["more"] = tasks["model"]["teachers"].pop("sums")
    Path(arguments[2]).write_text(yaml.safe_dump(tasks))
    assert run(*arguments, "--ckpt_path", checkpoint) == 2
    assert "a run on sums, not on more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--ckpt_path", "no/such.ckpt"], "there is no checkpoint 'no/such.ckpt'"),
        (["--ckpt_path", __file__], "is not a checkpoint"),
        (
            ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "-1"],
            "model.optimizer: Invalid learning rate",
        ),
        (["--seed_everything", "-5"], "seed_everything=-5"),
        (["--data.eval_problems", "-3"], "eval_problems=-3"),
        (["--model.micro_batch_tokens", "-5"], "micro_batch_tokens=-5"),
        (["--model.gradient_clip", "-1"], "gradient_clip=-1"),
        (["--model.chat_template", "nonsense.jinja"], "nonsense.jinja"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_cannot_work_are_told_in_one_line(run, arguments, capsys, wrong, told):
    assert run(*arguments, *wrong) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert told in line


def test_checkpoints_can_be_switched_off(run, arguments, tmp_path):
    assert run(*arguments, "--trainer.enable_checkpointing", "false", "--summary.evaluate", "false") == 0
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_a_chat_template_may_be_a_file(student_folder, tmp_path):
    (tmp_path / "template.jinja").write_text("{{ 'hello' }}")
    tokenizer = load_tokenizer(str(student_folder), str(tmp_path / "template.jinja"))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "hello"


def test_models_load_where_the_accelerator_is_the_default_device(student_folder, teacher_folder):
    """Lightning makes it so around `configure_model`; the meta device stands for one that is no CPU."""
    teacher = LocalTeacher(str(teacher_folder))
    module = OnPolicyDistillation(str(student_folder), {"sums": teacher})
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    with torch.device("meta"):
        module.configure_model()
    assert {parameter.device.type for parameter in module.student.parameters()} == {"cpu"}
    assert teacher.model.device.type == "cpu"


def test_half_precision_with_a_gradient_scaler_is_refused(student_folder, teacher_folder):
    module = OnPolicyDistillation(str(student_folder), {"sums": LocalTeacher(str(teacher_folder))})
    data = AlternatingTasks(tasks={"sums": AdditionProblems()})
    module._trainer = SimpleNamespace(precision="16-mixed", datamodule=data)
    with pytest.raises(ConfigurationError, match="16-mixed"):
        module.setup("fit")


def test_classes_in_the_current_folder_can_be_named(tmp_path, monkeypatch, capsys):
    from lsm_lightning.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "argv", ["lsm-lightning", "fit"])
    assert main() == 2
    assert sys.path[0] == ""
    assert capsys.readouterr().err.startswith("error: ")
