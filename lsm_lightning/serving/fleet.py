"""The vLLM servers of a run: found at their addresses or started, and shared out over its processes."""

import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.processes import Place, gather, share, together
from lsm_lightning.serving.client import BadAnswer, Client, Patience, Question
from lsm_lightning.serving.gpu import only_own_gpu
from lsm_lightning.serving.launch import Launch, Server, healthy

Answer = TypeVar("Answer")
DEVELOPER_MODE = {"VLLM_SERVER_DEV_MODE": "1"}
"""Without it vLLM offers neither new weights nor an empty prefix cache, and no sleep."""
SLEEP_MODE = ("--enable-sleep-mode",)
"""Without it vLLM on a GPU says that it sleeps and gives nothing back."""


@dataclass(frozen=True, kw_only=True)
class Servers:
    """Which vLLM servers answer, and how patiently they are asked.

    Args:
        urls: Addresses of servers that are there, such as `http://10.0.0.1:8000`. Processes share them out: one for
            each, or several for each, or several processes to one.
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
        self.place = Place()
        self.model: Model | None = None
        self.root_of: dict[str, str | None] = {}
        """By address, the folder or hub id that a server was started with, where it tells."""
        self._fit, self._proof = fit, proof
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
        self._client = Client(urls, self._patience, self._remedy, self._back, self._proof)
        together(self._meet)

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
        return Client([url], self._patience, self._remedy).ask_one(0, question)

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
            self._own = Server(self.settings.launch, options, environment)
            weakref.finalize(self, Server.stop, self._own)
            self._own.start()

    def _meet(self) -> None:
        for url in self.urls:
            model = self.ask_at(url, Question(what="to say what model it has", path="/v1/models", read=_read_model))
            if self.model is not None and model.context != self.model.context:
                raise ConfigurationError(
                    f"The servers {self.urls[0]} and {url} have different context lengths, {self.model.context} and "
                    f"{model.context} tokens: start them with the same --max-model-len."
                )
            self.model, self.root_of[url] = model, model.root

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
        return healthy(url) and self._fit(url)


def _read_model(answer: dict[str, Any]) -> Model:
    (card, *_) = answer["data"]
    name, context, root = card["id"], card.get("max_model_len"), card.get("root")
    if not isinstance(name, str) or not isinstance(context, int):
        raise BadAnswer("does not say max_model_len, as vLLM does")
    return Model(name=name, context=context, root=root if isinstance(root, str) else None)
