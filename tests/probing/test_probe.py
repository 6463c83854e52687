"""A sound set-up passes without a word; each defect that would ruin a run is made for real, and refused by name."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from scripted import EchoEpisode, EchoGames
from tiny import save_tiny
from torch import Tensor
from transformers import PreTrainedModel

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives import FullVocabulary, LocalSupportMatching, Objective, SampledToken
from lsm_lightning.objectives.head import OutputHead
from lsm_lightning.pretrained import EMBEDDED_FOLDER, load_model, load_tokenizer, turn_end_ids
from lsm_lightning.probing import Probing, TaskProbe, probe_task
from lsm_lightning.probing import probe as probe_module
from lsm_lightning.probing.answers import Played, openings, play
from lsm_lightning.probing.probe import LOOKED_AHEAD
from lsm_lightning.probing.sampling import check_randomness
from lsm_lightning.probing.templates import longest_prompt
from lsm_lightning.rollout import LocalEngine, Sampling
from lsm_lightning.rollout.collect import Player
from lsm_lightning.tasks.base import Split, Task
from lsm_lightning.tasks.math import AdditionProblems
from lsm_lightning.teacher import LocalTeacher
from lsm_lightning.types import Completion, Message, Prompt, Support, Turn
from tokenalign import Pair

STUDENT, TEACHER = "embedded:student", "embedded:math-teacher"
LSM = LocalSupportMatching(k=32)
model_of = cache(lambda name: load_model(name, "float32"))


WRITTEN: dict[Any, Played] = {}


def remembered(task: Task, player: Player, **how: Any) -> Played:
    """Writing takes longest, and the embedded models write the same every time."""
    name = str(player.tokenizer.name_or_path)
    key = (name, player.tokenizer.chat_template, player.turn_end, player.sampling, str(vars(task)), *how.values())
    if not name.startswith(str(EMBEDDED_FOLDER)):
        return play(task, player, **how)
    if key not in WRITTEN:
        WRITTEN[key] = play(task, player, **how)
    return WRITTEN[key]


def probed(
    teacher: LocalTeacher | str = TEACHER,
    student: str = STUDENT,
    *,
    objective: Objective = LSM,
    mask: Any = "repair",
    task: Task | None = None,
    student_template: str | None = None,
    sampling: Sampling = Sampling(),
    leads: bool = True,
    broadcast: Callable[[Any], Any] = lambda it: it,
    **settings: Any,
) -> TaskProbe:
    """What is seen of a pair of models, on the embedded ones' own task if no other is given."""
    teacher = LocalTeacher(teacher) if isinstance(teacher, str) else teacher
    tokenizer, model = load_tokenizer(student, student_template), model_of(student)
    teacher.setup(
        tokenizer,
        vocabulary=len(model.get_output_embeddings().weight),
        respell=mask == "repair",
        tokens=objective.teacher_tokens,
        device=torch.device("cpu"),
    )
    player = Player(
        engine=LocalEngine.around(model),
        tokenizer=tokenizer,
        turn_end=turn_end_ids(model, tokenizer),
        sampling=sampling,
    )
    probing = {
        "name": "sums", "task": AdditionProblems() if task is None else task, "teacher": teacher,
        "device": torch.device("cpu"), "student": player, "objective": objective, "mask": mask, "samples": 4,
        "first": 0, "seed": 0, "texts": 4, "tokens": 256, **settings,
    }  # fmt: skip
    with mock.patch.object(probe_module, "play", remembered):
        return probe_task(Probing(**probing), leads=leads, broadcast=broadcast)


def verdicts(probe: TaskProbe) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in probe.findings}


def text_of(probe: TaskProbe, check: str) -> str:
    (found,) = [str(finding) for finding in probe.findings if finding.check == check]
    return found


def asserted_refusal(probe: TaskProbe, check: str, *names: str) -> None:
    refused = {finding.check: str(finding) for finding in probe.of("refused")}
    assert check in refused, probe.findings
    for name in names:
        assert name in refused[check]


# ---- sound ----------------------------------------------------------------------------------------------------------

