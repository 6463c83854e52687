"""Colours, where a person looks at a terminal that has them."""

import os
from typing import Literal, TextIO

When = Literal["auto", "always", "never"]
Colour = Literal["red", "green", "yellow", "blue", "magenta", "cyan", "grey", "bold"]
_CODES = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "magenta": 35, "cyan": 36, "grey": 90, "bold": 1}


def wants_colour(when: When, stream: TextIO) -> bool:
    """`auto` paints on a terminal, unless NO_COLOR is set or the terminal is a dumb one."""
    if when != "auto":
        return when == "always"
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Painter:
    """Paints texts, or leaves all as they are.

    >>> Painter(True)("x", "red"), Painter(False)("x", "red")
    ('\\x1b[31mx\\x1b[0m', 'x')
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def __call__(self, text: str, colour: Colour | None) -> str:
        """The text in a colour."""
        return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if self.enabled and colour and text else text
