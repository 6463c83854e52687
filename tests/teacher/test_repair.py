"""A teacher that reads its own spelling of what the student wrote."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from slow import all_response_logits, sampled_ids, turn_of
from teachers import TEXTS, K, Meanings, asked, members, slow_answers, teacher_at, written
from tiny import STUDENT_END, TEACHER_END, THINK_TAGS, chat_tokenizer, save_tiny, tiny_model, train_bpe
from tokenizers import Tokenizer

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.masks import loss_mask
from lsm_lightning.objectives import LocalSupportMatching
from lsm_lightning.objectives.functional import support_divergence
from lsm_lightning.teacher import LocalTeacher
from lsm_lightning.types import Support, Turn
from lsm_lightning.update import accumulate_gradients, student_top_tokens

OTHER_CORPUS = ["The river runs past apple trees and a stone shop; thinkers drink ink. 12 30 42 \\boxed{7}"] * 3


def shuffled_bpe() -> Tokenizer:
    """The student's tokens under other ids, control tokens and tags included."""
    spec = json.loads(train_bpe().to_str())
    tokens = list(spec["model"]["vocab"])
    ids = random.Random(5).sample(range(len(tokens)), len(tokens))
    spec["model"]["vocab"] = dict(sorted(zip(tokens, ids, strict=True), key=lambda item: item[1]))
    for token in spec["added_tokens"]:
        token["id"] = spec["model"]["vocab"][token["content"]]
    return Tokenizer.from_str(json.dumps(spec))


def other_bpe() -> Tokenizer:
    """Trained on another text: most longer tokens are others, and fewer."""
    return train_bpe(OTHER_CORPUS, 300)


def bpe_with_another_end(kept: int = 310) -> Tokenizer:
    """The student's ids up to some number, and from there tokens that the student has under no id at all."""
    spec = json.loads(train_bpe().to_str())
    vocab = spec["model"]["vocab"]
    gone = {token for token, id in vocab.items() if id >= kept}
    merges = [merge for merge in spec["model"]["merges"] if gone.isdisjoint((*merge, "".join(merge)))]
    new = [["Q", letter] for letter in "abcdefghijklmnopqrstuvwxyzABCD"]
    spec["model"]["merges"] = merges + new
    spec["model"]["vocab"] = {token: id for token, id in vocab.items() if id < kept} | {
        "".join(merge): kept + number for number, merge in enumerate(new)
    }
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < kept]
    return Tokenizer.from_str(json.dumps(spec))


TEACHERS = {
    "the same vocabulary": lambda: chat_tokenizer(train_bpe(), TEACHER_END, whole_tags=THINK_TAGS),
    "other ids": lambda: chat_tokenizer(shuffled_bpe(), TEACHER_END, whole_tags=THINK_TAGS),
    "another vocabulary": lambda: chat_tokenizer(other_bpe(), TEACHER_END, whole_tags=THINK_TAGS),
    "the same way to end": lambda: chat_tokenizer(other_bpe(), STUDENT_END),
}


@pytest.fixture(scope="module", params=TEACHERS)
def folder(request, tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("teacher"), TEACHERS[request.param](), seed=2)


@pytest.fixture(scope="module")
def teacher(folder, student_tokenizer) -> LocalTeacher:
    return teacher_at(folder, student_tokenizer, respell=True)


@pytest.fixture(scope="module", params=["spelled as usual", "letter by letter", "cut off"])
def answers(request, student_tokenizer) -> list[Turn]:
    """Of the student: whole tokens, or the spelling that is furthest from the teacher's."""
    ended, pieces = request.param != "cut off", request.param == "letter by letter"
    return written(student_tokenizer, TEXTS, ended=ended, pieces=pieces)


# ---- against a slow reader ------------------------------------------------------------------------------------------


def test_supports_come_back_where_a_token_starts_on_both_sides(teacher, student_tokenizer, answers):
    """And hold what a teacher says who reads one turn at a time in its own spelling."""
    slow, support = slow_answers(teacher, student_tokenizer, answers), asked(teacher, answers)
    assert support.comparable.tolist() == [answer is not None for answer in slow]
    meanings = Meanings(student=student_tokenizer, teacher=teacher.tokenizer)
    sampled = sampled_ids(answers).tolist()
    for n, (answer, found) in enumerate(zip(slow, members(support), strict=True)):
        if answer is None:
            assert not found
            assert not support.alike[n]
            continue
        rivals = meanings.rivals()
        expected, lost = meanings.support(answer.log_probs, K)
        assert {i: value for i, value in found.items() if i not in rivals} == pytest.approx(expected, abs=1e-5)
        assert support.lost[n].item() == pytest.approx(lost, abs=1e-5)
        assert support.alike[n].item() == (meanings.of(answer.token) == sampled[n])
        if support.alike[n]:
            own = answer.log_probs[answer.token].item()
            assert support.sampled[n].item() == pytest.approx(own, abs=1e-5)
        end = answer.log_probs[teacher.tokenizer.eos_token_id].item()
        assert support.turn_end[n].item() == pytest.approx(end, abs=1e-5)


