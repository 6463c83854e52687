"""The process that compares expressions symbolically: `python -m lsm_lightning.tasks.grading_worker`.

It reads one JSON object `{"gold": ..., "answer": ...}` a line and answers `true` or `false` a line, after a first line
that says it is ready. It has no time limit of its own worth the name: whoever started it kills it (`grading_process`),
because neither signals nor threads interrupt big-integer arithmetic. It never imports torch.
"""

import contextlib
import json
import os
import signal
import sys
from typing import Any, TextIO

MEMORY_LIMIT = 2 * 1024**3
"""Bytes of address space, where the platform can limit it."""
ORPHAN_LIMIT = 20.0
"""Seconds after which a comparison ends the process, should nobody be left to kill it."""


def main() -> None:
    """Answer until standard input ends."""
    answers = _private_stdout()
    from math_verify import LatexExtractionConfig, parse, verify  # slow, so not before it is needed

    _limit_memory()
    settings = {"extraction_config": [LatexExtractionConfig()], "parsing_timeout": None}

    def equal(gold: str, answer: str) -> bool:
        parsed = [parse(f"${text}$", **settings) for text in (gold, answer)]
        return verify(*parsed, timeout_seconds=None, allow_set_relation_comp=True)

    _write(answers, "ready")
    for line in sys.stdin:
        request = json.loads(line)
        _set_alarm(ORPHAN_LIMIT)
        try:
            verdict = equal(request["gold"], request["answer"])
        except (Exception, RecursionError, MemoryError):
            verdict = False
        _set_alarm(0.0)
        _write(answers, verdict)


def _private_stdout() -> TextIO:
    """The pipe to the parent; whatever a library prints goes to standard error instead."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return pipe


def _write(pipe: TextIO, value: Any) -> None:
    pipe.write(json.dumps(value) + "\n")
    pipe.flush()


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))


def _set_alarm(seconds: float) -> None:
    if hasattr(signal, "setitimer"):  # the default action of SIGALRM ends the process, also inside C code
        signal.setitimer(signal.ITIMER_REAL, seconds)


if __name__ == "__main__":
    main()
