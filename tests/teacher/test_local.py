import dataclasses
import json
import shutil

import pytest
import torch
from scripted import say
from slow import all_response_logits, sampled_ids, tensor_sizes, turn_of
from teachers import VOCABULARY, K, asked, members, nothing_added, slow_log_probs, teacher_at
from tiny import PAD, STUDENT_END, TEACHER_END, THINK_TAGS, random_ids, tiny_model
from torch.testing import assert_close
from transformers import PreTrainedModel

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.masks import loss_mask
from lsm_lightning.objectives import LocalSupportMatching
from lsm_lightning.pretrained import load_model, load_tokenizer, render
from lsm_lightning.rollout import Sampling
from lsm_lightning.teacher import LocalTeacher
from lsm_lightning.teacher import scoring as scoring_module
from lsm_lightning.types import Support
from lsm_lightning.update import accumulate_gradients


@pytest.fixture(scope="module")
def teacher(teacher_folder, student_tokenizer) -> LocalTeacher:
    """Reads the student's tokens as they stand."""
    return teacher_at(teacher_folder, student_tokenizer)


@pytest.fixture(scope="module", params=[False, True], ids=["as it stands", "respelled"])
def either(request, teacher_folder, student_tokenizer) -> LocalTeacher:
    return teacher_at(teacher_folder, student_tokenizer, respell=request.param)


def assert_same_support(ours: Support, theirs: Support) -> None:
    for name in ("ids", "comparable", "alike"):
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist(), name
    for name in ("log_probs", "sampled", "turn_end", "lost"):
        assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-5)


# ---- what it says ---------------------------------------------------------------------------------------------------


def test_scores_are_those_of_a_slow_reader(teacher, turns, teacher_tokenizer):
    support, log_probs = asked(teacher, turns), slow_log_probs(teacher, turns)
    shared = teacher.translation.members.nonzero()[:, 0]
    top = log_probs[:, shared].topk(K, -1)
    assert support.ids.tolist() == shared[top.indices].tolist()
    assert_close(support.log_probs.double(), top.values, rtol=1e-5, atol=1e-5)
    sampled = log_probs.gather(1, sampled_ids(turns)[:, None])[:, 0]
    assert_close(support.sampled.double(), sampled, rtol=1e-5, atol=1e-5)
    end = teacher_tokenizer.convert_tokens_to_ids(TEACHER_END)
    assert_close(support.turn_end.double(), log_probs[:, end], rtol=1e-5, atol=1e-5)
    assert support.comparable.all()
    assert support.alike.all()
    assert (support.lost == 0).all()


def test_log_probs_are_over_the_whole_vocabulary_and_ordered(teacher, turns):
    support = asked(teacher, turns)
    tail = slow_log_probs(teacher, turns).exp().scatter(1, support.ids, 0.0).sum(-1)
    assert_close(support.log_probs.double().exp().sum(-1) + tail, torch.ones_like(tail), rtol=0, atol=1e-5)
    assert (tail > 1e-3).all()
    assert (support.log_probs.diff(dim=-1) <= 0).all()


def test_further_ids_are_looked_up_and_none_counts_twice(teacher, turns):
    """Some are among the top tokens, one is there twice, one is no token of both."""
    top, log_probs = asked(teacher, turns).ids, slow_log_probs(teacher, turns)
    sampled = sampled_ids(turns)[:, None]
    added = torch.cat((sampled, top[:, 2:3], torch.full_like(sampled, 77), sampled), -1)
    support = asked(teacher, turns, added)
    assert support.ids.shape == (len(sampled), K + 4)
    for n, found in enumerate(members(support)):
        tokens = {*top[n].tolist(), *added[n].tolist()}
        assert found == pytest.approx({i: log_probs[n, i].item() for i in tokens}, abs=1e-5)


def test_it_may_be_asked_for_no_top_tokens(teacher_folder, student_tokenizer, turns):
    teacher = teacher_at(teacher_folder, student_tokenizer, tokens=0)
    assert asked(teacher, turns).ids.shape == (len(sampled_ids(turns)), 0)
    support = asked(teacher, turns, sampled_ids(turns)[:, None])
    assert support.ids[:, 0].tolist() == sampled_ids(turns).tolist()
    assert support.log_probs[:, 0].tolist() == support.sampled.tolist()


