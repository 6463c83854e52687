"""Whether answers end, and by what."""

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from lsm_lightning.probing.answers import ended
from lsm_lightning.probing.finding import Finding, ok, refused, unknown, warning
from lsm_lightning.types import Turn
from tokenalign.visible import visible
from tokenalign.vocabulary import Vocabulary

SURE = math.log(0.5)


def check_ending(
    side: str,
    turns: Sequence[Turn],
    turn_end: AbstractSet[int],
    vocabulary: Vocabulary,
    tags: Sequence[str],
    *,
    new: int,
    cut: bool,
) -> Finding:
    """A side's answers end, and do not run on past a control token that looks like their end.

    Args:
        side: `student` or `teacher`.
        turns: In its own tokens, with their log-probs.
        turn_end: What ends its turn.
        vocabulary: Its own.
        tags: Texts that are no end, although they may be control tokens.
        new: Longest answer that they were allowed.
        cut: Whether that is less than the task allows.
    """
    check = f"{side}'s turn end"
    names = " ".join(visible(vocabulary.pieces[i]) for i in sorted(turn_end)) or "nothing"
    done = sum(ended(turn, turn_end) or turn.completion.stopped for turn in turns)
    if done:
        return ok(check, f"{done} of {len(turns)} answers ended, by {names} (limit {new} tokens)")
    past = [i for turn in turns for i in _surely(turn, turn_end, vocabulary, tags)]
    if past:
        return refused(
            check,
            f"None of {len(turns)} answers ended by {names}; they went on after {visible(vocabulary.pieces[past[0]])}",
            f"If that ends a turn of this model, add id {past[0]} to eos_token_id in its generation_config.json, or "
            f"set a chat_template that shows it. If not, the {side} does not know what such a prompt asks of it.",
        )
    text = f"None of {len(turns)} answers ended within {new} tokens, by {names}"
    if cut:
        return unknown(check, text, "Give the probe more by --probing.tokens.")
    return warning(check, text, f"Raise the task's max_new_tokens, if the {side} needs longer.")


def _surely(turn: Turn, turn_end: AbstractSet[int], vocabulary: Vocabulary, tags: Sequence[str]) -> list[int]:
    """Control tokens that end nothing and were no accident."""
    no_end = {tag.encode() for tag in tags}
    return [
        i
        for i, value in zip(turn.completion.ids, turn.completion.log_probs, strict=True)
        if vocabulary.special[i] and i not in turn_end and value > SURE and vocabulary.pieces[i] not in no_end
    ]
