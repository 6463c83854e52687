"""The command `probe`, and the same look at the start of a fit, which changes nothing of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import LIGHTNINGS_ADVICE, started
from test_cli import ONE_CPU, ROOT, assert_one_error_line

from lsm_lightning.callbacks import probe as probe_module
from lsm_lightning.pretrained import load_tokenizer
from lsm_lightning.probing.report import PLAIN_WIDTH

pytestmark = LIGHTNINGS_ADVICE
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
NO_QUESTION = load_tokenizer("embedded:student").chat_template.replace("message['content']", "'...'")

Run = Callable[..., int]
Settings = dict[str, Any]


@pytest.fixture
def alone(settings: Settings, tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of a command on tiny models, one step of two problems, nothing evaluated."""

    def arguments(command: str, *more: str) -> list[str]:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(settings))
        fit = ["--summary.evaluate", "false"] if command == "fit" else []
        return [command, "--config", str(path), *fit, *more]

    return arguments


@pytest.fixture
def embedded(settings: Settings) -> Settings:
    """The same on the embedded models, where nothing is to be warned of."""
    settings["model"] |= {
        "student": "embedded:student",
        "teachers": {
            "sums": {"class_path": "lsm_lightning.teacher.LocalTeacher", "init_args": {"path": "embedded:math-teacher"}}
        },
        "mask": "repair",
    }
    settings["data"]["tasks"]["sums"]["init_args"] |= {"max_new_tokens": 64}
    return settings


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_quickstart_passes(run, monkeypatch, tmp_path, capsys):
    pytest.importorskip("textworld", reason="the alfworld extra is not installed")
    monkeypatch.chdir(tmp_path)
    assert run("probe", "--config", QUICKSTART, *ONE_CPU.split()) == 0
    said = capsys.readouterr().out
    assert said.rstrip().endswith("A run can start.")
    assert said.count("relation") == 2  # tokenalign's screen of each pair
    for words in ("part of a tag", "own answers", "the teacher solved", "<|im_end|>"):
        assert words in said
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_what_is_printed_is_plain_and_as_wide_as_it_should_be(embedded, run, alone, tmp_path, capsys):
    """Texts hold whatever they like: markup, control characters."""
    question = "Add [bold]2[/bold] and 3.\x1b[31m [link=x]" + "very " * 100 + "soon."
    (tmp_path / "train.jsonl").write_text(json.dumps({"problem": question, "answer": "5"}) + "\n")
    file = str(tmp_path / "train.jsonl")
    embedded["data"]["tasks"]["sums"] = {
        "class_path": "lsm_lightning.tasks.math.MathProblems",
        "init_args": {"train_file": file, "test_file": file, "max_new_tokens": 16, "instruction": "[red]Be brief."},
    }
    assert run(*alone("probe", "--probing.texts", "2")) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "[red]Be brief." in said
    assert max(map(len, said.splitlines())) <= PLAIN_WIDTH


def test_what_would_ruin_a_run_is_told_with_all_else_and_by_the_exit_status(embedded, run, alone, capfd):
    embedded["model"]["teachers"]["sums"]["init_args"]["chat_template"] = NO_QUESTION
    assert run(*alone("probe")) == 2
    said = capfd.readouterr()
    assert "Refused: 1 of these would ruin a run." in said.out
    assert_one_error_line(said.err, "leaves out what the task says")


def test_help_teaches(run, capsys):
    with pytest.raises(SystemExit):
        run("probe", "--help")
    said = capsys.readouterr().out
    assert "The exit status is 0 if a run can start" in said
    assert "--probing.texts" in said


@pytest.mark.parametrize("arguments", [["--probing.texts", "-1"], ["--probing.tokens", "0"], ["--probing.texts", "0"]])
def test_a_mistake_is_told_in_one_line(run, alone, capfd, arguments):
    assert run(*alone("probe", *arguments)) == 2
    assert_one_error_line(capfd.readouterr().err, arguments[1])


# ---- at the start of a fit ------------------------------------------------------------------------------------------


def test_a_fit_says_a_line_a_task(embedded, run, alone, capsys):
    assert run(*alone("fit")) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("probe ·")]
    assert len(told) == 1
    assert "17 ok;" in told[0]


def test_a_fit_that_would_be_for_nothing_does_not_start(embedded, run, alone, tmp_path, capfd):
    embedded["model"]["teachers"]["sums"]["init_args"]["chat_template"] = NO_QUESTION
    assert run(*alone("fit")) == 2
    assert_one_error_line(capfd.readouterr().err, "--probing.refuse false")
    assert not list(tmp_path.rglob("*.ckpt"))
    assert run(*alone("fit", "--probing.refuse", "false")) == 0
    assert "refused: teacher's template" in capfd.readouterr().out
    assert run(*alone("fit", "--probing.texts", "0")) == 0
    assert "probe ·" not in capfd.readouterr().out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(next(folder.rglob("last.ckpt")), weights_only=False)["state_dict"]


def differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.fixture
def trained(settings: Settings, run: Run, alone: Callable[..., list[str]], tmp_path: Path) -> Any:
    """The weights of a run of two steps whose dropout draws random numbers; resumed after the first, if asked to be."""
    settings["model"]["lora"] = {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.3}
    settings["model"]["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}

    def trained(name: str, texts: int, resumed: bool = False) -> dict[str, torch.Tensor]:
        folder = tmp_path / name
        common = ["--trainer.default_root_dir", str(folder), "--probing.texts", str(texts)]
        common += ["--checkpoint.dirpath", str(folder / "checkpoints")]
        if resumed:
            assert run(*alone("fit", *common, "--trainer.max_steps", "1")) == 0
            common += ["--ckpt_path", "last"]
        assert run(*alone("fit", *common, "--trainer.max_steps", "2")) == 0
        return weights(folder)

    return trained


def test_a_resumed_fit_is_the_same_bit_for_bit_with_and_without_a_look(trained):
    assert differing(trained("with", 4, resumed=True), trained("without", 0, resumed=True)) == []


def test_a_fit_is_the_same_bit_for_bit_even_after_a_look_that_draws_random_numbers(trained, monkeypatch):
    without = trained("without", 0)
    right = probe_module.probe_task

    def drawing(*arguments: Any, **options: Any) -> Any:
        torch.rand(1)
        return right(*arguments, **options)

    monkeypatch.setattr(probe_module, "probe_task", drawing)
    assert differing(trained("restored", 4), without) == []
    monkeypatch.setattr(probe_module, "restore_random_states", lambda *_: None)
    assert differing(trained("drawing", 4), without) != []


# ---- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("broken", "whole"), [(True, False), (False, False), (False, True)])
def test_processes_that_share_a_teacher_look_together(settings, alone, tmp_path, broken, whole):
    teacher = settings["model"]["teachers"]["sums"]["init_args"]
    teacher |= {"sharded": True} | ({"chat_template": NO_QUESTION} if broken else {})
    # Held whole by each process to write, or not at all.
    evaluate = ["--summary.evaluate", "true"] if whole else []
    arguments = alone("fit", "--trainer.devices", "2", "--trainer.strategy", "ddp", "--probing.texts", "2", *evaluate)
    with started(arguments, tmp_path / "output", processes=2) as both:
        assert both.wait() == ([2, 2] if broken else [0, 0]), both.said()
    assert ("refused: teacher's template" if broken else " ok") in both.said(0)
    assert "probe ·" not in both.said(1)
