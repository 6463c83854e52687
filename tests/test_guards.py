"""What stops a run in order, and what a run must survive."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import TEACHER_END, chat_tokenizer, save_tiny, tiny_model, train_bpe
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from lsm_lightning import module as module_module
from lsm_lightning.datamodule import AlternatingTasks
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.module import SKIPPED_STEPS_ALLOWED, OnPolicyDistillation
from lsm_lightning.objectives import LocalSupportMatching
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


def test_a_run_that_learns_nothing_ends(run, arguments, monkeypatch, capsys, caplog):
    right = module_module.loss_mask

    def nothing(*arguments):
        mask = right(*arguments)
        mask.keep[:] = False
        return mask

    monkeypatch.setattr(module_module, "loss_mask", nothing)
    assert run(*arguments, "--summary.evaluate", "false") == 2
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["Skipped a step: the mask 'tags' left no position to learn from."] * SKIPPED_STEPS_ALLOWED
    assert capsys.readouterr().err.startswith("error: The mask 'tags' left no position")


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
        (["--ckpt_path", "no/such.ckpt"], "There is no checkpoint 'no/such.ckpt'"),
        (["--ckpt_path", __file__], "is not a checkpoint"),
        (
            ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "-1"],
            "model.optimizer: Invalid learning rate",
        ),
        (["--seed_everything", "-5"], "seed_everything=-5"),
        (["--checkpoint.save_top_k", "-1"], "save_top_k=-1"),
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


# ---- models that do not fit -----------------------------------------------------------------------------------------

Folders = dict[str, Path]
"""The student's and the teacher's."""


def respoil(folder: Path, spoil: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change a model's weights."""
    weights = load_file(folder / "model.safetensors")
    spoil(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def weights_with(value: float, folder: Path) -> None:
    respoil(folder, lambda weights: weights["model.embed_tokens.weight"].index_fill_(0, torch.tensor([50]), value))


def not_a_number_in_the_teacher(folders: Folders) -> None:
    weights_with(torch.nan, folders["teacher"])


def infinity_in_the_teacher(folders: Folders) -> None:
    weights_with(torch.inf, folders["teacher"])


def not_a_number_in_the_student(folders: Folders) -> None:
    weights_with(torch.nan, folders["student"])


def untied_with_one_bad_row(folder: Path) -> None:
    """No logit of a text without this token is touched."""
    tiny_model("qwen2-untied", seed=4, eos_token_id=1, pad_token_id=0).save_pretrained(folder)
    weights_with(torch.nan, folder)


def not_a_number_where_none_looks_in_the_teacher(folders: Folders) -> None:
    untied_with_one_bad_row(folders["teacher"])


def not_a_number_where_none_looks_in_the_student(folders: Folders) -> None:
    untied_with_one_bad_row(folders["student"])


def narrower(folder: Path) -> None:
    """Weights of another width than the configuration says."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 48, "head_dim": 16}))


def another_width_in_the_teacher(folders: Folders) -> None:
    narrower(folders["teacher"])


def another_width_in_the_student(folders: Folders) -> None:
    narrower(folders["student"])


def fewer_rows(folder: Path) -> None:
    """An output matrix that is smaller than the tokenizer."""
    tiny_model(vocabulary=300, eos_token_id=1, pad_token_id=0).save_pretrained(folder)


def ids_beyond_the_student(folders: Folders) -> None:
    fewer_rows(folders["student"])


def ids_beyond_the_teacher(folders: Folders) -> None:
    fewer_rows(folders["teacher"])


def another_vocabulary(folders: Folders) -> None:
    save_tiny(folders["teacher"], chat_tokenizer(train_bpe(["another text altogether"] * 3, 300), TEACHER_END))


UNFIT: list[tuple[Callable[[Folders], None], list[str]]] = [
    (not_a_number_in_the_teacher, ["{teacher}", "model.embed_tokens.weight", "not finite", "dtype"]),
    (infinity_in_the_teacher, ["{teacher}", "model.embed_tokens.weight", "not finite", "dtype"]),
    (not_a_number_in_the_student, ["{student}", "model.embed_tokens.weight", "not finite", "dtype"]),
    (not_a_number_where_none_looks_in_the_teacher, ["{teacher}", "model.embed_tokens.weight", "not finite", "dtype"]),
    (not_a_number_where_none_looks_in_the_student, ["{student}", "model.embed_tokens.weight", "not finite", "dtype"]),
    (another_width_in_the_teacher, ["{teacher}", "cannot be loaded", "32", "48"]),
    (another_width_in_the_student, ["{student}", "cannot be loaded", "32", "48"]),
    (ids_beyond_the_student, ["{student}", "340 tokens", "300 rows"]),
    (ids_beyond_the_teacher, ["{teacher}", "340 tokens", "300 rows"]),
    (another_vocabulary, ["student", "{teacher}", "differ", "model.mask to repair"]),
]


@pytest.fixture
def folders(settings, student_folder, teacher_folder, tmp_path) -> Folders:
    """Copies to be spoilt, which the settings name."""
    copies = {
        "student": Path(shutil.copytree(student_folder, tmp_path / "a-student")),
        "teacher": Path(shutil.copytree(teacher_folder, tmp_path / "a-teacher")),
    }
    settings["model"]["student"] = str(copies["student"])
    settings["model"]["teachers"]["sums"]["init_args"]["path"] = str(copies["teacher"])
    return copies


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """Steps that were begun; none is gone through with."""
    begun: list[int] = []

    def training_step(self, batch, batch_idx):
        begun.append(batch_idx)
        raise ConfigurationError("a step was begun")

    monkeypatch.setattr(OnPolicyDistillation, "training_step", training_step)
    return begun


@pytest.mark.parametrize("mask", ["tags", "repair"])
@pytest.mark.parametrize(("spoil", "told"), UNFIT, ids=[spoil.__name__ for spoil, _ in UNFIT])
def test_models_that_do_not_fit_are_told_before_the_first_step(
    settings, folders, steps, run, tmp_path, capsys, spoil, told, mask
):
    settings["model"]["mask"] = mask
    spoil(folders)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    capsys.readouterr()
    assert run("fit", "--config", str(tmp_path / "run.yaml"), "--summary.evaluate", "false") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    if spoil is another_vocabulary and mask == "repair":  # which is what the message advises
        assert steps == [0]
        return
    assert steps == []
    assert line.startswith("error: ")
    for part in told:
        assert part.format(**folders) in line


@pytest.mark.parametrize("packing", [True, False])
def test_a_student_that_would_mix_packed_sequences_may_not_pack(
    settings, folders, steps, run, tmp_path, capsys, packing
):
    settings["model"]["packing"] = packing
    small = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=340, num_attention_heads=2, init_std=0.2, pad_token_id=0, eos_token_id=1, **small)
    OPTForCausalLM(config).save_pretrained(folders["student"])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    run("fit", "--config", str(tmp_path / "run.yaml"), "--summary.evaluate", "false")
    assert steps == ([] if packing else [0])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert (f"model.packing: OPTForCausalLM ('{folders['student']}')" in line) == packing


@pytest.mark.parametrize("source", ["teacher", "student", "union", "sampled_added"])
def test_a_support_larger_than_the_vocabulary_is_told_before_the_first_step(
    settings, folders, steps, run, tmp_path, capsys, source
):
    settings["model"]["objective"]["init_args"] = {"k": 341, "source": source}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert run("fit", "--config", str(tmp_path / "run.yaml"), "--summary.evaluate", "false") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert steps == []
    for part in ("error: ", "k=341", str(folders["student"]), "Lower model.objective.init_args.k"):
        assert part in line
    assert (str(folders["teacher"]) in line) == (source in ("teacher", "sampled_added"))


def test_models_that_fit_begin_their_first_step(settings, folders, steps, run, tmp_path):
    """The checks above can fail."""
    settings["model"]["objective"]["init_args"] = {"k": 330, "source": "union"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    run("fit", "--config", str(tmp_path / "run.yaml"), "--summary.evaluate", "false")
    assert steps == [0]


def test_the_default_objective_is_the_papers(student_folder, teacher_folder):
    module = OnPolicyDistillation(str(student_folder), {"sums": LocalTeacher(str(teacher_folder))})
    assert isinstance(module.objective, LocalSupportMatching)
    assert module.objective.teacher_tokens == 32


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
