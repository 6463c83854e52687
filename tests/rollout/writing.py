"""What the tests of the local engine ask it to write."""

from transformers import PreTrainedModel

from lsm_lightning.rollout import LocalEngine, Sampling
from lsm_lightning.rollout.base import Request
from lsm_lightning.types import Completion

GREEDY = Sampling(temperature=0.0)
NUCLEUS = Sampling(temperature=1.0, top_p=0.9)
ENDS = frozenset(range(0, 340, 9))
"""So many tokens end a turn that untrained models write answers of many lengths."""


def engine_of(model: PreTrainedModel, **settings: int) -> LocalEngine:
    engine = LocalEngine(**settings)
    engine.sync(model)
    return engine


def write(
    engine: LocalEngine,
    requests: list[Request],
    sampling: Sampling = NUCLEUS,
    new: int = 24,
    ends: frozenset[int] = ENDS,
) -> list[Completion]:
    return engine.generate(requests, sampling, max_new_tokens=new, turn_end=ends)


def ids_of(completions: list[Completion]) -> list[list[int]]:
    return [list(completion.ids) for completion in completions]
