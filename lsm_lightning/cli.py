"""On-policy distillation of language models by local support matching."""

# The command line: LightningCLI, with errors in one line and callbacks that every run has.

import difflib
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from argparse import RawDescriptionHelpFormatter, RawTextHelpFormatter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import DefaultHelpFormatter
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only

from lsm_lightning import checkpoints
from lsm_lightning.callbacks import Checkpoint, Probe, ProgressLine, RunSummary, Stopped, StopSignals, Timeline
from lsm_lightning.datamodule import AlternatingTasks
from lsm_lightning.errors import ConfigurationError, TrainingDivergedError
from lsm_lightning.export import export
from lsm_lightning.module import OnPolicyDistillation
from lsm_lightning.planning.command import tell_plan
from lsm_lightning.pretrained import DType
from lsm_lightning.sharding import shards_of


class Parser(LightningArgumentParser):
    """Reports a mistake in one line, without the pages of usage that argparse puts before it."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise what is wrong as a `ConfigurationError`."""
        raise ConfigurationError(_with_suggestion(_one_line(message), self)) from ex

    def instantiate_classes(self, *args: Any, **kwargs: Any) -> Any:
        """Make what the command line describes; a class that refuses its settings is a mistake like any other.

        Raises:
            ConfigurationError: A class refuses its settings.
        """
        try:
            return super().instantiate_classes(*args, **kwargs)
        except ConfigurationError:
            raise
        except ValueError as error:
            told, made = _one_line(str(error)), re.search(r"class_path='([^']+)'", str(error))
            # Whose settings they are is not always told; of nested classes the innermost comes first.
            raise ConfigurationError(f"{made[1]}: {told}" if made and made[1] not in told else told) from error


class Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Leaves the lines of a description as they are."""


class Runner(Trainer):
    """Lightning's trainer with two more commands.

    `plan` needs no trainer: one would ask for devices that are not there.
    """

    plan = staticmethod(tell_plan)

    def probe(self, model: OnPolicyDistillation, datamodule: AlternatingTasks, ckpt_path: str | None = None) -> None:
        """Look at tokenizers, chat templates and teachers before a run, and tell what would ruin it.

        Args:
            model: The module.
            datamodule: The tasks.
            ckpt_path: Look at the student of this checkpoint.

        Raises:
            ConfigurationError: A run would be for nothing.
        """
        self.predict(model, datamodule=datamodule, return_predictions=False, ckpt_path=ckpt_path, weights_only=False)


class CLI(LightningCLI):
    """`fit`, `validate`, `probe`, `plan`; the seed is one setting; probe, progress, summary and checkpoints belong to
    every run."""

    _nothing_found = ""
    """What to tell where `--ckpt_path auto` has found no checkpoint."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer functions that this module has steps for, and what is looked at before a run."""
        own = ("fit", "validate")
        commands = {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in own}
        return commands | {
            "probe": {"model", "datamodule"},
            "plan": {"model", "datamodule", "trainer", "evaluate"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what does not come from the model and the data."""
        parser.link_arguments("seed_everything", "model.seed", compute_fn=_seed)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_seed)
        # Before the summary, which may evaluate for long.
        parser.add_lightning_class_args(Probe, "probing")
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
            self._go_on()
            return
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule, self.model = self._get(self.config_init, "data"), self._get(self.config_init, "model")
        self.trainer = self.trainer_class  # type: ignore[assignment]  # asked for the command's name only

    def _go_on(self) -> None:
        """Have the model look at the checkpoint that is gone on from, and tell where the run stands."""
        path = self._get(self.config, "ckpt_path")
        told = self._nothing_found
        if path is not None:
            state = checkpoints.read_state(Path(path))
            training = self.subcommand == "fit"
            self.model.go_on_from(state, training=training)
            done, steps = state["global_step"], self.trainer.max_steps
            if training:
                told = f"Going on from {path}, after step {done}."
            if training and done >= steps > 0:
                told = f"Nothing left to train: {path} is of step {done}, and trainer.max_steps is {steps}."
        if told and self.trainer.is_global_zero:
            print(told, flush=True)

    def plan(self, **kwargs: Any) -> None:
        """Tell where memory and time will go."""
        evaluate = self._get(self.config_init, "summary").evaluate
        trainer = self._get(self.config_init, "trainer").as_dict()
        _check_trainer(trainer)
        tell_plan(trainer=trainer, evaluate=evaluate, **kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Leave out callbacks that are switched off, which Lightning would refuse, and log into the run's folder.

        A probe leaves nothing behind.

        Raises:
            ConfigurationError: There is no such trainer, or none here.
        """
        _check_trainer(config)
        if self.subcommand == "probe":
            self.save_config_callback = None
            config |= {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "callbacks": None}
            looking: list[Callback] = [each for each in callbacks if isinstance(each, Probe | RunSummary)]
            return super()._instantiate_trainer(config, looking)
        for setting, kind in (("enable_progress_bar", ProgressLine), ("enable_checkpointing", Checkpoint)):
            if config.get(setting) is False:
                callbacks = [callback for callback in callbacks if not isinstance(callback, kind)]
        if any(isinstance(callback, Checkpoint) for callback in callbacks):
            callbacks = [StopSignals(), *callbacks]
        for callback in callbacks:
            if isinstance(callback, Checkpoint) and not callback.dirpath:
                callback.folder = Path(_run_folder(config.get("default_root_dir")))
        if config.get("logger") in (None, True):
            config["logger"] = TensorBoardLogger(_run_folder(config.get("default_root_dir")), name=None, flush_secs=10)
        if config.get("profiler") is None:
            config["profiler"] = Timeline()
        try:
            trainer = super()._instantiate_trainer(config, callbacks)
        except (ValueError, TypeError, RuntimeError, ImportError) as error:  # as Lightning tells a wrong setting
            raise ConfigurationError(f"trainer: {_one_line(str(error))}") from error
        if isinstance(strategy := trainer.strategy, ModelParallelStrategy):  # before it meets the other processes
            shards_of(strategy, nodes=trainer.num_nodes, devices=trainer.num_devices)
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Find and look at the checkpoint before anything is loaded. Lightning's own way would let hyperparameters
        stored in it override the command line.

        Raises:
            ConfigurationError: There is none, it is not whole, or Lightning would look for it where none is kept.
        """
        if not self.config.get("subcommand"):
            return
        config = self.config[self.config.subcommand]
        path = config.get("ckpt_path")
        if str(path) in ("best", "hpc", "registry"):
            raise ConfigurationError(
                f"ckpt_path: {path}: no checkpoint goes by that name here. Use last, auto, or the path of one."
            )
        if str(path) in ("last", "auto"):
            folder = Path(
                config.get("checkpoint", {}).get("dirpath") or _run_folder(config["trainer"].get("default_root_dir"))
            )
            found = checkpoints.newest(folder)
            if found is None and str(path) == "last":
                raise ConfigurationError(
                    f"ckpt_path: last: no checkpoint below '{folder}'. Use --ckpt_path auto to start anew where there "
                    "is none."
                )
            if found is None:
                self._nothing_found = f"No checkpoint below '{folder}': starting anew."
            path = config["ckpt_path"] = found and str(found)
        if path is not None:
            # By one process of a node; srun does not set what other launchers do.
            local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID", "0")
            checkpoints.check(Path(path), every_byte=local_rank == "0")

    def fit(self, model: OnPolicyDistillation, **kwargs: Any) -> None:
        """Train; after Ctrl-C, SIGTERM or SLURM's warning, tell where the checkpoint is and how to go on.

        Raises:
            Interrupted: A signal ended the run; a checkpoint is saved by then.
        """
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        signals = next((each for each in callbacks if isinstance(each, StopSignals)), None)
        try:
            with signals.listening() if signals else nullcontext():
                self.trainer.fit(model, **kwargs)
        except SystemExit as error:
            cause = error.__context__
            if not isinstance(cause, KeyboardInterrupt):  # how Lightning leaves after Ctrl-C
                raise
            raise _interrupted(cause, self.trainer) from error


class Interrupted(Exception):  # noqa: N818 - not an error
    """A signal ended the run in order; the text says where it stands.

    Args:
        message: What to tell.
        status: The exit status.
    """

    def __init__(self, message: str, status: int = 130) -> None:
        super().__init__(message)
        self.status = status


def _interrupted(cause: KeyboardInterrupt, trainer: Trainer) -> Interrupted:
    """What to tell, and what SLURM needs to be told."""
    signum = cause.signum if isinstance(cause, Stopped) else signal.SIGINT
    # A launcher takes a status for a failure, and ends the others while the first one is still at work.
    follows = isinstance(cause, Stopped) and cause.agreed and not trainer.is_global_zero
    status = 0 if follows else 128 + signum
    saved = getattr(trainer.checkpoint_callback, "last_model_path", "")
    if not saved:
        return Interrupted("Interrupted before the first step was done; nothing to save.", status)
    message = f"Interrupted after step {trainer.global_step}. Saved {saved}; "
    if signum == signal.SIGUSR1:
        requeued, job = _requeue() if trainer.is_global_zero else (True, "")
        if requeued:
            return Interrupted(f"{message}SLURM will start job {job} again: --ckpt_path auto goes on from here.", 0)
        message += f"scontrol could not requeue job {job}; "
    return Interrupted(f"{message}add --ckpt_path {shlex.quote(saved)} to the same command to go on.", status)


def _requeue() -> tuple[bool, str]:
    """Ask SLURM to run this job again.

    Returns:
        Whether it will, and the job's name.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
    try:
        return subprocess.run(["scontrol", "requeue", job], capture_output=True).returncode == 0, job
    except OSError:
        return False, job


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


NOT_HERE = {
    "barebones": "progress, summary and checkpoints belong to every run; switch off what you can do without",
    "check_val_every_n_epoch": "there are no epochs; use trainer.val_check_interval, which counts steps",
    "overfit_batches": "a step is no batch of a data set; give a task of few problems",
}
"""Settings of the trainer that a run would fail with later, and what to do."""


PROBE = """\
Look at tokenizers, chat templates and teachers before a run, and tell what would ruin it.

Takes the configuration and overrides of fit. Student and teachers are loaded and write a few answers to the first
problems of each task, the teachers score them, and for each task is printed
  - how the two tokenizers differ, and what to do about it;
  - what each check saw: templates, contexts, log-probs, top tokens, own answers against shuffled ones, ends of turns;
  - which of the student's tokens the loss would leave out, and why;
  - a prompt and its answers.
The exit status is 0 if a run can start, and 2 if it would be for nothing. Nothing is trained or written. The same is
done at the start of every fit, on --probing.texts answers, and told in a line a task.

for example
  python -m lsm_lightning probe --config configs/quickstart.yaml
  python -m lsm_lightning probe --config my.yaml --probing.texts 16 --ckpt_path last"""


EXPORT = """\
Write the trained student of a run as a folder in transformers format.

AutoModelForCausalLM.from_pretrained and vLLM load it. It holds the weights bit for bit, the tokenizer with the run's
chat template, the run's sampling and turn ends, and a model card with settings and figures. Adapters are merged.

RUN is one of
  runs/quickstart                                     its newest version, and there last.ckpt or the newest checkpoint
  runs/quickstart/version_3                           that version
  runs/quickstart/version_3/checkpoints/last.ckpt     that checkpoint: a file, or the folder of a sharded one

for example
  python -m lsm_lightning export runs/quickstart -o student
  python -m lsm_lightning export runs/quickstart/version_3 -o student --dtype bfloat16 --overwrite"""


def run(arguments: Sequence[str] | None = None) -> CLI:
    """Parse and run one command.

    Raises:
        ConfigurationError: Something the user chose cannot work.
        Interrupted: A signal ended training in order.
        SystemExit: After `--help`.
    """
    _quieten()
    _check_files(sys.argv[1:] if arguments is None else arguments)
    return CLI(
        OnPolicyDistillation,
        AlternatingTasks,
        trainer_class=Runner,
        args=None if arguments is None else list(arguments),
        seed_everything_default=0,
        trainer_defaults=TRAINER_DEFAULTS,
        parser_class=Parser,
        parser_kwargs={
            "prog": "python -m lsm_lightning",
            "description": __doc__.splitlines()[0] if __doc__ else "",
            "epilog": "Besides: `export RUN -o DIR` writes a run's student as a model folder, see `export --help`.",
            "probe": {"description": PROBE, "formatter_class": Formatter},
        },
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )


def export_command(arguments: Sequence[str]) -> None:
    """Write the student of a run as a model folder, and tell where.

    Raises:
        ConfigurationError: The run cannot be exported, or the folder not be written.
        Interrupted: Ctrl-C was pressed.
        SystemExit: After `--help`.
    """
    _quieten()
    parser = Parser(prog="python -m lsm_lightning export", description=EXPORT, formatter_class=RawTextHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, one of its versions, or a checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the model folder to write")
    parser.add_argument("--dtype", type=DType, default="auto", help="of the weights; auto: as in the checkpoint")
    parser.add_argument("--adapter", action="store_true", help="write the adapters alone, as peft reads them")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that lies in DIR")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="the run's config.yaml, if it is not beside the run"
    )
    options = parser.parse_args(list(arguments))
    try:
        print(export(**vars(options)))
    except KeyboardInterrupt as interruption:
        raise Interrupted("Interrupted; nothing was written.") from interruption


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command for a person.

    Returns:
        The exit status: 0 fine, or SLURM will go on; 1 training diverged, 2 a mistake in what was asked for, 130 after
        Ctrl-C, 143 after SIGTERM; all but the first are told in one line.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if words[:1] == ["export"]:
            export_command(words[1:])
        else:
            run(arguments)
    except (ConfigurationError, MisconfigurationException) as error:
        print(f"error: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except TrainingDivergedError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except Interrupted as interruption:
        if not getattr(rank_zero_only, "rank", 0):
            print(interruption, file=sys.stderr)
        return interruption.status
    except KeyboardInterrupt as interruption:
        print("Interrupted before training began; nothing to save.", file=sys.stderr)
        return 128 + (interruption.signum if isinstance(interruption, Stopped) else signal.SIGINT)
    return 0


def _quieten() -> None:
    """Leave the screen to what concerns the run."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else a line a layer and step
    for message in (
        ".*does not have many workers.*",  # the loader deals out step numbers; the work is done in the step
        ".*treespec, LeafSpec.*",  # Lightning's own use of torch
        ".*Checkpoint directory .* exists and is not empty.*",  # so it does when a run is resumed
        ".*The dirpath has changed from.*",  # a resumed run logs into a folder of its own
        ".*AFTER optimization.*",  # as it should be: a checkpoint follows its step
        ".*It is recommended to use `self.log.*sync_dist=True.*",  # an evaluation's numbers are those of all processes
        ".*your dataloader is not resumable.*",  # the data module keeps the position
        ".*`is_gradient_checkpointing` is deprecated.*",  # peft's business
        ".*`loftq_config` specified but will be ignored.*",  # by the default of peft's own settings
    ):
        warnings.filterwarnings("ignore", message=message)


def _seed(value: bool | int) -> int:
    """The seed as a number; `seed_everything` may also be a bool."""
    if int(value) < 0:
        raise ConfigurationError(f"seed_everything={value}: use 0 or a positive number.")
    return int(value)


def _check_trainer(settings: Mapping[str, Any]) -> None:
    """Refuse what no device could run.

    Raises:
        ConfigurationError: A setting is none for these runs.
    """
    for name, advice in NOT_HERE.items():
        if value := settings.get(name):
            raise ConfigurationError(f"trainer.{name}={value}: {advice}.")
    if settings.get("val_check_interval") == 0:
        raise ConfigurationError("trainer.val_check_interval=0: give a number of steps; the default validates never.")


def _run_folder(default_root_dir: Any) -> str:
    """Where a run with this setting of the trainer logs."""
    return str(default_root_dir or "runs")


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


OF_A_CHOICE = re.compile(
    r"Does not validate against any of the Union|Subtypes: |Errors:|Given value type: "
    r"|Given value: (Namespace|NestedArg|{)|Expected a path but |Expected (a )?<class 'NoneType'>"
)
"""How a line begins that the parser writes around a value which may have one of several types."""


def _one_line(message: str) -> str:
    """jsonargparse nests what is wrong in indented lines; of a choice of types it tells too much."""
    lines = [line.strip(" -") for line in message.strip().splitlines() if line.strip()]
    if "Union subtypes" in message:
        lines = [line for line in lines if not OF_A_CHOICE.match(line)]
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
