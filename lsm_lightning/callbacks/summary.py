"""What a run leaves behind: a table, `summary.json` and a picture of the reward and KL curves."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from rich.console import Console
from rich.table import Table

from lsm_lightning.callbacks.curves import draw_curves
from lsm_lightning.callbacks.progress import progress
from lsm_lightning.model_card import model_card, percent, versions
from lsm_lightning.module import OnPolicyDistillation

NEXT = """\
Next: another seed            --seed_everything 1
      your own student        --model.student FOLDER_OR_HUB_ID
      the one-token baseline  --config configs/ablation/sampled_token.yaml  (after the first --config)
      every setting           python -m lsm_lightning fit --help"""

Scores = dict[str, dict[str, float]]
"""Task → `{"value", "n", "low", "high"}`, see `OnPolicyDistillation.evaluate`."""


class RunSummary(Callback):
    """Evaluates the teachers and the student before training and the student after it, and sums the run up.

    It writes `summary.json` and `curves.png` into `trainer.default_root_dir`, where the next run overwrites them, and
    into the run's own log folder, together with the trained `student` in transformers format. What it has measured is
    part of the checkpoint, so a resumed run ends with the whole picture.

    Args:
        evaluate: Whether to play the test splits; without, only the curves are drawn.
    """

    def __init__(self, evaluate: bool = True) -> None:
        self.evaluate = evaluate
        self.before: Scores = {}
        self.teacher: Scores = {}
        self.curves: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._since = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far."""
        self._tick()
        return {"before": self.before, "teacher": self.teacher, "curves": self.curves, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what an interrupted run had measured."""
        for name, value in state_dict.items():
            setattr(self, name, value)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure every teacher and the untrained student, once."""
        self._since = time.monotonic()
        assert isinstance(pl_module, OnPolicyDistillation)
        if not self.evaluate or self.before:
            return
        for name, teacher in pl_module.teachers.items():
            with progress(f"evaluating the {name} teacher", shown=trainer.is_global_zero) as on_progress:
                self.teacher[name] = pl_module.evaluate(name, teacher.player(pl_module.eval_sampling), on_progress)
        self.before = self._evaluate_student(trainer, pl_module, "before")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the step's reward and KL."""
        point = {name: outputs.get(f"{batch.task}/train/{name}") for name in ("reward", "kl")}
        self.curves.append({"step": trainer.global_step, "task": batch.task, **point})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the trained student; write the files and print the table. The last checkpoint is there by now."""
        assert isinstance(pl_module, OnPolicyDistillation)
        after = self._evaluate_student(trainer, pl_module, "after") if self.evaluate else {}
        self._tick()
        log_folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective
        summary = {
            "before": self.before,
            "after": after,
            "teacher": self.teacher,
            "seconds": round(self.seconds, 1),
            "steps": trainer.global_step,
            "seed": pl_module.seed,
            "student": pl_module.student_name,
            "versions": versions(),
        }
        pl_module.save_student(log_folder / "student", model_card(_settings(trainer), summary))
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        picture = draw_curves(self.curves, {"before": self.before, "after": after, "teacher": self.teacher}, folder)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        if log_folder != folder:
            for name in ("summary.json", picture.name):
                shutil.copy(folder / name, log_folder / name)
        self._print(trainer, after, log_folder, folder)

    def _evaluate_student(self, trainer: Trainer, module: OnPolicyDistillation, when: str) -> Scores:
        scores = {}
        for name in module.teachers:
            with progress(
                f"evaluating the student on {name} {when} training", shown=trainer.is_global_zero
            ) as on_progress:
                scores[name] = module.evaluate(name, on_progress=on_progress)
        for logger in trainer.loggers:
            logger.log_metrics({f"{name}/eval/value": s["value"] for name, s in scores.items()}, trainer.global_step)
        return scores

    def _tick(self) -> None:
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - (self._since or now), now

    def _print(self, trainer: Trainer, after: Scores, log_folder: Path, folder: Path) -> None:
        console = Console(soft_wrap=True)
        if after:
            console.print(_table(self.before, after, self.teacher))
        checkpoint = getattr(trainer.checkpoint_callback, "last_model_path", "") or trainer.ckpt_path or "none"
        console.print(
            f"{trainer.global_step} steps in {self.seconds:.0f} s\n"
            f"student      {log_folder / 'student'}  (transformers format)\n"
            f"checkpoint   {checkpoint}\nTensorBoard  tensorboard --logdir {folder}\n"
            f"curves       {folder / 'curves.png'}\nsummary      {folder / 'summary.json'}\n{NEXT}"
        )


def _settings(trainer: Trainer) -> dict[str, Any]:
    """As in `config.yaml`; none where a run was not started from the command line."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            return yaml.safe_load(callback.parser.dump(callback.config, skip_none=False))
    return {}


def _table(before: Scores, after: Scores, teacher: Scores) -> Table:
    table = Table(title="Success on held-out problems, in % (95 % interval)")
    for column in ("task", "problems", "before", "after", "teacher"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name in after:
        cells = [percent(scores[name]) for scores in (before, after, teacher)]
        table.add_row(name, str(int(after[name]["n"])), *cells)
    return table
