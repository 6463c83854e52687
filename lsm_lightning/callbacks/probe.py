"""Looks at tasks, teachers and the student before a run, and refuses to start one that would be for nothing."""

from lightning.pytorch import Callback, LightningModule, Trainer

from lsm_lightning.callbacks.summary import RunSummary
from lsm_lightning.datamodule import PROBLEMS_PER_SEED, AlternatingTasks
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.module import OnPolicyDistillation
from lsm_lightning.probing import Probing, TaskProbe, probe_task
from lsm_lightning.probing.report import console, show, show_short
from lsm_lightning.random_states import random_states, restore_random_states


class Probe(Callback):
    """Checks templates, contexts, tokenizers and teachers on a few answers: a line a task at the start of a fit, all
    of it by the command `probe`.

    Args:
        texts: How many answers each side writes for a task; 0 starts a fit without a look.
        tokens: Longest of these answers, where the task does not allow less.
        teacher_writes: Whether teachers write greedy answers of their own, to be scored. A sharded one does so only
            with `summary.evaluate`, since each process holds it whole meanwhile.
        refuse: Whether what would ruin a run ends it before it begins; without, it is told, and the run goes on.

    Raises:
        ConfigurationError: A number is out of range.
    """

    def __init__(self, texts: int = 4, tokens: int = 256, teacher_writes: bool = True, refuse: bool = True) -> None:
        if texts < 0 or tokens < 1:
            raise ConfigurationError(f"Probe(texts={texts}, tokens={tokens}): use texts >= 0 and tokens >= 1.")
        self.texts = texts
        self.tokens = tokens
        self.teacher_writes = teacher_writes
        self.refuse = refuse

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, tell in a few lines, and refuse.

        Raises:
            ConfigurationError: The run would be for nothing.
        """
        if not self.texts:
            return
        probes = self._probes(trainer, pl_module)
        if trainer.is_global_zero:
            show_short(probes, console())
        self._refuse(probes)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, and tell all; the command `probe` comes here.

        Raises:
            ConfigurationError: A run would be for nothing.
        """
        if not self.texts:
            raise ConfigurationError("--probing.texts=0: there is nothing to look at; use at least 1.")
        probes = self._probes(trainer, pl_module)
        if trainer.is_global_zero:
            show(probes, console())
        self._refuse(probes)

    def _probes(self, trainer: Trainer, module: LightningModule) -> list[TaskProbe]:
        assert isinstance(module, OnPolicyDistillation)
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, AlternatingTasks)
        evaluated = any(isinstance(each, RunSummary) and each.evaluate for each in trainer.callbacks)  # type: ignore[attr-defined]
        before = random_states(module.device)
        module.engine.sync(module.student)
        probes = [
            probe_task(
                Probing(
                    name=name,
                    task=task,
                    teacher=module.teachers[name],
                    device=module.device,
                    student=module.player(module.sampling),
                    objective=module.objective,
                    mask=module.mask,
                    samples=data.samples_per_prompt[name],
                    first=data.seed * PROBLEMS_PER_SEED,
                    seed=module.seed,
                    texts=self.texts,
                    tokens=self.tokens,
                    teacher_writes=self.teacher_writes and (evaluated or not module.teachers[name].sharded),
                ),
                leads=trainer.is_global_zero,
                broadcast=trainer.strategy.broadcast,
            )
            for name, task in data.tasks.items()
        ]
        module.engine.rest()
        restore_random_states(before, module.device)
        return probes

    def _refuse(self, probes: list[TaskProbe]) -> None:
        found = [(probe.name, finding) for probe in probes for finding in probe.of("refused")]
        if not found or not self.refuse:
            return
        (name, finding), *others = found
        more = f" There are {len(others)} more: see the command probe." if others else ""
        raise ConfigurationError(
            f"Task '{name}', {finding.check}: {finding}{more} (--probing.refuse false goes on all the same.)"
        )
