"""What teachers have in common that score an answer token by token, wherever their model runs."""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.pretrained import check_model, render
from lsm_lightning.teacher.base import Teacher
from lsm_lightning.teacher.reading import Reading, as_it_stands, respelled
from lsm_lightning.teacher.translation import Translation
from lsm_lightning.types import Support, Turn
from tokenalign import Pair

logger = logging.getLogger(__name__)
LOGITS_AT_ONCE = 2**24
"""At most so many log-probs over the vocabulary exist at once while scoring (64 MiB in float32)."""


class ScoringTeacher(Teacher):
    """Reads the prompt under its own template, and the answer in its own spelling or as it stands.

    Args:
        path: Its model: an embedded one, a folder in transformers format, or a hub id.
        chat_template: A jinja2 template that replaces the tokenizer's own.
    """

    tokenizer: PreTrainedTokenizerBase
    device: torch.device

    def __init__(self, path: str, chat_template: str | None) -> None:
        self.path = path
        self.chat_template = chat_template
        self._told_of_length = False

    def check(self) -> None:
        """See `Teacher.check`."""
        check_model(self.path)

    def _meet(
        self,
        student: PreTrainedTokenizerBase,
        *,
        rows: int,
        turn_end: Collection[int],
        vocabulary: int,
        respell: bool,
        tokens: int | None,
    ) -> None:
        """Compare tokenizers, with `tokenizer` and `device` in place.

        Args:
            student: The student's tokenizer.
            rows: Of the teacher's output matrix.
            turn_end: All tokens at which the teacher ends a turn.
            vocabulary: See `Teacher.setup`, as the others.
            respell: See there.
            tokens: See there.

        Raises:
            ConfigurationError: The two have less in common than is asked for.
        """
        self.rows = rows
        self.turn_end = torch.tensor(sorted(turn_end), dtype=torch.long, device=self.device)
        self.pair = self._pair(student, vocabulary)
        self.respell = respell
        translate = Translation.of_meaning if respell else Translation.of_ids
        self.translation = translate(self.pair, vocabulary, rows, self.path, self.device)
        if tokens is not None and tokens > self.translation.known:
            raise ConfigurationError(
                f"A support of k={tokens} tokens was asked for, but the student '{student.name_or_path}' and the "
                f"teacher '{self.path}' share only {self.translation.known}. Lower model.objective.init_args.k."
            )
        self.tokens = int(self.translation.members.sum()) if tokens is None else tokens

    def _read(self, turns: Sequence[Turn]) -> tuple[list[list[int]], Reading]:
        """The prompts of some turns as the teacher's tokens, and their answers; nothing of those that are too long."""
        prompts = render(self.tokenizer, [list(turn.prompt.messages) for turn in turns])
        reading = respelled(turns, self.pair) if self.respell else as_it_stands(turns, self.rows)
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, reading.responses, strict=True)]
        too_long = [i for i, length in enumerate(lengths) if self.context is not None and length > self.context]
        if not too_long:
            return prompts, reading
        if not self._told_of_length:
            self._told_of_length = True
            logger.warning(
                f"Nothing is learned from {len(too_long)} of {len(turns)} answers, which with their prompts are longer "
                f"(up to {max(lengths)} tokens) than what the teacher '{self.path}' reads ({self.context}). Lower the "
                "task's max_new_tokens, shorten its prompt, or give the teacher a longer context. Said once."
            )
        prompts = [prompt[:1] if i in too_long else prompt for i, prompt in enumerate(prompts)]
        return prompts, reading.without(too_long)

    def _supports(
        self,
        log_probs: Callable[[Int[Tensor, " m"]], Float[Tensor, "m v"]],
        targets: Int[Tensor, " t"],
        position: Int[Tensor, " n"],
        sampled: Int[Tensor, " n"],
        added: Int[Tensor, "n c"],
    ) -> Iterator[Support]:
        """Supports of N student positions in a row, a chunk of log-probs at a time.

        Args:
            log_probs: Gives the teacher's at some of the T places of its own reading, to be overwritten.
            targets: What it reads at each of these places.
            position: The place of each student position; -1 for none.
            sampled: The student's tokens.
            added: See `Teacher.score`.
        """
        rows = max(1, LOGITS_AT_ONCE // self.rows)
        for part in torch.arange(len(position), device=position.device).split(rows):
            at = position[part].clamp(min=0)
            yield self._answer(log_probs(at), targets[at], position[part] >= 0, sampled[part], added[part])

    def _answer(
        self,
        log_probs: Float[Tensor, "n v"],
        target: Int[Tensor, " n"],
        comparable: Bool[Tensor, " n"],
        sampled: Int[Tensor, " n"],
        added: Int[Tensor, "n c"],
    ) -> Support:
        turn_end = log_probs[:, self.turn_end].logsumexp(-1)
        log_probs = self.translation.merge_(log_probs)
        of_target = log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        ids, members, lost = self.translation.translate(log_probs, self.tokens, added)
        members = members.masked_fill(~comparable.unsqueeze(-1), -torch.inf)
        alike = comparable & (self.translation.to_teacher[sampled] == target)
        return Support(
            ids=ids.masked_fill(members == -torch.inf, 0),
            log_probs=members,
            sampled=of_target.masked_fill(~alike, -torch.inf),
            turn_end=turn_end,
            lost=lost,
            comparable=comparable,
            alike=alike,
        )

    def _pair(self, student: PreTrainedTokenizerBase, vocabulary: int) -> Pair:
        try:
            return Pair(
                student,
                self.tokenizer,
                student_size=max(vocabulary, len(student)),
                teacher_size=max(self.rows, len(self.tokenizer)),
            )
        except ValueError as error:
            raise ConfigurationError(
                f"The tokenizers of student and teacher '{self.path}' cannot be compared: {error}"
            ) from error


def joined(parts: Sequence[Support]) -> Support:
    """Supports laid end to end."""
    return Support(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Support)})
