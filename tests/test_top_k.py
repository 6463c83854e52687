"""The K largest, with and without groups."""

import pytest
import torch

from lsm_lightning.top_k import top_k


@pytest.mark.parametrize(("columns", "k"), [(1247, 32), (1248, 1), (300, 8), (64, 16), (64, 17), (5, 5), (9, 0)])
def test_it_is_topk(columns, k):
    generator = torch.Generator().manual_seed(columns)
    # Few distinct values: many are equal.
    for values in (torch.randn(40, columns, generator=generator), torch.randint(9, (40, columns)).float()):
        values[:, ::3] = -torch.inf
        top, ids = top_k(values, k)
        assert torch.equal(top, values.topk(k, -1).values)
        assert torch.equal(values.gather(-1, ids), top)
        assert all(len(set(row)) == k for row in ids.tolist())


def test_what_is_no_number_comes_first():
    values = torch.zeros(1, 100)
    values[0, 57] = torch.nan
    assert top_k(values, 2)[1][0, 0] == 57


def test_no_rows_are_no_rows():
    assert top_k(torch.zeros(0, 100), 3)[1].shape == (0, 3)
