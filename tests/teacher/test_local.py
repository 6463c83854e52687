import json
from pathlib import Path

import pytest
import torch
from reference import all_response_logits, response_logits, sampled_ids, turn_of
from tiny import PAD, STUDENT_END, TEACHER_END, THINK_TAGS, chat_tokenizer, save_tiny, tiny_model, train_bpe
from tokenizers import Tokenizer
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.masks import loss_mask
from lsm_lightning.pretrained import render
from lsm_lightning.rollout import Sampling
from lsm_lightning.teacher import LocalTeacher
from lsm_lightning.teacher import local as local_module
from lsm_lightning.types import Support, Turn

K, VOCABULARY = 8, 340


def teacher_at(
    folder: Path, student: PreTrainedTokenizerFast, vocabulary: int = VOCABULARY, **settings
) -> LocalTeacher:
    teacher = LocalTeacher(str(folder), **settings)
    teacher.check()
    teacher.setup(student, vocabulary, torch.device("cpu"))
    return teacher


@pytest.fixture(scope="module")
def teacher(teacher_folder, student_tokenizer) -> LocalTeacher:
    return teacher_at(teacher_folder, student_tokenizer)


def slow_log_probs(teacher: LocalTeacher, turns: list[Turn]) -> torch.Tensor:
    """`[N, V]` under the teacher's own template, one turn at a time."""
    prompts = render(teacher.tokenizer, [list(turn.prompt.messages) for turn in turns])
    with torch.no_grad():
        logits = [response_logits(teacher.model, p, t.completion.ids) for p, t in zip(prompts, turns, strict=True)]
    return torch.cat(logits).double().log_softmax(-1)


def assert_same_support(ours: Support, theirs: Support) -> None:
    assert ours.ids.tolist() == theirs.ids.tolist()
    for name in ("log_probs", "sampled", "turn_end"):
        assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-5)


def test_scores_are_those_of_a_slow_reader(teacher, turns, teacher_tokenizer):
    support, log_probs = teacher.score(turns, K), slow_log_probs(teacher, turns)
    top = log_probs[:, teacher._shared].topk(K, -1)
    shared = teacher._shared.nonzero()[:, 0]
    assert support.ids.tolist() == shared[top.indices].tolist()
    assert_close(support.log_probs.double(), top.values, rtol=1e-5, atol=1e-5)
    sampled = log_probs.gather(1, sampled_ids(turns)[:, None])[:, 0]
    assert_close(support.sampled.double(), sampled, rtol=1e-5, atol=1e-5)
    end = teacher_tokenizer.convert_tokens_to_ids(TEACHER_END)
    assert_close(support.turn_end.double(), log_probs[:, end], rtol=1e-5, atol=1e-5)


