"""A served teacher says what a local one of the same weights says."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeServer, Fault, serving
from scripted import say
from slow import sampled_ids, turn_of
from teachers import K, asked, members
from tiny import random_ids, save_tiny
from vllm_python import vllm_launch

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.rollout import Sampling
from lsm_lightning.serving import ServerError, Servers
from lsm_lightning.serving import client as client_module
from lsm_lightning.teacher import LocalTeacher, ServedTeacher
from lsm_lightning.types import Support

CLOSE = 1e-3
"""Nats."""


@pytest.fixture(scope="module")
def folder(teacher_tokenizer, tmp_path_factory) -> Path:
    """Heads of 32, the least that vLLM's kernels know."""
    return save_tiny(tmp_path_factory.mktemp("wide") / "teacher", teacher_tokenizer, seed=2, hidden_size=64)


@pytest.fixture(scope="module")
def fake(folder) -> Iterator[FakeServer]:
    with serving(folder) as server:
        yield server


@pytest.fixture(scope="module")
def vllm(folder) -> Iterator[Servers]:
    first = ServedTeacher(str(folder), Servers(launch=vllm_launch()))
    first._options = {"--model": str(folder), "--max-logprobs": "40", "--dtype": "float32"}
    first.fleet.find_place()
    first.fleet.open([word for option in first._options.items() for word in option])
    yield Servers(urls=first.fleet.urls)
    first.close()


@pytest.fixture(params=["fake", pytest.param("vllm", marks=pytest.mark.vllm)])
def servers(request) -> Servers:
    if request.param == "vllm":
        return request.getfixturevalue("vllm")
    return Servers(urls=[request.getfixturevalue("fake").url], timeout=30, attempts=2)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.01)


@pytest.fixture(params=[False, True], ids=["as it stands", "respelled"])
def respell(request) -> bool:
    return request.param


def ready(teacher: Any, student: Any, *, respell: bool, tokens: int | None = K, added: int = 0) -> Any:
    teacher.check()
    teacher.setup(student, vocabulary=340, respell=respell, tokens=tokens, device=torch.device("cpu"), added=added)
    return teacher


def assert_alike(served: Support, local: Support, tokens: int = K) -> None:
    """The same members, but for those that are equally probable, with the same log-probs."""
    assert served.comparable.tolist() == local.comparable.tolist()
    assert served.alike.tolist() == local.alike.tolist()
    for ours, theirs in zip(members(served), members(local), strict=True):
        assert len(ours) == len(theirs)
        least = min(theirs.values(), default=0.0)
        for token in ours.keys() | theirs.keys():
            assert ours.get(token, least) == pytest.approx(theirs.get(token, least), abs=CLOSE)
    assert served.lost == pytest.approx(local.lost, abs=CLOSE)
    assert served.sampled.exp().tolist() == pytest.approx(local.sampled.exp().tolist(), abs=CLOSE)
    both = (served.sampled > -torch.inf) & (local.sampled > -torch.inf)
    assert both.equal(local.sampled > -torch.inf)
    assert served.sampled[both].tolist() == pytest.approx(local.sampled[both].tolist(), abs=CLOSE)
    told = served.turn_end > -torch.inf
    assert served.turn_end[told].tolist() == pytest.approx(local.turn_end[told].tolist(), abs=CLOSE)
    untold = local.comparable & ~told
    assert (local.turn_end[untold] <= local.log_probs[untold, tokens - 1] + CLOSE).all()  # it is no top token


@pytest.mark.parametrize("tokens", [1, K, 16])
def test_supports_are_those_of_a_local_teacher(servers, folder, student_tokenizer, turns, respell, tokens):
    teachers = [ServedTeacher(str(folder), servers), LocalTeacher(str(folder))]
    served, local = (
        asked(ready(teacher, student_tokenizer, respell=respell, tokens=tokens), turns) for teacher in teachers
    )
    assert_alike(served, local, tokens)
    assert (served.turn_end > -torch.inf).any() or not respell


