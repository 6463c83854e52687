import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenalign as ta


def slow_spans(pieces: list[bytes], tags: list[str]) -> list[tuple[int, int, str]]:
    """The owner of every byte, and every place at which a tag stands."""
    text = b"".join(pieces)
    owner = [token for token, piece in enumerate(pieces) for _ in piece]
    found = []
    for tag in tags:
        start = text.find(tag.encode())
        while start >= 0:
            end = start + len(tag.encode())
            found.append((owner[start], owner[end - 1] + 1, tag))
            start = text.find(tag.encode(), end)
    return sorted(found)


@given(st.lists(st.lists(st.integers(0, 401), min_size=6, max_size=6), max_size=4))
@settings(max_examples=40, deadline=None)
def test_tag_spans_equal_a_slow_search_row_by_row(pair, base, rows):
    tags = ["th", "<", "é", "in"]
    ids = np.array(rows, int).reshape(-1, 6)
    expected = [slow_spans([pair.student.pieces[id] for id in row], tags) for row in rows]
    assert ta.tag_spans(base, ids, tags) == expected


def test_a_tag_across_two_rows_is_none(base):
    ids = [base.token_to_id("<"), base.token_to_id("a")]
    assert ta.tag_spans(base, [ids, ids], ["a<"]) == [[], []]
    assert ta.tag_spans(base, [ids + ids], ["a<"]) == [[(1, 3, "a<")]]


def test_one_tag_needs_no_list(base):
    ids = base.encode("a<b").ids
    assert ta.tag_spans(base, ids, "a<") == ta.tag_spans(base, ids, ["a<"])


@pytest.mark.parametrize(
    ("tag", "message"), [("", "everywhere"), (3, "tags contain 3, which is no text"), ("\ud800", "no text contains")]
)
def test_bad_tags_are_refused(base, tag, message):
    with pytest.raises(ValueError, match=message):
        ta.tag_spans(base, [1], [tag])
