"""The models inside the package, and the run that uses them."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from safetensors import safe_open
from scripted import say
from teachers import asked, teacher_at

from lsm_lightning.cli import TRAINER_DEFAULTS
from lsm_lightning.datamodule import AlternatingTasks
from lsm_lightning.evaluation import evaluate
from lsm_lightning.masks import loss_mask
from lsm_lightning.module import OnPolicyDistillation
from lsm_lightning.objectives import LocalSupportMatching
from lsm_lightning.pretrained import EMBEDDED_FOLDER, load_model, load_tokenizer, turn_end_ids
from lsm_lightning.rollout import LocalEngine, Sampling
from lsm_lightning.rollout.collect import Player
from lsm_lightning.tasks.alfworld import AlfworldGames
from lsm_lightning.tasks.math import AdditionProblems, sample_problem, worked_answer
from lsm_lightning.teacher import LocalTeacher
from lsm_lightning.types import Support, Turn
from tokenalign import Pair, Relation

ROOT = Path(__file__).parent.parent
NAMES = ("student", "math-teacher", "alfworld-teacher")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
]


def player_of(name: str) -> Player:
    model, tokenizer = load_model(f"embedded:{name}", "float32"), load_tokenizer(f"embedded:{name}")
    engine = LocalEngine.around(model)
    return Player(engine=engine, tokenizer=tokenizer, turn_end=turn_end_ids(model, tokenizer), sampling=Sampling())


def success(name: str, problems: int) -> float:
    played = evaluate(AdditionProblems(), player_of(name), indices=range(problems), seed=0)
    return sum(trajectory.reward for trajectory in played) / problems


def test_they_are_small_and_hold_safetensors_only():
    files = [path for path in EMBEDDED_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja"}
    assert sorted(path.parent.name for path in files if path.suffix == ".safetensors") == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_finite(name):
    with safe_open(EMBEDDED_FOLDER / name / "model.safetensors", "pt") as weights:
        assert all(weights.get_tensor(key).isfinite().all() for key in weights.keys())  # noqa: SIM118


@pytest.mark.parametrize("teacher", NAMES[1:])
def test_student_and_teachers_share_a_vocabulary_and_spell_tags_and_turn_ends_differently(teacher):
    pair = Pair(load_tokenizer("embedded:student"), load_tokenizer(f"embedded:{teacher}"))
    assert pair.relation is Relation.SHARED_VOCAB_OTHER_SPLIT
    assert len(pair.collisions) == 0
    student, other = pair.conventions
    assert student.turn_end.isdisjoint(other.turn_end)
    assert pair.report().policy == "tags"


@pytest.fixture(scope="module")
def answered() -> tuple[Player, list[Turn]]:
    """The student, and what it wrote."""
    student = player_of("student")
    conversations = [[{"role": "user", "content": sample_problem(0, "train", i, 3).question}] for i in range(16)]
    return student, say(student, conversations, max_new_tokens=64)


def scored(answered: tuple[Player, list[Turn]], *, respell: bool) -> tuple[LocalTeacher, Support]:
    """What the math teacher says to it."""
    student, turns = answered
    vocabulary = len(student.tokenizer)
    teacher = teacher_at("embedded:math-teacher", student.tokenizer, vocabulary=vocabulary, respell=respell, tokens=32)
    return teacher, asked(teacher, turns)


def test_the_mask_leaves_out_the_spelling_and_keeps_the_reasoning(answered):
    student, (turn, *_) = answered
    teacher, _ = scored(answered, respell=False)
    keep = loss_mask(teacher.pair, [turn], "tags").keep
    pieces = [student.tokenizer.decode([i]) for i in turn.completion.ids]
    dropped = [piece for piece, kept in zip(pieces, keep.tolist(), strict=True) if not kept]
    assert dropped == ["<", "think", ">", "</", "think", ">", "<|im_end|>"]
    assert keep.sum() > 20


def test_repair_leaves_out_only_what_lies_inside_a_tag(answered):
    """Its start is comparable, and so is the end of the turn."""
    student, (turn, *_) = answered
    _, support = scored(answered, respell=True)
    comparable = support.comparable[: len(turn.completion.ids)]
    pieces = [student.tokenizer.decode([i]) for i in turn.completion.ids]
    dropped = [piece for piece, kept in zip(pieces, comparable.tolist(), strict=True) if not kept]
    assert dropped == ["think", ">", "think", ">"]


def test_the_teacher_prefers_its_own_spelling_and_reads_the_students(answered):
    """What makes the mask matter: at the first tag the teacher gives the student's spelling little probability."""
    teacher, support = scored(answered, respell=False)
    _, turns = answered
    keep = loss_mask(teacher.pair, turns, "tags").keep
    first = torch.tensor([0, *[len(turn.completion.ids) for turn in turns[:-1]]]).cumsum(0)
    assert support.sampled[first].exp().max() < 0.2
    best_kept = support.log_probs[keep][:, 0].exp()
    assert best_kept.median() > 0.95