def test_it_may_be_asked_for_everything(teacher_folder, student_tokenizer, turns):
    teacher = teacher_at(teacher_folder, student_tokenizer, tokens=None)
    support, log_probs = asked(teacher, turns), slow_log_probs(teacher, turns)
    assert support.ids.shape[1] == teacher.translation.known
    assert_close(support.log_probs.double(), log_probs.gather(1, support.ids), rtol=1e-5, atol=1e-5)


def test_the_prompt_is_read_under_the_teachers_own_template(teacher_folder, student_tokenizer, teacher, turns):
    """What it says is not what it would say after the student's prompt, where the templates differ."""
    loud = str(teacher.tokenizer.chat_template).replace("message['content']", "message['content'] + '!'")
    other = teacher_at(teacher_folder, student_tokenizer, chat_template=loud)
    with torch.no_grad():
        as_student_asked = all_response_logits(other.model, turns).log_softmax(-1)
    support = asked(other, turns)
    expected = slow_log_probs(other, turns).gather(1, support.ids)
    assert_close(support.log_probs.double(), expected, rtol=1e-5, atol=1e-5)
    assert (support.log_probs - as_student_asked.gather(1, support.ids)).abs().max() > 0.01


def test_all_of_the_teachers_ends_are_one_class(teacher_folder, student_tokenizer, turns, tmp_path):
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
    ends = [2, 17, 40]
    generation = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": ends}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    teacher = teacher_at(folder, student_tokenizer)
    mass = slow_log_probs(teacher, turns)[:, ends].exp().sum(-1)
    assert_close(asked(teacher, turns).turn_end.double(), mass.log(), rtol=1e-5, atol=1e-5)
    assert teacher.player(Sampling()).turn_end == set(ends)


# ---- how it is computed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 30, 50, 100], ids="batch_tokens={}".format)
def test_batching_changes_nothing(either, turns, monkeypatch, batch_tokens):
    whole = asked(either, turns)
    monkeypatch.setattr(either, "batch_tokens", batch_tokens)
    assert_same_support(asked(either, turns), whole)


@pytest.mark.parametrize("logits", [1, 1000, 5000], ids="logits={}".format)
def test_chunks_of_logits_change_nothing(either, turns, monkeypatch, logits):
    whole = asked(either, turns, sampled_ids(turns)[:, None])
    monkeypatch.setattr(scoring_module, "LOGITS_AT_ONCE", logits)
    assert_same_support(asked(either, turns, sampled_ids(turns)[:, None]), whole)


def test_order_of_turns_is_kept(either, turns):
    parts = [asked(either, [turn]) for turn in turns]
    for order in (range(len(turns)), [4, 0, 5, 7, 2, 1, 6, 3]):
        support = asked(either, [turns[i] for i in order])
        assert support.ids.tolist() == [row for i in order for row in parts[i].ids.tolist()]


def test_an_answer_of_no_tokens_has_no_positions(either, turns):
    empty = turn_of(turns[0], [])
    assert_same_support(asked(either, [turns[1], empty, turns[2]]), asked(either, turns[1:3]))
    assert asked(either, [empty, empty]).ids.shape[0] == 0


def test_logits_of_the_whole_vocabulary_never_exist_for_all_positions(
    student_tokenizer, teacher_tokenizer, turns, tmp_path, monkeypatch
):
    rows = 5000
    teacher_tokenizer.save_pretrained(tmp_path)
    narrow = {"hidden_size": 8, "intermediate_size": 8, "eos_token_id": 2, "pad_token_id": 0}
    tiny_model(vocabulary=rows, **narrow).save_pretrained(tmp_path)
    long = [turn_of(turn, random_ids(seed=i, length=60)) for i, turn in enumerate(turns)]
    for respell in (False, True):
        teacher = teacher_at(tmp_path, student_tokenizer, respell=respell)
        monkeypatch.setattr(scoring_module, "LOGITS_AT_ONCE", 4 * rows)
        with tensor_sizes() as sizes:
            asked(teacher, long)
        assert sizes.largest <= 8 * rows  # the embedding is that large
        monkeypatch.setattr(scoring_module, "LOGITS_AT_ONCE", 2**23)
        with tensor_sizes() as sizes:
            asked(teacher, long)
        assert sizes.largest == len(sampled_ids(long)) * rows  # the watch can see them


def test_it_is_frozen_in_eval_mode_and_stays_out_of_the_graph(either, turns):
    def train(module: torch.nn.Module) -> bool:
        return module.training

    assert not any(map(train, either.model.modules()))
    assert not any(parameter.requires_grad for parameter in either.model.parameters())
    before = {name: value.clone() for name, value in either.model.state_dict().items()}
    support = asked(either, turns)
    assert not any(getattr(support, field.name).requires_grad for field in dataclasses.fields(support))
    assert all(torch.equal(before[name], value) for name, value in either.model.state_dict().items())


