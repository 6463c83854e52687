"""Bytes and texts as a terminal can show them, in a known number of columns."""

import unicodedata
from collections.abc import Sequence

BLANK = "␣"
_SIGNS = {" ": BLANK, "\n": "⏎", "\t": "⇥", "\r": "␍"}
"""Signs for characters that leave no trace."""


def visible(piece: bytes | str, *, blanks: bool = True) -> str:
    r"""A token's text, every character of it seen: `␣` a blank, `⏎` a line feed, `\xe2` a byte that is no text.

    Args:
        piece: The token, or a longer text.
        blanks: Mark blanks too.

    >>> visible(b" a\n"), visible(b"\xe2\x82"), visible("\u200b")
    ('␣a⏎', '\\xe2\\x82', '\\u200b')
    """
    text = piece if isinstance(piece, str) else piece.decode(errors="backslashreplace")
    shown = "".join(_SIGNS.get(character) or _seen(character) for character in text)
    return shown if blanks else shown.replace(BLANK, " ")


def _seen(character: str) -> str:
    # Categories C*: control and format characters, lone surrogates, unassigned ones; Z*: blanks of other kinds.
    unseen = unicodedata.category(character)[0] in "CZ"
    if not unseen:
        return character
    point = ord(character)
    return f"\\x{point:02x}" if point < 0x100 else f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"


def columns(text: str) -> int:
    """How many columns of a terminal a text without control characters takes.

    >>> columns("ab"), columns("東京"), columns("e\u0301")
    (2, 4, 1)
    """
    return sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Me", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "FW" else 1


def fitted(text: str, width: int) -> str:
    """A text in exactly so many columns: filled up with blanks, or cut and ended by `…`.

    >>> fitted("ab", 3), fitted("abcd", 3), fitted("東京", 3)
    ('ab ', 'ab…', '東…')
    """
    if columns(text) > width:
        shown = ""
        for character in text:
            if columns(shown + character) > width - 1:
                break
            shown += character
        text = shown + "…"
    return text + " " * (width - columns(text))


def row(cells: Sequence[str], widths: Sequence[int], between: str = "  ") -> str:
    """Cells side by side, no blank at the end."""
    return between.join(map(fitted, cells, widths)).rstrip()