def test_in_its_own_spelling_the_teacher_is_surer_and_knows_how_to_end(answered):
    plain, repaired = (scored(answered, respell=respell)[1] for respell in (False, True))
    both = plain.comparable & repaired.comparable
    surest = [support.log_probs[both].max(-1).values.exp().mean().item() for support in (plain, repaired)]
    assert surest[1] > surest[0]
    student, turns = answered
    ends = torch.tensor([i in student.turn_end for turn in turns for i in turn.completion.ids])
    assert repaired.sampled[ends].exp().median() > 0.9


def test_the_math_teacher_is_good_and_the_student_is_not():
    assert success("math-teacher", 100) >= 0.9
    assert success("student", 100) <= 0.5


def test_a_worked_answer_is_worth_a_point():
    task = AdditionProblems()
    episode = task.episode("test", 0)
    episode.step(worked_answer(sample_problem(0, "test", 0, 3)))
    assert episode.reward == 1.0


def test_the_quickstart_lowers_the_kl_in_its_first_steps(tmp_path):
    """Three steps of each task, with the quickstart's own settings; the ALFWorld extra is needed."""
    pytest.importorskip("textworld", reason="the alfworld extra is not installed")
    settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    optimizer = settings["model"]["optimizer"]["init_args"]
    history: dict[str, list[float]] = {"math": [], "alfworld": []}

    class Listen(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            history[batch.task].append(float(trainer.callback_metrics[f"{batch.task}/train/kl"]))

    module = OnPolicyDistillation(
        student="embedded:student",
        teachers={name: LocalTeacher(f"embedded:{name}-teacher") for name in history},
        objective=LocalSupportMatching(**settings["model"]["objective"]["init_args"]),
        engine=LocalEngine(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, **optimizer),
        micro_batch_tokens=settings["model"]["micro_batch_tokens"],
    )
    data = AlternatingTasks(
        tasks={"math": AdditionProblems(), "alfworld": AlfworldGames()},
        prompts_per_step=settings["data"]["prompts_per_step"],
        samples_per_prompt=settings["data"]["samples_per_prompt"],
    )
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=6, default_root_dir=tmp_path, logger=False, callbacks=[Listen()],
        enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0, **TRAINER_DEFAULTS,
    )  # fmt: skip
    trainer.fit(module, data)
    assert [len(values) for values in history.values()] == [3, 3]
    for task, values in history.items():
        assert values[-1] < values[0], (task, values)


def test_the_summary_of_a_run_is_complete(run, tmp_path, monkeypatch, capsys):
    """The files and the table at the end, of a run of two steps on math alone."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--trainer.max_steps", "2", "--data.eval_problems", "20", "--trainer.accelerator", "cpu"]
    assert run("fit", "--config", str(ROOT / "configs" / "math.yaml"), *arguments) == 0
    summary = json.loads((tmp_path / "runs" / "math" / "summary.json").read_text())
    for part in ("before", "after", "teacher"):
        score = summary[part]["math"]
        assert score.keys() == {"value", "n", "low", "high"}
        assert score["n"] == 20
        assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1
    assert summary["steps"] == 2
    assert summary["seed"] == 0
    assert summary["seconds"] > 0
    assert summary["versions"].keys() >= {"torch", "lightning", "transformers"}
    assert (tmp_path / "runs" / "math" / "curves.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for word in ("before", "after", "teacher", "last.ckpt", "tensorboard --logdir", "curves.png", "Next:"):
        assert word in printed
