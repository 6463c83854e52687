import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SPECIAL, STUDENT_END, TEACHER_END, THINK_TAGS, chat_tokenizer, save_tiny, train_bpe
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lsm_lightning.cli import main
from lsm_lightning.pretrained import load_model, render
from lsm_lightning.types import Completion, Prompt, Turn

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def student_tokenizer() -> PreTrainedTokenizerFast:
    """Spells the reasoning tags in pieces."""
    return chat_tokenizer(train_bpe(), STUDENT_END)


@pytest.fixture(scope="session")
def teacher_tokenizer() -> PreTrainedTokenizerFast:
    """The same vocabulary; the tags are single tokens, and a turn ends otherwise."""
    return chat_tokenizer(train_bpe(), TEACHER_END, whole_tags=THINK_TAGS)


@pytest.fixture(scope="session")
def student_folder(student_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "student", student_tokenizer, seed=1)


@pytest.fixture(scope="session")
def teacher_folder(teacher_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "teacher", teacher_tokenizer, seed=2)


@pytest.fixture
def student(student_folder: Path) -> PreTrainedModel:
    """In float64, so that laws can be checked to many digits."""
    return load_model(str(student_folder), "float32").double()


@pytest.fixture(scope="session")
def turns(student_tokenizer: PreTrainedTokenizerFast) -> list[Turn]:
    """Prompts and made-up answers of many lengths, some of one token, some cut off."""
    rng = random.Random(3)
    questions = [
        "Say apple",
        "How many coins?",
        "A shop sold 7 cards on Monday and 5 on Tuesday.",
        "now",
        "7+5",
        "stone",
        "say river",
        "drink",
    ]
    conversations = [[{"role": "user", "content": question}] for question in questions]
    made = []
    for number, (messages, prompt) in enumerate(
        zip(conversations, render(student_tokenizer, conversations), strict=True)
    ):
        truncated = number % 3 == 0
        text = [rng.randrange(len(SPECIAL), len(student_tokenizer)) for _ in range([4, 9, 1, 6, 2, 0, 12, 3][number])]
        ids = text if truncated else [*text, student_tokenizer.eos_token_id]
        made.append(
            Turn(
                prompt=Prompt(messages=messages, ids=prompt),
                completion=Completion(ids=ids, log_probs=[-rng.uniform(2, 9) for _ in ids], truncated=truncated),
                answer=student_tokenizer.decode(text),
            )
        )
    return made


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The exit status of the program with these arguments, in this process."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # seeding leaves traces in the environment
        monkeypatch.setenv(name, "0")

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["lsm-lightning", *arguments])
        return main()

    return run


@pytest.fixture
def settings(student_folder: Path, teacher_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A run that would train for one step, to be spoilt."""
    teacher = {"class_path": "lsm_lightning.teacher.LocalTeacher", "init_args": {"path": str(teacher_folder)}}
    return {
        "model": {
            "student": str(student_folder),
            "teachers": {"sums": teacher},
            "objective": {"class_path": "lsm_lightning.objectives.LocalSupportMatching", "init_args": {"k": 8}},
            "mask": "tags",
        },
        "data": {
            "tasks": {
                "sums": {
                    "class_path": "lsm_lightning.tasks.math.AdditionProblems",
                    "init_args": {"max_new_tokens": 4, "test_size": 2},
                }
            },
            "prompts_per_step": 2,
            "samples_per_prompt": 1,
        },
        "trainer": {"max_steps": 1, "accelerator": "cpu", "default_root_dir": str(tmp_path), "logger": False},
    }
