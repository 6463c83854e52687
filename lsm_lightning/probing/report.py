"""A probe for people: a screen a task, or what is worth a line at the start of a run."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lsm_lightning.probing.finding import Verdict
from lsm_lightning.probing.probe import TaskProbe
from tokenalign.visible import visible

LOOKS: dict[Verdict, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "unknown": ("not seen", "dim"),
    "warning": ("warning", "yellow"),
    "refused": ("refused", "bold red"),
}
"""What a verdict is called, and its colour on a terminal."""
WIDTHS = 80, 120
PLAIN_WIDTH = 100
TEXT_SHOWN = 300
"""Characters of a prompt or an answer."""


def console() -> Console:
    """As wide as the terminal, within what reads well."""
    made = Console(highlight=False)
    made.width = min(max(made.width, WIDTHS[0]), WIDTHS[1]) if made.is_terminal else PLAIN_WIDTH
    return made


def show(probes: Sequence[TaskProbe], console: Console) -> None:
    """Print all that was seen."""
    for probe in probes:
        console.print(Text(f"\n{probe.name}: student and teacher", style="bold"))
        # Not through markup: tokens look like it.
        console.print(Text(probe.report.screen(console.width)), soft_wrap=True)
        console.print(Text(f"\n{probe.name}: checks ({probe.seconds:.1f} s)", style="bold"))
        console.print(_checks(probe))
        if probe.masked or probe.of("ok"):
            console.print(Text(f"\n{probe.name}: tokens of the student's that the loss leaves out", style="bold"))
            console.print(_masked(probe))
        if probe.texts:
            console.print(Text(f"\n{probe.name}: a prompt and its answers", style="bold"))
            console.print(_texts(probe))
    console.print(Text(f"\n{verdict(probes)}", style="bold"))


def show_short(probes: Sequence[TaskProbe], console: Console) -> None:
    """Print a line a task, and what is wrong."""
    for probe in probes:
        share = sum(row.share for row in probe.masked)
        reasons = ", ".join(f"{row.reason} {row.share:.1%}" for row in probe.masked[:2])
        left_out = f"{share:.1%} of the student's tokens left out{f' ({reasons})' if reasons else ''}"
        console.print(f"probe · {probe.name}: {_count(probe)}; {left_out}; {probe.seconds:.1f} s", markup=False)
        for finding in probe.of("warning", "refused"):
            name, style = LOOKS[finding.verdict]
            console.print(Text.assemble(f"probe · {probe.name}: ", (name, style), f": {finding.check}: {finding}"))


def verdict(probes: Sequence[TaskProbe]) -> str:
    """Where that leaves the run, in a sentence."""
    refused = sum(len(probe.of("refused")) for probe in probes)
    warned = sum(len(probe.of("warning")) for probe in probes)
    if refused:
        return f"Refused: {refused} of these would ruin a run."
    return f"A run can start, with {warned} warning{'s' if warned > 1 else ''}." if warned else "A run can start."


def _count(probe: TaskProbe) -> str:
    counts = {LOOKS[kind][0]: len(probe.of(kind)) for kind in LOOKS}
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number)


def _plain() -> Table:
    return Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))


def _checks(probe: TaskProbe) -> Table:
    table = _plain()
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in probe.findings:
        name, style = LOOKS[finding.verdict]
        table.add_row(Text(name, style=style), Text(finding.check), Text(str(finding)))
    return table


def _masked(probe: TaskProbe) -> Table:
    table = _plain()
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for row in probe.masked:
        table.add_row(Text(row.reason), Text(f"{row.share:.1%}"), Text("  ".join(row.examples)))
    table.add_row(Text("all together"), Text(f"{sum(row.share for row in probe.masked):.1%}"), Text(""))
    return table


def _texts(probe: TaskProbe) -> Table:
    table = _plain()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for side, (prompt, answer) in probe.texts.items():
        if side == "student":
            table.add_row("prompt", Text(_shown(prompt)))
        table.add_row(side, Text(_shown(answer)))
    for side, rewards in probe.rewards.items():
        if rewards:
            solved = sum(reward == 1 for reward in rewards)
            table.add_row("", Text(f"the {side} solved {solved} of the {len(rewards)} that came to an end"))
    return table


def _shown(text: str) -> str:
    """Without control characters; the end of a text that is too long, where prompts ask and answers answer."""
    shown = visible(text, blanks=False)
    return shown if len(shown) <= TEXT_SHOWN else f"…{shown[-TEXT_SHOWN:]}"
