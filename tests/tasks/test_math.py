import json
import random
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.tasks.grading import Verdict, grade
from lsm_lightning.tasks.math import (
    DEFAULT_INSTRUCTION,
    TEMPLATES,
    AdditionProblem,
    AdditionProblems,
    MathProblems,
    sample_problem,
    sloppy_answer,
    split_of_pair,
    worked_answer,
)

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "math"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the evaluation files are not beside this checkout")

problems = st.builds(
    sample_problem,
    st.integers(0, 9),
    st.sampled_from(["train", "test"]),
    st.integers(0, 10_000),
    st.integers(1, 5),
)


def carries_into_a_column(problem: AdditionProblem) -> bool:
    columns = len(str(problem.first))
    return any(problem.first % 10**place + problem.second % 10**place >= 10**place for place in range(1, columns))


@given(problems)
def test_a_problem_states_its_numbers_and_their_sum(problem):
    assert problem.answer == problem.first + problem.second
    assert str(problem.first) in problem.question
    assert str(problem.second) in problem.question
    assert problem.kind in TEMPLATES


@given(problems)
def test_a_worked_answer_is_correct(problem):
    assert grade(str(problem.answer), worked_answer(problem)) is Verdict.CORRECT


@given(problems, st.randoms(use_true_random=False))
def test_forgetting_every_carry_is_wrong_exactly_where_a_column_receives_one(problem, rng):
    expected = Verdict.WRONG if carries_into_a_column(problem) else Verdict.CORRECT
    assert grade(str(problem.answer), sloppy_answer(problem, rng, 1.0)) is expected


@given(problems, st.integers(0, 99), st.floats(0, 1))
def test_every_written_sum_of_a_sloppy_answer_is_right_and_the_box_follows_from_them(problem, seed, slip):
    text = sloppy_answer(problem, random.Random(seed), slip)
    steps, box = text.removesuffix("}").split(": ")[1].split("</think>\\boxed{")
    sums = [step.split("=") for step in steps.split(" ")]
    assert all(sum(map(int, left.split("+"))) == int(right) for left, right in sums)
    total = sum(10**place * (int(right) % 10) for place, (_, right) in enumerate(sums[:-1]))
    assert int(box) == total + 10 ** (len(sums) - 1) * int(sums[-1][1])


@given(problems)
def test_without_slips_the_sloppy_answer_is_the_worked_one(problem):
    assert sloppy_answer(problem, random.Random(0), 0.0) == worked_answer(problem)


def test_slips_come_at_the_given_rate():
    carrying = [p for i in range(3000) if carries_into_a_column(p := sample_problem(0, "train", i, 2))]
    rng = random.Random(0)
    wrong = sum(sloppy_answer(p, rng, 0.3) != worked_answer(p) for p in carrying)
    assert wrong / len(carrying) == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_train_and_test_share_no_pair_of_numbers_even_between_seeds(digits):
    pairs = {
        split: {
            tuple(sorted((p.first, p.second)))
            for seed, index in product(range(3), range(count))
            for p in [sample_problem(seed, split, index, digits)]
        }
        for split, count in [("train", 1500), ("test", 300)]
    }
    assert pairs["test"]
    assert not pairs["train"] & pairs["test"]


def test_the_disjointness_check_can_fail(monkeypatch):
    monkeypatch.setattr("lsm_lightning.tasks.math.split_of_pair", lambda first, second: split)
    drawn = []
    for split in ("train", "test"):
        drawn.append({p.answer for index in range(300) for p in [sample_problem(0, split, index, 1)]})
    assert drawn[0] & drawn[1]


def test_about_one_pair_in_ten_is_for_testing():
    drawn = [split_of_pair(a, b) for a in range(100, 200) for b in range(300, 400)]
    assert drawn.count("test") / len(drawn) == pytest.approx(0.1, abs=0.01)


def test_an_episode_is_a_pure_function_of_settings_split_and_index():
    def questions(task, split):
        return [task.episode(split, index).messages() for index in range(50)]

    assert questions(AdditionProblems(), "train") == questions(AdditionProblems(), "train")
    assert questions(AdditionProblems(), "train") != questions(AdditionProblems(), "test")
    assert questions(AdditionProblems(), "train") != questions(AdditionProblems(seed=1), "train")


def test_all_four_templates_are_asked_about_equally_often():
    kinds = [AdditionProblems().episode("train", index).kind for index in range(800)]
    assert all(kinds.count(kind) / len(kinds) == pytest.approx(0.25, abs=0.06) for kind in TEMPLATES)


@pytest.mark.parametrize(
    ("answer", "reward", "invalid"),
    [("\\boxed{{{}}}", 1.0, 0), ("\\boxed{{1{}}}", 0.0, 0), ("It is {}.", 0.0, 1)],
    ids=["right", "wrong", "no box"],
)
def test_an_episode_ends_with_its_one_answer(answer, reward, invalid):
    episode = AdditionProblems().episode("test", 7)
    assert not episode.done
    episode.step(answer.format(sample_problem(0, "test", 7, 3).answer))
    assert (episode.done, episode.reward, episode.invalid_actions) == (True, reward, invalid)
    episode.close()
    episode.close()


def test_the_instruction_follows_the_question():
    plain, asked = (AdditionProblems(instruction=text).episode("train", 3).messages() for text in ("", "Think."))
    assert asked == [{"role": "user", "content": plain[0]["content"] + "\nThink."}]


