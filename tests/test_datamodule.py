from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import EchoGames

from lsm_lightning.datamodule import AlternatingTasks
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.schedules import Repeating
from lsm_lightning.tasks.math import AdditionProblems

PER_STEP = {"math": 6, "echo": 4}


def module(rank: int = 0, world: int = 1, max_steps: int = 7, **settings) -> AlternatingTasks:
    """On one process of several; the trainer is only asked which."""
    tasks = {"math": AdditionProblems(test_size=11), "echo": EchoGames(test_size=5)}
    data = AlternatingTasks(**{"tasks": tasks, "prompts_per_step": PER_STEP, "samples_per_prompt": 2, **settings})
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world, max_steps=max_steps)
    return data


def test_tasks_alternate_strictly_from_the_first_on():
    assert [module().batch(step).task for step in range(5)] == ["math", "echo", "math", "echo", "math"]


@given(st.integers(0, 60))
def test_a_batch_is_a_pure_function_of_settings_and_step(step):
    used = module()
    for other in (3, 0, 17):
        used.advance(used.batch(other))
    assert used.batch(step) == module().batch(step)


@given(st.integers(1, 4), st.integers(0, 30))
def test_processes_share_out_every_problem_once(world, step):
    whole = module().batch(step)
    shares = [module(rank, world).batch(step) for rank in range(world)]
    assert sorted(index for share in shares for index in share.indices) == list(whole.indices)
    assert {(share.task, share.step, share.samples_per_prompt) for share in shares} == {(whole.task, step, 2)}
    assert all(share.indices for share in shares)


@given(st.integers(1, 4))
def test_processes_share_out_the_test_split_once(world):
    for name, size in (("math", 11), ("echo", 5)):
        shares = [module(rank, world).eval_indices(name) for rank in range(world)]
        assert sorted(index for share in shares for index in share) == list(range(size))


def test_evaluation_can_be_shortened():
    assert module(eval_problems=3).eval_indices("math") == range(3)
    assert module(eval_problems=99).eval_indices("echo") == range(5)


def test_no_problem_comes_twice_and_none_is_left_out():
    for name, size in PER_STEP.items():
        batches = [batch for batch in map(module().batch, range(12)) if batch.task == name]
        drawn = [index for batch in batches for index in batch.indices]
        assert drawn == list(range(6 * size))


def test_runs_of_other_seeds_draw_other_problems():
    drawn = [set(module(seed=seed).batch(step).indices) for seed in range(3) for step in range(0, 40, 2)]
    assert len(set().union(*drawn)) == sum(map(len, drawn))


def test_a_pattern_of_tasks_is_followed():
    data = module(schedule=Repeating(["math", "math", "echo"]))
    assert [data.batch(step).task for step in range(6)] == ["math", "math", "echo"] * 2
    assert data.batch(3).indices == tuple(range(12, 18))


# ---- where a run stands ---------------------------------------------------------------------------------------------


def steps(data: AlternatingTasks) -> list[tuple[int, str]]:
    return [(batch.step, batch.task) for batch in data.train_dataloader()]


@given(st.integers(0, 6))
def test_a_resumed_run_is_in_phase(done):
    whole = steps(module())
    interrupted, resumed = module(), module()
    for step in range(done):
        interrupted.advance(interrupted.batch(step))
    resumed.load_state_dict(interrupted.state_dict())
    assert whole[:done] + steps(resumed) == whole


def test_handing_out_a_batch_is_not_having_done_it():
    data = module()
    loader = iter(data.train_dataloader())
    next(loader)
    next(loader)
    assert data.state_dict()["step"] == 0
    data.advance(data.batch(0))
    assert data.state_dict()["step"] == 1


def test_a_run_whose_steps_were_used_up_can_go_on():
    """Skipped steps do not count for the trainer, so it may ask for more."""
    data = module(max_steps=3)
    data.load_state_dict({"tasks": ["math", "echo"], "step": 3})
    assert steps(data) == [(3, "echo")]


def test_validation_plays_each_task_once():
    batches = list(module(rank=1, world=2).val_dataloader())
    assert [(batch.task, list(batch.indices)) for batch in batches] == [("math", [1, 3, 5, 7, 9]), ("echo", [1, 3])]


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_no_tasks_are_refused():
    with pytest.raises(ConfigurationError, match=r"data\.tasks is empty"):
        AlternatingTasks(tasks={})


@pytest.mark.parametrize("name", ["prompts_per_step", "samples_per_prompt"])
@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"math": 3}, "disagree about echo"),
        ({"math": 3, "echo": 1, "go": 2}, "disagree about go"),
        (0, "at least 1"),
    ],
)
def test_numbers_that_do_not_fit_the_tasks_are_refused(name, value, says):
    with pytest.raises(ConfigurationError, match=f"data.{name}.*{says}"):
        module(**{name: value})


def test_fewer_prompts_than_processes_are_refused():
    module(world=4).setup("fit")
    with pytest.raises(ConfigurationError, match=r"prompts_per_step=4 of task 'echo' is less than the 5 processes"):
        module(world=5).setup("fit")


@pytest.mark.parametrize("pattern", [["poetry"], ["math", "echo", "poetry"]], ids=["first", "last"])
def test_a_schedule_that_names_an_unknown_task_is_refused_before_the_first_step(pattern):
    with pytest.raises(ConfigurationError, match="'poetry'; the tasks are math, echo"):
        module(schedule=Repeating(pattern)).setup("fit")


def test_a_task_that_is_not_ready_is_named():
    class Broken(EchoGames):
        def setup(self) -> None:
            raise ConfigurationError("the games are missing: download them.")

    with pytest.raises(ConfigurationError, match="Task 'games': the games are missing"):
        module(tasks={"games": Broken()}, prompts_per_step=4).setup("fit")


def test_a_task_without_test_problems_is_refused():
    with pytest.raises(ConfigurationError, match="'empty' has no test problems"):
        module(tasks={"empty": EchoGames(test_size=0)}, prompts_per_step=4).setup("fit")
