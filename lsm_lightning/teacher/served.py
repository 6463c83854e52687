"""A teacher on vLLM servers, asked for its most probable tokens at each place of a text."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lsm_lightning.batching import end_to_end, sampled_ids
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.pretrained import DType, load_skeleton, load_tokenizer, locate, turn_end_ids
from lsm_lightning.processes import gather, together
from lsm_lightning.rollout.base import Sampling
from lsm_lightning.rollout.collect import Player
from lsm_lightning.rollout.vllm import VLLMEngine
from lsm_lightning.serving import protocol
from lsm_lightning.serving.client import BadAnswer, Question, ServerError
from lsm_lightning.serving.fleet import Fleet, Servers
from lsm_lightning.serving.protocol import Scores
from lsm_lightning.teacher.scoring import ScoringTeacher, joined
from lsm_lightning.types import Support, Turn

logger = logging.getLogger(__name__)
SAMPLE = "What is 12 + 30? <think>12 + 30 = 42</think>"
"""A text that tells whether a server has the tokenizer that it should have."""
SAME = 0.25
"""Nats by which one model's log-probs of it may differ from one start to the next, in whatever type."""


class ServedTeacher(ScoringTeacher):
    """A frozen model on vLLM servers, which reads the prompt under its own chat template.

    It says the same as a `LocalTeacher` of the same weights about its top tokens and the token it reads, and nothing of
    others: objectives that compare over the student's own tokens, or over all, need a local one. Ends of a turn that
    are not among the top tokens count as impossible.

    Args:
        path: The model's name for its tokenizer, chat template and configuration; its weights are the servers' matter.
        servers: Which ones, and how patiently they are asked. Servers that are there need `--max-logprobs` as large as
            the support, or some more where the teacher has several ends of a turn.
        dtype: Of the weights of a server that is started; `auto` takes what the model was saved in.
        chat_template: A jinja2 template that replaces the tokenizer's own.
    """

    elsewhere = True

    fleet: Fleet

    def __init__(self, path: str, servers: Servers, dtype: DType = "auto", chat_template: str | None = None) -> None:
        super().__init__(path, chat_template)
        if servers.colocated:
            raise ConfigurationError(
                f"The servers of the teacher '{path}': launch.colocated=true is for rollouts, a teacher's server does "
                "not sleep. Give it a GPU of its own, or take a LocalTeacher (sharded or with offload)."
            )
        self.servers = servers
        self.dtype: DType = dtype
        self.fleet = Fleet(servers, self._is_as_before)
        self._said: dict[str, Scores] = {}
        """What each server made of a text at first."""

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
        """See `Teacher.setup`.

        Raises:
            ServerError: A server does not answer.
        """
        if tokens is None:
            raise ConfigurationError(
                f"model.objective compares over all tokens, of which the served teacher '{self.path}' gives the most "
                "probable only: use LocalSupportMatching, or a LocalTeacher."
            )
        if added:
            raise ConfigurationError(
                f"model.objective.init_args.source compares over {added} of the student's own top tokens, about which "
                f"the served teacher '{self.path}' says nothing: set it to teacher or sampled_added, or use a "
                "LocalTeacher."
            )
        self.tokenizer = load_tokenizer(self.path, self.chat_template)
        self.device = device
        model = load_skeleton(self.path)
        self._meet(
            student,
            rows=len(model.get_output_embeddings().weight),
            turn_end=turn_end_ids(model, self.tokenizer),
            vocabulary=vocabulary,
            respell=respell,
            tokens=tokens,
        )
        # The ends of a turn may be one token of the support, and then leave room for others.
        self.asked = self.tokens + max(0, len(self.turn_end) - 1)
        saved = getattr(model.config, "dtype", None) or torch.float32
        self._options = {
            "--model": locate(self.path),
            "--served-model-name": "teacher",
            "--dtype": str(saved if self.dtype == "auto" else self.dtype).removeprefix("torch."),
            "--max-logprobs": str(self.asked),
        }
        self._connect()

    def _connect(self) -> None:
        """Find the servers; all processes call it together."""
        if not self.fleet.is_open:
            self.fleet.find_place()
            self.fleet.open([word for option in self._options.items() for word in option])
            for said in gather(together(self._check_servers)):
                self._said.update(said)
            assert self.fleet.model is not None
            self.context = self.fleet.model.context - 1  # a server writes a token besides

    @torch.no_grad()
    def score(self, turns: Sequence[Turn], added: Int[Tensor, "n c"]) -> Support:
        """See `Teacher.score`; of further ids, only those that are served are members.

        Raises:
            ServerError: A server did not answer, or not what it was asked.
        """
        self._connect()
        prompts, reading = self._read(turns)
        texts = [(p, r) for p, r in zip(prompts, reading.responses, strict=True) if r]
        served = self.fleet.ask(
            [(number, self._question(number, len(texts), *text)) for number, text in enumerate(texts)]
        )
        targets = end_to_end([response for _, response in texts] or [[0]], self.device)
        ids, values = _together(served, self.asked + 1, self.device)

        def log_probs(at: Int[Tensor, " m"]) -> Float[Tensor, "m v"]:
            everything = values.new_full((len(at), self.rows), -torch.inf)
            return everything.scatter(-1, ids[at], values[at])

        position = reading.position_in(range(len(turns))).to(self.device)
        sampled = sampled_ids(turns, self.device)
        return joined([*self._supports(log_probs, targets, position, sampled, added)])

    def player(self, sampling: Sampling) -> Player:
        """See `Teacher.player`."""
        self._connect()
        return Player(
            engine=VLLMEngine.around(self.fleet),
            tokenizer=self.tokenizer,
            turn_end=frozenset(self.turn_end.tolist()),
            sampling=sampling,
        )

    def cancel(self) -> None:
        """See `Teacher.cancel`."""
        self.fleet.cancel()

    def close(self) -> None:
        """See `Teacher.close`."""
        self.fleet.close()

    def _question(self, number: int, of: int, prompt: list[int], response: list[int]) -> Question[Scores]:
        ids = [*prompt, *response]

        def read(answer: Any) -> Scores:
            scores = protocol.read_scores(answer, ids, self.asked, first=len(prompt))
            if scores.ids.max() >= self.rows:
                raise BadAnswer(f"names the token {scores.ids.max()}, of {self.rows} that '{self.path}' has")
            return scores

        assert self.fleet.model is not None
        return Question(
            what=f"score answer {number + 1} of {of}",
            path=protocol.COMPLETIONS,
            body=protocol.scoring(self.fleet.model.name, ids, self.asked),
            read=read,
        )

    def _check_servers(self) -> dict[str, Scores]:
        """What this process's servers make of a text."""
        said: dict[str, Scores] = {}
        for url in self.fleet.urls:
            said[url] = self._check(url)
            if (root := self.fleet.root_of[url]) is not None and Path(root).name != Path(locate(self.path)).name:
                logger.warning(
                    f"The server {url} has the model '{root}', and the teacher's path is '{self.path}': make sure that "
                    "they are the same."
                )
        return said

    def _check(self, url: str) -> Scores:
        """Ask for a score, and whether a text is read as the same tokens."""
        assert self.fleet.model is not None
        own: list[int] = self.tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
        body = protocol.scoring(self.fleet.model.name, own, self.asked) | {"prompt": SAMPLE}
        question = Question(
            what=f"score a text with the {self.asked} most probable tokens",
            path=protocol.COMPLETIONS,
            body=body,
            read=lambda answer: list(map(int, answer["choices"][0]["prompt_token_ids"])),
        )
        if self.fleet.ask_at(url, question) != own:
            raise ConfigurationError(
                f"The server {url} reads a text as other tokens than the tokenizer of '{self.path}' does: it has "
                "another model. Set the teacher's path to the model that it was started with."
            )
        return self.fleet.ask_at(url, self._question(0, 1, own[:1], own[1:]))

    def _is_as_before(self, url: str) -> bool:
        """Whether a server that was away has the model that it had."""
        scores, before = self._check(url), self._said[url]
        gap = np.abs(np.sort(scores.log_probs, -1)[:, -1] - np.sort(before.log_probs, -1)[:, -1]).mean()
        if not gap < SAME:
            raise ServerError(
                f"The server {url} was away and has come back with another model: the log-probs of its most probable "
                f"tokens differ by {gap:.2g} nats from before. Start it with '{self.path}' and go on with --ckpt_path."
            )
        return True


def _together(
    served: Sequence[Scores], width: int, device: torch.device
) -> tuple[Int[Tensor, "t e"], Float[Tensor, "t e"]]:
    """Ids and log-probs of all places in a row; of a place that is none, where there are none."""
    nothing = Scores(ids=np.zeros((1, width), np.int64), log_probs=np.full((1, width), -np.inf, np.float32))
    all_ids, all_values = zip(*((scores.ids, scores.log_probs) for scores in served or [nothing]), strict=True)
    return (
        torch.from_numpy(np.concatenate(all_ids)).to(device),
        torch.from_numpy(np.concatenate(all_values)).to(device),
    )
