"""Questions to inference servers: many at once, each asked again after a failure, every answer checked."""

import asyncio
import json
import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import aiohttp

from lsm_lightning.errors import ConfigurationError

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")
Result = TypeVar("Result")
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between two attempts, doubled each time."""
SECONDS_BETWEEN_LOOKS = 0.5
"""At a server that is away."""
TEMPORARY = frozenset({408, 425, 429})
"""Statuses below 500 after which it is worth asking again."""
API_KEY = "VLLM_API_KEY"
"""The environment variable, of vLLM's own name, with the key that servers demand; a setting would be written down with
the run."""
KEYLESS = frozenset({401, 403})
"""Statuses of a server that demands another key, or one at all."""
FOR_DEVELOPERS = "Only vLLM from 0.32 on, started with VLLM_SERVER_DEV_MODE=1 in its environment, knows this path."
QUOTED = 200
"""Characters of a server's own words that an error repeats."""


class ServerError(ConfigurationError):
    """A server does not answer, or not what was asked; the text names it, the request and what to do."""


class Cancelled(Exception):  # noqa: N818 - whoever cancels wants it
    """What was asked is not wanted any more."""


class _AllAwayError(Exception):
    """No server is there to be asked."""


class BadAnswer(ValueError):  # noqa: N818 - it is about the answer; whoever asked decides what it means
    """An answer is not what was asked for; the text goes on after "it"."""


@dataclass(frozen=True, kw_only=True)
class Question(Generic[Answer]):
    """One request, and how its answer is read."""

    what: str
    """That the server is to do, for people: "write answer 3 of 128"."""
    path: str
    body: dict[str, Any] | None = None
    """Sent as JSON (POST); None: a GET."""
    read: Callable[[Any], Answer]
    """Of the JSON that came; raises `BadAnswer` where something is missing, of another length, or not finite."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long and how often servers are asked."""

    timeout: float
    attempts: int
    concurrency: int


@dataclass
class Trouble:
    """What there was with some servers, whoever asked them."""

    retries: int = 0
    """How often something was asked again."""
    told: set[tuple[str, str]] = field(default_factory=set)
    """Addresses and ways of failing that a warning has told."""


