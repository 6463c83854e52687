"""The vLLM servers of a run: found at their addresses or started, and shared out over its processes."""

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.processes import Place, gather, share, together
from lsm_lightning.serving.client import BadAnswer, Client, Patience, Question, ServerError, Trouble
from lsm_lightning.serving.gpu import only_own_gpu
from lsm_lightning.serving.launch import Launch, Server, healthy

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")
Result = TypeVar("Result")
DEVELOPER_MODE = {"VLLM_SERVER_DEV_MODE": "1"}
"""Without it vLLM offers neither new weights nor an empty prefix cache, and no sleep."""
SLEEP_MODE = ("--enable-sleep-mode",)
"""Without it vLLM on a GPU says that it sleeps and gives nothing back."""


@dataclass(frozen=True, kw_only=True)
class Servers:
    """Which vLLM servers answer, and how patiently they are asked.

    Where the environment variable VLLM_API_KEY is set, every request shows that key, and servers that are started
    demand it.

    Args:
        urls: Addresses of servers that are there, such as `http://10.0.0.1:8000`. Processes share them out: one for
            each, or several for each, or several processes to one. All must be there at first; while one is away later
            on, the others answer in its place.
        launch: How to start them instead, one on each machine or for each process; they end with the run.
        timeout: Seconds until a request is given up and sent again.
        attempts: How often a request is sent before the run ends, with pauses of 1, 2, 4, ... seconds.
        concurrency: Requests under way at once, from each process.
    """

    urls: list[str] = field(default_factory=list)
    launch: Launch | None = None
    timeout: float = 600.0
    attempts: int = 6
    concurrency: int = 256

    def __post_init__(self) -> None:
        if bool(self.urls) is (self.launch is not None):
            raise ConfigurationError(
                f"servers(urls={self.urls}, launch={self.launch}): give either the addresses of vLLM servers that are "
                "there, or launch.command to start them."
            )
        if self.timeout <= 0 or self.attempts < 1 or self.concurrency < 1:
            raise ConfigurationError(
                f"servers(timeout={self.timeout:g}, attempts={self.attempts}, concurrency={self.concurrency}): "
                "all must be positive."
            )
        if wrong := [url for url in self.urls if not url.startswith(("http://", "https://"))]:
            raise ConfigurationError(f"servers(urls=[{wrong[0]!r}]): begin it with http:// or https://.")

    @property
    def colocated(self) -> bool:
        """Whether each process has a server on its own GPU."""
        return self.launch is not None and self.launch.colocated


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a server says of the model that it has."""

    name: str
    context: int
    """Tokens of prompt and answer together, at most."""
    root: str | None
    """The folder or hub id that it was started with, where it tells."""


class Fleet:
    """The servers that this process asks; after `open` they are there and answer.

    Args:
        settings: The user's.
        fit: Told the address of a server that was away and answers again, before it is asked anything else: whether it
            is fit for use. It runs in another thread.
        proof: See `Client`.
    """

    def __init__(
        self, settings: Servers, fit: Callable[[str], bool] = lambda url: True, proof: Question[None] | None = None
    ) -> None:
        self.settings = settings
        self.logs: Path | None = None
        """See `launch.Server`."""
        self.place = Place()
        self.model: Model | None = None
        self.root_of: dict[str, str | None] = {}
        """By address, the folder or hub id that a server was started with, where it tells."""
        self._fit, self._proof = fit, proof
        self._trouble = Trouble()
        self._lost: set[str] = set()
        """Servers that were away at the last `renew`."""
        self._own: Server | None = None
        self._client: Client | None = None

    def find_place(self) -> None:
        """Find out where this process stands among the others; all call it together."""
        self.place = Place.find()

    def open(self, options: Sequence[str]) -> None:
        """Find the servers or start them; all processes call it together, after `find_place`.

        Args:
            options: Of servers that are started.

        Raises:
            ServerError: One cannot be started or does not answer; raised by all.
        """
        together(lambda: self._launch(options))
        # Clients of OpenAI's are given the address with /v1.
        urls = [url.rstrip("/").removesuffix("/v1") for url in self.settings.urls]
        if self.settings.launch is not None:
            started = gather(self._own.url if self._own is not None else "")
            urls = [started[self.place.rank if self.settings.colocated else self.place.first_here]]
        else:
            urls = share(urls, self.place.rank, self.place.processes)
        models = _merged(gather(together(lambda: self._meet(urls))))
        together(lambda: _check_contexts(models))
        self.model, self.root_of = models[urls[0]], {url: model.root for url, model in models.items()}
        others = {} if self.settings.launch is not None else models  # what a machine starts only it can reach
        reserves = [url for url, model in others.items() if url not in urls and model.name == self.model.name]
        self._client = Client(urls, self._patience, self._remedy, self._back, self._proof, reserves, self._trouble)

    @property
    def is_open(self) -> bool:
        """Whether `open` was called, and `close` not."""
        return self._client is not None

    @property
    def urls(self) -> list[str]:
        """Addresses of this process's servers."""
        assert self._client is not None, "open() comes first"
        return self._client.servers

    @property
    def kept(self) -> list[str]:
        """Those of them that this process renews, on behalf of all that ask them."""
        if self.settings.launch is not None:
            return self.urls if self._starts_one else []
        return self.urls if self.place.rank < len(self.settings.urls) else []

    def ask(self, questions: Sequence[tuple[int, Question[Answer]]]) -> list[Answer]:
        """See `Client.ask`; the number of a server is counted around, so any will do."""
        assert self._client is not None, "open() comes first"
        return self._client.ask(questions)

    def converse(
        self,
        questions: Mapping[int, tuple[int, Question[Answer]]],
        answered: Callable[[Mapping[int, Answer]], Mapping[int, tuple[int, Question[Answer]]]],
    ) -> None:
        """See `Client.converse`; servers are numbered as in `ask`."""
        assert self._client is not None, "open() comes first"
        self._client.converse(questions, answered)

    def cancel(self) -> None:
        """See `Client.cancel`."""
        if self._client is not None:
            self._client.cancel()

    def ask_at(self, url: str, question: Question[Answer]) -> Answer:
        """Ask this very server, and do not look after it in between."""
        return Client([url], self._patience, self._remedy, trouble=self._trouble).ask_one(0, question)

    @property
    def retries(self) -> int:
        """How often this process has asked something again."""
        return self._trouble.retries

    def renew(self, work: Callable[[str], None]) -> None:
        """Do something at every server, each by the process that keeps it; all processes call it together.

        One of `urls` that is away is left out as long as another is there, and `fit` is asked when it is back.

        Args:
            work: Given an address; raises `ServerError` where it fails.

        Raises:
            ServerError: It failed at a server that is there, or all are away; raised by all.
        """
        assert self._client is not None, "open() comes first"
        together(self.revive)
        kept = self.kept
        there = [url for url in kept if self.settings.launch is not None or healthy(url)]
        if not any(gather(there)):
            there = kept  # with patience
        failed = {url: None for url in kept if url not in there} | together(lambda: self._away_at(there, work))
        everyone, away = {url for of_process in gather(kept) for url in of_process}, _merged(gather(failed))
        if away.keys() == everyone:
            together(lambda: _raise_first(away.values()))
        for url in failed.keys() - self._lost:
            logger.warning(
                f"The server {url} is away. The others ({len(everyone) - len(away)} of {len(everyone)}) answer in its "
                "place until it is back."
            )
        self._lost = {*away}
        self._client.lose(away)

    @property
    def has_ended(self) -> bool:
        """Whether this process has started a server that runs no more."""
        return self._own is not None and not self._own.alive

    def revive(self, leaving: threading.Event | None = None) -> None:
        """Start this process's own server again where it has ended.

        Args:
            leaving: Ends the waiting for it.

        Raises:
            ServerError: It cannot be started.
        """
        if self.has_ended:
            assert self._own is not None
            self._own.start(leaving)

    def close(self) -> None:
        """End what was started."""
        if self._own is not None:
            self._own.stop()
        self._own = self._client = self.model = None
        self._lost = set()

    @property
    def _patience(self) -> Patience:
        settings = self.settings
        return Patience(timeout=settings.timeout, attempts=settings.attempts, concurrency=settings.concurrency)

    @property
    def _remedy(self) -> str:
        return (
            "Look into the server's log, start it again and go on with --ckpt_path; init_args.servers.timeout "
            f"({self.settings.timeout:g}) and .attempts ({self.settings.attempts}) say how long it is waited for."
        )

    @property
    def _starts_one(self) -> bool:
        return self.settings.colocated or (self.settings.launch is not None and self.place.is_first_here)

    def _launch(self, options: Sequence[str]) -> None:
        if self._starts_one:
            assert self.settings.launch is not None
            environment = DEVELOPER_MODE
            if self.settings.colocated:
                options, environment = [*options, *SLEEP_MODE], environment | only_own_gpu()
            self._own = Server(self.settings.launch, options, environment, self.logs)
            weakref.finalize(self, Server.stop, self._own)
            self._own.start()

    def _meet(self, urls: Sequence[str]) -> dict[str, Model]:
        question = Question(what="say what model it has", path="/v1/models", read=_read_model)
        return {url: self.ask_at(url, question) for url in urls}

    def _away_at(self, urls: Sequence[str], work: Callable[[str], None]) -> dict[str, ServerError]:
        """Work at servers, and tell at which of them it failed because they are away."""
        failures: dict[str, ServerError] = {}
        for url in urls:
            try:
                work(url)
            except ServerError as error:
                if self.settings.launch is not None or healthy(url):
                    raise
                failures[url] = error
        return failures

    def _back(self, url: str) -> bool:
        """After an outage: start one's own server again, or wait for who does; others are looked at as they are."""
        assert self._client is not None, "open() comes first"
        leaving = self._client.leaving
        if self.has_ended:
            self.revive(leaving)
        elif self.settings.launch is not None:
            end = time.monotonic() + self.settings.launch.start_timeout
            while not healthy(url) and time.monotonic() < end and not leaving.wait(1.0):
                pass
        try:
            return healthy(url) and self._fit(url)
        except ServerError:
            if healthy(url):
                raise
            return False  # it has gone again


def _merged(of_processes: Sequence[Mapping[str, Result]]) -> dict[str, Result]:
    return {url: result for of_process in of_processes for url, result in of_process.items()}


def _raise_first(failures: Iterable[ServerError | None]) -> None:
    raise next(failure for failure in failures if failure is not None)


def _check_contexts(models: Mapping[str, Model]) -> None:
    (first, model), *others = models.items()
    for url, other in others:
        if other.context != model.context:
            raise ConfigurationError(
                f"The servers {first} and {url} have different context lengths, {model.context} and {other.context} "
                "tokens: start them with the same --max-model-len."
            )


def _read_model(answer: dict[str, Any]) -> Model:
    (card, *_) = answer["data"]
    name, context, root = card["id"], card.get("max_model_len"), card.get("root")
    if not isinstance(name, str) or not isinstance(context, int):
        raise BadAnswer("does not say max_model_len, as vLLM does")
    return Model(name=name, context=context, root=root if isinstance(root, str) else None)
