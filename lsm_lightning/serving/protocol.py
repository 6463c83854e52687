"""What is sent to vLLM's `/v1/completions`, and how an answer is read: token ids in and out, nothing taken on trust.

vLLM ignores fields that it does not know without a word, and takes defaults of a model's generation settings (top-k,
a penalty) where a field is left out. So every field is sent, and every answer is held against its question.
"""

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsm_lightning.rollout.base import Request, Sampling
from lsm_lightning.serving.client import BadAnswer
from lsm_lightning.types import Completion

COMPLETIONS = "/v1/completions"
NO_CHANCE = -9999.0
"""What vLLM writes for minus infinity, which JSON does not know."""
ROUNDING = 1e-3
"""Nats by which a log-prob may exceed 0."""
PLAIN = {
    "n": 1,
    "stream": False,
    "echo": False,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "add_special_tokens": False,
    "skip_special_tokens": False,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
}
"""Nothing that changes a distribution, and ids instead of text."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A model's most probable tokens at each of T places."""

    ids: NDArray[np.int64]
    """`[T, E]`; a place with fewer entries than others repeats its first."""
    log_probs: NDArray[np.float32]
    """`[T, E]`, nats; -inf for a token without a chance."""


def writing(
    model: str, request: Request, sampling: Sampling, max_new_tokens: int, turn_end: AbstractSet[int]
) -> dict[str, Any]:
    """A request for one answer and the log-probs of its tokens."""
    return PLAIN | {
        "model": model,
        "prompt": [*request.ids],
        "seed": request.seed,
        "max_tokens": request.longest(max_new_tokens),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stop": [*sampling.stop],
        "include_stop_str_in_output": True,
        "stop_token_ids": sorted(turn_end),
        "ignore_eos": True,  # ends at the tokens above and at no others
        "logprobs": 0,  # of the sampled token alone
    }


def read_written(
    answer: dict[str, Any], request: Request, sampling: Sampling, max_new_tokens: int, turn_end: AbstractSet[int]
) -> Completion:
    """The answer, with its log-probs at temperature 1 and without top-p.

    Raises:
        BadAnswer: It is to another prompt, or something is missing, of another length, or no log-prob.
    """
    choice = _choice(answer, request.ids)
    ids, log_probs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    longest = request.longest(max_new_tokens)
    if not 1 <= len(ids) <= longest:
        raise BadAnswer(f"wrote {len(ids)} tokens where 1 to {longest} were asked for")
    if len(log_probs) != len(ids):
        raise BadAnswer(f"gave {len(log_probs)} log-probs for {len(ids)} tokens")
    if choice["logprobs"]["tokens"] != [f"token_id:{i}" for i in ids]:
        raise BadAnswer("gave log-probs of other tokens than those it wrote")
    if not all(isinstance(value, float | int) and NO_CHANCE < value <= ROUNDING for value in log_probs):
        raise BadAnswer("gave log-probs that are not finite, or above 0")
    if any(i in turn_end for i in ids[:-1]):
        raise BadAnswer("wrote on after the end of a turn")
    ended = ids[-1] in turn_end
    stopped = not ended and choice["finish_reason"] == "stop" and choice["stop_reason"] in sampling.stop
    truncated = not (ended or stopped)
    if truncated and len(ids) < longest:
        raise BadAnswer(f"stopped after {len(ids)} tokens without an end of turn ({choice.get('finish_reason')})")
    return Completion(ids=ids, log_probs=[*map(float, log_probs)], truncated=truncated, stopped=stopped)


def scoring(model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
    """A request for the K most probable tokens, and the actual one, at each place of a text."""
    return PLAIN | {"model": model, "prompt": [*ids], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}


def read_scores(answer: dict[str, Any], ids: Sequence[int], k: int, first: int) -> Scores:
    """The scores from place `first` on, which is at least 1: of the first token nothing is said.

    Raises:
        BadAnswer: They are of another text, or a place lacks some, or they are no log-probs.
    """
    places = _choice(answer, ids)["prompt_logprobs"]
    if places is None or len(places) != len(ids) or places[0] is not None:
        raise BadAnswer(f"gave log-probs at {len(places or ())} places of {len(ids)}")
    rows: list[list[int]] = []
    values: list[list[float]] = []
    for place, token in zip(places[first:], ids[first:], strict=True):
        row = [int(i) for i in place]
        ranks = {entry["rank"] for entry in place.values()}
        if not ranks.issuperset(range(1, k + 1)) or token not in row or len(row) > k + 1:
            raise BadAnswer(
                f"gave {len(row)} log-probs at a place where the {k} highest and the token's were asked for"
            )
        rows.append(row + row[:1] * (k + 1 - len(row)))
        of_row = [entry["logprob"] for entry in place.values()]
        values.append(of_row + of_row[:1] * (k + 1 - len(of_row)))
    log_probs = np.array(values, np.float32).reshape(len(rows), k + 1)
    log_probs[log_probs <= NO_CHANCE] = -math.inf
    if np.isnan(log_probs).any() or (log_probs > ROUNDING).any():
        raise BadAnswer("gave log-probs that are no numbers, or above 0")
    return Scores(ids=np.array(rows, np.int64).reshape(len(rows), k + 1), log_probs=log_probs)


def next_tokens(model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
    """A request for the K most probable tokens after a text, read from the prefix cache where one is kept."""
    return PLAIN | {"model": model, "prompt": [*ids], "max_tokens": 1, "temperature": 0.0, "logprobs": k}


def read_next_tokens(answer: dict[str, Any], ids: Sequence[int], k: int) -> dict[int, float]:
    """Their log-probs by id.

    Raises:
        BadAnswer: Some are missing, or no log-probs.
    """
    (of_first,) = _choice(answer, ids)["logprobs"]["top_logprobs"]
    found = {int(name.removeprefix("token_id:")): float(value) for name, value in of_first.items()}
    if len(found) < k or not all(value <= ROUNDING for value in found.values()):
        raise BadAnswer(f"gave {len(found)} log-probs of the {k} most probable tokens, or some that are none")
    return found


def _choice(answer: dict[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    (choice,) = answer["choices"]
    if choice["prompt_token_ids"] != [*ids]:
        raise BadAnswer("answers to another prompt than the one sent")
    return choice