def test_the_slow_reader_can_tell_another_spelling(teacher, student_tokenizer):
    """The check above can fail: broken tags are read as other tokens, and some of them start nowhere."""
    answers = written(student_tokenizer, TEXTS)
    slow = slow_answers(teacher, student_tokenizer, answers)
    assert None in slow
    theirs = teacher.tokenizer.convert_tokens_to_ids("<think>")
    if "<think>" in teacher.tokenizer.added_tokens_encoder:
        assert theirs in {answer.token for answer in slow if answer is not None}


def test_further_ids_are_looked_up_by_what_they_mean(teacher, student_tokenizer, answers):
    sampled = sampled_ids(answers)
    added = torch.stack((sampled, torch.full_like(sampled, 77), sampled), -1)
    slow, plain = slow_answers(teacher, student_tokenizer, answers), asked(teacher, answers)
    support = asked(teacher, answers, added)
    meanings = Meanings(student=student_tokenizer, teacher=teacher.tokenizer)
    back = {meanings.of(i): i for i in range(len(teacher.tokenizer))}
    rivals = meanings.rivals()
    for n, (answer, top, found) in enumerate(zip(slow, members(plain), members(support), strict=True)):
        if answer is None:
            assert not found
            continue
        more = {i: answer.log_probs[back[i]].item() for i in added[n].tolist() if i in back}
        expected = {i: value for i, value in (more | top).items() if i not in rivals}
        assert {i: value for i, value in found.items() if i not in rivals} == pytest.approx(expected, abs=1e-5)


# ---- nothing to repair ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alike_folder(student_tokenizer, tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("alike"), student_tokenizer, seed=2)


def fields_of(support: Support) -> dict[str, list]:
    return {name: getattr(support, name).tolist() for name in support.__dataclass_fields__}


def test_where_nothing_is_spelled_otherwise_repair_changes_no_bit(student_tokenizer, alike_folder):
    answers = written(student_tokenizer, TEXTS)
    added = sampled_ids(answers)[:, None]
    plain, repaired = (
        asked(teacher_at(alike_folder, student_tokenizer, respell=respell), answers, added) for respell in (False, True)
    )
    assert fields_of(plain) == fields_of(repaired)


def test_where_something_is_it_changes_something(student_tokenizer, alike_folder):
    answers = written(student_tokenizer, TEXTS, pieces=True)
    plain, repaired = (
        asked(teacher_at(alike_folder, student_tokenizer, respell=respell), answers) for respell in (False, True)
    )
    assert plain.comparable.all()
    assert not repaired.comparable.all()


def test_repair_leaves_masking_to_what_can_be_compared(teacher, answers):
    mask = loss_mask(teacher.pair, answers, "repair")
    assert mask.keep.all()
    assert asked(teacher, answers).comparable.float().mean() > 0.3


# ---- the end of a turn ----------------------------------------------------------------------------------------------


