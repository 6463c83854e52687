"""What a client makes of servers that misbehave."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from fake_vllm import COMPLETIONS, FakeServer, Fault, serving
from tiny import random_ids, save_tiny

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.rollout import Sampling
from lsm_lightning.rollout.base import Request
from lsm_lightning.serving import Fleet, Launch, ServerError, Servers, protocol
from lsm_lightning.serving import client as client_module
from lsm_lightning.serving.client import Cancelled, Client, Patience, Question, Trouble
from lsm_lightning.serving.launch import healthy
from lsm_lightning.types import Completion

ENDS = frozenset(range(0, 340, 9))
FAULTS = [
    "500",
    "hangs up",
    "truncated JSON",
    "a log-prob too few",
    "not finite",
    "fields ignored",
    "another prompt",
    "stops early",
]


@pytest.fixture(scope="module")
def folder(student_tokenizer, tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("served"), student_tokenizer, seed=1)


@pytest.fixture
def fake(folder) -> Iterator[FakeServer]:
    with serving(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client_module, "SECONDS_BETWEEN_LOOKS", 0.0)


def client(*urls: str, attempts: int = 3, timeout: float = 20.0, concurrency: int = 8, **settings: object) -> Client:
    patience = Patience(timeout=timeout, attempts=attempts, concurrency=concurrency)
    return Client(urls, patience, "Look into its log.", **settings)


def questions(number: int, new: int = 6) -> list[tuple[int, Question[Completion]]]:
    requests = [Request(ids=random_ids(seed, 5 + seed), seed=seed) for seed in range(number)]
    return [
        (
            i,
            Question(
                what=f"write answer {i + 1} of {number}",
                path=COMPLETIONS,
                body=protocol.writing("tiny", request, Sampling(), new, ENDS),
                read=lambda answer, request=request: protocol.read_written(answer, request, Sampling(), new, ENDS),
            ),
        )
        for i, request in enumerate(requests)
    ]


def test_answers_come_in_the_order_of_the_questions(fake):
    together = client(fake.url).ask(questions(12))
    alone = [client(fake.url).ask_one(*question) for question in questions(12)]
    assert together == alone
    assert len({tuple(answer.ids) for answer in together}) == 12


def test_no_question_has_no_answer():
    assert client("http://127.0.0.1:1").ask([]) == []


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_that_passes_changes_no_answer(fake, kind):
    undisturbed = client(fake.url).ask(questions(5))
    asked = len(fake.log)
    fake.faults.append(Fault(kind, times=2))
    assert client(fake.url).ask(questions(5)) == undisturbed
    assert sum(fault.times for fault in fake.faults) == 0
    most = 15 if kind == "hangs up" else 7  # after an outage the others are in doubt too
    assert 5 <= len(fake.log) - asked <= most  # those that failed were asked again, and no others


@pytest.mark.parametrize(
    ("kind", "told"),
    [*zip(
        FAULTS,
        ["status 500 .out of memory.", "broke off", "damaged JSON", "5 log-probs for 6 tokens", "not finite",
         "KeyError", "another prompt", "stopped after 5 tokens"],
        strict=True,
    )],
)  # fmt: skip
def test_one_that_stays_ends_with_the_name_of_server_request_and_cause(fake, kind, told):
    fake.faults.append(Fault(kind, times=1000))
    ask = questions(1)
    ask[0][1].body["stop_token_ids"] = []  # it writes to the limit
    failed = rf"{fake.url} failed to write answer 1 of 1 .{COMPLETIONS}. 3 times.*{told}"
    with pytest.raises(ServerError, match=failed) as e:
        client(fake.url).ask(ask)
    assert str(e.value).endswith("Look into its log.")
    assert "\n" not in str(e.value)
    assert fake.faults[0].times == 997


def test_a_slow_answer_is_asked_for_again(fake):
    fake.faults.append(Fault("slow", seconds=30.0))
    started = time.monotonic()
    (answer,) = client(fake.url, timeout=0.5).ask(questions(1))
    assert answer == client(fake.url).ask(questions(1))[0]
    assert time.monotonic() - started < 20
    fake.faults.append(Fault("slow", seconds=1.0, times=10))
    with pytest.raises(ServerError, match=r"no answer within 0\.1 s"):
        client(fake.url, timeout=0.1).ask(questions(1))


def test_what_is_refused_is_not_asked_again(fake):
    (asked,) = questions(1)
    asked[1].body["max_tokens"] = 10_000
    refused = rf"{fake.url} refuses to write answer 1 of 1 .*400.*maximum context length is 256"
    with pytest.raises(ServerError, match=refused):
        client(fake.url).ask([asked])
    assert len(fake.log) == 1


def test_where_one_server_is_away_the_next_one_answers(fake):
    undisturbed = client(fake.url).ask(questions(6))
    assert client("http://127.0.0.1:1", fake.url).ask(questions(6)) == undisturbed


def test_a_server_that_was_away_is_looked_after_once_before_it_is_asked_again(fake):
    undisturbed = client(fake.url).ask(questions(6))
    looked: list[str] = []

    def back(url: str) -> bool:
        looked.append(url)
        if len(looked) == 2:
            fake.listen()
        return len(looked) == 2

    fake.stop()
    assert client(fake.url, attempts=8, back=back).ask(questions(6)) == undisturbed
    assert looked == [fake.url, fake.url]


def test_no_more_questions_are_under_way_than_agreed(fake):
    under_way, most, lock = 0, 0, threading.Lock()
    answer = fake.answer

    def counted(*arguments):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.01)
        try:
            return answer(*arguments)
        finally:
            with lock:
                under_way -= 1

    fake.answer = counted
    client(fake.url, concurrency=3).ask(questions(12))
    assert most == 3


def test_what_is_cancelled_ends_at_once(fake):
    fake.faults.append(Fault("slow", seconds=30, times=10))
    asking, raised = client(fake.url, timeout=60.0), []

    def ask() -> None:
        try:
            asking.ask(questions(4))
        except Cancelled as error:
            raised.append(error)

    thread = threading.Thread(target=ask)
    started = time.monotonic()
    thread.start()
    while fake.faults[0].times == 10:
        time.sleep(0.01)
    asking.cancel()
    thread.join(20)
    assert raised
    assert time.monotonic() - started < 20
    fake.faults.clear()
    assert len(asking.ask(questions(2))) == 2  # it can be asked again


@pytest.mark.parametrize(("path", "explained"), [("/pause", True), (COMPLETIONS, False)])
def test_a_path_that_only_developers_have_is_explained(fake, path, explained):
    fake.faults.append(Fault("404", path=path))
    question = Question(what="do something", path=path, body={}, read=lambda answer: answer)
    with pytest.raises(ServerError, match="404") as error:
        client(fake.url).ask_one(0, question)
    assert ("VLLM_SERVER_DEV_MODE=1" in str(error.value)) == explained


def test_a_way_of_failing_is_told_once_and_every_retry_counted(fake, caplog):
    trouble = Trouble()
    client(fake.url, trouble=trouble).ask(questions(5))
    assert trouble.retries == 0
    fake.faults.append(Fault("500", times=3))
    client(fake.url, attempts=9, trouble=trouble).ask(questions(5))
    assert trouble.retries == 3
    assert (
        len([record for record in caplog.records if "is asked again: it answered with status 500" in record.message])
        == 1
    )


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_an_address_may_be_that_of_the_api(fake, suffix):
    fleet = Fleet(Servers(urls=[fake.url + suffix]))
    fleet.open([])
    assert fleet.urls == [fake.url]


def test_an_address_without_a_protocol_is_refused():
    with pytest.raises(ConfigurationError, match=r"10\.0\.0\.1:8000.*http://"):
        Servers(urls=["10.0.0.1:8000"])


# ---- one of several that is away ------------------------------------------------------------------------------------


def test_while_one_is_away_nobody_waits_for_it(fake, monkeypatch):
    """Not even for the pause after a failure, nor while somebody looks after it; and it costs no attempt."""
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 60.0)
    looked = threading.Event()

    def back(url: str) -> bool:
        looked.set()
        time.sleep(2.0)
        return False

    asking = client("http://127.0.0.1:1", fake.url, attempts=1, back=back)
    asking.lose(["http://127.0.0.1:1"])
    undisturbed = client(fake.url).ask(questions(6))
    started = time.monotonic()
    assert asking.ask(questions(6)) == undisturbed
    assert looked.is_set()
    assert time.monotonic() - started < 20


def test_one_that_is_back_is_asked_again_and_only_then(fake, folder):
    with serving(folder) as other:
        there = threading.Event()
        asking = client(fake.url, other.url, back=lambda url: there.is_set())
        asking.lose([other.url])
        asking.ask(questions(6))
        assert not other.log
        there.set()
        asking.ask(questions(6))
        assert other.log


def test_reserves_are_asked_only_where_all_others_are_away(fake, folder):
    with serving(folder) as reserve:
        asking = client(fake.url, reserves=[reserve.url], back=lambda url: False)
        undisturbed = asking.ask(questions(6))
        assert not reserve.log
        asking.lose([fake.url])
        asked = len(fake.log)
        assert asking.ask(questions(6)) == undisturbed
        assert len(fake.log) == asked
        asking.lose([fake.url, reserve.url])
        with pytest.raises(ServerError, match=r"not reachable .*away still"):
            asking.ask(questions(6))


# ---- keys -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def locked(folder) -> Iterator[FakeServer]:
    with serving(folder, key="open sesame") as server:
        yield server


def test_a_server_that_demands_a_key_is_shown_it(locked, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "open sesame")
    assert len(client(locked.url).ask(questions(2))) == 2
    fleet = Fleet(Servers(urls=[locked.url]))
    fleet.open([])
    assert fleet.model is not None


@pytest.mark.parametrize("key", [None, "", "another"])
def test_a_wrong_key_is_told_at_once_and_not_by_its_name(locked, monkeypatch, caplog, key):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(ServerError, match=f"{locked.url} refuses to write .*status 401.*VLLM_API_KEY") as error:
        client(locked.url, attempts=9).ask(questions(1))
    assert not key or key not in str(error.value) + caplog.text
    assert "again" not in caplog.text


def test_a_key_that_no_header_may_have_is_refused(fake, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "open\nsesame")
    with pytest.raises(ConfigurationError, match="VLLM_API_KEY has a line break") as error:
        client(fake.url).ask(questions(1))
    assert "sesame" not in str(error.value)


@pytest.mark.parametrize("status", [200, 401, 503])
def test_a_server_that_demands_a_key_for_everything_is_there_all_the_same(monkeypatch, status):
    """As behind a gateway; one that answers that it has failed is not."""
    shown: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            shown.append(self.headers["Authorization"])
            self.send_response(status)
            self.end_headers()

    monkeypatch.setenv("VLLM_API_KEY", "open sesame")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert healthy(f"http://127.0.0.1:{server.server_address[1]}") == (status != 503)
        thread.join()
    assert shown == ["Bearer open sesame"]


@pytest.mark.parametrize(
    "settings",
    [
        {"command": ["vllm", "--api-key", "sesame"]},
        {"command": ["vllm", "--api-key=sesame"]},
        {"command": ["vllm"], "environment": {"VLLM_API_KEY": "sesame"}},
    ],
    ids=str,
)
def test_a_key_is_no_setting(settings):
    with pytest.raises(ConfigurationError, match="VLLM_API_KEY of the run instead") as error:
        Launch(**settings)
    assert "sesame" not in str(error.value)