class Client:
    """Servers that answer alike: a question goes to the one it is meant for, and after a failure to the next.

    One that is away is passed over while another is there, but for a look whether it is back.

    Args:
        servers: Their addresses, such as `http://10.0.0.1:8000`.
        patience: How long and how often they are asked.
        remedy: Ends the text of an error.
        reserves: Addresses of others, which are asked where all of `servers` are away.
        back: Asked, in a thread, before a server that was not reachable gets another question: whether it is there
            again and fit for use.
        proof: That a server is still as fit as it was; its `read` raises `BadAnswer` where it is not. No answer counts
            before that has been asked behind it, and a server that gives none is looked after as one that was away.
        trouble: Where trouble is noted.
    """

    def __init__(
        self,
        servers: Sequence[str],
        patience: Patience,
        remedy: str,
        back: Callable[[str], bool] = lambda url: True,
        proof: Question[None] | None = None,
        reserves: Sequence[str] = (),
        trouble: Trouble | None = None,
    ) -> None:
        self.servers, self._reserves = [*servers], [*reserves]
        self._patience = patience
        self._remedy = remedy
        self._back = back
        self._proof = proof
        self._proven: dict[str, float] = {}
        """When each server was asked for the last proof that it gave."""
        self._away: dict[str, float] = {}
        """Servers that were not reachable, and when they were last looked after."""
        self._outages: Counter[str] = Counter()
        self._locks: dict[str, asyncio.Lock] = {}
        self._trouble = trouble or Trouble()
        self._under_way: list[SimpleQueue[Any]] = []
        self.leaving = threading.Event()
        """Set when nothing is asked any more: then `back` has nothing to wait for."""

    def ask(self, questions: Sequence[tuple[int, Question[Answer]]]) -> list[Answer]:
        """Answers in the order of the questions, each of which comes with the number of its server.

        Raises:
            ServerError: A question was not answered after all attempts, or was refused.
        """
        answers: dict[int, Answer] = {}

        def keep(come: Mapping[int, Answer]) -> dict[int, tuple[int, Question[Answer]]]:
            answers.update(come)
            return {}

        self.converse(dict(enumerate(questions)), keep)
        return [answers[place] for place in range(len(questions))]

    def converse(
        self,
        questions: Mapping[int, tuple[int, Question[Answer]]],
        answered: Callable[[Mapping[int, Answer]], Mapping[int, tuple[int, Question[Answer]]]],
    ) -> None:
        """Ask, and ask what follows from the answers, while others are still awaited.

        Args:
            questions: By any numbers; each with the number of its server.
            answered: Given, in this thread, all answers that have come since its last call; gives further questions.

        Raises:
            ServerError: As `ask`.
            Cancelled: By `cancel`.
        """
        if not questions:
            return
        numbers: dict[Future[Answer], int] = {}
        answers: SimpleQueue[Future[Answer] | None] = SimpleQueue()
        with self._network() as ask, self._cancellable(answers):
            while questions or numbers:
                for number, question in questions.items():
                    answer = ask(*question)
                    numbers[answer] = number
                    answer.add_done_callback(answers.put)
                come = [answers.get()]
                while not answers.empty():
                    come.append(answers.get())
                if None in come:
                    raise Cancelled
                questions = answered({numbers.pop(answer): answer.result() for answer in come if answer is not None})

    def cancel(self) -> None:
        """Give up what other threads are asking; there `Cancelled` is raised."""
        for answers in [*self._under_way]:
            answers.put(None)

    def lose(self, urls: Collection[str]) -> None:
        """Take these servers for away and all others for there, until they show otherwise."""
        self._away = dict.fromkeys(urls, 0.0)

    def ask_one(self, server: int, question: Question[Answer]) -> Answer:
        """As `ask`."""
        (answer,) = self.ask([(server, question)])
        return answer

    @contextmanager
    def _cancellable(self, answers: SimpleQueue[Any]) -> Iterator[None]:
        self._under_way.append(answers)
        try:
            yield
        finally:
            self._under_way.remove(answers)

    @contextmanager
    def _network(self) -> Iterator[Callable[[int, Question[Answer]], Future[Answer]]]:
        """Gives a function that asks; a thread of its own does the waiting. What is awaited at the end is given up."""
        headers = authorization()
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="questions", daemon=True)
        thread.start()
        self._locks = {url: asyncio.Lock() for url in (*self.servers, *self._reserves)}
        bound = asyncio.Semaphore(self._patience.concurrency)

        def run(coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
            return asyncio.run_coroutine_threadsafe(coroutine, loop)

        session = run(_session(headers)).result()
        self.leaving.clear()
        try:
            yield lambda server, question: run(self._patiently(session, bound, server, question))
        finally:
            self.leaving.set()
            run(_end(session)).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _patiently(
        self, session: aiohttp.ClientSession, bound: asyncio.Semaphore, server: int, question: Question[Answer]
    ) -> Answer:
        started, failure, url, attempt = time.monotonic(), "", "", 0
        while attempt < self._patience.attempts:
            if attempt:
                await asyncio.sleep(min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE))
            order = self._order(server, attempt)
            url = order[0]
            try:
                url = await self._first_there(order)
                outages = self._outages[url]
                async with bound:
                    answer = await self._once(session, url, question)
                await self._prove(session, url)
                if self._outages[url] == outages:
                    return answer
                self._trouble.retries += 1
                continue  # it may be of a server that had just been started again
            except _AllAwayError:
                failure = "was not reachable or broke off (away still)"
            except TimeoutError:
                failure = f"gave no answer within {self._patience.timeout:g} s"
            except (aiohttp.ClientError, OSError) as error:
                failure = f"was not reachable or broke off ({_short(str(error)) or type(error).__name__})"
                self._lose(url)
            except json.JSONDecodeError as error:
                failure = f"answered with damaged JSON ({error})"
            except BadAnswer as error:
                failure = str(error)
            attempt += 1
            if attempt < self._patience.attempts:
                self._trouble.retries += 1
                self._tell(url, question.what, failure)
        spent = time.monotonic() - started
        raise ServerError(
            f"The server {url} failed to {question.what} ({question.path}) {self._patience.attempts} times in "
            f"{spent:.0f} s: it {failure}. {self._remedy}"
        )

    def _tell(self, url: str, what: str, failure: str) -> None:
        """Say, once for each way of failing, that a server does; what fails all the time only slows a run down."""
        how = failure.partition("(")[0]
        if (url, how) not in self._trouble.told:
            self._trouble.told.add((url, how))
            logger.warning(f"The server {url} failed to {what} and is asked again: it {failure}. Said once.")

    async def _once(self, session: aiohttp.ClientSession, url: str, question: Question[Answer]) -> Answer:
        method = "GET" if question.body is None else "POST"
        limit = aiohttp.ClientTimeout(total=self._patience.timeout)
        async with session.request(method, f"{url}{question.path}", json=question.body, timeout=limit) as response:
            text = await response.text()
        if response.status >= 500 or response.status in TEMPORARY:
            raise BadAnswer(f"answered with status {response.status} ({_quote(text)})")
        if response.status >= 400:
            hint = "" if response.status != 404 or question.path.startswith("/v1/") else f" {FOR_DEVELOPERS}"
            if response.status in KEYLESS:
                hint = f" Set the environment variable {API_KEY} of this run to the server's key."
            raise ServerError(
                f"The server {url} refuses to {question.what} ({question.path}) with status {response.status}: "
                f"{_quote(text)}.{hint}"
            )
        answer = json.loads(text) if text else None
        try:
            return question.read(answer)
        except BadAnswer:
            raise
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise BadAnswer(
                f"answered with something else than was asked for ({type(error).__name__}: {error})"
            ) from error

    async def _prove(self, session: aiohttp.ClientSession, url: str) -> None:
        """Have a server prove that it is still as fit as it was; of many answers that come together, one asks for all.

        Raises:
            BadAnswer: It is not, and counts as away from now on.
        """
        if self._proof is None:
            return
        come = time.monotonic()
        async with self._locks[url]:
            asked = time.monotonic()
            if self._proven.get(url, -math.inf) < come and url not in self._away:
                try:
                    await self._once(session, url, self._proof)
                except BadAnswer:
                    self._lose(url)
                    raise
                self._proven[url] = asked

    def _lose(self, url: str) -> None:
        """Note that a server is away; what it is answering by now does not count."""
        self._outages[url] += url not in self._away
        self._away.setdefault(url, 0.0)

    def _order(self, server: int, attempt: int) -> list[str]:
        """In which servers are asked a question meant for one of them."""
        own, others = server % len(self.servers), server % max(1, len(self._reserves))
        order = self.servers[own:] + self.servers[:own] + self._reserves[others:] + self._reserves[:others]
        first = attempt % len(order)
        return order[first:] + order[:first]

    async def _first_there(self, order: Sequence[str]) -> str:
        """The first of some servers that is not away, or not any more.

        Raises:
            _AllAwayError: There is none.
        """
        for url in order:
            if url not in self._away or await self._is_back(url, wait=self._away.keys() >= {*order}):
                return url
        raise _AllAwayError

    async def _is_back(self, url: str, *, wait: bool) -> bool:
        """Whether a server that was away is there again; of many questions that an outage hits, one sees to it.

        Args:
            url: Its address.
            wait: Until somebody else's look at it is over; else it counts as away meanwhile.
        """
        if self._locks[url].locked() and not wait:
            return False
        async with self._locks[url]:
            if url not in self._away:
                return True
            recently = time.monotonic() - self._away[url] < SECONDS_BETWEEN_LOOKS
            if recently or not await asyncio.to_thread(self._back, url):
                self._away[url] = time.monotonic()
                return False
            del self._away[url]
            return True


def authorization() -> dict[str, str]:
    """The header that shows a server the key it demands; none where the environment has no key.

    Raises:
        ConfigurationError: The key cannot be part of a header.
    """
    key = os.environ.get(API_KEY)
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise ConfigurationError(f"{API_KEY} has a line break or another character that no HTTP header may have.")
    return {"Authorization": f"Bearer {key}"}


async def _session(headers: Mapping[str, str]) -> aiohttp.ClientSession:
    # The semaphore bounds connections; a limit of the connector's own would count waiting as time spent.
    return aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0))


async def _end(session: aiohttp.ClientSession) -> None:
    """Give up whatever the thread is at."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await session.close()
    await asyncio.get_running_loop().shutdown_default_executor()


def _quote(text: str) -> str:
    """The message in an error's JSON, or the text itself."""
    try:
        told = json.loads(text)
        text = told.get("message") or told["error"]["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return _short(str(text))


def _short(text: str) -> str:
    """In one line."""
    line = " ".join(text.split())
    return line if len(line) <= QUOTED else f"{line[:QUOTED]}…"
