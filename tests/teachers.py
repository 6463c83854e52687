"""Teachers to be asked, and slow ways to what they must answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from slow import response_logits
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lsm_lightning.pretrained import render
from lsm_lightning.teacher import LocalTeacher
from lsm_lightning.types import Completion, Prompt, Support, Turn

K, VOCABULARY = 8, 340
TEXTS = ["river stone", "<think>7+5=12</think> \\boxed{12}", "apple", "say <think>thinking", ""]


def teacher_at(
    folder: Path | str,
    student: PreTrainedTokenizerFast,
    *,
    vocabulary: int = VOCABULARY,
    respell: bool = False,
    tokens: int | None = K,
    **settings: object,
) -> LocalTeacher:
    """Ready to be asked; without `respell` it reads the student's tokens as they stand."""
    teacher = LocalTeacher(str(folder), **settings)
    teacher.check()
    teacher.setup(student, vocabulary=vocabulary, respell=respell, tokens=tokens, device=torch.device("cpu"))
    return teacher


def nothing_added(turns: Sequence[Turn]) -> Tensor:
    return torch.zeros((sum(len(turn.completion.ids) for turn in turns), 0), dtype=torch.long)


def asked(teacher: LocalTeacher, turns: Sequence[Turn], added: Tensor | None = None) -> Support:
    return teacher.score(turns, nothing_added(turns) if added is None else added)


def members(support: Support) -> list[dict[int, float]]:
    """At each position the student's ids and their log-probs."""
    found = []
    for ids, log_probs in zip(support.ids.tolist(), support.log_probs.tolist(), strict=True):
        kept = [(i, value) for i, value in zip(ids, log_probs, strict=True) if value > float("-inf")]
        assert len(dict(kept)) == len(kept), "an id is there twice"
        found.append(dict(kept))
    return found


def slow_log_probs(teacher: LocalTeacher, turns: Sequence[Turn]) -> Tensor:
    """`[N, V]` under the teacher's own template, one turn at a time, the student's tokens as they stand."""
    prompts = render(teacher.tokenizer, [list(turn.prompt.messages) for turn in turns])
    with torch.no_grad():
        logits = [response_logits(teacher.model, p, t.completion.ids) for p, t in zip(prompts, turns, strict=True)]
    return torch.cat(logits).double().log_softmax(-1)


def written(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, ended: bool = True, pieces: bool = False
) -> list[Turn]:
    """Answers to as many questions, in the tokenizer's spelling or letter by letter."""
    messages = [[{"role": "user", "content": f"Say {number}"}] for number in range(len(texts))]
    turns = []
    for conversation, prompt, text in zip(messages, render(tokenizer, messages), texts, strict=True):
        parts = list(text) if pieces else [text]
        ids = [i for part in parts for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
        ids += [tokenizer.eos_token_id] * ended
        turns.append(
            Turn(
                prompt=Prompt(messages=conversation, ids=prompt),
                completion=Completion(ids=ids, log_probs=[-3.0] * len(ids), truncated=not ended),
                answer=text,
            )
        )
    return turns


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a teacher says at one of the student's positions, where its own spelling has a token that starts there."""

    log_probs: Tensor
    """`[V]`, float64."""
    token: int
    """What it reads there itself."""


def slow_answers(teacher: LocalTeacher, student: PreTrainedTokenizerFast, turns: Sequence[Turn]) -> list[Answer | None]:
    """One turn at a time, from the texts alone: each side's tokens as text, and where they start (ASCII only)."""
    answers: list[Answer | None] = []
    own, end = teacher.tokenizer, teacher.tokenizer.eos_token_id
    prompts = render(own, [list(turn.prompt.messages) for turn in turns])
    for turn, prompt in zip(turns, prompts, strict=True):
        ids = list(turn.completion.ids)
        ended = ids[-1:] == [student.eos_token_id]
        pieces = [student.decode([i]) for i in (ids[:-1] if ended else ids)]
        theirs = own("".join(pieces), add_special_tokens=False)["input_ids"]
        starts = {len(own.decode(theirs[:j])): j for j in reversed(range(len(theirs)))}
        starts |= {len("".join(pieces)): len(theirs)} if ended else {}
        theirs = theirs + [end] * ended
        with torch.no_grad():
            log_probs = response_logits(teacher.model, prompt, theirs).double().log_softmax(-1)
        for i in range(len(ids)):
            at = starts.get(len("".join(pieces[:i])))
            answers.append(None if at is None else Answer(log_probs=log_probs[at], token=theirs[at]))
    return answers


@dataclass(frozen=True, kw_only=True)
class Meanings:
    """Which of the student's tokens means what a teacher's does: by its text, and by ending a turn."""

    student: PreTrainedTokenizerFast
    teacher: PreTrainedTokenizerFast
    vocabulary: int = VOCABULARY

    def of(self, theirs: int) -> int | None:
        """The student's id."""
        if theirs == self.teacher.eos_token_id:
            return self.student.eos_token_id
        token = self.teacher.convert_ids_to_tokens(theirs)
        ours = self.student.get_vocab().get(token)
        if ours is None or ours >= self.vocabulary or ours == self.student.eos_token_id:
            return None
        control = [token in controls(tokenizer) for tokenizer in (self.student, self.teacher)]
        return ours if control[0] == control[1] else None

    def rivals(self) -> set[int]:
        """Student ids that look like the teacher's end of a turn and end nothing."""
        ours = self.student.get_vocab().get(self.teacher.eos_token)
        return {ours} - {None, self.student.eos_token_id}

    def support(self, log_probs: Tensor, k: int) -> tuple[dict[int, float], float]:
        """The student's ids with the teacher's log-probs of its top K, and the probability of those without an id."""
        known = range(len(self.teacher))
        top = sorted(known, key=lambda i: -log_probs[i].item())[:k]
        found = {self.of(i): log_probs[i].item() for i in top if self.of(i) is not None}
        return found, sum(log_probs[i].exp().item() for i in top if self.of(i) is None)


def controls(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