@pytest.mark.parametrize("settings", [{"digits": 0}, {"digits": 10}, {"test_size": 0}, {"max_new_tokens": 0}])
def test_impossible_settings_are_refused_by_name_and_value(settings):
    [(name, value)] = settings.items()
    with pytest.raises(ConfigurationError, match=f"{name}={value}"):
        AdditionProblems(**settings)


def test_the_test_split_ends_and_the_train_split_does_not():
    task = AdditionProblems(test_size=5)
    task.setup()
    assert task.test_size() == 5
    task.episode("train", 10**9)
    with pytest.raises(IndexError, match="5"):
        task.episode("test", 5)


@pytest.fixture
def problem_file(tmp_path):
    def write(*rows, name="sums.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return str(path)

    return write


ROWS = [{"problem": f"What is {number} + 1?", "answer": str(number + 1)} for number in range(7)]


def questions_of(task, split, indices):
    return [task.episode(split, index).messages()[0]["content"] for index in indices]


def test_every_pass_asks_all_problems_in_an_order_of_its_own(problem_file):
    task = MathProblems(train_file=problem_file(*ROWS), instruction="")
    passes = [questions_of(task, "train", range(7 * number, 7 * number + 7)) for number in range(4)]
    assert all(sorted(asked) == sorted(row["problem"] for row in ROWS) for asked in passes)
    assert len({tuple(asked) for asked in passes}) == 4


def test_the_order_follows_from_seed_and_index_alone(problem_file):
    path = problem_file(*ROWS)
    forward = questions_of(MathProblems(train_file=path, seed=1), "train", range(30))
    backward = questions_of(MathProblems(train_file=path, seed=1), "train", reversed(range(30)))
    other = questions_of(MathProblems(train_file=path, seed=2), "train", range(30))
    assert forward == backward[::-1]
    assert forward != other


def test_the_test_file_keeps_its_order_and_grades_by_its_answers(problem_file):
    task = MathProblems(test_file=problem_file(*ROWS, ""))
    task.setup()
    assert task.test_size() == 7
    episode = task.episode("test", 3)
    assert episode.kind == "sums"
    assert episode.messages()[0]["content"] == f"What is 3 + 1?\n{DEFAULT_INSTRUCTION}"
    episode.step("<think>3 and 1</think>\\boxed{4}")
    assert episode.reward == 1.0
    with pytest.raises(IndexError, match="7"):
        task.episode("test", 7)


def test_fields_can_have_other_names_and_answers_can_be_numbers(problem_file):
    path = problem_file({"q": "2+2?", "a": 4})
    episode = MathProblems(test_file=path, question_field="q", answer_field="a").episode("test", 0)
    episode.step("\\boxed{4}")
    assert episode.reward == 1.0


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], ["holds no problem"]),
        (["", "  "], ["holds no problem"]),
        ([ROWS[0], "{oops"], ["line 2", "{oops", "Write it like"]),
        ([ROWS[0], [1, 2]], ["line 2", "[1, 2]", "Write it like"]),
        ([ROWS[0], "", {"problem": "?"}], ["line 3", "'answer'", "['problem']", "answer_field"]),
        ([{"question": "?", "answer": "1"}], ["line 1", "'problem'", "question_field"]),
        ([ROWS[0], ROWS[1], {"problem": "?", "answer": " "}], ["line 3", "' '", "Fill it in"]),
        ([{"problem": "?", "answer": ["1", "2"]}], ["line 1", '["1", "2"]', "answer_field"]),
        ([{"problem": "?", "answer": None}], ["line 1", "null", "answer_field"]),
    ],
)
def test_a_bad_file_is_refused_by_file_line_value_and_remedy(problem_file, rows, told):
    path = problem_file(*rows)
    for task in (MathProblems(train_file=path), MathProblems(test_file=path)):
        with pytest.raises(ConfigurationError) as error:
            task.setup()
        assert all(part in str(error.value) for part in [path, *told])


def test_a_missing_file_and_one_of_another_encoding_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"nowhere\.jsonl.*no such file"):
        MathProblems(train_file=str(tmp_path / "nowhere.jsonl")).setup()
    (tmp_path / "latin.jsonl").write_bytes('{"problem": "é"}'.encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"latin\.jsonl.*UTF-8"):
        MathProblems(train_file=str(tmp_path / "latin.jsonl")).setup()


def test_a_task_without_the_file_of_a_split_says_so(problem_file):
    path = problem_file(*ROWS)
    with pytest.raises(ConfigurationError, match="train_file=None"):
        MathProblems(test_file=path).episode("train", 0)
    with pytest.raises(ConfigurationError, match="at least one"):
        MathProblems()
    assert MathProblems(train_file=path).test_size() == 0


@needs_data
@pytest.mark.parametrize(("name", "size"), [("math500", 500), ("aime24", 30), ("minerva", 272), ("olympiad", 674)])
def test_real_files_are_read_whole_and_their_golds_are_right(name, size):
    task = MathProblems(test_file=str(DATA / f"{name}.jsonl"))
    task.setup()
    assert task.test_size() == size
    golds = [json.loads(line)["answer"] for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
    for index, gold in enumerate(golds):
        episode = task.episode("test", index)
        episode.step(f"<think>Clear.</think> It is $\\boxed{{{gold}}}$.")
        assert episode.reward == 1.0, gold
