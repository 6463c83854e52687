"""The texts of a probe: the first turns of a task as either side plays them, and the same tokens in another order."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import takewhile
from random import Random

from transformers import PreTrainedTokenizerBase

from lsm_lightning.pretrained import render
from lsm_lightning.probing.templates import ANSWER
from lsm_lightning.rollout.collect import Player, collect
from lsm_lightning.tasks.base import Task
from lsm_lightning.types import Completion, Message, Prompt, Turn
from tokenalign import Pair


@dataclass(frozen=True, kw_only=True, slots=True)
class Played:
    """The first turns of some episodes."""

    turns: list[Turn]
    rewards: list[float]
    """Of the episodes that were over by then."""


def openings(task: Task, indices: Sequence[int], max_turns: int) -> list[list[list[Message]]]:
    """What these training episodes ask in their first turns: turn, episode that is not over, messages.

    All answers are a stand-in of one word. Real ones are longer, and what they lead to seldom is shorter.
    """
    asked = []
    with ExitStack() as opened:
        going = [opened.enter_context(closing(task.episode("train", index))) for index in indices]
        while going:
            asked.append([list(episode.messages()) for episode in going])
            if len(asked) == max_turns:
                break
            for episode in going:
                episode.step(ANSWER)
            going = [episode for episode in going if not episode.done]
    return asked


def play(
    task: Task, player: Player, *, indices: Sequence[int], max_turns: int, max_new_tokens: int, seed: int
) -> Played:
    """Play training episodes for so many turns, or to their end."""
    trajectories = collect(
        [((seed, "probe", index), task.episode("train", index)) for index in indices],
        player,
        max_new_tokens=max_new_tokens,
        max_turns=max_turns,
    )
    return Played(
        turns=[turn for trajectory in trajectories for turn in trajectory.turns],
        rewards=[trajectory.reward for trajectory in trajectories if not trajectory.unfinished],
    )


def ended(turn: Turn, turn_end: AbstractSet[int]) -> bool:
    """Whether an end-of-turn token stands at its end."""
    return not turn.completion.truncated and bool(turn.completion.ids) and turn.completion.ids[-1] in turn_end


def in_students_tokens(
    turns: Sequence[Turn],
    pair: Pair,
    student: PreTrainedTokenizerBase,
    *,
    respell: bool,
    turn_end: AbstractSet[int],
) -> list[Turn]:
    """A teacher's answers as if the student had written them, ended as it ends its own.

    Where the teacher does not respell, it is given its own ids again: those are what it reads.

    Args:
        turns: In the teacher's tokens.
        pair: Student and teacher.
        student: The student's tokenizer.
        respell: Whether the teacher reads its own spelling of the student's texts.
        turn_end: Whatever ends the teacher's turn.
    """
    prompts = render(student, [list(turn.prompt.messages) for turn in turns])
    own_end = pair.conventions[0].own_turn_end
    made = []
    for turn, prompt in zip(turns, prompts, strict=True):
        is_ended = ended(turn, turn_end)
        text = turn.completion.ids[:-1] if is_ended else turn.completion.ids
        if respell:
            ids = pair.spellers[0].spell([turn.answer.encode()])[0]
        else:
            ids = list(takewhile(lambda i: i < pair.student.size, text))
        if is_ended and (respell or len(ids) == len(text)):
            ids = [*ids, turn.completion.ids[-1] if own_end is None else own_end]
        else:
            is_ended = False
        completion = Completion(ids=ids, log_probs=[0.0] * len(ids), truncated=not is_ended)
        made.append(
            Turn(prompt=Prompt(messages=turn.prompt.messages, ids=prompt), completion=completion, answer=turn.answer)
        )
    return made


def shuffled(turn: Turn, seed: int) -> Turn | None:
    """The same tokens in another order, an end of the turn still at the end; None where there is no other order."""
    ids = list(turn.completion.ids)
    last = len(ids) if turn.completion.truncated else len(ids) - 1
    text = ids[:last]
    if len(set(text)) < 2:
        return None
    mixed, random = list(text), Random(seed)
    while mixed == text:
        random.shuffle(mixed)
    completion = Completion(
        ids=mixed + ids[last:], log_probs=turn.completion.log_probs, truncated=turn.completion.truncated
    )
    return Turn(prompt=turn.prompt, completion=completion, answer=turn.answer)
