"""A rollout engine on vLLM servers, which take over the student's weights after each step."""

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# As a module: it imports this package too.
from lsm_lightning import export
from lsm_lightning.batching import TokenBatch, hidden_states
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives.head import OutputHead
from lsm_lightning.pretrained import DType, context_of
from lsm_lightning.processes import gather, together
from lsm_lightning.rollout.base import Conversations, Engine, Request, Sampling, check_finite
from lsm_lightning.serving import protocol
from lsm_lightning.serving.client import BadAnswer, Question, ServerError
from lsm_lightning.serving.fleet import SLEEP_MODE, Fleet, Servers
from lsm_lightning.serving.gpu import free_memory, give_back_cache
from lsm_lightning.serving.scratch import scratch_folder
from lsm_lightning.sharding import rest
from lsm_lightning.student import plain_state_dict
from lsm_lightning.types import Completion

PROBES, PROBE_TOKENS, PROBE_TOP = 4, 160, 8
"""So many texts of so many tokens, which is more than a block of any prefix cache, and so many of the most probable
tokens after each tell whose weights a server has."""
RENEWAL = ("/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume")
"""How a server takes over new weights."""
WAKING = (
    "/wake_up?tags=weights",
    "/collective_rpc",
    "/wake_up?tags=kv_cache",
    "/reset_prefix_cache",
    "/update_weight_version",
)
"""The same for one that sleeps: its weights have a place before its cache has one, and with that it goes on."""
SLEEP = "/sleep?level=2"
"""At this level weights are thrown away like the cache; new ones come anyway."""
VERSION = "/weight_info"
"""What a server says of the weights that it has."""
HEADLESS = frozenset({"gemma2", "gemma3n", "gemma3n_text"})
"""Kinds of models to which vLLM gives no output matrix besides the embedding, so that it refuses weights for one."""
RENEWING, FALLING_ASLEEP = "take over new weights", "sleep"
"""See `Question.what`."""
GIB = 2**30


