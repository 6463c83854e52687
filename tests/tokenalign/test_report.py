import json
from dataclasses import fields, replace

import pytest
import template_kit as kit
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_kit import IM_END, Wrapped, train, train_metaspace, with_tokens
from tokenizers import Tokenizer

import tokenalign as ta
from tokenalign.visible import columns, fitted, visible


def of(student: object, teacher: object, **options) -> ta.Report:
    return ta.Pair(student, teacher, **options).report()


@pytest.fixture(scope="module")
def controlled() -> Tokenizer:
    return train(special=kit.CONTROLS)


@pytest.fixture(scope="module")
def reports(pair, base, cased, controlled) -> dict[str, ta.Report]:
    """Pairs of every relation."""
    channels = Wrapped(controlled, kit.CHANNELS, {"eos_token": "<|return|>"})
    dated = Wrapped(controlled, kit.DATED, {"bos_token": "<s>", "eos_token": "<|eot_id|>"})
    named = [f"<tag{i}>" for i in range(12)]
    return {
        "tags and ends": pair.report(),
        "alike": of(base, base),
        "other bytes": of(base, train_metaspace()),
        "other order": of(base, controlled),
        "other prompts": of(channels, dated),
        "normalised": of(base, cased),
        "many tags": of(base, with_tokens(base, named), tags=named),
        "broken template": of(Wrapped(base, "{% if %}"), Wrapped(base, "{{ 'x' | center(10**9) }}")),
    }


NAMES = [
    *("tags and ends", "alike", "other bytes", "other order", "other prompts", "normalised", "many tags"),
    "broken template",
]


@pytest.mark.parametrize("name", NAMES)
def test_fits_a_screen_and_ends_with_the_advice(reports, name):
    lines = str(reports[name]).splitlines()
    assert len(lines) <= 24
    assert max(map(columns, lines)) <= 100
    assert " ".join(lines).endswith(reports[name].advice)
    assert max(map(columns, reports[name].screen(72).splitlines())) <= 72
    assert reports[name].advice.count('policy "' + reports[name].policy) == 1


@pytest.mark.parametrize("name", NAMES)
def test_dictionary_is_of_json_types_and_complete(reports, name):
    told = reports[name].to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told.keys() == {field.name for field in fields(ta.Report)} | {"mismatches", "policy", "advice"}
    assert all(type(value) is not ta.Relation for value in told.values())


@pytest.mark.parametrize(
    ("name", "mismatches", "said"),
    [
        ("tags and ends", ["<think>", "</think>", "the end of a turn"], "<think>, </think> and the end of a turn"),
        ("tags and ends", ["<think>", "</think>", "the end of a turn"], "merge_class"),
        ("alike", [], "spell alike"),
        ("other bytes", ["ids", "text"], "project_topk"),
        ("other order", ["ids"], "pair.to_teacher(ids)"),
        ("other prompts", ["the end of a turn", "prompts"], "as one class"),
        ("normalised", ["text"], "of ordinary text otherwise"),
        ("many tags", [], "otherwise and would punish"),
    ],
)
def test_names_what_training_must_handle(reports, name, mismatches, said):
    assert set(mismatches) <= set(reports[name].mismatches)
    assert bool(reports[name].mismatches) == (name != "alike")
    assert said in reports[name].advice


def test_control_each_finding_changes_the_advice(reports):
    report = reports["alike"]
    changed = [
        replace(report, relation=ta.Relation.DIFFERENT),
        replace(report, split_otherwise=0.5),
        replace(report, collisions=3),
        replace(report, ends_alike=False),
        replace(report, prompts_alike=False),
        replace(report, tags=report.tags | {"<think>": (["<think>"], ["<", "think>"])}),
    ]
    assert len({other.advice for other in changed} | {report.advice}) == 7
    assert all(len(other.mismatches) == 1 for other in changed)


def test_typical_response_is_masked_as_flags_say(pair, reports):
    report = reports["tags and ends"]
    text = "".join(report.response)
    assert text.startswith("<think>\n")
    assert text.endswith("<|im_end|>")
    pieces = [report.response[place] for place in report.dropped["tags"]]
    assert "".join(pieces) == "<think></think><|im_end|>"
    assert report.dropped["tags"] == report.dropped["canonical"]
    assert set(report.dropped["paper"]) < set(report.dropped["tags"]) < set(report.dropped["strict"])


def test_collision_is_an_example(reports):
    id, ours, theirs = reports["other order"].collision
    assert ours != theirs
    assert reports["alike"].collision is None
    assert str(id) in str(reports["other order"])


def test_shows_how_each_side_holds_each_tag(reports):
    line = next(line for line in str(reports["tags and ends"]).splitlines() if line.startswith("<think>"))
    assert "pieces: <" in line
    assert "one token: <think>  </think>" in line
    assert reports["tags and ends"].to_dict()["held"]["<think>"] == ["pieces", "one token"]


def test_tags_that_differ_are_shown_first_and_the_rest_counted(reports):
    text = str(reports["many tags"])
    assert "<tag0>" in text
    assert "more tags" in text


def test_prompts_of_one_template_are_alike_whatever_the_ids(base):
    shifted = train(special=["<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert of(Wrapped(base, IM_END), Wrapped(shifted, IM_END)).prompts_alike
    assert of(Wrapped(base, IM_END), base).prompts_alike
    assert not of(Wrapped(base, IM_END), Wrapped(base, kit.PLAIN)).prompts_alike


@given(st.text(), st.integers(1, 30))
def test_fitted_text_takes_its_columns(text, width):
    shown = visible(text)
    assert columns(fitted(shown, width)) == width
    assert fitted(shown, columns(shown)) == shown


@given(st.binary())
def test_visible_text_leaves_nothing_unseen(piece):
    shown = visible(piece)
    assert shown.isprintable()
    assert " " not in shown
    assert bool(shown) == bool(piece)