CHECKS = {
    "tokenizers", "student's template", "teacher's template", "student's context", "teacher's context", "log-probs",
    "top tokens", "student's answers", "student's turn end", "teacher's turn end", "scoring", "own answers",
    "end of turn", "mask", "samples", "estimate", "randomness",
}  # fmt: skip


@pytest.fixture(scope="module")
def sound() -> TaskProbe:
    return probed()


def test_a_sound_pair_passes_every_check(sound):
    assert verdicts(sound) == dict.fromkeys(CHECKS, "ok")


def test_figures_of_a_sound_pair(sound):
    """The embedded pair differs in the spelling of `<think>` and in nothing else (`test_embedded`)."""
    assert {row.reason for row in sound.masked} <= {"part of a tag"}
    assert 0 < sum(row.share for row in sound.masked) < 0.2
    assert sound.rewards["teacher"] == [1.0] * 4
    assert len(sound.rewards["student"]) == 4


@pytest.mark.parametrize("objective", [FullVocabulary(), SampledToken(), LocalSupportMatching(k=8, source="union")])
def test_a_sound_pair_passes_whatever_is_compared(objective):
    assert not probed(objective=objective, sampling=Sampling(top_p=1.0)).of("warning", "refused")


def test_less_is_seen_of_a_teacher_that_does_not_write():
    probe = probed(teacher_writes=False)
    assert not probe.of("warning", "refused")
    assert verdicts(probe).keys() == CHECKS - {"teacher's turn end", "scoring", "own answers", "end of turn"}
    assert probe.texts.keys() == {"student"}


@pytest.mark.parametrize(("texts", "turns"), [(1, 1), (4, 4), (9, 9), (10, 12)])
def test_so_many_texts_are_written(texts, turns):
    """Two games of two turns, three of three, and so on, where there may be many turns."""
    task = EchoGames(turns=9)
    task.max_turns = 10
    with mock.patch.object(Player, "turns", autospec=True, side_effect=Player.turns) as answered:
        probed(task=task, texts=texts)
    assert sum(len(call.args[1]) for call in answered.call_args_list) == 2 * turns


# ---- templates and contexts -----------------------------------------------------------------------------------------

RIGHT = load_tokenizer(TEACHER).chat_template
BROKEN: dict[str, tuple[str, str]] = {
    "drops the question": (RIGHT.replace("message['content']", "'...'"), "It leaves out what the task says"),
    "drops half of it": (RIGHT.replace("message['content']", "message['content'][:20]"), "It leaves out"),
    "asks nobody": (RIGHT.replace("add_generation_prompt", "false"), "does not ask the assistant to speak"),
    "the bare question": ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "does not ask the assistant"),
    "refuses": ("{{ raise_exception('no [such] role') }}", "cannot be rendered: no [such] role"),
    "is no program": ("{{ messages[0]['content'] + 1 }}", "cannot be rendered"),
}


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_breaks_a_prompt_is_refused(name, side):
    template, names = BROKEN[name]
    if side == "student":
        probe = probed(student_template=template)
    else:
        probe = probed(LocalTeacher(TEACHER, chat_template=template))
    asserted_refusal(probe, f"{side}'s template", names)
    assert probe.texts == {}  # nothing was written for it


NO_PREFIX_NEEDED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] + '<|assistant|>' }}"
    "{% else %}{{ ' ' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
)


def test_a_template_whose_questions_ask_by_themselves_is_none_of_them():
    """As those that end a question by `[/INST]`, and have no generation prefix."""
    probe = probed(LocalTeacher(TEACHER, chat_template=NO_PREFIX_NEEDED))
    assert verdicts(probe)["teacher's template"] == "ok"


def copied(name: str, folder: Path, change: Callable[[PreTrainedModel], None] = lambda model: None) -> Path:
    """An embedded model, changed."""
    shutil.copytree(EMBEDDED_FOLDER / name, folder)
    model = load_model(str(folder), "float32")
    change(model)
    model.save_pretrained(folder)
    return folder


