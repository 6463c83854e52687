"""Token streams of every sort, natural and hostile, from a seed."""

import random
from collections import defaultdict
from collections.abc import Sequence

SNIPPETS = [
    *("<think>", "</think>", "<tool_call>", "<action>", "</action>", "<thi", "nk>", "<x>"),
    *("<|im_end|>", "<|end|>", "<|im_start|>", "[INST]", "https://a.b", "def f(x):", "\\boxed{"),
    *(" the", "think", " ink", "a", "A", "42", ".", ",", "<", ">", " 's", "don't"),
    *(" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "▁", "▁▁", "\u200b", "\u202eab"),
    *("é", "e\u0301", "É", "ﬁ", "İ", "①", "東京", "は雨", "한", "\u1112\u1161\u11ab", "Привет", "नि"),
    *("🙂", "👩\u200d👩\u200d👧"),
]


class Streams:
    """Random rows for one vocabulary.

    Args:
        pieces: Bytes per id.
        special: Ids of control tokens.
        natural: Encodings of texts.
    """

    def __init__(self, pieces: Sequence[bytes], special: Sequence[int], natural: Sequence[Sequence[int]]) -> None:
        self.pieces, self.special, self.natural = pieces, special, natural
        self.starting: dict[bytes, list[int]] = defaultdict(list)
        for id, piece in enumerate(pieces):
            if piece and id not in set(special):
                self.starting[piece[:1]].append(id)
        self.id_of = {piece: id for id, piece in enumerate(pieces) if piece}

    def any_spelling(self, rng: random.Random, text: bytes) -> list[int]:
        """The text in a random segmentation; what no token spells is left out."""
        ids, place = [], 0
        while place < len(text):
            fits = [id for id in self.starting[text[place : place + 1]] if text.startswith(self.pieces[id], place)]
            if not fits:
                place += 1
                continue
            ids.append(rng.choice(fits))
            place += len(self.pieces[ids[-1]])
        return ids

    def mutated(self, rng: random.Random, ids: Sequence[int]) -> list[int]:
        """A few tokens split, merged, swapped, doubled, dropped, or replaced."""
        ids = list(ids)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(ids)) if ids else 0
            match rng.randrange(6):
                case 0:
                    ids[place : place + 1] = self.any_spelling(
                        rng, b"".join(self.pieces[id] for id in ids[place : place + 1])
                    )
                case 1:
                    merged = self.id_of.get(b"".join(self.pieces[id] for id in ids[place : place + 2]))
                    ids[place : place + 2] = ids[place : place + 2] if merged is None else [merged]
                case 2:
                    ids[place : place + 2] = ids[place : place + 2][::-1]
                case 3:
                    ids[place:place] = ids[place : place + 1]
                case 4:
                    del ids[place : place + 1]
                case _:
                    ids[place : place + 1] = [rng.randrange(len(self.pieces))]
        return ids[: rng.randint(0, len(ids))] if rng.random() < 0.2 else ids

    def row(self, rng: random.Random) -> list[int]:
        """One row, of at most a few dozen tokens."""
        match rng.randrange(8):
            case 0:
                return [rng.randrange(len(self.pieces)) for _ in range(rng.choice([0, 1, 2, 5, 20]))]
            case 1 | 2:
                return self.mutated(rng, rng.choice(self.natural))
            case 3:
                whole = "".join(rng.choices(SNIPPETS, k=rng.randint(1, 6))).encode()
                return self.any_spelling(rng, bytes(byte for byte in whole if rng.random() > 0.1))
            case 4:
                run = rng.choices(self.special, k=rng.randint(1, 4)) if self.special else []
                return [*run, *self.any_spelling(rng, rng.choice(SNIPPETS).encode()), *run]
            case 5:
                return self.any_spelling(rng, rng.randbytes(rng.randint(0, 8)))
            case _:
                parts = rng.choices(SNIPPETS, k=rng.randint(0, 10))
                return [
                    id
                    for part in parts
                    for id in (
                        [rng.choice(self.special)]
                        if self.special and rng.random() < 0.1
                        else self.any_spelling(rng, part.encode())
                    )
                ]
