"""Math tasks of one turn: made-up column additions for tiny models, and problems read from JSON Lines files."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.tasks.base import Episode, Split, Task
from lsm_lightning.tasks.grading import Verdict, grade
from lsm_lightning.tasks.math_files import GoldProblem, read_problems
from lsm_lightning.types import Message

TEMPLATES = {
    "finds": "{name} has {first} {things} and finds {second} more. How many {things} does {name} have now?",
    "jars": "There are {first} {things} in one jar and {second} {things} in another. How many {things} are there?",
    "shop": "A shop sold {first} {things} on Monday and {second} on Tuesday. How many {things} were sold?",
    "packs": "{name} packs {first} {things}, then packs {second} more. What is the total?",
}
"""Word problems by kind. All name the numbers late and far apart; bare `a + b` questions are learnt far worse."""

NAMES = ("Mia", "Tom", "Ana", "Leo", "Zoe", "Max", "Eva", "Sam", "Ida", "Ben")
THINGS = ("coins", "shells", "stamps", "cards", "beads", "nuts", "marbles", "stickers", "buttons", "ribbons")

DEFAULT_INSTRUCTION = (
    "Work it out step by step between <think> and </think>, then write the final answer alone inside \\boxed{}."
)

_TEST_SHARE = 10
"""One pair of numbers in so many belongs to the test split."""


@dataclass(frozen=True, slots=True)
class AdditionProblem:
    """A word problem whose solution is `first + second`."""

    question: str
    first: int
    second: int
    answer: int
    kind: str
    """Key of `TEMPLATES`."""


def split_of_pair(first: int, second: int) -> Split:
    """The one split that may ask for this sum, whatever the seed and the order of the numbers; about 1 in 10 is test.

    >>> split_of_pair(237, 682) == split_of_pair(682, 237)
    True
    """
    low, high = sorted((first, second))
    digest = hashlib.sha256(f"{low}+{high}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % _TEST_SHARE == 0 else "train"


def sample_problem(seed: int, split: Split, index: int, digits: int) -> AdditionProblem:
    """Problem `index` of a split: a pure function of its arguments, each number with `digits` digits and no leading 0.

    Both splits are unbounded in `index` and share no pair of numbers, not even between different seeds
    (`split_of_pair`); with few digits a pair comes back within its own split.
    """
    rng = random.Random(f"addition/{seed}/{split}/{index}/{digits}")
    smallest, largest = 10 ** (digits - 1), 10**digits - 1
    while True:
        first, second = rng.randint(smallest, largest), rng.randint(smallest, largest)
        if split_of_pair(first, second) == split:
            break
    kind = rng.choice(list(TEMPLATES))
    question = TEMPLATES[kind].format(name=rng.choice(NAMES), things=rng.choice(THINGS), first=first, second=second)
    return AdditionProblem(question, first, second, first + second, kind)


def worked_answer(problem: AdditionProblem) -> str:
    r"""The model answer: the sum restated, its columns from right to left as `digit+digit+carry=sum`, the box.

    Restating the sum first makes it learnable in seconds of CPU time.

    >>> print(worked_answer(AdditionProblem("", 237, 682, 919, "shop")))
    <think>237+682: 7+2+0=9 3+8+0=11 2+6+1=9</think>\boxed{919}
    """
    return _write_columns(problem, forgets_carry=lambda: False)


def sloppy_answer(problem: AdditionProblem, rng: random.Random, slip: float) -> str:
    r"""What a weak student imitates: `worked_answer` in which each carry into a column is forgotten with chance `slip`.

    A forgotten carry is written as `+0`; every written sum is right by itself, and the box follows from these sums.

    >>> print(sloppy_answer(AdditionProblem("", 237, 682, 919, "shop"), random.Random(0), slip=1.0))
    <think>237+682: 7+2+0=9 3+8+0=11 2+6+0=8</think>\boxed{819}
    """
    return _write_columns(problem, forgets_carry=lambda: rng.random() < slip)


def _write_columns(problem: AdditionProblem, *, forgets_carry: Callable[[], bool]) -> str:
    carry, sums, written = 0, [], []
    for upper, lower in zip(reversed(str(problem.first)), reversed(str(problem.second)), strict=True):
        if carry and forgets_carry():
            carry = 0
        column = int(upper) + int(lower) + carry
        written.append(f"{upper}+{lower}+{carry}={column}")
        sums.append(column)
        carry = column // 10
    boxed = str(sums[-1]) + "".join(str(column % 10) for column in reversed(sums[:-1]))
    steps = " ".join(written)
    return f"<think>{problem.first}+{problem.second}: {steps}</think>\\boxed{{{boxed}}}"


class MathEpisode(Episode):
    """One question, one answer; the reward is 1 if the grader accepts it, else 0.

    An answer without a box counts as an invalid action.
    """

    def __init__(self, question: str, gold: str, kind: str = "", instruction: str = "") -> None:
        self.kind = kind
        self._question = f"{question}\n{instruction}" if instruction else question
        self._gold = gold

    def messages(self) -> Sequence[Message]:
        """The question as one user message."""
        assert not self.done, "the episode is over"
        return [{"role": "user", "content": self._question}]

    def step(self, answer: str) -> None:
        """Grade the answer; the episode is then over."""
        assert not self.done, "the episode is over"
        verdict = grade(self._gold, answer)
        self.done = True
        self.reward = 1.0 if verdict is Verdict.CORRECT else 0.0
        self.invalid_actions = int(verdict is Verdict.NO_BOX)


class AdditionProblems(Task):
    """Word problems that add two numbers, made from a seed: enough to train a tiny model in minutes on a CPU.

    The train and the test split are disjoint by construction: a hash of the unordered pair of numbers, which knows
    neither seed nor wording, assigns each pair to one of them, about one in ten to test.

    Args:
        digits: Digits of each number, from 1 to 9.
        seed: Of the problems; other seeds ask other problems, from the same split of the pairs.
        test_size: Number of test problems.
        max_new_tokens: Longest answer, in tokens.
        instruction: Text put under each question; tiny models know what to do and need none.
    """

    def __init__(
        self, digits: int = 3, seed: int = 0, test_size: int = 200, max_new_tokens: int = 64, instruction: str = ""
    ) -> None:
        if not 1 <= digits <= 9:
            raise ConfigurationError(f"AdditionProblems(digits={digits}): choose 1 to 9 digits.")
        _check_positive("AdditionProblems", test_size=test_size, max_new_tokens=max_new_tokens)
        self.digits = digits
        self.seed = seed
        self.max_new_tokens = max_new_tokens
        self.instruction = instruction
        self._test_size = test_size

    def setup(self) -> None:
        """Nothing to read: the problems are made up."""

    def test_size(self) -> int:
        """Number of problems in the test split."""
        return self._test_size

    def episode(self, split: Split, index: int) -> MathEpisode:
        """Episode of `sample_problem(seed, split, index, digits)`; its kind is the template's name."""
        _check_index(split, index, self._test_size)
        problem = sample_problem(self.seed, split, index, self.digits)
        return MathEpisode(problem.question, str(problem.answer), problem.kind, self.instruction)


