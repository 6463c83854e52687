"""Tokenizers of the tiktoken library, and `tekken.json` files, which are split by it: bytes merged by rank."""

import base64
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from tokenalign.kinds.kind import Added, Kind, Spelled, as_piece, by_id, exact
from tokenalign.splitting import Splitting

if TYPE_CHECKING:
    from tiktoken import Encoding

_FIRST_CONTROLS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""What the control tokens of a `tekken.json` are that does not list them."""
_ROLES = {"<unk>": "unk_token", "<s>": "bos_token", "</s>": "eos_token", "<pad>": "pad_token"}


@lru_cache(maxsize=4)
def kind_of_encoding(encoding: "Encoding") -> Kind:
    """The kind of a `tiktoken.Encoding`."""
    controls = {
        encoding.encode_single_token(text): Added(content=text, special=True) for text in encoding.special_tokens_set
    }
    ends = {"eos_token": "<|endoftext|>"} if "<|endoftext|>" in encoding.special_tokens_set else {}
    return _kind(encoding._pat_str, encoding._mergeable_ranks, controls, first=0, declared=ends)


def kind_of_tekken(content: Mapping[str, Any]) -> Kind:
    """The kind of a parsed `tekken.json`. Control tokens come first, ordinary ones follow by rank.

    Raises:
        ValueError: Its tokens are not in the order of their ranks, or fewer than it says.
        AttributeError, KeyError, TypeError: It is no such file.
    """
    config = content["config"]
    first, size = config["default_num_special_tokens"], config["default_vocab_size"]
    listed = content.get("special_tokens") or [
        {"rank": id, "token_str": text} for id, text in enumerate(_FIRST_CONTROLS)
    ]
    names = {entry["rank"]: entry["token_str"] for entry in listed}
    # The file may hold more tokens than the model has.
    tokens = content["vocab"][: size - first]
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in tokens}
    if [*ranks.values()] != [*range(size - first)]:
        raise ValueError(f"its tokens are not those of the ranks 0..{size - first - 1}, in order. Download it again.")
    controls = {id: Added(content=names.get(id, f"<SPECIAL_{id}>"), special=True) for id in range(first)}
    declared = {_ROLES[entry.content]: entry.content for entry in controls.values() if entry.content in _ROLES}
    return _kind(str(config["pattern"]), ranks, controls, first=first, declared=declared)


def _kind(
    pattern: str, ranks: Mapping[bytes, int], added: Mapping[int, Added], *, first: int, declared: Mapping[str, str]
) -> Kind:
    """A kind whose ordinary ids are `first` and more, in the order of the ranks."""
    pieces = by_id(
        [
            *((first + rank, piece) for piece, rank in ranks.items()),
            *((id, as_piece(entry.content)) for id, entry in added.items()),
        ]
    )
    contents = {entry.content: id for id, entry in added.items()}

    def id_of(content: str) -> int | None:
        rank = ranks.get(as_piece(content))
        return contents.get(content, None if rank is None else first + rank)

    return Kind(
        pieces=pieces,
        added=added,
        id_of=id_of,
        encoder=partial(_Encoder, pattern, ranks, added, pieces, first),
        splitting=lambda: Splitting(patterns=(pattern,), isolates=True),
        rules=pattern,
        declared=declared,
    )


def _encoding(pattern: str, ranks: dict[bytes, int], special: dict[str, int]) -> "Encoding":
    try:
        from tiktoken import Encoding
    except ImportError as error:
        raise ValueError(
            'it is split by the tiktoken library. Install that: pip install "tokenalign[tiktoken]".'
        ) from error
    return Encoding("tokenalign", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


class _Encoder:
    """See `Encoder`."""

    def __init__(
        self,
        pattern: str,
        ranks: Mapping[bytes, int],
        added: Mapping[int, Added],
        pieces: Sequence[bytes],
        first: int,
        tags: tuple[str, ...],
    ) -> None:
        self._pieces, self._first = pieces, first
        self._whole = {entry.content: id for id, entry in added.items() if not entry.special or entry.content in tags}

        # Tokens that are matched as a whole are no ordinary ones, so their ids lie beyond the ranks.
        whole = {content: len(pieces) + id for content, id in self._whole.items()}
        self._encoding = _encoding(pattern, dict(ranks), whole)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        whole, beyond = set(self._whole), len(self._pieces)
        spelled = (self._encoding.encode(text, allowed_special=whole, disallowed_special=()) for text in texts)
        return [[id - beyond if id >= beyond else id + self._first for id in ids] for ids in spelled]

    def spelled(self, texts: Sequence[str], *, opening: bool = False) -> list[Spelled]:
        return [exact(ids, self._pieces) for ids in self.ids(texts)]
