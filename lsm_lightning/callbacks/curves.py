"""The picture of a run: reward and KL of each task over the steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

COLOURS = matplotlib.colormaps["tab10"]
SMOOTHING = 0.6
"""Share of the running mean that a new point keeps."""


def draw_curves(
    curves: Sequence[Mapping[str, Any]], scores: Mapping[str, Mapping[str, Mapping[str, float]]], folder: Path
) -> Path:
    """Write `curves.png` and return its path.

    Args:
        curves: One `{"step", "task", "reward", "kl"}` for each step.
        scores: `before`, `after` and `teacher`: task → `{"value", "low", "high", "n"}`; empty ones are left out.
        folder: Where to.
    """
    tasks = list(dict.fromkeys(point["task"] for point in curves))
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    reward_axes, kl_axes = figure.subplots(2, 1, sharex=True)
    for number, task in enumerate(tasks):
        points = [point for point in curves if point["task"] == task]
        for axes, name in ((reward_axes, "reward"), (kl_axes, "kl")):
            shown = [(point["step"], point[name]) for point in points if point[name] is not None]
            if not shown:
                continue
            steps, values = zip(*shown, strict=True)
            axes.plot(steps, values, color=COLOURS(number), alpha=0.25, linewidth=1)
            axes.plot(steps, _smooth(values), color=COLOURS(number), linewidth=2, label=task)
        _draw_scores(reward_axes, task, COLOURS(number), scores, last=max((p["step"] for p in points), default=0))
    reward_axes.set(ylabel="rollout reward", ylim=(-0.02, 1.02))
    reward_axes.set_title("On-policy distillation: rollouts while training; points with bars: held-out problems")
    kl_axes.set(xlabel="step", ylabel="KL to the teacher (nats a token)")
    if any(point["kl"] for point in curves) and all((point["kl"] or 1) > 0 for point in curves):
        kl_axes.set_yscale("log")
    for axes in (reward_axes, kl_axes):
        axes.grid(alpha=0.3)
        if tasks:
            axes.legend(loc="best")
    path = folder / "curves.png"
    figure.savefig(path, dpi=130)
    return path


def _draw_scores(
    axes: Any, task: str, colour: Any, scores: Mapping[str, Mapping[str, Mapping[str, float]]], last: int
) -> None:
    for name, step in (("before", 0), ("after", last)):
        if task in scores[name]:
            score = scores[name][task]
            error = [[score["value"] - score["low"]], [score["high"] - score["value"]]]
            axes.errorbar([step], [score["value"]], yerr=error, fmt="o", color=colour, capsize=4)
    if task in scores["teacher"]:
        label = f"{task} teacher"
        axes.axhline(scores["teacher"][task]["value"], color=colour, linestyle="--", linewidth=1, label=label)


def _smooth(values: Sequence[float]) -> list[float]:
    smoothed: list[float] = []
    for value in values:
        smoothed.append(value if not smoothed else SMOOTHING * smoothed[-1] + (1 - SMOOTHING) * value)
    return smoothed