class VLLMEngine(Engine):
    """Generates on vLLM servers, on GPUs of their own, on those of the trainer, or on a CPU.

    After each step the student is written to a folder, from which the servers load it: they finish what they are at,
    load, forget the prompts that they have cached, and go on; a few next tokens tell whether they have done so. Servers
    that are there need vLLM 0.32 or newer, the student's configuration and VLLM_SERVER_DEV_MODE=1, and those on other
    machines must see `folder`.

    With `servers.launch.colocated` each process has a server on its own GPU, which sleeps from the end of the rollouts
    until the next weights come: it forgets the old ones and its cache, and the student has the room.

    Sampling is vLLM's: a text follows from the weights, the prompt and its seed as far as vLLM computes the same logits
    whatever else is in a batch.

    Args:
        servers: Which ones, and how patiently they are asked.
        folder: Where weights go on their way to the servers; a temporary one, if not given.
        dtype: Of the weights that are written and of a server that is started; `auto` is the student's own.
        tolerance: Nats by which the servers' log-probs may differ from the student's, on average, right after they have
            taken over its weights: rounding, 1e-6 in float32 and some hundredths in bfloat16. By default 0.001 where
            weights are written in float32, and 0.25 otherwise.
    """

    fleet: Fleet

    def __init__(
        self, servers: Servers, folder: str | None = None, dtype: DType = "auto", tolerance: float | None = None
    ) -> None:
        if tolerance is not None and not tolerance > 0:
            raise ConfigurationError(f"VLLMEngine(tolerance={tolerance:g}): use a positive number of nats.")
        self.servers = servers
        self.folder = folder
        self.dtype: DType = dtype
        self.tolerance = tolerance
        proof = Question(what="tell whose weights it has", path=VERSION, read=self._prove)
        self.fleet = Fleet(servers, self._renewed, proof)
        self._scratch: Callable[[], object] | None = None
        self._weights: Path | None = None
        self._probe: _Probe | None = None
        self._first: _Probe | None = None
        """Of the first weights: in a short type a step changes less than is lost by rounding, but many steps do not."""
        self._limit = 0.0
        self._run, self._syncs = "", 0
        self._asleep = False

    @classmethod
    def around(cls, fleet: Fleet) -> "VLLMEngine":
        """An engine that writes with what servers have, and changes nothing there: for frozen models such as a teacher.

        Args:
            fleet: Is open, and closed by others.
        """
        engine = cls(fleet.settings)
        engine.fleet = fleet
        return engine

    def sync(self, model: PreTrainedModel) -> None:
        """Have the servers take over the weights, adapters merged, sharded ones gathered; the first call finds them.

        Raises:
            ServerError: A server does not do its part or answers with other weights afterwards; or none can be reached,
                at the first call one.
            TrainingDivergedError: The weights give log-probs that are not finite.
        """
        probe = _Probe.of(model)
        fleet = self.fleet
        fresh = not fleet.is_open
        if fresh:
            fleet.find_place()
        dtype: torch.dtype = model.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        self._limit = self.tolerance or (0.25 if torch.finfo(dtype).bits < 32 else 0.001)
        weights = plain_state_dict(model, keep=fleet.place.is_first_here, dtype=dtype)
        if fresh:
            self._agree()
        together(lambda: self._write(model, weights))
        del weights
        if self.servers.colocated:
            give_back_cache()
        if fresh:
            fleet.open(self._options(model, dtype))
        earlier = [known for known in (self._first, self._probe) if known is not None]
        self._first, self._probe = self._first or probe, probe
        self._syncs += 1
        fleet.renew(lambda url: self._renew(url, earlier))
        self._asleep = False

    def converse(
        self,
        conversations: Conversations,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        turn_end: AbstractSet[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """See `Engine.converse`.

        Raises:
            ConfigurationError: A prompt and the longest answer exceed the servers' context.
            ServerError: A request was not answered.
        """
        assert self.fleet.model is not None, "sync() comes before converse()"
        assert not self._asleep, "after rest(), too"
        name = self.fleet.model.name
        first_prompts: dict[tuple[int, ...], int] = {}
        server: dict[int, int] = {}

        def questions() -> dict[int, tuple[int, Question[Completion]]]:
            asked = conversations.requests()
            remedy = "start it with a larger --max-model-len"
            self.check_room(asked.values(), max_new_tokens, whose="server", remedy=remedy)
            # Where one prompt of a conversation is cached, its next ones go too; equal first prompts share a server.
            for number, request in asked.items():
                if number not in server:
                    server[number] = first_prompts.setdefault(tuple(request.ids), len(first_prompts))
            return {number: (server[number], question(number, request)) for number, request in asked.items()}

        def question(number: int, request: Request) -> Question[Completion]:
            return Question(
                what=f"write the answer in conversation {number + 1} of {len(server)}",
                path=protocol.COMPLETIONS,
                body=protocol.writing(name, request, sampling, max_new_tokens, turn_end),
                read=lambda answer: protocol.read_written(answer, request, sampling, max_new_tokens, turn_end),
            )

        def answered(answers: Mapping[int, Completion]) -> dict[int, tuple[int, Question[Completion]]]:
            conversations.take(answers)
            return questions()

        self.fleet.converse(questions(), answered)

    def room(self, prompt_tokens: int) -> int | None:
        """See `Engine.room`; `sync` comes before."""
        assert self.fleet.model is not None, "sync() comes before room()"
        return self.fleet.model.context - prompt_tokens

    def rest(self) -> None:
        """See `Engine.rest`; servers elsewhere go on as they are.

        Raises:
            ServerError: One does not sleep, or has not given its memory back.
        """
        if self.servers.colocated and self.fleet.is_open and not self._asleep:
            together(self._sleep_all)
            self._asleep = True

    def close(self) -> None:
        """See `Engine.close`."""
        self.fleet.close()
        if self._scratch is not None:
            self._scratch()
        self._scratch = self._weights = self._probe = self._first = None
        self._syncs, self._asleep = 0, False

    # ---- weights ----------------------------------------------------------------------------------------------------

    @property
    def _version(self) -> str:
        """By which a server tells that it has these weights; one that was started again has forgotten it."""
        return f"{self._run}-{self._syncs}"

    def _agree(self) -> None:
        """On a name for this run, and on the folder of this machine's first process."""
        place, folder = self.fleet.place, self.folder
        if folder is None and place.is_first_here:
            folder, self._scratch = scratch_folder(self)
        folder = gather(folder)[place.first_here]
        assert folder is not None
        self._weights = Path(folder).expanduser().resolve() / f"student-{place.first_here}"
        self._run = gather(uuid4().hex)[0]

    def _write(self, model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
        assert self._weights is not None
        if self.fleet.place.is_first_here:
            # On a CPU vLLM packs the output matrix apart, also where it is the embedding, and has to be given both.
            twice = model.config.model_type not in HEADLESS
            export.write_weights(self._weights, model, weights, card="A run's present weights.\n", tied_twice=twice)

    def _options(self, model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
        options = {
            "--model": str(self._weights),
            "--tokenizer": str(model.name_or_path),
            "--served-model-name": "student",
            "--dtype": str(dtype).removeprefix("torch."),
        }
        return [word for option in options.items() for word in option]

    def _renewed(self, url: str) -> bool:
        """Give a server that was away the present weights again."""
        self._renew(url, [])
        return True

    def _renew(self, url: str, earlier: "Sequence[_Probe]") -> None:
        """Have a server load the weights, and make sure that it has."""
        assert self._probe is not None
        bodies: dict[str, dict[str, object]] = {
            "/collective_rpc": {"method": "reload_weights", "kwargs": {"weights_path": str(self._weights)}},
            "/update_weight_version": {"new_version": self._version},
        }
        for _ in range(self.servers.attempts):
            for path in WAKING if self.servers.colocated and self._sleeps(url) else RENEWAL:
                body = bodies.get(path, {})
                self.fleet.ask_at(url, Question(what=RENEWING, path=path, body=body, read=lambda answer: None))
            told = self._told(url, self._probe)
            if self._is_present(url):  # else it has started anew in between
                self._check(url, told, self._probe, earlier)
                return
        raise ServerError(
            f"The server {url} loses the student's weights again and again: does another run use it, or does it start "
            "anew all the time?"
        )

    def _prove(self, told: Mapping[str, object]) -> None:
        """That a server has the present weights still, by its own account."""
        if told["weight_version"] != self._version:
            raise BadAnswer("has lost the student's weights, as one that was started anew or that another run uses")

    def _is_present(self, url: str) -> bool:
        """Whether a server has the present weights by its own account."""
        version: str = self.fleet.ask_at(
            url, Question(what=RENEWING, path=VERSION, read=lambda answer: str(answer["weight_version"]))
        )
        return version == self._version

    def _sleeps(self, url: str, what: str = RENEWING) -> bool:
        """Whether a server sleeps by its own account; one that was started again does not."""
        asleep: bool = self.fleet.ask_at(
            url, Question(what=what, path="/is_sleeping", read=lambda answer: answer["is_sleeping"] is True)
        )
        return asleep

    def _sleep_all(self) -> None:
        for url in self.fleet.kept:
            try:
                self._sleep(url)
            except ServerError:
                if not self.fleet.has_ended:  # and holds nothing any more; the next `sync` starts it again
                    raise

    def _sleep(self, url: str) -> None:
        """Let a server sleep, and make sure that it does.

        Its word is not enough: it also says so when it has no sleep mode, and when its device has none.
        """
        assert self._weights is not None
        before = free_memory()
        self.fleet.ask_at(url, Question(what=FALLING_ASLEEP, path=SLEEP, body={}, read=lambda answer: None))
        asleep, after = self._sleeps(url, FALLING_ASLEEP), free_memory()
        gained = None if before is None or after is None else after - before
        least = sum(file.stat().st_size for file in self._weights.glob("*.safetensors")) // 2
        if asleep and (gained is None or gained >= least):
            return
        how = "says that it is awake"
        if asleep and gained is not None:
            how = f"has given back {gained / GIB:.2f} GiB of its GPU's memory, less than its weights alone take"
        raise ServerError(
            f"The server {url} was told to sleep and {how}. It has to run with {' '.join(SLEEP_MODE)} and alone with "
            "this process on its GPU; or give servers GPUs of their own (servers.launch.colocated=false)."
        )

    def _check(
        self, url: str, told: Sequence[Mapping[int, float]], probe: "_Probe", earlier: "Sequence[_Probe]"
    ) -> None:
        """Compare a server's next tokens with those of the student as it is, and as it was before and at first."""
        gap = probe.gap(told)
        before = min((known.gap(told) for known in earlier), default=torch.inf)
        if not gap <= self._limit or before < gap / 2:
            whose = f", and by {before:.2g} nats from those before" if before < gap else ""
            raise ServerError(
                f"The server {url} was told to load the weights in {self._weights}, and its log-probs differ from the "
                f"student's by {gap:.2g} nats{whose} (tolerance={self._limit:g}). It has to be started with the "
                "student's configuration and see this folder; if it computes in a shorter type, raise the tolerance."
            )

    def _told(self, url: str, probe: "_Probe") -> list[dict[int, float]]:
        assert self.fleet.model is not None
        name = self.fleet.model.name

        def question(ids: list[int]) -> Question[dict[int, float]]:
            return Question(
                what=RENEWING,
                path=protocol.COMPLETIONS,
                body=protocol.next_tokens(name, ids, PROBE_TOP),
                read=lambda answer: protocol.read_next_tokens(answer, ids, PROBE_TOP),
            )

        return [self.fleet.ask_at(url, question(ids)) for ids in probe.texts]


@dataclass(frozen=True, kw_only=True)
class _Probe:
    """What a model says after some texts of random tokens."""

    texts: list[list[int]]
    log_probs: Float[Tensor, "p v"]

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel) -> "_Probe":
        """All processes call it together."""
        rows = len(model.get_output_embeddings().weight)
        limit = context_of(model.config)
        length = PROBE_TOKENS if limit is None else min(PROBE_TOKENS, limit - 1)
        texts = np.random.default_rng(0).integers(rows, size=(PROBES, length)).tolist()
        training = model.training
        model.eval()
        with torch.autocast(model.device.type, enabled=False):
            hidden = hidden_states(model, TokenBatch.pad(texts, [[0]] * PROBES, model.device))
            log_probs = OutputHead.of(model).all_logits(hidden, exact=True).log_softmax(-1)
        model.train(training)
        rest(model)
        check_finite(bool(log_probs.isfinite().all()))
        return cls(texts=texts, log_probs=log_probs.float().cpu())

    def gap(self, told: Sequence[Mapping[int, float]]) -> float:
        """Mean absolute difference from what a server says, in nats."""
        differences = [
            abs(value - self.log_probs[text, token].item())
            for text, of_text in enumerate(told)
            for token, value in of_text.items()
        ]
        return sum(differences) / len(differences)
