"""The one error type for what a user can set right."""


class ConfigurationError(ValueError):
    """Something the user chose cannot work; the text names the value and what to do about it.

    The command line prints its text as one line, without a traceback, and exits with status 2.
    """
