"""A teacher in this process: a frozen transformers model with its own tokenizer and chat template."""

from collections.abc import Iterator, Sequence
from dataclasses import fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lsm_lightning.batching import TokenBatch, group_by_length, hidden_states, rows_of, spans
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives.head import OutputHead, check_head
from lsm_lightning.pretrained import (
    DType,
    check_model,
    check_vocabulary,
    load_model,
    load_skeleton,
    load_tokenizer,
    render,
    turn_end_ids,
)
from lsm_lightning.rollout.base import Sampling
from lsm_lightning.rollout.collect import Player
from lsm_lightning.rollout.local import LocalEngine
from lsm_lightning.sharding import gathered, load_sharded, spread
from lsm_lightning.teacher.base import Teacher
from lsm_lightning.teacher.reading import Reading, as_it_stands, respelled
from lsm_lightning.teacher.translation import Translation
from lsm_lightning.types import Support, Turn
from tokenalign import Pair

LOGITS_AT_ONCE = 2**24
"""At most so many logits exist at once while scoring (64 MiB in float32)."""


class LocalTeacher(Teacher):
    """A frozen model on the student's device, which reads the prompt under its own chat template.

    Its logits are summed in float32 or wider on a GPU, where that is free. On a CPU those of a half-precision teacher
    are rounded to its type, as the model itself does it, and not worth the last digits.

    Args:
        path: An embedded model (`embedded:math-teacher`), a folder in transformers format, or a hub id.
        dtype: Of its weights; `auto` takes what the model was saved in.
        chat_template: A jinja2 template that replaces the tokenizer's own.
        batch_tokens: Prompt and response tokens scored side by side; lower it where memory is short.
        batch_size: Answers written side by side when the teacher itself is evaluated.
        sharded: Spread the teacher over the processes (FSDP2), whatever the student's strategy is: for one that does
            not fit on a device. While it is evaluated each process holds all of it (`summary.evaluate`).
        offload: Keep it in main memory between scoring.
    """

    def __init__(
        self,
        path: str,
        dtype: DType = "auto",
        chat_template: str | None = None,
        batch_tokens: int = 16384,
        batch_size: int = 256,
        sharded: bool = False,
        offload: bool = False,
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
        self.sharded = sharded
        self.offload = offload

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
        self.device = device
        self.across = distributed.is_initialized() and self.sharded
        self.model = self._load_sharded() if self.across else self._load()
        self._move(device)
        self.rows = len(self.model.get_output_embeddings().weight)
        self.turn_end = torch.tensor(sorted(turn_end_ids(self.model, self.tokenizer)), dtype=torch.long, device=device)
        self.pair = self._pair(student, vocabulary)
        self.respell = respell
        translate = Translation.of_meaning if respell else Translation.of_ids
        self.translation = translate(self.pair, vocabulary, self.rows, self.path, device)
        if tokens is not None and tokens > self.translation.known:
            raise ConfigurationError(
                f"A support of k={tokens} tokens was asked for, but the student '{student.name_or_path}' and the "
                f"teacher '{self.path}' share only {self.translation.known}. Lower model.objective.init_args.k."
            )
        self.tokens = int(self.translation.members.sum()) if tokens is None else tokens
        self._rest()

    def _load(self) -> PreTrainedModel:
        model = load_model(self.path, self.dtype).requires_grad_(False)
        check_head(model, self.path)
        check_vocabulary(model, self.tokenizer, self.path)
        return model

    def _load_sharded(self) -> PreTrainedModel:
        mesh = init_device_mesh(self.device.type, (distributed.get_world_size(),))
        return load_sharded(
            self._load, lambda: load_skeleton(self.path).requires_grad_(False), mesh, device=self.device
        ).eval()

    def _move(self, device: torch.device) -> None:
        module: torch.nn.Module = self.model  # whose `to` takes a device; the type of the model's own does not
        module.to(device)

    def _rest(self) -> None:
        """Leave the device to others."""
        if self.across:
            spread(self.model)
        if self.offload:
            self._move(torch.device("cpu"))

    @torch.no_grad()
    def score(self, turns: Sequence[Turn], added: Int[Tensor, "n c"]) -> Support:
        """See `Teacher.score`.

        Raises:
            ConfigurationError: The teacher's log-probs are not finite.
        """
        prompts = render(self.tokenizer, [list(turn.prompt.messages) for turn in turns])
        reading = respelled(turns, self.pair) if self.respell else as_it_stands(turns, self.rows)
        lengths = [len(prompt) + len(r) for prompt, r in zip(prompts, reading.responses, strict=True)]
        places = spans([len(turn.completion.ids) for turn in turns])
        sampled = torch.tensor([i for t in turns for i in t.completion.ids], dtype=torch.long, device=added.device)
        parts: list[Support] = []
        order: list[Tensor] = []
        self._move(self.device)
        head = OutputHead.of(self.model)
        for group in self._batches(lengths):
            batch = TokenBatch.pad([prompts[i] for i in group], [reading.responses[i] for i in group], self.device)
            rows = rows_of(places, group, added.device)
            with torch.autocast(self.device.type, enabled=False):  # its own dtype decides
                position = _position(reading, group).to(self.device)
                parts.extend(self._answers(head, batch, position, sampled[rows], added[rows]))
            order.append(rows)
        self._rest()
        support = _joined(parts).rows(torch.cat(order).argsort())
        if bool((support.log_probs.isnan().any() | support.sampled.isnan().any()).item()):
            raise ConfigurationError(
                f"The teacher '{self.path}' answers with log-probs that are not finite, in {self.model.dtype}: set its "
                "dtype to float32, or check its weights."
            )
        return support

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Layers of a sharded teacher are gathered by all processes together, so all run equally many batches."""
        groups = group_by_length(lengths, self.batch_tokens) or [[]]
        if self.across:
            most = torch.tensor(len(groups), device=self.device)
            distributed.all_reduce(most, distributed.ReduceOp.MAX)
            groups += [[]] * (int(most) - len(groups))
        return groups

    def player(self, sampling: Sampling) -> Player:
        """See `Teacher.player`."""
        self._move(self.device)
        if self.across:
            gathered(self.model)
        engine = LocalEngine.around(self.model, self.batch_size)
        return Player(
            engine=engine, tokenizer=self.tokenizer, turn_end=frozenset(self.turn_end.tolist()), sampling=sampling
        )

    def _answers(
        self,
        head: OutputHead,
        batch: TokenBatch,
        position: Int[Tensor, " n"],
        sampled: Int[Tensor, " n"],
        added: Int[Tensor, "n c"],
    ) -> Iterator[Support]:
        """Supports of consecutive student positions, a chunk of logits at a time."""
        hidden, targets = hidden_states(self.model, batch), batch.targets
        if not len(targets):  # the teacher cannot spell anything of these texts
            hidden, targets = hidden.new_zeros(1, hidden.shape[1]), targets.new_zeros(1)
        rows = max(1, LOGITS_AT_ONCE // self.rows)
        for part in torch.arange(len(position), device=position.device).split(rows):
            at = position[part].clamp(min=0)
            log_probs = head.all_logits(hidden[at], exact=hidden.is_cuda).log_softmax(-1)
            yield self._answer(log_probs, targets[at], position[part] >= 0, sampled[part], added[part])

    def _answer(
        self,
        log_probs: Float[Tensor, "n v"],
        target: Int[Tensor, " n"],
        comparable: Bool[Tensor, " n"],
        sampled: Int[Tensor, " n"],
        added: Int[Tensor, "n c"],
    ) -> Support:
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
                teacher_size=max(self.rows, len(self.tokenizer)),
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