def test_the_comparison_can_fail(fake, folder, student_folder, student_tokenizer, turns):
    local = asked(ready(LocalTeacher(str(folder)), student_tokenizer, respell=False), turns)
    served = ready(ServedTeacher(str(folder), Servers(urls=[fake.url])), student_tokenizer, respell=False)
    assert_alike(asked(served, turns), local)
    with pytest.raises(AssertionError):
        assert_alike(asked(served, turns[::-1]), local)
    served.tokenizer.chat_template = served.tokenizer.chat_template.replace("message['content']", "'!'")
    with pytest.raises(AssertionError):
        assert_alike(asked(served, turns), local)


def test_the_sampled_token_is_looked_up_wherever_it_ranks(servers, folder, student_tokenizer, turns):
    added = sampled_ids(turns)[:, None]
    supports = [
        asked(ready(teacher, student_tokenizer, respell=False), turns, added)
        for teacher in (ServedTeacher(str(folder), servers), LocalTeacher(str(folder)))
    ]
    assert_alike(*supports)
    assert [sampled in found for sampled, found in zip(sampled_ids(turns).tolist(), members(supports[0]), strict=True)]
    assert any(len(found) == K + 1 for found in members(supports[0]))


def test_it_may_be_asked_for_no_top_tokens(servers, folder, student_tokenizer, turns):
    """For an objective over the sampled token alone."""
    teachers = ServedTeacher(str(folder), servers), LocalTeacher(str(folder))
    served, local = (asked(ready(t, student_tokenizer, respell=True, tokens=0), turns) for t in teachers)
    assert served.log_probs.shape[0] == len(sampled_ids(turns))
    assert served.sampled.tolist() == pytest.approx(local.sampled.tolist(), abs=CLOSE)


def test_order_and_empty_answers_are_kept(fake, folder, student_tokenizer, turns, respell):
    served = ready(ServedTeacher(str(folder), Servers(urls=[fake.url])), student_tokenizer, respell=respell)
    local = ready(LocalTeacher(str(folder)), student_tokenizer, respell=respell)
    empty = turn_of(turns[0], [])
    for some in ([turns[3], empty, turns[1]], [empty], []):
        assert_alike(asked(served, some), asked(local, some))


def test_it_plays_as_a_local_one(servers, folder, student_tokenizer):
    asks = [[{"role": "user", "content": text}] for text in ("Say apple", "How many coins?")]
    players = [
        ready(teacher, student_tokenizer, respell=False).player(Sampling(temperature=0.0))
        for teacher in (ServedTeacher(str(folder), servers), LocalTeacher(str(folder)))
    ]
    served, local = (say(player, asks, max_new_tokens=6) for player in players)
    assert [list(turn.completion.ids) for turn in served] == [list(turn.completion.ids) for turn in local]


def test_several_ends_of_a_turn_leave_room_for_as_many_members(fake, folder, student_tokenizer, turns, tmp_path):
    """Together they are one member, wherever the teacher thinks of all of them at once."""
    likely = members(asked(ready(LocalTeacher(str(folder)), student_tokenizer, respell=False), turns))
    ends = [token for token, _ in Counter(token for found in likely for token in found).most_common(3)]
    several = shutil.copytree(folder, tmp_path / folder.name)
    generation = json.loads((several / "generation_config.json").read_text()) | {"eos_token_id": [2, *ends]}
    (several / "generation_config.json").write_text(json.dumps(generation))
    served, local = (
        ready(teacher, student_tokenizer, respell=True)
        for teacher in (ServedTeacher(str(several), Servers(urls=[fake.url])), LocalTeacher(str(several)))
    )
    theirs = asked(local, turns)

    def odd_places() -> tuple[int, int]:
        """Places with other members, and all, where the server names the ends that matter."""
        ours = asked(served, turns)
        told = ((ours.turn_end - theirs.turn_end).abs() < 0.1) & theirs.comparable
        return sum(
            members(ours)[place].keys() != members(theirs)[place].keys() for place in told.nonzero()[:, 0].tolist()
        ), int(told.sum())

    odd, all_places = odd_places()
    assert (odd, all_places > 10) == (0, True)
    served.asked = served.tokens  # the control: as if each end were a member
    assert odd_places()[0] > 0


