"""What one check has found."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "unknown", "warning", "refused"]
"""`refused` would ruin a run; `unknown` is what could not be looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of a probe."""

    check: str
    """What was looked at, in a few words."""
    verdict: Verdict
    text: str
    """What was seen, with figures; one or more sentences without the last full stop."""
    remedy: str = ""
    """What to do about it, in a sentence."""

    def __str__(self) -> str:
        return f"{self.text}. {self.remedy}".strip()


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check=check, verdict="ok", text=text)


def unknown(check: str, text: str, remedy: str = "") -> Finding:
    """It could not be looked at."""
    return Finding(check=check, verdict="unknown", text=text, remedy=remedy)


def warning(check: str, text: str, remedy: str) -> Finding:
    """A run may suffer."""
    return Finding(check=check, verdict="warning", text=text, remedy=remedy)


def refused(check: str, text: str, remedy: str) -> Finding:
    """A run would be for nothing."""
    return Finding(check=check, verdict="refused", text=text, remedy=remedy)
