"""What flows through a step: small dataclasses, frozen but one, with shapes.

`N` counts response tokens of all turns, one turn after the other; `K` is the size of a support.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from jaxtyping import Bool, Float, Int
from torch import Tensor

Message = dict[str, str]
"""One chat message: `{"role": "user", "content": "..."}`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What the student is asked in one turn."""

    messages: Sequence[Message]
    """The conversation, for a teacher that renders it through its own chat template."""
    ids: Sequence[int]
    """The same conversation as the student's tokens, under the student's template, generation prefix included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What the student sampled in one turn."""

    ids: Sequence[int]
    """Sampled tokens, all of which train; the end-of-turn token is the last one unless `truncated` or `stopped`."""
    log_probs: Sequence[float]
    """Nats, of each sampled token under the student at temperature 1 and without top-p."""
    truncated: bool
    """Whether the length limit, not an end-of-turn token or a stop string, ended it."""
    stopped: bool = False
    """Whether a stop string ended it, in its last token; the model itself has not ended its turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One prompt and its answer: the unit of training."""

    prompt: Prompt
    completion: Completion
    answer: str
    """The completion as text, without the end-of-turn token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """One finished episode."""

    kind: str
    """The sort of problem within its task, for reports: an ALFWorld task type, say."""
    turns: Sequence[Turn]
    reward: float
    """From 0 to 1; 1 is solved. For people to watch, no part of the loss."""
    invalid_actions: int
    """Turns whose answer the environment could not use."""
    invalid_kinds: Mapping[str, int] = field(default_factory=dict)
    """The same by kind, where the task tells kinds apart."""
    outgrown: bool = False
    """Whether it ended because its prompt left no room for an answer in the student's context."""
    unfinished: bool = False
    """Whether it was left off after some turns; its reward says nothing then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Support:
    """What a teacher says at each of N response positions."""

    ids: Int[Tensor, "n k"]
    """Ids of the student's vocabulary; 0 where there is no member."""
    log_probs: Float[Tensor, "n k"]
    """Nats, over the teacher's whole vocabulary: `exp` of a row sums to 1 minus the tail, never to more than 1. An id
    that rivals its end of a turn means nothing to it and takes a share of the tail. -inf: no member."""
    sampled: Float[Tensor, " n"]
    """Nats: the teacher's log-prob of the token that the student sampled, where `alike`."""
    turn_end: Float[Tensor, " n"]
    """Nats: the teacher's log-prob of ending the turn, all its end-of-turn tokens together."""
    lost: Float[Tensor, " n"]
    """Probability of those of the teacher's top tokens that the student's vocabulary does not have."""
    comparable: Bool[Tensor, " n"]
    """Whether a token starts here on both sides, so that the two next-token distributions follow the same text."""
    alike: Bool[Tensor, " n"]
    """Whether the teacher reads the very token that the student sampled here."""

    def rows(self, index: Int[Tensor, " m"]) -> "Support":
        """The support of some positions only."""
        return Support(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


@dataclass(kw_only=True, slots=True)
class StepBatch:
    """Which episodes one training step plays.

    Not frozen, and without a `range`: Lightning's half and double precision rebuild whatever a loader gives, field by
    field, in search of tensors.
    """

    task: str
    step: int
    """Position in the schedule, from 0; seeds derive from it."""
    indices: tuple[int, ...]
    """Problem numbers of the task; a small data set may repeat a problem within a step."""
    samples_per_prompt: int
    """How many episodes play each problem."""
