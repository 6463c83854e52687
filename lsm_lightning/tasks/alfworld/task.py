"""ALFWorld as a task: where its games come from, and an episode of one."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from random import Random

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.tasks.alfworld import extra
from lsm_lightning.tasks.alfworld.files import expanded, find_games, read_game
from lsm_lightning.tasks.alfworld.game import Game
from lsm_lightning.tasks.alfworld.games import generate
from lsm_lightning.tasks.alfworld.invalid import INVALID_KINDS, invalid_kind
from lsm_lightning.tasks.alfworld.play import Play
from lsm_lightning.tasks.alfworld.prompts import (
    PROJECTIONS,
    PROMPTS,
    Projection,
    ProjectionName,
    PromptName,
    PromptTemplate,
    render,
)
from lsm_lightning.tasks.alfworld.running import LocalGame, RunningGame
from lsm_lightning.tasks.alfworld.translation import TranslationCache, user_cache_folder
from lsm_lightning.tasks.alfworld.workers import default_workers, worker_pool
from lsm_lightning.tasks.alfworld.world import WorldName
from lsm_lightning.tasks.base import Episode, Split, Task
from lsm_lightning.types import Message

GENERATED_TEST_GAMES = 96


class AlfworldEpisode(Episode):
    """One game: a prompt with the admissible commands, an answer with one of them, up to `max_turns` times.

    An answer that names no admissible command costs a turn; the game answers "Nothing happens." Where the game runs in
    a worker process, `step` returns at once, and what is asked afterwards waits. So play many episodes by taking a step
    with each before anything is asked of any.

    Args:
        game: What to play.
        running: The same, at its start; the episode closes it.
        template: How a turn is written down.
        projection: The command an answer stands for.
        max_turns: The episode ends after so many answers.
        history: How many earlier turns a prompt shows.
        give_up_after: The episode also ends after so many unusable answers in a row; None is never.
    """

    def __init__(
        self,
        game: Game,
        running: RunningGame,
        *,
        template: PromptTemplate,
        projection: Projection,
        max_turns: int,
        history: int,
        give_up_after: int | None,
    ) -> None:
        self.kind = game.kind
        self.invalid_kinds: Counter[str] = Counter()
        self._play = Play(running, history)
        self._template, self._projection = template, projection
        self._max_turns, self._give_up_after = max_turns, give_up_after
        self._unusable_in_a_row = 0
        self._refused: str | None = None
        self._over, self._judged = False, True
        self._reward = 0.0

    @property
    def done(self) -> bool:  # type: ignore[override]  # nobody else sets it
        """Whether it is over; waits for the game's answer."""
        self._judge()
        return self._over

    @property
    def reward(self) -> float:  # type: ignore[override]
        """1 if the game is won; waits for its answer."""
        self._judge()
        return self._reward

    def messages(self) -> Sequence[Message]:
        """The prompt as the one user message of the turn; waits for the game's answer.

        Raises:
            ConfigurationError: The game cannot be played; with its name.
            RuntimeError: The episode is over.
        """
        play = self._playing()
        text = render(self._template, play.task, play.taken, play.history, play.observation, play.admissible)
        return [{"role": "user", "content": text}]

    def step(self, answer: str) -> None:
        """Give the command an answer stands for; the game's answer is not waited for."""
        play = self._playing()
        command, tagged = self._projection(answer)
        admissible = play.admissible
        if play.act(command):
            self._refused, self._unusable_in_a_row = None, 0
        else:
            kind = invalid_kind(command, tagged=tagged, admissible=admissible, refused=self._refused)
            self.invalid_kinds[kind] += 1
            self.invalid_actions += 1
            self._refused, self._unusable_in_a_row = command, self._unusable_in_a_row + 1
        self._judged = False

    def close(self) -> None:
        """End the episode and give back what the game holds."""
        self._over = self._judged = True
        self._play.close()

    def _playing(self) -> Play:
        if self.done:
            raise RuntimeError("the episode is over")
        return self._play

    def _judge(self) -> None:
        """See what the last answer led to, once."""
        if self._judged:
            return
        self._judged = True
        play = self._play
        if play.won or play.taken >= self._max_turns or self._unusable_in_a_row == self._give_up_after:
            self._reward = float(play.won)
            self.close()