def test_bf16_scores_are_those_of_float32_within_rounding(student_tokenizer, teacher_folder, turns):
    """Its top tokens may change places where they lie within rounding of each other."""
    everything = {"tokens": None}
    exact = asked(teacher_at(teacher_folder, student_tokenizer, **everything), turns)
    half = asked(teacher_at(teacher_folder, student_tokenizer, dtype="bfloat16", **everything), turns)
    assert half.log_probs.dtype == torch.float32
    assert_close(half.log_probs.exp().sum(-1), exact.log_probs.exp().sum(-1), rtol=0, atol=0.02)
    by_id = [torch.zeros(len(s.ids), VOCABULARY).scatter(1, s.ids, s.log_probs) for s in (exact, half)]
    error = (by_id[0] - by_id[1]).abs()
    assert error.max() < 0.15
    assert error.mean() < 0.02
    for name in ("sampled", "turn_end"):
        assert_close(getattr(half, name), getattr(exact, name), rtol=0, atol=0.15)
    top = asked(teacher_at(teacher_folder, student_tokenizer, dtype="bfloat16"), turns)
    kth = exact.log_probs[:, K - 1 : K]  # what is in the top K of one is nearly as likely in the other
    assert (by_id[0].gather(1, top.ids) >= kth - 0.3).all()
    unlike = asked(teacher_at(teacher_folder, student_tokenizer, **everything), turns[::-1]).sampled  # the control
    assert (unlike - exact.sampled).abs().max() > 0.15


@pytest.mark.parametrize("respell", [False, True], ids=["as it stands", "respelled"])
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-6), ("bfloat16", 1e-3)])
def test_a_student_has_nothing_to_learn_from_itself(student_folder, student_tokenizer, turns, dtype, most, respell):
    """On a CPU its logits as a teacher are rounded to its type."""
    objective = LocalSupportMatching(k=K, support="tail_bucket")
    teacher = teacher_at(student_folder, student_tokenizer, dtype=dtype, respell=respell)
    itself = load_model(str(student_folder), dtype)
    support = asked(teacher, turns)
    weights = support.comparable.float() / support.comparable.sum()

    def loss(student: PreTrainedModel) -> float:
        groups = [[*range(len(turns))]]
        return accumulate_gradients(
            student, objective, turns, support, weights, groups=groups, backward=lambda loss: None
        ).loss

    assert abs(loss(itself)) < most
    with torch.no_grad():
        itself.get_output_embeddings().weight *= 1.5  # the control
    assert loss(itself) > 10 * most


# ---- what never enters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("respell", [False, True], ids=["as it stands", "respelled"])
@pytest.mark.parametrize("rows", [340, 352])
def test_ids_beyond_the_tokenizers_never_enter(student_tokenizer, teacher_tokenizer, turns, tmp_path, rows, respell):
    """A teacher's matrix is often padded beyond its tokenizer, and beyond the student's."""
    model = tiny_model(vocabulary=400, seed=4, eos_token_id=2, pad_token_id=0)
    with torch.no_grad():
        model.base_model.embed_tokens.weight[VOCABULARY:] *= 30  # what does not exist is most probable
    model.save_pretrained(tmp_path)
    teacher_tokenizer.save_pretrained(tmp_path)
    for tokens, added in ((K, nothing_added(turns)), (None, sampled_ids(turns)[:, None])):
        teacher = teacher_at(tmp_path, student_tokenizer, vocabulary=rows, respell=respell, tokens=tokens)
        support = asked(teacher, turns, added)
        assert support.ids.max() < len(student_tokenizer)
        assert (support.lost == 0).all() or respell
    assert slow_log_probs(teacher, turns).argmax(-1).max() >= VOCABULARY  # the control


@pytest.mark.parametrize("respell", [False, True], ids=["as it stands", "respelled"])
def test_an_id_that_the_student_cannot_write_never_enters(student_tokenizer, teacher_folder, turns, respell):
    """With a student of 100 output rows, the teacher's other tokens are no support."""
    teacher = teacher_at(teacher_folder, student_tokenizer, vocabulary=100, respell=respell)
    short = [turn_of(turn, [5 + i % 95 for i in turn.completion.ids]) for turn in turns]
    assert asked(teacher, short).ids.max() < 100


