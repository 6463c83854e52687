"""Whether the way in which rollouts draw tokens ruins or wastes a run."""

import math
from collections.abc import Sequence

from lsm_lightning.objectives import Objective, SampledToken
from lsm_lightning.probing.finding import Finding, ok, refused, unknown, warning
from lsm_lightning.rollout import Sampling
from lsm_lightning.types import Turn
from tokenalign.vocabulary import Vocabulary


def check_samples(sampling: Sampling, samples: int) -> Finding:
    """Several samples of a prompt are several texts.

    Args:
        sampling: Of rollouts.
        samples: Of each prompt in a step.
    """
    check, how = "samples", f"{samples} a prompt, at temperature {sampling.temperature:g} and top-p {sampling.top_p:g}"
    if sampling.temperature == 0 and samples > 1:
        return warning(
            check,
            f"{how}: all {samples} are the same text, so {samples - 1} of them are for nothing",
            "Raise model.sampling.temperature, or set data.samples_per_prompt to 1.",
        )
    return ok(check, how)


def check_estimate(objective: Objective, sampling: Sampling) -> Finding:
    """An objective that stands for a mean over the student's own draws is given those.

    `SampledToken` rewards and weighs tokens by the student's log-probs at temperature 1 and without top-p, and corrects
    for no other way of drawing. It may teach even so (the paper tries its baseline with top-p 0.9 too).
    """
    check = "estimate"
    if not isinstance(objective, SampledToken):
        return ok(check, "The objective sums over tokens, however a text was drawn")
    if sampling.temperature == 1 and sampling.top_p == 1:
        return ok(check, "Tokens are drawn from the student itself")
    return warning(
        check,
        f"SampledToken's loss stands for the reverse KL if tokens are drawn from the student itself; at temperature "
        f"{sampling.temperature:g} and top-p {sampling.top_p:g} it is biased",
        "Set model.sampling.temperature and model.sampling.top_p to 1, as the paper's baseline does.",
    )


def check_randomness(
    turns: Sequence[Turn], calm: Sequence[Turn], sampling: Sampling, vocabulary: Vocabulary
) -> Finding:
    """A high temperature leaves something of what the student knows.

    Below half of chance the student is surprised by what it wrote; below chance, all of its vocabulary is more to its
    liking. (Embedded student on math, 38 % solved, after 20 steps at temperature 1, 2, 2.5 and 5: 99, 92, 54, 42.)

    Args:
        turns: What it wrote.
        calm: What it writes at temperature 1, where it is above that.
        sampling: Of `turns`.
        vocabulary: The student's.
    """
    check, chance = "randomness", -math.log(vocabulary.known)
    mean, at_one = _mean(turns), _mean(calm)
    if math.isnan(mean):
        return unknown(check, "The student wrote nothing")
    text = f"The student gives its own answers {mean:.2f} nats a token (chance: {chance:.2f})"
    if sampling.temperature <= 1 or math.isnan(at_one):
        return ok(check, text)
    text = f"{text} at temperature {sampling.temperature:g}, and {at_one:.2f} at 1"
    if at_one < chance / 2 or mean >= chance / 2:  # it knows little, or what it knows is still there
        return ok(check, text)
    remedy = "Lower model.sampling.temperature, to 1 if nothing speaks against it."
    if mean < chance:
        return refused(check, f"{text}: they are as good as random, and teach nothing about what it writes", remedy)
    return warning(check, f"{text}: they are mostly random", remedy)


def _mean(turns: Sequence[Turn]) -> float:
    """Nats a token; NaN for none."""
    values = [value for turn in turns for value in turn.completion.log_probs]
    return math.fsum(values) / len(values) if values else math.nan
