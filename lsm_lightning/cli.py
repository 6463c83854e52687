"""On-policy distillation of language models by local support matching."""

# The command line: LightningCLI, with errors in one line and callbacks that every run has.

import difflib
import logging
import re
import shlex
import sys
import warnings
import zipfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from lsm_lightning.callbacks import Checkpoint, ProgressLine, RunSummary
from lsm_lightning.datamodule import AlternatingTasks
from lsm_lightning.errors import ConfigurationError, TrainingDivergedError
from lsm_lightning.module import OnPolicyDistillation
from lsm_lightning.planning.command import tell_plan


class Parser(LightningArgumentParser):
    """Reports a mistake in one line, without the pages of usage that argparse puts before it."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise what is wrong as a `ConfigurationError`."""
        raise ConfigurationError(_with_suggestion(_one_line(message), self)) from ex


class RunOrPlan(Trainer):
    """Lightning's trainer with one more command. It needs no trainer: one would ask for devices that are not there."""

    plan = staticmethod(tell_plan)


class CLI(LightningCLI):
    """`fit`, `validate`, `plan`; the seed is one setting; progress, summary and checkpoints belong to every run."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer functions that this module has steps for, and the planner."""
        own = ("fit", "validate")
        commands = {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in own}
        return commands | {"plan": {"model", "datamodule", "trainer", "evaluate"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what does not come from the model and the data."""
        parser.link_arguments("seed_everything", "model.seed", compute_fn=_seed)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_seed)
        parser.add_lightning_class_args(ProgressLine, "progress")
        parser.add_lightning_class_args(RunSummary, "summary")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.set_defaults(
            {
                # One file, checkpoints/last.ckpt; set save_top_k and filename to keep more.
                "checkpoint.filename": "last",
                "checkpoint.save_top_k": 0,
                "checkpoint.save_last": True,
                "checkpoint.every_n_train_steps": 20,
                "checkpoint.save_on_exception": True,
                "checkpoint.enable_version_counter": False,
            }
        )

    def instantiate_classes(self) -> None:
        """Make what the command line describes; for a plan, all but the trainer."""
        if self.subcommand != "plan":
            super().instantiate_classes()
            return
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule, self.model = self._get(self.config_init, "data"), self._get(self.config_init, "model")
        self.trainer = self.trainer_class  # type: ignore[assignment]  # asked for the command's name only

    def plan(self, **kwargs: Any) -> None:
        """Tell where memory and time will go."""
        evaluate = self._get(self.config_init, "summary").evaluate
        tell_plan(trainer=self._get(self.config_init, "trainer").as_dict(), evaluate=evaluate, **kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Leave out callbacks that are switched off, which Lightning would refuse, and log into the run's folder."""
        for setting, kind in (("enable_progress_bar", ProgressLine), ("enable_checkpointing", Checkpoint)):
            if config.get(setting) is False:
                callbacks = [callback for callback in callbacks if not isinstance(callback, kind)]
        if config.get("logger") in (None, True):
            config["logger"] = TensorBoardLogger(config.get("default_root_dir") or "runs", name=None, flush_secs=10)
        return super()._instantiate_trainer(config, callbacks)

    def _parse_ckpt_path(self) -> None:
        """Look at the checkpoint before anything is loaded. Lightning's own way would let hyperparameters stored in it
        override the command line."""
        if self.config.get("subcommand"):
            _check_checkpoint(self.config[self.config.subcommand].get("ckpt_path"))

    def fit(self, model: OnPolicyDistillation, **kwargs: Any) -> None:
        """Train; after Ctrl-C, tell where the checkpoint is and how to go on.

        Raises:
            Interrupted: Ctrl-C was pressed; Lightning has saved a checkpoint by then.
        """
        try:
            self.trainer.fit(model, **kwargs)
        except SystemExit as error:
            if not isinstance(error.__context__, KeyboardInterrupt):  # how Lightning leaves after Ctrl-C
                raise
            checkpoint = getattr(self.trainer.checkpoint_callback, "last_model_path", "")
            if checkpoint:
                raise Interrupted(
                    f"Interrupted after step {self.trainer.global_step}. Saved {checkpoint}; add --ckpt_path "
                    f"{shlex.quote(checkpoint)} to the same command to go on."
                ) from error
            raise Interrupted("Interrupted before the first step was done; nothing to save.") from error


class Interrupted(Exception):  # noqa: N818 - not an error
    """Ctrl-C ended the run in order; the text says where it stands."""


TRAINER_DEFAULTS: dict[str, Any] = {
    "enable_model_summary": False,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    # The end of a run is `max_steps`; there are no epochs.
    "max_epochs": -1,
    # Lightning's validation runs every so many steps, if `val_check_interval` asks for it.
    "check_val_every_n_epoch": None,
    "val_check_interval": 10**9,
    # The data module deals out problems to processes itself.
    "use_distributed_sampler": False,
}


def run(arguments: Sequence[str] | None = None) -> CLI:
    """Parse and run one command.

    Raises:
        ConfigurationError: Something the user chose cannot work.
        Interrupted: Ctrl-C was pressed.
        SystemExit: After `--help`.
    """
    _quieten()
    _check_files(sys.argv[1:] if arguments is None else arguments)
    return CLI(
        OnPolicyDistillation,
        AlternatingTasks,
        trainer_class=RunOrPlan,
        args=None if arguments is None else list(arguments),
        seed_everything_default=0,
        trainer_defaults=TRAINER_DEFAULTS,
        parser_class=Parser,
        parser_kwargs={"prog": "python -m lsm_lightning", "description": __doc__.splitlines()[0] if __doc__ else ""},
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command for a person.

    Returns:
        The exit status: 0 fine, 1 training diverged, 2 a mistake in what was asked for, 130 after Ctrl-C; all but the
        first are told in one line.
    """
    try:
        run(arguments)
    except (ConfigurationError, MisconfigurationException) as error:
        print(f"error: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except TrainingDivergedError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("Interrupted before training began; nothing to save.", file=sys.stderr)
        return 130
    return 0


def _quieten() -> None:
    """Leave the screen to what concerns the run."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # the loader deals out step numbers; the work is done in the step
        ".*treespec, LeafSpec.*",  # Lightning's own use of torch
        ".*Checkpoint directory .* exists and is not empty.*",  # so it does when a run is resumed
        ".*The dirpath has changed from.*",  # a resumed run logs into a folder of its own
        ".*AFTER optimization.*",  # as it should be: a checkpoint follows its step
        ".*your dataloader is not resumable.*",  # the data module keeps the position
    ):
        warnings.filterwarnings("ignore", message=message)


def _seed(value: bool | int) -> int:
    """The seed as a number; `seed_everything` may also be a bool."""
    if int(value) < 0:
        raise ConfigurationError(f"seed_everything={value}: use 0 or a positive number.")
    return int(value)


def _check_checkpoint(path: str | Path | None) -> None:
    """A file or a folder of a sharded checkpoint; Lightning's own words (`last`, `best`) are left to it."""
    if path is None or str(path) in ("last", "best", "hpc", "registry"):
        return
    if not Path(path).exists():
        raise ConfigurationError(f"--ckpt_path: there is no checkpoint '{path}'.")
    if not (Path(path).is_dir() or zipfile.is_zipfile(path)):
        raise ConfigurationError(f"--ckpt_path: '{path}' is not a checkpoint, or was cut off while it was written.")


def _check_files(arguments: Sequence[str]) -> None:
    """Name the file whose YAML is broken; the parser tells what is wrong, but not where."""
    values = [after for before, after in pairwise(arguments) if before in ("-c", "--config")]
    values += [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]
    for path in map(Path, values):
        try:
            if path.is_file():
                yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{path} is not valid YAML: {_one_line(str(error))}") from error


def _one_line(message: str) -> str:
    """jsonargparse nests what is wrong in indented lines; the innermost ones say it best."""
    lines = [line.strip(" -") for line in message.strip().splitlines() if line.strip()]
    return " ".join(lines)


def _with_suggestion(message: str, parser: LightningArgumentParser) -> str:
    """Add the name that was probably meant."""
    wrong = re.search(r"(?:does not accept option|Option|Key) '([^']+)'", message)
    if wrong is None:
        return message
    parsers = [parser, *(parser._subcommands_action.choices.values() if parser._subcommands_action else ())]
    known = {action.dest for each in parsers for action in each._actions}
    close = difflib.get_close_matches(wrong[1], sorted(known), n=1)
    return f"{message} Did you mean '{close[0]}'?" if close else message
