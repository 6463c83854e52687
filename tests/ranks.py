"""Runs of several processes that import everything once: loading the libraries takes longer than a tiny run.

A clean process loads them and forks the ranks of one run after the other, as torchrun would start them.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent


def finish_with_ranks(runs: list[list[str]], devices: int, timeout: float = 120.0) -> None:
    """Run the program with each of these arguments, in turn.

    Raises:
        AssertionError: One of the runs failed, or `timeout` seconds were not enough for all.
    """
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(devices), json.dumps(runs)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, process_group=0
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        assert process.returncode == 0, output[-3000:]
    finally:  # a rank that lost another would wait for it for long
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def fork_rank(rank: int, devices: int, port: int, arguments: list[str]) -> int:
    """The process id of a new rank; it never returns here."""
    if child := os.fork():
        return child
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(devices),
        "LOCAL_WORLD_SIZE": str(devices), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }  # fmt: skip
    sys.argv = ["lsm-lightning", *arguments]
    status = 1
    try:
        status = main()
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    from lsm_lightning.cli import main

    for number, arguments in enumerate(json.loads(sys.argv[2])):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            free = probe.getsockname()[1]
        ranks = [fork_rank(rank, int(sys.argv[1]), free, arguments) for rank in range(int(sys.argv[1]))]
        statuses = [os.waitpid(rank, 0)[1] for rank in ranks]
        if any(statuses):
            sys.exit(f"run {number} failed")