def test_ending_is_one_token_on_both_sides(teacher_folder, student_tokenizer, teacher_tokenizer):
    """The teacher's way of ending is worth what it says of it, under the student's own id; no other id ends a turn."""
    teacher = teacher_at(teacher_folder, student_tokenizer, respell=True, tokens=300)
    answers = written(student_tokenizer, TEXTS)
    support = asked(teacher, answers)
    ours, theirs = student_tokenizer.eos_token_id, teacher_tokenizer.eos_token_id
    ends = sampled_ids(answers) == ours
    assert ends.sum() == len(TEXTS)
    assert support.alike[ends].all()
    for n, found in enumerate(members(support)):
        if support.comparable[n]:
            assert found[ours] == pytest.approx(support.turn_end[n].item(), abs=1e-6)
            # The teacher's id is no way for the student to end: it is no likelier than the least likely member.
            assert found[theirs] == min(found.values())
    assert support.sampled[ends].tolist() == support.turn_end[ends].tolist()


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 30.0], ids=["flat", "as it is", "peaked"])
def test_rivals_take_no_more_than_the_others_leave_over(teacher, sharpness, k):
    """However sure the teacher is of its first tokens, and whatever the student lacks of them."""
    logits = sharpness * torch.randn(200, teacher.rows, generator=torch.Generator().manual_seed(7))
    log_probs = teacher.translation.merge_(logits.log_softmax(-1))
    nothing = torch.zeros((len(logits), 0), dtype=torch.long)
    ids, found, lost = teacher.translation.translate(log_probs.clone(), k, nothing)
    sums = found.exp().sum(-1) + lost
    assert (sums <= 1 + 1e-6).all()
    rivals, others = found[:, k:], found[:, :k]
    assert ids[:, k:].tolist() == [teacher.translation.rivals.tolist()] * len(ids)
    assert rivals.shape[1] == 0 or (sums > others.exp().sum(-1) + lost).any()  # they have some
    least = others.masked_fill(others == -torch.inf, torch.inf).amin(-1, keepdim=True)
    assert (rivals <= least).all()
    assert (rivals.isfinite() == least.isfinite()).all()
    assert not found.isnan().any()


def test_beside_one_member_and_its_rival_something_is_left_over(student, teacher_folder, student_tokenizer):
    """What is logged of a sure teacher's mass outside is a probability."""
    objective = LocalSupportMatching(k=1, support="tail_bucket")
    teacher = teacher_at(teacher_folder, student_tokenizer, respell=True, tokens=1)
    with torch.no_grad():
        teacher.model.get_output_embeddings().weight *= 5
    answers = written(student_tokenizer, TEXTS)
    support = asked(teacher, answers)
    weights = support.comparable.double() / support.comparable.sum()
    groups = [[*range(len(answers))]]
    totals = accumulate_gradients(
        student, objective, answers, support, weights, groups=groups, backward=lambda loss: None
    )
    outside, number = totals.metrics["teacher_mass_outside"]
    assert 0 <= outside / number < 0.5


def test_all_ends_of_the_student_mean_the_end_and_count_once(student_tokenizer, teacher_folder, tmp_path):
    """Here both control tokens end the student's turn, whichever it writes."""
    student = chat_tokenizer(train_bpe(), STUDENT_END)
    student.eos_token = TEACHER_END
    ids = [student.convert_tokens_to_ids(token) for token in (STUDENT_END, TEACHER_END)]
    teacher = teacher_at(teacher_folder, student, respell=True, tokens=300)
    assert teacher.pair.conventions[0].turn_end == set(ids)
    (turn,) = written(student_tokenizer, ["apple"])
    for end in ids:
        answer = turn_of(turn, [*turn.completion.ids[:-1], end])
        n = len(answer.completion.ids)
        support = asked(teacher, [answer], torch.tensor([ids] * n))
        assert support.alike[-1]
        assert support.sampled[-1] == support.turn_end[-1]
        for found, log_prob in zip(members(support), support.turn_end.tolist(), strict=True):
            held = [found[i] for i in ids if i in found]
            assert held == pytest.approx([log_prob], abs=1e-6)
            assert sum(torch.tensor(list(found.values())).exp().tolist()) < 1 + 1e-5


def test_several_ends_of_the_teacher_are_one(student_tokenizer, teacher_folder, tmp_path):
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
    generation = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": [2, 17, 40]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    everything = {"respell": True, "tokens": None}
    one, several = (teacher_at(path, student_tokenizer, **everything) for path in (teacher_folder, folder))
    answers = written(student_tokenizer, ["apple stone"])
    ours = student_tokenizer.eos_token_id
    support = asked(several, answers)
    assert support.alike[-1]
    assert support.sampled[-1] == support.turn_end[-1]
    for found, alone, whole in zip(members(support), members(asked(one, answers)), support.turn_end, strict=True):
        assert found[ours] == pytest.approx(whole.item(), abs=1e-5)
        parts = [alone[i] for i in (ours, 17, 40)]
        assert found[ours] == pytest.approx(torch.tensor(parts).logsumexp(0).item(), abs=1e-5)
        assert {i for i in (17, 40) if i in found} <= {i for i in found if found[i] == min(found.values())}


# ---- what cannot be read --------------------------------------------------------------------------------------------