def test_log_probs_are_over_the_whole_vocabulary_and_ordered(teacher, turns):
    support = teacher.score(turns, K)
    tail = slow_log_probs(teacher, turns).exp().scatter(1, support.ids, 0.0).sum(-1)
    assert_close(support.log_probs.double().exp().sum(-1) + tail, torch.ones_like(tail), rtol=0, atol=1e-5)
    assert (tail > 1e-3).all()
    assert (support.log_probs.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("batch_tokens", [1, 30, 50, 100], ids="batch_tokens={}".format)
def test_batching_changes_nothing(teacher_folder, student_tokenizer, teacher, turns, batch_tokens):
    other = teacher_at(teacher_folder, student_tokenizer, batch_tokens=batch_tokens)
    assert_same_support(other.score(turns, K), teacher.score(turns, K))


@pytest.mark.parametrize("logits", [1, 1000, 5000], ids="logits={}".format)
def test_chunks_of_logits_change_nothing(teacher, turns, monkeypatch, logits):
    whole = teacher.score(turns, K)
    monkeypatch.setattr(local_module, "LOGITS_AT_ONCE", logits)
    assert_same_support(teacher.score(turns, K), whole)


def test_order_of_turns_is_kept(teacher, turns):
    parts = [teacher.score([turn], K) for turn in turns]
    for order in (range(len(turns)), [4, 0, 5, 2, 1, 3]):
        support = teacher.score([turns[i] for i in order], K)
        assert support.ids.tolist() == [row for i in order for row in parts[i].ids.tolist()]


def test_an_answer_of_no_tokens_has_no_positions(teacher, turns):
    empty = turn_of(turns[0], [])
    assert_same_support(teacher.score([turns[1], empty, turns[2]], K), teacher.score(turns[1:3], K))


def test_the_prompt_is_read_under_the_teachers_own_template(teacher_folder, student_tokenizer, teacher, turns):
    """What it says is not what it would say after the student's prompt, where the templates differ."""
    loud = str(teacher.tokenizer.chat_template).replace("message['content']", "message['content'] + '!'")
    other = teacher_at(teacher_folder, student_tokenizer, chat_template=loud)
    with torch.no_grad():
        as_student_asked = all_response_logits(other.model, turns).log_softmax(-1)
    assert_close(
        other.score(turns, K).log_probs.double(), _top(other, slow_log_probs(other, turns)), rtol=1e-5, atol=1e-5
    )
    assert (other.score(turns, K).log_probs - _top(other, as_student_asked)).abs().max() > 0.01


def _top(teacher: LocalTeacher, log_probs: torch.Tensor) -> torch.Tensor:
    return log_probs.masked_fill(~teacher._shared, -torch.inf).topk(K, -1).values


def test_all_of_the_teachers_ends_are_one_class(teacher_folder, student_tokenizer, turns, tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    for file in Path(teacher_folder).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    ends = [2, 17, 40]
    generation = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": ends}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    teacher = teacher_at(folder, student_tokenizer)
    mass = slow_log_probs(teacher, turns)[:, ends].exp().sum(-1)
    assert_close(teacher.score(turns, K).turn_end.double(), mass.log(), rtol=1e-5, atol=1e-5)
    assert teacher.player(Sampling()).turn_end == set(ends)


@pytest.mark.parametrize("rows", [340, 352])
def test_ids_beyond_the_students_vocabulary_never_enter(student_tokenizer, teacher_tokenizer, turns, tmp_path, rows):
    """A teacher's matrix is often padded beyond its tokenizer, and beyond the student's."""
    ends = {"eos_token_id": 2, "pad_token_id": 0}
    model = tiny_model(vocabulary=400, seed=4, **ends)
    with torch.no_grad():
        model.base_model.embed_tokens.weight[rows:] *= 30  # what does not exist is most probable
    model.save_pretrained(tmp_path)
    teacher_tokenizer.save_pretrained(tmp_path)
    teacher = teacher_at(tmp_path, student_tokenizer, vocabulary=rows)
    support = teacher.score(turns, K)
    assert support.ids.max() < len(student_tokenizer)
    assert slow_log_probs(teacher, turns).argmax(-1).max() >= rows  # the control
    assert_close(support.log_probs.double(), _top(teacher, slow_log_probs(teacher, turns)), rtol=1e-4, atol=1e-4)


def test_an_id_that_the_student_cannot_write_never_enters(student_tokenizer, teacher_folder, turns):
    """With a student of 100 output rows, the teacher's other tokens are no support."""
    teacher = teacher_at(teacher_folder, student_tokenizer, vocabulary=100)
    short = [turn_of(turn, [i % 100 for i in turn.completion.ids]) for turn in turns]
    assert teacher.score(short, K).ids.max() < 100


def test_a_token_from_the_students_padding_is_scored_too(student_tokenizer, teacher_tokenizer, turns, tmp_path):
    """An untrained output row beyond the tokenizer can be sampled, if rarely; it must not end the run."""
    teacher_tokenizer.save_pretrained(tmp_path)
    tiny_model(vocabulary=352, seed=4, eos_token_id=2, pad_token_id=0).save_pretrained(tmp_path)
    teacher = teacher_at(tmp_path, student_tokenizer, vocabulary=352)
    odd = turn_of(turns[0], [20, 351, 30])
    assert teacher.score([odd], K).ids.shape == (3, K)
    assert loss_mask(teacher.pair, [odd], "tags").keep.shape == (3,)


def test_another_vocabulary_is_refused_with_the_remedy(student_tokenizer, tmp_path):
    spec = json.loads(train_bpe().to_str())
    low, high = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)[50:52]
    vocabulary = spec["model"]["vocab"]
    vocabulary[low], vocabulary[high] = vocabulary[high], vocabulary[low]
    other = chat_tokenizer(Tokenizer.from_str(json.dumps(spec)), TEACHER_END, whole_tags=THINK_TAGS)
    save_tiny(tmp_path, other)
    with pytest.raises(ConfigurationError, match=r"2 of the student's 340 tokens .*same tokenizer family"):
        teacher_at(tmp_path, student_tokenizer)


def test_the_vocabulary_check_lets_the_same_one_pass(teacher):
    assert int(teacher._shared.sum()) >= VOCABULARY - len(THINK_TAGS)


def test_a_support_larger_than_what_both_share_is_refused(teacher, turns):
    shared = int(teacher._shared.sum())
    assert teacher.score(turns, shared).ids.shape[1] == shared
    with pytest.raises(ConfigurationError, match=f"k={shared + 1} .* share only {shared}"):
        teacher.score(turns, shared + 1)


def test_a_missing_teacher_fails_before_anything_is_loaded():
    with pytest.raises(ConfigurationError, match="no-such-teacher"):
        LocalTeacher("./no-such-teacher").check()


def test_the_teacher_can_play(teacher):
    player = teacher.player(Sampling(temperature=0.0))
    (turn,) = player.answer([[{"role": "user", "content": "Say apple"}]], [0], max_new_tokens=5)
    assert 1 <= len(turn.completion.ids) <= 5
    assert turn.prompt.ids == render(teacher.tokenizer, [[{"role": "user", "content": "Say apple"}]])[0]


def test_both_sides_spell_and_end_differently_over_one_vocabulary(teacher, student_tokenizer, teacher_tokenizer):
    """What the fixtures promise to the tests that use them."""
    assert student_tokenizer.get_vocab() == teacher_tokenizer.get_vocab()
    assert len(student_tokenizer("<think>")["input_ids"]) > len(teacher_tokenizer("<think>")["input_ids"]) == 1
    assert student_tokenizer.eos_token == STUDENT_END != teacher_tokenizer.eos_token
    assert student_tokenizer.pad_token == PAD
