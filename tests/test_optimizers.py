"""What updates the student is known to work before a run begins."""

import csv
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import tiny_model
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as schedules
from transformers import get_cosine_schedule_with_warmup

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.learning_rates import WarmupCosine
from lsm_lightning.optimizers import check_step, make_optimizer

CPU = torch.device("cpu")


def rates_of(make: Callable[[Any], Any], steps: int) -> list[float]:
    """The learning rate of each step, as a share of the optimiser's."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


# ---- the learning rate ----------------------------------------------------------------------------------------------


def test_the_rate_rises_in_a_line_and_falls_in_half_a_cosine():
    rates = rates_of(lambda optimizer: WarmupCosine(optimizer, warmup_steps=4, max_steps=20, final=0.1), 30)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[12] == pytest.approx(0.55)  # half way
    assert rates[4:21] == sorted(rates[4:21], reverse=True)
    assert rates[20:] == pytest.approx([0.1] * 10)


def test_without_a_warm_up_it_is_the_cosine_of_transformers():
    ours = rates_of(lambda optimizer: WarmupCosine(optimizer, warmup_steps=0, max_steps=9), 9)
    theirs = rates_of(lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 0, 9), 9)
    assert ours == pytest.approx(theirs)


def test_a_schedule_goes_on_where_its_state_stood():
    make = partial(WarmupCosine, warmup_steps=3, max_steps=11)
    whole = rates_of(make, 11)
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    first = make(optimizer)
    for _ in range(5):
        optimizer.step()
        first.step()
    states = first.state_dict(), optimizer.state_dict()
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    second = make(optimizer)
    second.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    for rate in whole[5:]:
        assert optimizer.param_groups[0]["lr"] == rate
        optimizer.step()
        second.step()


@pytest.mark.parametrize("wrong", [{"warmup_steps": 9}, {"warmup_steps": -1}, {"final": 1.5}, {"max_steps": 0}])
def test_a_schedule_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ConfigurationError, match=next(f"{name}={value}" for name, value in wrong.items())):
        WarmupCosine(SGD([nn.Parameter(torch.zeros(1))], lr=1.0), **{"warmup_steps": 2, "max_steps": 9, **wrong})


# ---- what cannot make a step ----------------------------------------------------------------------------------------

TAKES_STEPS = ("Adam", "AdamW", "SGD", "RAdam", "NAdam", "Adagrad", "Adafactor", "RMSprop", "Muon", "Rprop", "ASGD")


@pytest.mark.parametrize("name", TAKES_STEPS)
def test_optimisers_that_take_steps_pass(name):
    check_step(partial(getattr(torch.optim, name), lr=1e-3), None, device=CPU, max_steps=3)


@pytest.mark.parametrize(
    "make",
    [torch.optim.LBFGS, torch.optim.SparseAdam, partial(AdamW, capturable=True), partial(AdamW, lr=-1)],
    ids=["closure", "sparse gradients", "a GPU", "a wrong value"],
)
def test_optimisers_that_do_not_are_told(make):
    with pytest.raises(ConfigurationError, match=r"^model\.optimizer: "):
        check_step(make, None, device=CPU, max_steps=3)


WORKS = {
    "one cycle": partial(schedules.OneCycleLR, max_lr=1.0, total_steps=3),
    "exponential": partial(schedules.ExponentialLR, gamma=0.9),
    "cosine": partial(schedules.CosineAnnealingLR, T_max=3),
    "warm-up": partial(WarmupCosine, warmup_steps=1, max_steps=3),
}
FAILS = {
    "plateau": schedules.ReduceLROnPlateau,
    "no end": partial(schedules.OneCycleLR, max_lr=1.0),
    "too short": partial(schedules.OneCycleLR, max_lr=1.0, total_steps=2),
    "no period": partial(schedules.CosineAnnealingLR, T_max=0),
}


@pytest.mark.parametrize("name", WORKS)
def test_schedules_that_reach_the_end_pass(name):
    check_step(partial(SGD, lr=1.0), WORKS[name], device=CPU, max_steps=3)
    rates_of(WORKS[name], 3)


@pytest.mark.parametrize("name", FAILS)
def test_schedules_that_do_not_are_told(name):
    with pytest.raises(ConfigurationError, match=r"^model\.lr_scheduler: "):
        check_step(partial(SGD, lr=1.0), FAILS[name], device=CPU, max_steps=3)
    with pytest.raises((ValueError, TypeError, ArithmeticError)):  # as the run would have
        rates_of(FAILS[name], 3)


def test_a_check_leaves_random_numbers_alone():
    before = torch.get_rng_state()
    check_step(partial(AdamW, lr=1e-3), WORKS["warm-up"], device=CPU, max_steps=3)
    assert torch.equal(torch.get_rng_state(), before)


SPOILT: dict[str, tuple[dict[str, Any], str]] = {
    "optimizer": ({"class_path": "torch.optim.LBFGS"}, "LBFGS"),
    "lr_scheduler": (
        {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 1.0, "total_steps": 2}},
        "total_steps=2",
    ),
    "no_decay": (["*norms*"], "*norms*"),
}


@pytest.mark.parametrize("setting", SPOILT)
@pytest.mark.parametrize("command", ["fit", "plan"])
def test_run_and_plan_tell_it_in_one_line(settings, run, tmp_path, capsys, setting, command):
    value, named = SPOILT[setting]
    settings["model"][setting] = value
    settings["trainer"]["max_steps"] = 3
    settings["summary"] = {"evaluate": False}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert run(command, "--config", str(tmp_path / "run.yaml")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: model.{setting}: ")
    assert named in line


# ---- weight decay ---------------------------------------------------------------------------------------------------


def test_weights_that_match_are_not_decayed_and_none_is_lost():
    model = tiny_model("phi-bias")
    model.get_input_embeddings().requires_grad_(False)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = make_optimizer(partial(SGD, lr=0.1, weight_decay=0.5), model, ["*norm*", "*.bias"])
    assert [len(group["params"]) > 0 for group in optimizer.param_groups] == [True, True]
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, weight in model.named_parameters():
        kept = "norm" in name or name.endswith("bias") or not weight.requires_grad
        torch.testing.assert_close(weight, before[name] * (1.0 if kept else 0.95))
    assert make_optimizer(partial(SGD, lr=0.1), model).param_groups[0]["params"] == [
        weight for weight in model.parameters() if weight.requires_grad
    ]


def test_all_weights_may_be_spared_and_a_pattern_without_weights_is_told():
    model = tiny_model()
    (group,) = make_optimizer(partial(SGD, lr=0.1, weight_decay=0.5), model, ["*"]).param_groups
    assert group["weight_decay"] == 0.0
    model.get_input_embeddings().requires_grad_(False)
    with pytest.raises(ConfigurationError, match="embed"):
        make_optimizer(partial(SGD, lr=0.1), model, ["*embed*"])


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_a_run_follows_its_schedule(settings, run, tmp_path):
    """By class path, with weights that are not decayed."""
    scheduler = {"warmup_steps": 2, "max_steps": 4, "final": 0.5}
    settings["model"] |= {
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-4}},
        "lr_scheduler": {"class_path": "lsm_lightning.learning_rates.WarmupCosine", "init_args": scheduler},
        "no_decay": ["*norm*"],
    }
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    settings["trainer"] |= {"max_steps": 4, "logger": logger}
    settings["summary"] = {"evaluate": False}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert run("fit", "--config", str(tmp_path / "run.yaml")) == 0
    (path,) = tmp_path.rglob("metrics.csv")
    told = [float(row["optimizer/lr"]) for row in csv.DictReader(path.read_text().splitlines()) if row["optimizer/lr"]]
    half_way = 0.5 + 0.5 * (1 + math.cos(math.pi / 2)) / 2
    assert told == pytest.approx([1e-4, 2e-4, 3e-4, half_way * 3e-4])
    state = torch.load(Path(path.parent) / "checkpoints" / "last.ckpt")["optimizer_states"][0]
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.01, 0.0]
