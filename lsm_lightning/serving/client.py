"""Questions to inference servers: many at once, each asked again after a failure, every answer checked."""

import asyncio
import json
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
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
FOR_DEVELOPERS = "Only vLLM from 0.32 on, started with VLLM_SERVER_DEV_MODE=1 in its environment, knows this path."
QUOTED = 200
"""Characters of a server's own words that an error repeats."""


class ServerError(ConfigurationError):
    """A server does not answer, or not what was asked; the text names it, the request and what to do."""


class Cancelled(Exception):  # noqa: N818 - whoever cancels wants it
    """What was asked is not wanted any more."""


class BadAnswer(ValueError):  # noqa: N818 - it is about the answer; whoever asked decides what it means
    """An answer is not what was asked for; the text goes on after "it"."""


@dataclass(frozen=True, kw_only=True)
class Question(Generic[Answer]):
    """One request, and how its answer is read."""

    what: str
    """For people: "answer 3 of 128"."""
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


class Client:
    """Servers that answer alike: a question goes to the one it is meant for, and after a failure to the next.

    Args:
        servers: Their addresses, such as `http://10.0.0.1:8000`.
        patience: How long and how often they are asked.
        remedy: Ends the text of an error.
        back: Asked, in a thread, before a server that was not reachable gets another question: whether it is there
            again and fit for use.
        proof: That a server is still as fit as it was; its `read` raises `BadAnswer` where it is not. No answer counts
            before that has been asked behind it, and a server that gives none is looked after as one that was away.
    """

    def __init__(
        self,
        servers: Sequence[str],
        patience: Patience,
        remedy: str,
        back: Callable[[str], bool] = lambda url: True,
        proof: Question[None] | None = None,
    ) -> None:
        self.servers = list(servers)
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
        self._told: set[tuple[str, str]] = set()
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
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="questions", daemon=True)
        thread.start()
        self._locks = {url: asyncio.Lock() for url in self.servers}
        bound = asyncio.Semaphore(self._patience.concurrency)

        def run(coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
            return asyncio.run_coroutine_threadsafe(coroutine, loop)

        session = run(_session()).result()
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
            url = self.servers[(server + attempt) % len(self.servers)]
            outages = self._outages[url]
            try:
                if url in self._away:
                    await self._look_after(url)
                async with bound:
                    answer = await self._once(session, url, question)
                await self._prove(session, url)
                if self._outages[url] == outages:
                    return answer
                continue  # it may be of a server that had just been started again
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
                self._tell(url, question.what, failure)
        spent = time.monotonic() - started
        raise ServerError(
            f"The server {url} failed at {question.what} ({question.path}) {self._patience.attempts} times in "
            f"{spent:.0f} s: it {failure}. {self._remedy}"
        )

    def _tell(self, url: str, what: str, failure: str) -> None:
        """Say, once for each way of failing, that a server does; what fails all the time only slows a run down."""
        how = failure.partition("(")[0]
        if (url, how) not in self._told:
            self._told.add((url, how))
            logger.warning(f"The server {url} failed at {what} and is asked again: it {failure}. Said once.")

    async def _once(self, session: aiohttp.ClientSession, url: str, question: Question[Answer]) -> Answer:
        method = "GET" if question.body is None else "POST"
        limit = aiohttp.ClientTimeout(total=self._patience.timeout)
        async with session.request(method, f"{url}{question.path}", json=question.body, timeout=limit) as response:
            text = await response.text()
        if response.status >= 500 or response.status in TEMPORARY:
            raise BadAnswer(f"answered with status {response.status} ({_quote(text)})")
        if response.status >= 400:
            hint = "" if response.status != 404 or question.path.startswith("/v1/") else f" {FOR_DEVELOPERS}"
            raise ServerError(
                f"The server {url} refuses {question.what} ({question.path}) with status {response.status}: "
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

    async def _look_after(self, url: str) -> None:
        """Before a server that was away is asked again; of many questions that an outage hits, one sees to it.

        Raises:
            ConnectionError: It is away still.
        """
        async with self._locks[url]:
            if url not in self._away:
                return
            recently = time.monotonic() - self._away[url] < SECONDS_BETWEEN_LOOKS
            if recently or not await asyncio.to_thread(self._back, url):
                self._away[url] = time.monotonic()
                raise ConnectionError("away still")
            del self._away[url]


async def _session() -> aiohttp.ClientSession:
    # The semaphore bounds connections; a limit of the connector's own would count waiting as time spent.
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


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