class AlfworldGames(Task):
    """Text ALFWorld: find, fetch, clean, heat, cool and place things in a house of words.

    Games are generated without end, or read from folders of genuine ones. Needs the `alfworld` extra.

    Args:
        train_games: Folder of genuine training games (every `game.tw-pddl` below it), for instance
            `$ALFWORLD_DATA/json_2.1.1/train`; null generates them.
        test_games: Folder of genuine test games, for instance `$ALFWORLD_DATA/json_2.1.1/valid_seen`; null generates
            them.
        world: Rooms of generated games: `mini` has 3 rooms of 6 to 9 receptacles, 14 kinds of receptacles and 20 of
            objects; `full` has 8 rooms of up to 22, 29 and 52 kinds, and wants `max_turns: 50`.
        seed: Of generated games, and of the order in which genuine ones are played.
        test_size: Number of test games; null is 96 generated ones, or every genuine one.
        max_turns: An episode ends after so many answers.
        history: How many earlier turns a prompt shows.
        prompt: How a turn is written down: `compact`, `paper` (long prose, for a model that knows no ALFWorld), or a
            template of your own, with the admissible commands or without.
        projection: Which command an answer stands for: `strict` is the last `<action>` after the thinking; `paper` is
            the first one anywhere, in lower case, or without any the end of the answer.
        give_up_after: A training episode also ends after so many unusable answers in a row; null is never.
        max_new_tokens: Longest answer in one turn, in tokens.
        workers: Processes that play the games, beside each process of the run; one that dies is replaced and its games
            go on. null is one a core, at most 8; 0 plays in the run's own process.
        cache_folder: Where what is worked out of genuine games is kept for the next run (30 KB a game); null is
            `lsm_lightning/alfworld` in the user's cache folder.

    Raises:
        ConfigurationError: A number is out of range, or the prompt template has an unknown field.
    """

    invalid_kinds = INVALID_KINDS

    def __init__(
        self,
        train_games: str | None = None,
        test_games: str | None = None,
        world: WorldName = "mini",
        seed: int = 0,
        test_size: int | None = None,
        max_turns: int = 25,
        history: int = 2,
        prompt: PromptName | PromptTemplate = "compact",
        projection: ProjectionName = "strict",
        give_up_after: int | None = 3,
        max_new_tokens: int = 32,
        workers: int | None = None,
        cache_folder: str | None = None,
    ) -> None:
        _at_least(
            1, test_size=test_size, max_turns=max_turns, give_up_after=give_up_after, max_new_tokens=max_new_tokens
        )
        _at_least(0, history=history, workers=workers)
        self._folders: dict[Split, str | None] = {"train": train_games, "test": test_games}
        self._paths: dict[Split, Sequence[Path]] = {}
        self._world, self._seed, self._test_size = world, seed, test_size
        self.max_turns, self._history, self._give_up_after = max_turns, history, give_up_after
        self._template = prompt if isinstance(prompt, PromptTemplate) else PROMPTS[prompt]
        self._template.check()
        self._projection: ProjectionName = projection
        self.max_new_tokens = max_new_tokens
        self._workers = workers
        self._kept = TranslationCache(user_cache_folder() if cache_folder is None else expanded(cache_folder))

    def setup(self) -> None:
        """Check that the engine is there and that every genuine game is one.

        Raises:
            ConfigurationError: The `alfworld` extra is missing, a folder holds no games or fewer than `test_size`, or a
                file is none.
        """
        extra.require()
        for split, folder in self._folders.items():
            if folder is not None and split not in self._paths:
                self._paths[split] = find_games(folder)
        found = len(self._paths.get("test", ()))
        if self._test_size is not None and 0 < found < self._test_size:
            raise ConfigurationError(
                f"test_size={self._test_size}, but {self._folders['test']} holds {found} games; null is all of them"
            )

    def test_size(self) -> int:
        """Number of test games."""
        if self._test_size is not None:
            return self._test_size
        self.setup()
        return len(self._paths["test"]) if "test" in self._paths else GENERATED_TEST_GAMES

    def episode(self, split: Split, index: int) -> AlfworldEpisode:
        """A fresh episode of game `index`; genuine training games start over reshuffled, test games are played once.

        Raises:
            ConfigurationError: As `setup`.
            IndexError: There is no such test game.
        """
        self.setup()
        if index < 0 or (split == "test" and index >= self.test_size()):
            raise IndexError(f"{split} game {index}: there are {self.test_size()} test games, numbered from 0")
        game = self._game(split, index)
        return AlfworldEpisode(
            game,
            self._running(game, self._kept if split in self._paths else None),
            template=self._template,
            projection=PROJECTIONS[self._projection],
            max_turns=self.max_turns,
            history=self._history,
            give_up_after=self._give_up_after if split == "train" else None,
        )

    def _running(self, game: Game, kept: TranslationCache | None) -> RunningGame:
        workers = default_workers() if self._workers is None else self._workers
        return worker_pool(workers).open(game, kept) if workers else LocalGame(game, kept)

    def _game(self, split: Split, index: int) -> Game:
        if split not in self._paths:
            return generate(self._seed, index, self._world, split)
        paths = self._paths[split]
        round_number, position = divmod(index, len(paths))
        return read_game(paths[_shuffled(len(paths), f"{split}/{self._seed}/{round_number}")[position]])


@lru_cache(maxsize=4)
def _shuffled(size: int, key: str) -> Sequence[int]:
    """A permutation that depends on nothing but its arguments."""
    order = list(range(size))
    Random(key).shuffle(order)
    return order


def _at_least(least: int, **settings: int | None) -> None:
    for name, value in settings.items():
        if value is not None and value < least:
            raise ConfigurationError(f"AlfworldGames({name}={value}): use {least} or more")