def of_context(tokens: int) -> Callable[[PreTrainedModel], None]:
    def change(model: PreTrainedModel) -> None:
        model.config.max_position_embeddings = tokens

    return change


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("tokens", [70, 200])
def test_a_context_that_is_too_short_is_refused(tmp_path, side, tokens):
    folder = str(copied({"student": "student", "teacher": "math-teacher"}[side], tmp_path / "m", of_context(tokens)))
    probe = probed(student=folder) if side == "student" else probed(folder)
    if tokens == 70:
        asserted_refusal(probe, f"{side}'s context", "max_new_tokens=64", f"context of {tokens} tokens")
    else:
        assert verdicts(probe)[f"{side}'s context"] == "ok"


class Recounting(EchoEpisode):
    """Each turn tells of all turns before it."""

    def messages(self) -> list[Message]:
        (asked,) = super().messages()
        return [{"role": "user", "content": "You said a word. " * len(self.answers) + asked["content"]}]


class LongGames(EchoGames):
    """Of nine turns; at most so many are played."""

    def __init__(self, kind: type[EchoEpisode], max_turns: int = 9) -> None:
        super().__init__(max_new_tokens=16)
        self.kind, self.max_turns = kind, max_turns
        self.opened: list[EchoEpisode] = []

    def episode(self, split: Split, index: int) -> EchoEpisode:
        self.opened.append(self.kind("apple", turns=9))
        return self.opened[-1]


def prompt_tokens(task: LongGames, turn: int) -> int:
    return longest_prompt(load_tokenizer(TEACHER), openings(task, [0], turn)[-1])


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_context_that_later_turns_outgrow_is_told_with_the_turn(tmp_path, side):
    growing, steady = LongGames(Recounting), LongGames(EchoEpisode)
    first, last = prompt_tokens(growing, 1), prompt_tokens(growing, LOOKED_AHEAD)
    assert first + 16 < last

    def found(task: Task, context: int) -> tuple[str, str]:
        name = {"student": "student", "teacher": "math-teacher"}[side]
        folder = str(copied(name, tmp_path / f"{context}-{len(list(tmp_path.iterdir()))}", of_context(context)))
        probe = probed(student=folder, task=task) if side == "student" else probed(folder, task=task)
        return verdicts(probe)[f"{side}'s context"], text_of(probe, f"{side}'s context")

    verdict, text = found(growing, last + 15)  # one token less than the longest answer
    assert verdict == "warning"
    assert f"{last} tokens in turn {LOOKED_AHEAD}, after" in text
    assert found(growing, last)[0] == "refused"  # no answer at all
    assert found(growing, last + 16)[0] == "ok"
    assert found(LongGames(Recounting, max_turns=1), last)[0] == "ok"
    assert found(steady, last)[0] == "ok"
    verdict, text = found(growing, first + 15)
    assert verdict == "refused"
    assert f"{first} tokens in turn 1 " in text


def test_what_is_looked_ahead_at_is_closed():
    task = LongGames(Recounting)
    asked = openings(task, range(3), LOOKED_AHEAD)
    assert [len(turn) for turn in asked] == [3] * LOOKED_AHEAD
    assert [len(episode.answers) for episode in task.opened] == [LOOKED_AHEAD - 1] * 3
    assert all(episode.closed for episode in task.opened)
    assert len(openings(LongGames(EchoEpisode, max_turns=1), range(3), 20)) == 9  # to the end, where that is sooner


# ---- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "samples", "verdict"), [(0.0, 4, "warning"), (0.0, 1, "ok"), (0.7, 4, "ok"), (1.0, 4, "ok")]
)
def test_samples_that_are_one_text_are_warned_of(temperature, samples, verdict):
    probe = probed(sampling=Sampling(temperature=temperature), samples=samples)
    assert [finding.check for finding in probe.of("warning", "refused")] == (["samples"] if verdict != "ok" else [])
    assert f"{samples} a prompt, at temperature {temperature:g}" in text_of(probe, "samples")