def test_another_vocabulary_is_refused_without_repair_and_told_the_remedy(student_tokenizer, folder, request):
    name = request.node.callspec.params["folder"]
    if name == "the same vocabulary":
        teacher_at(folder, student_tokenizer)  # the check lets it pass
        return
    with pytest.raises(
        ConfigurationError, match=rf"student and of the teacher '{folder}' differ: \d+ .*mask to repair"
    ):
        teacher_at(folder, student_tokenizer)


def test_ids_that_are_padding_at_the_teacher_are_no_difference(student_tokenizer, tmp_path):
    """A shorter vocabulary in a matrix of as many rows, beside one that has other tokens there."""
    short = chat_tokenizer(train_bpe(size=310), TEACHER_END)
    assert short.get_vocab().items() <= student_tokenizer.get_vocab().items()
    save_tiny(tmp_path / "short", short, seed=2)
    tiny_model(vocabulary=340, seed=2, eos_token_id=2, pad_token_id=0).save_pretrained(tmp_path / "short")
    assert teacher_at(tmp_path / "short", student_tokenizer).translation.known == 310
    save_tiny(tmp_path / "other", chat_tokenizer(bpe_with_another_end(), TEACHER_END), seed=2)
    with pytest.raises(ConfigurationError, match=r"differ: 30 of the student's 340 ids are other tokens there"):
        teacher_at(tmp_path / "other", student_tokenizer)


def test_vocabularies_with_next_to_nothing_in_common_are_refused(student_tokenizer, tmp_path):
    tokenizer = chat_tokenizer(other_bpe(), TEACHER_END)
    save_tiny(tmp_path, tokenizer, seed=2)
    with pytest.raises(ConfigurationError, match=rf"'{tmp_path}' share 1 tokens.*tokenalign inspect"):
        teacher_at(tmp_path, student_tokenizer, vocabulary=1, respell=True, tokens=1)


def test_a_text_that_the_teacher_cannot_spell_is_not_compared(teacher, student_tokenizer):
    """Half a character before a control token."""
    half = student_tokenizer("東", add_special_tokens=False)["input_ids"][:1]
    (turn,) = written(student_tokenizer, ["apple"])
    odd = turn_of(turn, [*half, student_tokenizer.convert_tokens_to_ids("<|user|>")])
    support = asked(teacher, [odd, turn])
    assert support.log_probs.isnan().sum() == 0
    assert support.comparable[2:].any()


# ---- sources --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("support_kind", ["renormalise", "tail_bucket", "generalised"])
@pytest.mark.parametrize("source", ["teacher", "student", "union", "sampled_added"])
@pytest.mark.parametrize("bpe", [train_bpe, other_bpe], ids=["one vocabulary", "two vocabularies"])
def test_the_loss_over_every_source_is_that_of_all_logits_of_both_sides(
    student, student_tokenizer, tmp_path, bpe, source, support_kind
):
    """The whole way of a step, against sets of tokens whose probabilities are looked up one by one."""
    objective = LocalSupportMatching(k=K, source=source, support=support_kind)
    folder = save_tiny(tmp_path, chat_tokenizer(bpe(), STUDENT_END), seed=2)
    teacher = teacher_at(folder, student_tokenizer, respell=True, tokens=objective.teacher_tokens)
    answers, groups = written(student_tokenizer, TEXTS), [[0, 3, 2], [1], [4]]
    sampled = sampled_ids(answers)
    added = [sampled[:, None]] if objective.adds_sampled else []
    added.append(student_top_tokens(student, answers, objective.student_tokens, groups=groups))
    support = asked(teacher, answers, torch.cat(added, -1))
    weights = support.comparable.double() / support.comparable.sum()
    totals = accumulate_gradients(
        student, objective, answers, support, weights, groups=groups, backward=lambda loss: None
    )

    student_says = all_response_logits(student, answers).detach().log_softmax(-1)
    meanings = Meanings(student=student_tokenizer, teacher=teacher.tokenizer)
    back = {meanings.of(i): i for i in range(len(teacher.tokenizer))}
    losses = []
    for n, answer in enumerate(slow_answers(teacher, student_tokenizer, answers)):
        if answer is None:
            continue
        top, own = set(meanings.support(answer.log_probs, K)[0]), set(student_says[n].topk(K).indices.tolist())
        tokens = {
            "teacher": top, "student": own, "union": top | own, "sampled_added": top | {int(sampled[n])},
        }[source] & back.keys()  # fmt: skip
        sides = student_says[n][sorted(tokens)], answer.log_probs[[back[i] for i in sorted(tokens)]]
        losses.append(support_divergence(*sides, support=support_kind).item())
    assert len(losses) > 20
    assert totals.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
