import sys
from argparse import Namespace
from pathlib import Path
from time import process_time

import pytest
import torch
from transformers import PreTrainedModel

from lsm_lightning.pretrained import load_model, load_tokenizer
from lsm_lightning.rollout import LocalEngine, Sampling
from lsm_lightning.rollout.base import Request

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from bench_rollout import Setting, bench, compete, generate, lengths, write

SHARP = Sampling(temperature=1e-4)
"""As good as greedy, which `generate` does not do for several samples of a prompt."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_model("embedded:student", "float32")


def test_lengths_are_uneven_and_one_is_the_longest():
    drawn = lengths(128, 100)
    assert max(drawn) == 100
    assert min(drawn) >= 1
    assert 15 < sorted(drawn)[64] < 25
    assert sum(drawn) / 128 < 40


@pytest.mark.parametrize(
    "setting",
    [Setting(rows=6), Setting(rows=4, grouped=True), Setting(rows=2), Setting(rows=6, cache="static")],
    ids=str,
)
@pytest.mark.parametrize("turn_end", [frozenset(), frozenset(range(0, 1247, 3))], ids=["limits", "ends"])
def test_both_sides_write_the_same_greedy_answers_in_every_setting(model, setting, turn_end):
    """Two samples of each prompt, of unequal limits: what is compared is equal work."""
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    requests = [Request(ids=prompt, seed=j, limit=3 + 4 * j + len(prompt)) for prompt in prompts for j in range(2)]
    ours = write(LocalEngine.around(model, 4), requests, turn_end, SHARP)
    assert generate(model, requests, turn_end, setting, SHARP) == ours
    if not turn_end:
        assert [len(answer) for answer in ours] == [request.limit for request in requests]


def test_the_best_of_theirs_is_what_counts():
    def run(seconds: float):
        def burn() -> list[list[int]]:
            x, end = torch.ones(64, 64), process_time() + seconds
            while process_time() < end:
                x @ x
            return [[0] * 100]

        return burn

    rows = compete({"ours": run(0.02), "generate, a": run(0.08), "generate, b": run(0.04)}, times=2)
    assert [row["engine"] for row in rows] == ["ours", "generate, b", "generate, a"]
    assert rows[0]["× best generate"] == pytest.approx(2, rel=0.4)
    assert rows[1]["× best generate"] == 1


def test_the_whole_bench_runs(model):
    arguments = Namespace(prompts=4, samples=2, longest=6, times=1)
    tables = list(bench(model, load_tokenizer("embedded:student"), arguments))
    assert [len(rows) for _, rows in tables] == [7, 7, 2, 1]
    uneven = {row["engine"]: row["tokens"] for row in tables[0][1]}
    assert set(uneven.values()) == {sum(lengths(8, 6))}
    assert [row["equal"] for row in tables[2][1]] == [sum(1 + number % 8 for number in range(8))] * 2
    assert tables[3][1] == [{"answers": 4, "equal": 4}]
