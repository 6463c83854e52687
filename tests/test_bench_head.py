"""`scripts/bench_head.py` compares like with like, and sees a method that is wrong."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_head.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_head", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def case(bench, method, **changes):
    small = bench.Case(method=method, positions=40, width=16, vocabulary=300, threads=1, repeats=2)
    return replace(small, **changes)


@pytest.mark.parametrize("method", ["ours", "full_logits", "checkpointed_logits"])
def test_methods_of_this_repository_agree_with_the_float64_reference(bench, method):
    row = bench.measure(case(bench, method))
    assert row["loss_differs"] < 1e-5
    assert row["gradient_differs"] < 1e-5
    assert row["seconds"] > 0


def test_a_wrong_loss_or_gradient_would_be_seen(bench, monkeypatch):
    method = bench.METHODS["ours"]
    for wrong in (lambda inputs: 1.01 * method.run(inputs), lambda inputs: method.run(inputs) + inputs.weight.sum()):
        monkeypatch.setitem(bench.METHODS, "ours", replace(method, run=wrong))
        row = bench.measure(case(bench, "ours"))
        assert max(row["loss_differs"], row["gradient_differs"]) > 1e-3


@pytest.mark.parametrize("method", ["ours_with_teacher", "teacher_chunked", "teacher_naive"])
def test_the_teachers_way_gives_the_log_probs_of_full_logits(bench, method):
    row = bench.measure(case(bench, method))
    assert row.get("loss_differs", 0) < 1e-5


def test_a_peer_that_cannot_run_is_a_row_with_its_reason(bench, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    bench.work(case(bench, "trl_top_k"))
    assert '"reason": "ModuleNotFoundError: ' in capsys.readouterr().out


def test_the_exponent_is_that_of_a_power_law(bench):
    assert bench.exponent([1, 10, 100], [2, 20, 200]) == pytest.approx(1)
    assert bench.exponent([1, 10, 100], [2, 2, 2]) == pytest.approx(0)