@pytest.mark.parametrize(
    ("objective", "sampling", "verdict"),
    [
        (SampledToken(), Sampling(top_p=1.0), "ok"),
        (SampledToken(), Sampling(top_p=0.9), "warning"),
        (SampledToken(), Sampling(top_p=1.0, temperature=0.7), "warning"),
        (LSM, Sampling(top_p=0.9), "ok"),
    ],
)
def test_an_estimate_from_draws_that_are_not_the_students_own_is_warned_of(objective, sampling, verdict):
    probe = probed(objective=objective, sampling=sampling)
    assert verdicts(probe)["estimate"] == verdict
    assert not probe.of("refused")


@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_a_temperature_that_leaves_sense_is_passed(temperature, top_p):
    probe = probed(sampling=Sampling(temperature=temperature, top_p=top_p))
    assert not probe.of("warning", "refused")


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_answers_that_are_as_good_as_random_are_refused_before_all_that_follows_from_it(top_p):
    probe = probed(sampling=Sampling(temperature=5.0, top_p=top_p))
    assert probe.of("refused")[0].check == "randomness"
    asserted_refusal(probe, "randomness", "temperature 5", "chance: -7.13", "model.sampling.temperature")


def test_a_student_that_knows_nothing_is_not_what_a_temperature_ruins(student_folder, teacher_folder):
    task, sampling = AdditionProblems(digits=1, max_new_tokens=8), Sampling(temperature=5.0)
    probe = probed(str(teacher_folder), str(student_folder), task=task, mask="tags", sampling=sampling)
    assert verdicts(probe)["randomness"] == "ok"
    assert "at temperature 5" in text_of(probe, "randomness")


@pytest.mark.parametrize(
    ("wrote", "at_one", "verdict"),
    [(-0.3, -0.1, "ok"), (-3.0, -0.1, "ok"), (-4.0, -0.1, "warning"), (-8.0, -0.1, "refused"), (-8.0, -6.0, "ok")],
)
def test_how_random_is_too_random(wrote, at_one, verdict):
    def turns(value: float) -> list[Turn]:
        completion = Completion(ids=[1, 2], log_probs=[value - 0.1, value + 0.1], truncated=True)
        return [Turn(prompt=Prompt(messages=[], ids=[1]), completion=completion, answer="")]

    vocabulary = Pair(load_tokenizer(STUDENT), load_tokenizer(TEACHER)).student
    hot = Sampling(temperature=3.0)
    assert check_randomness(turns(wrote), turns(at_one), hot, vocabulary).verdict == verdict
    assert check_randomness(turns(wrote), [], Sampling(), vocabulary).verdict == "ok"
    assert check_randomness([], [], hot, vocabulary).verdict == "unknown"


# ---- log-probs ------------------------------------------------------------------------------------------------------