class MathProblems(Task):
    r"""Problems from JSON Lines files, one object with question and gold answer a line.

    The train file starts over reshuffled when it is through, each pass in an order of its own that follows from the
    seed; the test file keeps its order. An episode's kind is the name of its file without the ending.

    Args:
        train_file: Path of the training problems; `fit` needs it.
        test_file: Path of the test problems; `fit` and `validate` need it.
        question_field: Field of the question.
        answer_field: Field of the gold answer: LaTeX or plain, without a box.
        seed: Of the order of the training problems.
        max_new_tokens: Longest answer, in tokens (paper: 16384).
        instruction: Text put under each question; the grader reads the last \boxed{} after the last </think>.
    """

    def __init__(
        self,
        train_file: str | None = None,
        test_file: str | None = None,
        question_field: str = "problem",
        answer_field: str = "answer",
        seed: int = 0,
        max_new_tokens: int = 4096,
        instruction: str = DEFAULT_INSTRUCTION,
    ) -> None:
        if not (train_file or test_file):
            raise ConfigurationError("MathProblems(train_file=None, test_file=None): name at least one of the files.")
        _check_positive("MathProblems", max_new_tokens=max_new_tokens)
        self._files: dict[Split, str | None] = {"train": train_file, "test": test_file}
        self._fields = (question_field, answer_field)
        self.seed = seed
        self.max_new_tokens = max_new_tokens
        self.instruction = instruction
        self._problems: dict[Split, list[GoldProblem]] = {}

    def setup(self) -> None:
        """Read the files; `read_problems` says what is refused, with a `ConfigurationError` by file and line."""
        for split, name in self._files.items():
            if name:
                self._read(split)

    def test_size(self) -> int:
        """Number of problems in the test file; 0 without one."""
        return len(self._read("test")) if self._files["test"] else 0

    def episode(self, split: Split, index: int) -> MathEpisode:
        """Episode `index`: a pure function of settings, file and index; `ConfigurationError` without a file for it."""
        problems = self._read(split)
        _check_index(split, index, len(problems))
        if split == "train":
            number, place = divmod(index, len(problems))
            index = _order_of_pass(self.seed, number, len(problems))[place]
        problem = problems[index]
        kind = Path(str(self._files[split])).stem
        return MathEpisode(problem.question, problem.answer, kind, self.instruction)

    def _read(self, split: Split) -> list[GoldProblem]:
        name = self._files[split]
        if not name:
            raise ConfigurationError(f"MathProblems({split}_file=None): name a file to get {split} problems.")
        if split not in self._problems:
            self._problems[split] = read_problems(Path(name), *self._fields)
        return self._problems[split]


@lru_cache(maxsize=4)
def _order_of_pass(seed: int, number: int, size: int) -> list[int]:
    order = list(range(size))
    random.Random(f"math/{seed}/{number}").shuffle(order)
    return order


def _check_index(split: Split, index: int, test_size: int) -> None:
    if index < 0 or (split == "test" and index >= test_size):
        raise IndexError(f"problem {index} of the {split} split: the test split has {test_size}, counting from 0")


def _check_positive(owner: str, **settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise ConfigurationError(f"{owner}({name}={value}): choose at least 1.")
