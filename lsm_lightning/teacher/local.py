"""A teacher in this process: a frozen transformers model with its own tokenizer and chat template."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lsm_lightning.batching import TokenBatch, group_by_length, hidden_states, spans
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives.head import OutputHead, check_head
from lsm_lightning.pretrained import DType, check_model, load_model, load_tokenizer, render, turn_end_ids
from lsm_lightning.rollout.base import Sampling
from lsm_lightning.rollout.collect import Player
from lsm_lightning.rollout.local import LocalEngine
from lsm_lightning.teacher.base import Teacher
from lsm_lightning.types import Support, Turn
from tokenalign import Pair

LOGITS_AT_ONCE = 2**25
"""At most so many logits exist at once while scoring (128 MiB in float32)."""


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

    def setup(self, student: PreTrainedTokenizerBase, student_vocabulary: int, device: torch.device) -> None:
        """See `Teacher.setup`."""
        self.tokenizer = load_tokenizer(self.path, self.chat_template)
        self.model = load_model(self.path, self.dtype).requires_grad_(False)
        self.model.to(device)  # type: ignore[arg-type]
        check_head(self.model)
        self.head = OutputHead.of(self.model)
        self.turn_end = torch.tensor(sorted(turn_end_ids(self.model, self.tokenizer)), dtype=torch.long, device=device)
        self.pair = self._pair(student, student_vocabulary)
        self._shared = self._shared_ids(student_vocabulary).to(device)

    @torch.no_grad()
    def score(self, turns: Sequence[Turn], k: int) -> Support:
        """See `Teacher.score`; the student's tokens are read as they stand."""
        if k > int(self._shared.sum()):
            raise ConfigurationError(
                f"A support of k={k} tokens was asked for, but student and teacher '{self.path}' share only "
                f"{int(self._shared.sum())} tokens. Lower the objective's k."
            )
        prompts = render(self.tokenizer, [list(turn.prompt.messages) for turn in turns])
        # An id beyond the teacher's matrix (vocabularies are padded differently) is masked; here it only must not fail.
        rows = self.head.weight.shape[0]
        responses = [[i if i < rows else 0 for i in turn.completion.ids] for turn in turns]
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
        places = spans([len(response) for response in responses])
        parts: list[Support] = []
        order: list[int] = []
        for group in group_by_length(lengths, self.batch_tokens):
            batch = TokenBatch.pad([prompts[i] for i in group], [responses[i] for i in group], self.model.device)
            with torch.autocast(self.model.device.type, enabled=False):  # its own dtype decides
                parts.extend(self._top_k(hidden_states(self.model, batch), batch.targets, k))
            order.extend(place for i in group for place in places[i])
        return _joined(parts).rows(torch.tensor(order, device=self.model.device).argsort())

    def player(self, sampling: Sampling) -> Player:
        """See `Teacher.player`."""
        engine = LocalEngine.around(self.model, self.batch_size)
        return Player(
            engine=engine, tokenizer=self.tokenizer, turn_end=frozenset(self.turn_end.tolist()), sampling=sampling
        )

    def _top_k(self, hidden: Float[Tensor, "n d"], sampled: Int[Tensor, " n"], k: int) -> list[Support]:
        """Supports of consecutive positions, a chunk of logits at a time."""
        rows = max(1, LOGITS_AT_ONCE // self.head.weight.shape[0])
        return [self._top_k_of(*part, k) for part in zip(hidden.split(rows), sampled.split(rows), strict=True)]

    def _top_k_of(self, hidden: Float[Tensor, "n d"], sampled: Int[Tensor, " n"], k: int) -> Support:
        log_probs = self.head.all_logits(hidden).log_softmax(-1)
        top = log_probs.masked_fill(~self._shared, -torch.inf).topk(k, -1)
        return Support(
            ids=top.indices,
            log_probs=top.values,
            sampled=log_probs.gather(-1, sampled.unsqueeze(-1)).squeeze(-1),
            turn_end=log_probs[:, self.turn_end].logsumexp(-1),
        )

    def _pair(self, student: PreTrainedTokenizerBase, student_vocabulary: int) -> Pair:
        teacher_vocabulary = self.head.weight.shape[0]
        try:
            return Pair(
                student,
                self.tokenizer,
                student_size=max(student_vocabulary, len(student)),
                teacher_size=max(teacher_vocabulary, len(self.tokenizer)),
            )
        except ValueError as error:
            raise ConfigurationError(
                f"The tokenizers of student and teacher '{self.path}' cannot be compared: {error}"
            ) from error

    def _shared_ids(self, student_vocabulary: int) -> Bool[Tensor, " v"]:
        """Which of the teacher's output rows mean the same token in the student's vocabulary.

        Raises:
            ConfigurationError: The student's ids mean other tokens here, so they cannot be read as they stand.
        """
        to_teacher = torch.from_numpy(self.pair.vocab.to_teacher).long()
        same = to_teacher == torch.arange(len(to_teacher), device=to_teacher.device)
        moved = int((~same & (to_teacher >= 0)).sum())
        if moved:
            raise ConfigurationError(
                f"The vocabularies of the student and of the teacher '{self.path}' differ: {moved} of the student's "
                f"{len(to_teacher)} tokens have another id there. LocalTeacher reads the student's ids as they stand: "
                "choose a teacher of the same tokenizer family (`tokenalign.Pair(...).report()` tells more)."
            )
        shared = torch.zeros(self.head.weight.shape[0], dtype=torch.bool, device=same.device)
        shared[: len(same)] = same[: len(shared)]
        shared[student_vocabulary:] = False
        return shared


def _joined(parts: list[Support]) -> Support:
    return Support(
        ids=torch.cat([part.ids for part in parts]),
        log_probs=torch.cat([part.log_probs for part in parts]),
        sampled=torch.cat([part.sampled for part in parts]),
        turn_end=torch.cat([part.turn_end for part in parts]),
    )