@pytest.mark.parametrize(
    "kind", ["500", "hangs up", "truncated JSON", "a log-prob too few", "a place too poor", "not finite",
             "fields ignored", "another prompt"]
)  # fmt: skip
def test_every_answer_is_held_against_its_question(fake, folder, student_tokenizer, turns, kind):
    served = ready(ServedTeacher(str(folder), Servers(urls=[fake.url], attempts=2)), student_tokenizer, respell=True)
    undisturbed = asked(served, turns)
    fake.faults.append(Fault(kind))
    assert asked(served, turns).log_probs.equal(undisturbed.log_probs)
    assert fake.faults[-1].times == 0
    fake.faults.append(Fault(kind, times=2000))
    try:
        with pytest.raises(ServerError, match=rf"{fake.url} failed to score .*2 times"):
            asked(served, turns)
    finally:
        fake.faults.clear()


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tokens": None}, r"model\.objective compares over all tokens"),
        ({"added": 8}, r"model\.objective\.init_args\.source .* 8 of the student's own"),
        ({"tokens": 30}, r"refuses to score a text with the 30 most .*max_logprobs=20"),
    ],
)
def test_what_it_cannot_say_is_refused_at_the_start(fake, folder, student_tokenizer, settings, told):
    with pytest.raises(ConfigurationError, match=told):
        ready(ServedTeacher(str(folder), Servers(urls=[fake.url])), student_tokenizer, respell=True, **settings)


def test_another_model_on_the_server_is_told(student_folder, folder, student_tokenizer):
    """One whose tokenizer reads a text otherwise."""
    with (
        serving(student_folder) as other,
        pytest.raises(ConfigurationError, match=f"{other.url} reads a text as other"),
    ):
        ready(ServedTeacher(str(folder), Servers(urls=[other.url])), student_tokenizer, respell=False)


def test_a_server_that_is_not_there_is_told_with_its_address(folder, student_tokenizer):
    told = r"http://127\.0\.0\.1:1 failed to say what model it has ./v1/models.* not reachable"
    with pytest.raises(ServerError, match=told):
        ready(
            ServedTeacher(str(folder), Servers(urls=["http://127.0.0.1:1/"], attempts=2)),
            student_tokenizer,
            respell=True,
        )


@pytest.mark.parametrize("kind", ["served", "local"])
def test_of_a_text_that_is_too_long_nothing_is_said_and_the_others_stay(
    fake, folder, student_tokenizer, turns, caplog, kind
):
    made = ServedTeacher(str(folder), Servers(urls=[fake.url])) if kind == "served" else LocalTeacher(str(folder))
    teacher = ready(made, student_tokenizer, respell=False)
    assert teacher.context == (255 if kind == "served" else 256)
    alone = asked(teacher, turns[:2])
    assert not caplog.records
    long = turn_of(turns[0], random_ids(0, 256))
    for _ in range(2):
        support = asked(teacher, [turns[0], long, turns[1]])
        first = len(turns[0].completion.ids)
        assert not support.comparable[first : first + 256].any()
        others = torch.cat((torch.arange(first), torch.arange(first + 256, len(support.ids))))
        assert support.comparable[others].equal(alone.comparable)
        assert torch.allclose(support.log_probs[others], alone.log_probs, atol=1e-5)
    (record,) = caplog.records
    assert "1 of 3 answers, which with their prompts are longer" in record.message
    assert not asked(teacher, [long]).comparable.any()


def test_another_model_behind_a_server_is_told(fake, folder, student_tokenizer, tmp_path, caplog):
    other = shutil.copytree(folder, tmp_path / "renamed")
    ready(ServedTeacher(str(other), Servers(urls=[fake.url])), student_tokenizer, respell=False)
    (record,) = caplog.records
    assert str(folder) in record.message
    assert "renamed" in record.message


def test_a_server_that_comes_back_with_another_model_ends_the_run(
    folder, teacher_tokenizer, student_tokenizer, turns, tmp_path
):
    other = save_tiny(tmp_path / "other", teacher_tokenizer, seed=3, hidden_size=64)
    with serving(folder) as server:
        teacher = ready(ServedTeacher(str(folder), Servers(urls=[server.url])), student_tokenizer, respell=True)
        before = asked(teacher, turns)
        for present in (folder, other):
            server.stop()
            server.folder = present
            server.restart()
            server.faults.append(Fault("hangs up"))
            if present == folder:
                assert asked(teacher, turns).log_probs.equal(before.log_probs)
        with pytest.raises(ServerError, match="come back with another model"):
            asked(teacher, turns)
