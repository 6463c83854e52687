"""A teacher in this process: a frozen transformers model with its own tokenizer and chat template."""

from collections.abc import Iterator, Sequence
from dataclasses import fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lsm_lightning.batching import TokenBatch, group_by_length, hidden_states, rows_of, spans
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives.head import OutputHead, check_head
from lsm_lightning.pretrained import (
    DType,
    check_model,
    check_vocabulary,
    load_model,
    load_tokenizer,
    render,
    turn_end_ids,
)
from lsm_lightning.rollout.base import Sampling
from lsm_lightning.rollout.collect import Player
from lsm_lightning.rollout.local import LocalEngine
from lsm_lightning.teacher.base import Teacher
from lsm_lightning.teacher.reading import Reading, as_it_stands, respelled
from lsm_lightning.teacher.translation import Translation
from lsm_lightning.types import Support, Turn
from tokenalign import Pair

LOGITS_AT_ONCE = 2**24
"""At most so many logits exist at once while scoring (64 MiB in float32)."""


class LocalTeacher(Teacher):
    """A frozen model on the student's device, which reads the prompt under its own chat template.

    Args:
        path: An embedded model (`embedded:math-teacher`), a folder in transformers format, or a hub id.
        dtype: Of its weights; `auto` takes what the model was saved in.
        chat_template: A jinja2 template that replaces the tokenizer's own.
        batch_tokens: Prompt and response tokens scored side by side; lower it where memory is short.
        batch_size: Answers written side by side when the teacher itself is evaluated.
    """

    def __init__(
        self,
        path: str,
        dtype: DType = "auto",
        chat_template: str | None = None,
        batch_tokens: int = 16384,
        batch_size: int = 256,
    ) -> None:
        if batch_tokens < 1 or batch_size < 1:
            raise ConfigurationError(
                f"LocalTeacher(batch_tokens={batch_tokens}, batch_size={batch_size}): both must be at least 1."
            )
        self.path = path
        self.dtype: DType = dtype
        self.chat_template = chat_template
        self.batch_tokens = batch_tokens
        self.batch_size = batch_size

    def check(self) -> None:
        """See `Teacher.check`."""
        check_model(self.path)

    def setup(
        self,
        student: PreTrainedTokenizerBase,
        *,
        vocabulary: int,
        respell: bool,
        tokens: int | None,
        device: torch.device,
    ) -> None:
        """See `Teacher.setup`."""
        self.tokenizer = load_tokenizer(self.path, self.chat_template)
        self.model = load_model(self.path, self.dtype).requires_grad_(False).eval()
        self.model.to(device)
        check_head(self.model, self.path)
        check_vocabulary(self.model, self.tokenizer, self.path)
        self.head = OutputHead.of(self.model)
        self.turn_end = torch.tensor(sorted(turn_end_ids(self.model, self.tokenizer)), dtype=torch.long, device=device)
        self.pair = self._pair(student, vocabulary)
        self.respell = respell
        translate = Translation.of_meaning if respell else Translation.of_ids
        self.translation = translate(self.pair, vocabulary, self.head.weight.shape[0], self.path, device)
        if tokens is not None and tokens > self.translation.known:
            raise ConfigurationError(
                f"A support of k={tokens} tokens was asked for, but student and teacher '{self.path}' share only "
                f"{self.translation.known} tokens. Lower the objective's k."
            )
        self.tokens = int(self.translation.members.sum()) if tokens is None else tokens

    @torch.no_grad()
    def score(self, turns: Sequence[Turn], added: Int[Tensor, "n c"]) -> Support:
        """See `Teacher.score`.

        Raises:
            ConfigurationError: The teacher's log-probs are not finite.
        """
        prompts = render(self.tokenizer, [list(turn.prompt.messages) for turn in turns])
        reading = respelled(turns, self.pair) if self.respell else as_it_stands(turns, self.head.weight.shape[0])
        lengths = [len(prompt) + len(r) for prompt, r in zip(prompts, reading.responses, strict=True)]
        places = spans([len(turn.completion.ids) for turn in turns])
        sampled = torch.tensor([i for t in turns for i in t.completion.ids], dtype=torch.long, device=added.device)
        parts: list[Support] = []
        order: list[Tensor] = []
        for group in group_by_length(lengths, self.batch_tokens) or [[]]:
            batch = TokenBatch.pad(
                [prompts[i] for i in group], [reading.responses[i] for i in group], self.model.device
            )
            rows = rows_of(places, group, added.device)
            with torch.autocast(self.model.device.type, enabled=False):  # its own dtype decides
                position = _position(reading, group).to(self.model.device)
                parts.extend(self._answers(batch, position, sampled[rows], added[rows]))
            order.append(rows)
        support = _joined(parts).rows(torch.cat(order).argsort())
        if bool((support.log_probs.isnan().any() | support.sampled.isnan().any()).item()):
            raise ConfigurationError(
                f"The teacher '{self.path}' answers with log-probs that are not finite, in {self.model.dtype}: set its "
                "dtype to float32, or check its weights."
            )
        return support

    def player(self, sampling: Sampling) -> Player:
        """See `Teacher.player`."""
        engine = LocalEngine.around(self.model, self.batch_size)
        return Player(
            engine=engine, tokenizer=self.tokenizer, turn_end=frozenset(self.turn_end.tolist()), sampling=sampling
        )

    def _answers(
        self,
        batch: TokenBatch,
        position: Int[Tensor, " n"],
        sampled: Int[Tensor, " n"],
        added: Int[Tensor, "n c"],
    ) -> Iterator[Support]:
        """Supports of consecutive student positions, a chunk of logits at a time."""
        hidden, targets = hidden_states(self.model, batch), batch.targets
        if not len(targets):  # the teacher cannot spell anything of these texts
            hidden, targets = hidden.new_zeros(1, hidden.shape[1]), targets.new_zeros(1)
        rows = max(1, LOGITS_AT_ONCE // self.head.weight.shape[0])
        for part in torch.arange(len(position), device=position.device).split(rows):
            at = position[part].clamp(min=0)
            yield self._answer(hidden[at], targets[at], position[part] >= 0, sampled[part], added[part])

    def _answer(
        self,
        hidden: Float[Tensor, "n d"],
        target: Int[Tensor, " n"],
        comparable: Bool[Tensor, " n"],
        sampled: Int[Tensor, " n"],
        added: Int[Tensor, "n c"],
    ) -> Support:
        log_probs = self.head.all_logits(hidden).log_softmax(-1)
        turn_end = log_probs[:, self.turn_end].logsumexp(-1)
        log_probs = self.translation.merged(log_probs)
        ids, members, lost = self.translation.translate(log_probs, self.tokens, added)
        members = members.masked_fill(~comparable.unsqueeze(-1), -torch.inf)
        alike = comparable & (self.translation.to_teacher[sampled] == target)
        of_target = log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
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
                teacher_size=max(self.head.weight.shape[0], len(self.tokenizer)),
            )
        except ValueError as error:
            raise ConfigurationError(
                f"The tokenizers of student and teacher '{self.path}' cannot be compared: {error}"
            ) from error


def _position(reading: Reading, group: Sequence[int]) -> Int[Tensor, " n"]:
    """`position` of some turns end to end, counted over all of the group's responses."""
    starts = [places.start for places in spans([len(reading.responses[i]) for i in group])]
    parts = [(reading.position[i], start) for i, start in zip(group, starts, strict=True)]
    moved = [torch.where(position < 0, -1, position + start) for position, start in parts]
    return torch.cat(moved) if moved else torch.zeros(0, dtype=torch.long)


def _joined(parts: list[Support]) -> Support:
    return Support(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Support)})
