"""A teacher in this process: a frozen transformers model with its own tokenizer and chat template."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lsm_lightning.batching import TokenBatch, group_by_length, hidden_states, rows_of, sampled_ids, spans
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives.head import OutputHead, check_head
from lsm_lightning.pretrained import (
    DType,
    check_vocabulary,
    context_of,
    load_model,
    load_skeleton,
    load_tokenizer,
    turn_end_ids,
)
from lsm_lightning.rollout.base import Sampling
from lsm_lightning.rollout.collect import Player
from lsm_lightning.rollout.local import LocalEngine
from lsm_lightning.sharding import gathered, load_sharded, spread
from lsm_lightning.teacher.scoring import ScoringTeacher, joined
from lsm_lightning.types import Support, Turn


class LocalTeacher(ScoringTeacher):
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
        super().__init__(path, chat_template)
        self.dtype: DType = dtype
        self.batch_tokens = batch_tokens
        self.batch_size = batch_size
        self.sharded = sharded
        self.offload = offload

    def setup(
        self,
        student: PreTrainedTokenizerBase,
        *,
        vocabulary: int,
        respell: bool,
        tokens: int | None,
        device: torch.device,
        added: int = 0,
    ) -> None:
        """See `Teacher.setup`."""
        self.tokenizer = load_tokenizer(self.path, self.chat_template)
        self.device = device
        self.across = distributed.is_initialized() and self.sharded
        self.model = self._load_sharded() if self.across else self._load()
        self._move(device)
        self.context = context_of(self.model.config)
        self._meet(
            student,
            rows=len(self.model.get_output_embeddings().weight),
            turn_end=turn_end_ids(self.model, self.tokenizer),
            vocabulary=vocabulary,
            respell=respell,
            tokens=tokens,
        )
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
        prompts, reading = self._read(turns)
        lengths = [len(prompt) + len(r) for prompt, r in zip(prompts, reading.responses, strict=True)]
        places = spans([len(turn.completion.ids) for turn in turns])
        sampled = sampled_ids(turns, added.device)
        parts: list[Support] = []
        order: list[Tensor] = []
        self._move(self.device)
        head = OutputHead.of(self.model)
        for group in self._batches(lengths):
            batch = TokenBatch.pad([prompts[i] for i in group], [reading.responses[i] for i in group], self.device)
            rows = rows_of(places, group, added.device)
            with torch.autocast(self.device.type, enabled=False):  # its own dtype decides
                position = reading.position_in(group).to(self.device)
                parts.extend(self._answers(head, batch, position, sampled[rows], added[rows]))
            order.append(rows)
        self._rest()
        support = joined(parts).rows(torch.cat(order).argsort())
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

        def log_probs(at: Int[Tensor, " m"]) -> Float[Tensor, "m v"]:
            return head.all_logits(hidden[at], exact=hidden.is_cuda).log_softmax(-1)

        return self._supports(log_probs, targets, position, sampled, added)
