import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.profilers import PassThroughProfiler

from lsm_lightning.module import Clock

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from bench_scaling import QUICKSTART, Stopwatch, exponents, growth, outside


def rows(cost: Any) -> list[dict[str, Any]]:
    return [
        {"part": "update", "length": n, "tokens": n, "core s": cost(n), "µs/token": cost(n)} for n in (256, 512, 4096)
    ]


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_the_exponent_of_a_power_law_is_found(power):
    assert exponents(rows(lambda n: 3e-5 * n**power)) == {"update": pytest.approx(power)}


def test_what_grows_with_length_is_told_from_what_does_not():
    (fit,) = growth(rows(lambda n: 100 + 0.05 * n))
    assert (fit["a, µs"], fit["b, µs per 1,000"]) == pytest.approx((100, 50))
    assert fit["b's share %"] == pytest.approx(100 * 0.05 * 4096 / (100 + 0.05 * 4096))


def test_a_step_is_models_environment_and_the_rest():
    step = {"task": "math", "label": "made", "processes": 1, "strategy": "-", "all": 10.0}
    step |= {
        "rollout/all": 6.0,
        "rollout/model": 4.0,
        "rollout/environment": 1.0,
        "update/all": 3.0,
        "update/model": 2.5,
    }
    (row,) = outside([step])
    told = {name: row[name] for name in ("all", "model", "environment", "outside", "rollout", "update", "between")}
    assert told == pytest.approx(
        {
            "all": 1e4,
            "model": 6500,
            "environment": 1000,
            "outside": 2500,
            "rollout": 1000,
            "update": 500,
            "between": 1000,
        }
    )


def test_the_two_tasks_of_the_quickstart_are_summed():
    def step(task: str, seconds: float, model: float) -> dict[str, Any]:
        same = {"label": QUICKSTART, "processes": 1, "strategy": "-"}
        return same | {"task": task, "all": seconds, "update/all": seconds, "update/model": model}

    both = outside([step("math", 1.0, 0.5), step("alfworld", 9.0, 8.5)])[-1]
    assert (both["task"], both["%"]) == ("both", pytest.approx(10))
    assert (both["all"], both["model"], both["outside"]) == pytest.approx((1e4, 9e3, 1e3))


def test_nested_calls_are_counted_once_and_where_they_belong():
    watch, things = Stopwatch(), SimpleNamespace(inner=lambda: time.sleep(0.02), outer=lambda: things.inner())
    watch.around(things, "inner", "model")
    watch.around(things, "outer", "environment")
    clock = Clock(PassThroughProfiler())
    with watch.phases(clock, "rollout"):
        things.outer()
    things.inner()
    assert set(watch.seconds) == {("rollout", "environment"), ("rollout", "all"), ("between", "model")}
    assert clock.seconds["rollout"] >= watch.seconds["rollout", "environment"] >= 0.02
