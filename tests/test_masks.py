import pytest
import torch
from tiny import STUDENT_END

from lsm_lightning.masks import loss_mask
from lsm_lightning.types import Completion, Prompt, Turn
from tokenalign import Pair

ANSWERS = ["river stone", "<think>7+5=12</think> \\boxed{12}", "apple", "say <think>thinking"]
POLICIES = ["repair", "none", "paper", "tags", "canonical", "strict"]


@pytest.fixture(scope="module")
def pair(student_tokenizer, teacher_tokenizer) -> Pair:
    return Pair(student_tokenizer, teacher_tokenizer)


@pytest.fixture(scope="module")
def written(student_tokenizer) -> list[Turn]:
    """Answers in the student's spelling, each ended."""
    return [as_turn(student_tokenizer(text + STUDENT_END, add_special_tokens=False)["input_ids"]) for text in ANSWERS]


def as_turn(ids: list[int], *, truncated: bool = False) -> Turn:
    completion = Completion(ids=ids, log_probs=[0.0] * len(ids), truncated=truncated)
    return Turn(prompt=Prompt(messages=[], ids=[5]), completion=completion, answer="")


def pieces(tokenizer, turns: list[Turn], keep: torch.Tensor) -> list[str]:
    flat = [i for turn in turns for i in turn.completion.ids]
    return [tokenizer.convert_ids_to_tokens(i) for i, kept in zip(flat, keep.tolist(), strict=True) if not kept]


@pytest.mark.parametrize("policy", ["repair", "none"])
def test_neither_repair_nor_no_policy_leaves_anything_out(pair, written, policy):
    mask = loss_mask(pair, written, policy)
    assert mask.keep.tolist() == [True] * sum(len(turn.completion.ids) for turn in written)


def test_a_token_that_the_teacher_lacks_counts_only_where_it_reads_its_own_spelling(
    student_tokenizer, teacher_tokenizer
):
    """It could not read the id; its own spelling tells whether it can say anything there (`Support.comparable`)."""
    padded = Pair(student_tokenizer, teacher_tokenizer, student_size=352, teacher_size=352)
    turns = [as_turn([60, 351, 61])]
    for policy in POLICIES:
        mask = loss_mask(padded, turns, policy)
        assert mask.keep.tolist() == [True, policy == "repair", True]
        assert mask.reasons["UNMAPPED"] == 1


def test_tags_drops_the_pieces_of_tags_and_the_end_of_turn(pair, written, student_tokenizer):
    dropped = pieces(student_tokenizer, written, loss_mask(pair, written, "tags").keep)
    text = "".join(dropped)
    assert text.count("<think>") == 2
    assert text.count("</think>") == 1
    assert dropped.count(STUDENT_END) == len(written)
    assert set(text.replace(STUDENT_END, "")) <= set("</think>")


def test_a_teacher_of_the_same_spelling_drops_nothing(student_tokenizer, written):
    mask = loss_mask(Pair(student_tokenizer, student_tokenizer), written, "tags")
    assert mask.keep.all()
    assert mask.reasons["NONCANONICAL"] == 0


def test_reasons_say_why(pair, written):
    reasons = loss_mask(pair, written, "tags").reasons
    assert reasons["TAG"] >= 6
    assert reasons["EOS_CLASS"] == reasons["SPECIAL"] == len(written)
    assert reasons["NONCANONICAL"] >= reasons["TAG"]
    assert not {"PAD", "PROMPT"} & reasons.keys()


def test_reasons_do_not_depend_on_the_policy(pair, written):
    assert len({str(loss_mask(pair, written, policy).reasons) for policy in POLICIES}) == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_positions_lie_in_the_order_of_the_turns(pair, written, policy):
    one_by_one = [loss_mask(pair, [turn], policy).keep for turn in written]
    assert loss_mask(pair, written, policy).keep.tolist() == torch.cat(one_by_one).tolist()
    backwards = loss_mask(pair, written[::-1], policy).keep
    assert backwards.tolist() == torch.cat(one_by_one[::-1]).tolist()


def test_an_answer_cut_off_and_one_that_is_only_an_end(pair, written, student_tokenizer):
    end = student_tokenizer.eos_token_id
    turns = [as_turn([60, 61], truncated=True), as_turn([end]), written[0]]
    keep = loss_mask(pair, turns, "tags").keep
    assert len(keep) == sum(len(turn.completion.ids) for turn in turns)
    assert keep[:3].tolist() == [True, True, False]


def test_a_pad_token_in_the_middle_of_an_answer_keeps_its_place(pair, written):
    """An untrained student may write even that."""
    turns = [as_turn([60, 0, 61]), as_turn([0, 0]), written[0]]
    for policy in POLICIES:
        keep = loss_mask(pair, turns, policy).keep
        assert len(keep) == sum(len(turn.completion.ids) for turn in turns)


def test_no_turns_have_no_mask(pair):
    assert loss_mask(pair, [], "tags").keep.shape == (0,)