def test_a_token_from_the_students_padding_is_scored_too(student_tokenizer, teacher_tokenizer, turns, tmp_path):
    """An untrained output row beyond the tokenizer can be sampled, if rarely; it must not end the run."""
    teacher_tokenizer.save_pretrained(tmp_path)
    tiny_model(vocabulary=352, seed=4, eos_token_id=2, pad_token_id=0).save_pretrained(tmp_path)
    odd = turn_of(turns[0], [20, 351, 30])
    for respell in (False, True):
        teacher = teacher_at(tmp_path, student_tokenizer, vocabulary=352, respell=respell)
        support = asked(teacher, [odd], torch.full((3, 1), 351))
        assert support.ids.max() < VOCABULARY
        assert not support.alike[1]
        assert support.log_probs.isnan().sum() == 0
        assert loss_mask(teacher.pair, [odd], "repair" if respell else "tags").keep.shape == (3,)


def test_one_from_beyond_the_teachers_matrix_is_no_member(student_tokenizer, teacher_folder, turns):
    """The student may be padded where the teacher is not."""
    odd = turn_of(turns[0], [20, 351, 30])
    for respell in (False, True):
        teacher = teacher_at(teacher_folder, student_tokenizer, vocabulary=352, respell=respell)
        support = asked(teacher, [odd], torch.full((3, 1), 351))
        assert support.ids.max() < VOCABULARY
        assert not support.alike[1]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("respell", [False, True], ids=["as it stands", "respelled"])
def test_a_support_larger_than_what_both_share_is_refused(teacher_folder, student_folder, turns, respell):
    student_tokenizer = load_tokenizer(str(student_folder))
    shared = teacher_at(teacher_folder, student_tokenizer, respell=respell).translation.known
    assert shared > VOCABULARY - 5
    largest = teacher_at(teacher_folder, student_tokenizer, respell=respell, tokens=shared)
    assert asked(largest, turns).ids.shape[1] >= shared
    sides = rf"'{student_folder}' and the teacher '{teacher_folder}' share only {shared}\."
    told = rf"k={shared + 1} .*{sides} Lower model\.objective\.init_args\.k"
    with pytest.raises(ConfigurationError, match=told):
        teacher_at(teacher_folder, student_tokenizer, respell=respell, tokens=shared + 1)


@pytest.mark.parametrize("respell", [False, True], ids=["as it stands", "respelled"])
def test_answers_that_are_not_numbers_are_told(student_tokenizer, teacher_folder, turns, respell):
    """Weights that were finite at load may still overflow on the way, in half precision above all."""
    teacher = teacher_at(teacher_folder, student_tokenizer, respell=respell)
    with torch.no_grad():
        teacher.model.get_input_embeddings().weight[turns[1].completion.ids[0]] = torch.inf
    with pytest.raises(ConfigurationError, match=rf"{teacher_folder}.*not finite.*dtype"):
        asked(teacher, turns)


def test_a_missing_teacher_fails_before_anything_is_loaded():
    with pytest.raises(ConfigurationError, match="no-such-teacher"):
        LocalTeacher("./no-such-teacher").check()


@pytest.mark.parametrize("settings", [{"batch_tokens": 0}, {"batch_size": 0}])
def test_impossible_settings_are_refused_by_name_and_value(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ConfigurationError, match=f"{name}={value}"):
        LocalTeacher("x", **settings)


# ---- the rest -------------------------------------------------------------------------------------------------------


def test_the_teacher_can_play(teacher):
    player = teacher.player(Sampling(temperature=0.0))
    (turn,) = say(player, [[{"role": "user", "content": "Say apple"}]], max_new_tokens=5)
    assert 1 <= len(turn.completion.ids) <= 5
    assert turn.prompt.ids == render(teacher.tokenizer, [[{"role": "user", "content": "Say apple"}]])[0]


def test_both_sides_spell_and_end_differently_over_one_vocabulary(student_tokenizer, teacher_tokenizer):
    """What the fixtures promise to the tests that use them."""
    assert student_tokenizer.get_vocab() == teacher_tokenizer.get_vocab()
    for tag in THINK_TAGS:
        assert len(student_tokenizer(tag)["input_ids"]) > len(teacher_tokenizer(tag)["input_ids"]) == 1
    assert student_tokenizer.eos_token == STUDENT_END != teacher_tokenizer.eos_token
    assert student_tokenizer.pad_token == PAD
