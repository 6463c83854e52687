"""What repair is for: a teacher that knows `<think>` as one token only, and a student that writes it in pieces.

Both models are made here within a second. The teacher is certain of its answers, in its own spelling alone; the student
has the form of an answer and guesses the word. Thirty steps of the paper's objective make it right where the teacher
reads its own spelling, and ruin it where the teacher reads broken tags, whether or not the tags themselves are masked:
a mask hides a position from the loss and not from the teacher's context.
"""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from tiny import STUDENT_END, TEACHER_END, THINK_TAGS, chat_tokenizer, tiny_model, train_bpe
from transformers import PreTrainedTokenizerFast

from lsm_lightning.batching import TokenBatch, hidden_states
from lsm_lightning.cli import TRAINER_DEFAULTS
from lsm_lightning.datamodule import AlternatingTasks
from lsm_lightning.module import OnPolicyDistillation
from lsm_lightning.objectives import LocalSupportMatching
from lsm_lightning.objectives.head import OutputHead
from lsm_lightning.pretrained import render
from lsm_lightning.rollout import LocalEngine
from lsm_lightning.tasks.base import Episode, Split, Task
from lsm_lightning.teacher import LocalTeacher

WORDS = ("apple", "river", "stone", "drink", "coins", "cards")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
]


def question(word: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Say {word}"}]


def answer(word: str) -> str:
    return f"<think>{word}</think>{word}"


class Recall(Episode):
    """Asks for a word, thought and said."""

    def __init__(self, word: str) -> None:
        self.kind = word

    def messages(self) -> list[dict[str, str]]:
        return question(self.kind)

    def step(self, answered: str) -> None:
        self.done, self.reward = True, float(answered == answer(self.kind))


class Words(Task):
    max_new_tokens = 16

    def setup(self) -> None:
        pass

    def test_size(self) -> int:
        return 8 * len(WORDS)

    def episode(self, split: Split, index: int) -> Recall:
        return Recall(WORDS[index % len(WORDS)])


def taught_by_heart(
    folder: Path, tokenizer: PreTrainedTokenizerFast, answers: list[tuple[str, str]], *, steps: int, seed: int
) -> Path:
    """A model that imitates answers to questions about a word."""
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_model(seed=seed, initializer_range=0.05, **ends).train()
    prompts = render(tokenizer, [question(word) for word, _ in answers])
    responses = [
        [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for _, text in answers
    ]
    batch = TokenBatch.pad(prompts, responses, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        logits = OutputHead.of(model).all_logits(hidden_states(model, batch))
        torch.nn.functional.cross_entropy(logits, batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of student and teacher."""
    folder = tmp_path_factory.mktemp("models")
    guesses = [(word, answer(guess)) for word in WORDS for guess in WORDS]
    right = [(word, answer(word)) for word in WORDS]
    whole = chat_tokenizer(train_bpe(), TEACHER_END, whole_tags=THINK_TAGS)
    return (
        taught_by_heart(folder / "student", chat_tokenizer(train_bpe(), STUDENT_END), guesses, steps=100, seed=1),
        taught_by_heart(folder / "teacher", whole, right, steps=150, seed=2),
    )


def success(models: tuple[Path, Path], folder: Path, mask: str, steps: int = 30) -> float:
    """Share of right answers after training."""
    student, teacher = models
    module = OnPolicyDistillation(
        student=str(student),
        teachers={"words": LocalTeacher(str(teacher))},
        objective=LocalSupportMatching(k=32),
        engine=LocalEngine(),
        mask=mask,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    )
    data = AlternatingTasks(tasks={"words": Words()}, prompts_per_step=len(WORDS), samples_per_prompt=4)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=steps, default_root_dir=folder, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0, **TRAINER_DEFAULTS,
    )  # fmt: skip
    trainer.fit(module, data)
    return module.evaluate("words")["value"]


def test_repair_teaches_where_masks_and_raw_ids_do_harm(models, tmp_path):
    start = success(models, tmp_path, "repair", steps=1)
    assert 0.05 < start < 0.4
    assert success(models, tmp_path, "repair") > 0.6
    assert success(models, tmp_path, "tags") < start
    assert success(models, tmp_path, "none") < 0.05