class Otherwise(LocalTeacher):
    """Scores with other logits than it writes with."""

    def __init__(self, path: str, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(path)
        self.change = change

    def score(self, turns: Any, added: Tensor) -> Support:
        right = OutputHead.all_logits
        changed: Any = lambda head, *args, **options: self.change(right(head, *args, **options))  # noqa: E731
        with mock.patch.object(OutputHead, "all_logits", changed):
            return super().score(turns, added)


LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "temperature 2": lambda logits: logits / 2,
    "temperature 0.5": lambda logits: logits * 2,
    "rows in another order": lambda logits: logits.flip(-1),
    "one position late": lambda logits: logits.roll(1, 0),
    "noise": lambda logits: logits + 5 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("name", LOGITS)
def test_log_probs_other_than_those_it_writes_with_are_refused(name):
    asserted_refusal(probed(Otherwise(TEACHER, LOGITS[name])), "scoring", "raw (temperature 1")


@pytest.mark.parametrize("name", ["rows in another order", "one position late"])
def test_a_teacher_that_finds_shuffled_answers_better_is_refused(name):
    asserted_refusal(probed(Otherwise(TEACHER, LOGITS[name])), "own answers", "shuffled")


def test_rounding_is_not_refused():
    assert verdicts(probed(LocalTeacher(TEACHER, dtype="bfloat16")))["scoring"] in ("ok", "warning")
    assert not probed(LocalTeacher(TEACHER, dtype="bfloat16")).of("refused")


class Answering(LocalTeacher):
    """Changes what it answers."""

    def __init__(self, path: str, change: Callable[[Support], Support]) -> None:
        super().__init__(path)
        self.change = change

    def score(self, turns: Any, added: Tensor) -> Support:
        return self.change(super().score(turns, added))


ANSWERS: dict[str, tuple[Callable[[Support], Support], str, str]] = {
    "probabilities": (lambda s: replace(s, log_probs=s.log_probs.exp()), "log-probs", "more than a log-prob can be"),
    "no numbers": (lambda s: replace(s, log_probs=s.log_probs * torch.nan), "log-probs", "no numbers"),
    "a shift": (lambda s: replace(s, log_probs=s.log_probs + 0.5), "log-probs", ""),
    "five of 32": (lambda s: replace(s, ids=s.ids[:, :5], log_probs=s.log_probs[:, :5]), "top tokens", "5 came"),
    "nothing comparable": (
        lambda s: replace(s, comparable=torch.zeros_like(s.comparable), alike=torch.zeros_like(s.alike)), "mask", "0.0%"
    ),
    "no members": (
        lambda s: replace(s, log_probs=torch.full_like(s.log_probs, -torch.inf), lost=torch.ones_like(s.lost)), "mask",
        "two tokens to compare",
    ),
    "unlikely ends": (lambda s: replace(s, turn_end=s.turn_end - 9), "end of turn", "probability"),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_that_cannot_be_true_are_refused(name):
    change, check, names = ANSWERS[name]
    asserted_refusal(probed(Answering(TEACHER, change)), check, names)


def test_top_tokens_with_a_normaliser_of_their_own_are_refused(student_folder, teacher_folder):
    def renormalised(support: Support) -> Support:
        return replace(support, log_probs=support.log_probs.log_softmax(-1))

    teacher = Answering(str(teacher_folder), renormalised)
    probe = probed(teacher, str(student_folder), objective=LocalSupportMatching(k=8), mask="tags")
    asserted_refusal(probe, "log-probs", "among the top tokens")


def test_all_tokens_must_sum_to_one():
    def without_the_first(support: Support) -> Support:
        log_probs = support.log_probs.clone()
        log_probs[torch.arange(len(log_probs)), log_probs.argmax(-1)] = -torch.inf
        return replace(support, log_probs=log_probs)

    objective = FullVocabulary()
    asserted_refusal(probed(Answering(TEACHER, without_the_first), objective=objective), "log-probs", "sum to", "only")


# ---- models ---------------------------------------------------------------------------------------------------------


def shuffle_rows(model: PreTrainedModel) -> None:
    model.config.tie_word_embeddings = False
    head: Any = model.get_output_embeddings()
    order = torch.randperm(len(head.weight), generator=torch.Generator().manual_seed(0))
    head.weight = torch.nn.Parameter(head.weight[order].detach().clone())


def test_weights_that_do_not_fit_their_tokenizer_are_refused(tmp_path):
    asserted_refusal(
        probed(str(copied("math-teacher", tmp_path / "t", shuffle_rows))), "student's answers", "chance: -7"
    )


def test_a_student_as_its_own_teacher_is_warned_of():
    probe = probed(STUDENT)
    assert not probe.of("refused")
    assert [finding.check for finding in probe.of("warning")] == ["student's answers"]
    assert "nothing to learn" in text_of(probe, "student's answers")


# ---- ends of turns --------------------------------------------------------------------------------------------------


def ending_otherwise(name: str, folder: Path, end: str) -> Path:
    """An embedded model whose settings name another end of a turn than it writes."""
    copied(name, folder)
    for file, setting in (("tokenizer_config.json", "eos_token"), ("generation_config.json", "eos_token_id")):
        settings = json.loads((folder / file).read_text())
        settings[setting] = end if setting == "eos_token" else load_tokenizer(STUDENT).convert_tokens_to_ids(end)
        (folder / file).write_text(json.dumps(settings))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", end).replace("<|im_end|>", end))
    return folder


def test_a_teacher_that_goes_on_after_its_end_is_refused(tmp_path):
    folder = ending_otherwise("math-teacher", tmp_path / "teacher", "<|user|>")
    asserted_refusal(probed(str(folder)), "teacher's turn end", "<|end|>", "eos_token_id")


def test_a_student_that_goes_on_after_its_end_is_refused(tmp_path):
    folder = ending_otherwise("student", tmp_path / "student", "<|user|>")
    asserted_refusal(probed(student=str(folder)), "student's turn end", "<|im_end|>", "eos_token_id")


def test_answers_that_need_longer_are_warned_of():
    probe = probed(task=AdditionProblems(max_new_tokens=8))
    warned = {finding.check: str(finding) for finding in probe.of("warning")}
    assert warned.keys() == {"student's turn end", "teacher's turn end"}
    assert "max_new_tokens" in warned["teacher's turn end"]
    cut = probed(tokens=8)
    assert verdicts(cut)["teacher's turn end"] == verdicts(cut)["end of turn"] == "unknown"
    assert not cut.of("warning", "refused")


def test_an_end_that_is_another_token_to_the_student_is_refused_without_a_mask_and_warned_of_with_one():
    asserted_refusal(probed(mask="none"), "end of turn", "<|end|>", "<|im_end|>", "repair")
    assert "ends are masked" in text_of(probed(mask="tags"), "end of turn")


# ---- masks ----------------------------------------------------------------------------------------------------------


def test_reasons_add_up_to_what_is_left_out():
    for mask in ("none", "tags", "canonical", "strict", "paper"):
        probe = probed(mask=mask)
        counted = float(text_of(probe, "mask").split("%")[0])
        assert sum(row.share for row in probe.masked) == pytest.approx(1 - counted / 100, abs=1e-3)
        assert all(0 < len(row.examples) <= 3 for row in probe.masked)
    assert {row.reason for row in probed(mask="canonical").masked} == {"part of a tag", "end of the turn"}


def test_random_models_are_not_refused(student_folder, teacher_folder):
    """Nothing is wrong with a student that has to learn everything."""
    task = AdditionProblems(digits=1, max_new_tokens=8)
    probe = probed(str(teacher_folder), str(student_folder), task=task, objective=LocalSupportMatching(k=8))
    assert not probe.of("refused")


def test_a_vocabulary_of_its_own_is_compared_where_it_can_be(tmp_path, teacher_tokenizer):
    folder = save_tiny(tmp_path / "teacher", teacher_tokenizer, seed=2)
    probe = probed(str(folder), objective=LocalSupportMatching(k=8))
    assert text_of(probe, "mask")


# ---- several processes ----------------------------------------------------------------------------------------------


@dataclass
class Told:
    """What the process that leads told, to be heard by another."""

    messages: list[Any] = field(default_factory=list)

    def tell(self, message: Any) -> Any:
        self.messages.append(message)
        return message

    def hear(self, _: Any) -> Any:
        return self.messages.pop(0)


def test_a_process_that_follows_writes_nothing_and_sees_the_same():
    told, asked = Told(), []
    led = probed(broadcast=told.tell)
    following = Answering(TEACHER, lambda support: asked.append(len(support.ids)) or support)
    with mock.patch.object(LocalEngine, "converse", side_effect=AssertionError("it writes")):
        followed = probed(following, leads=False, broadcast=told.hear)
    assert followed == led
    assert asked == [0]
    assert told.messages == []


@pytest.mark.parametrize("error", [ConfigurationError("a server is away"), KeyError("odd")], ids=["known", "unknown"])
@pytest.mark.parametrize("where", ["writing", "scoring"])
def test_all_processes_stop_where_the_first_does(error, where):
    told = Told()

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    owner, name = (LocalTeacher, "score") if where == "scoring" else (AdditionProblems, "episode")
    with mock.patch.object(owner, name, fail), pytest.raises(type(error)):
        probed(broadcast=told.tell)
    kind = ConfigurationError if isinstance(error, ConfigurationError) else RuntimeError
    with pytest.raises(kind, match=r"a server is away|odd"):
        probed(leads=False, broadcast=told.hear)
    assert told.messages == []
