"""Errors that are told in one line, without a traceback."""


class ConfigurationError(ValueError):
    """Something the user chose cannot work; the text names the value and what to do about it.

    The command line prints its text as one line, without a traceback, and exits with status 2.
    """

    agreed = False
    """Whether all processes of the run raise it together, and can save a checkpoint together."""


class CheckpointError(ConfigurationError):
    """A checkpoint cannot be written, say because the disk is full; the previous one is left as it is."""


class TrainingDivergedError(RuntimeError):
    """The student's numbers are no longer finite; its last good checkpoint is left as it is."""
