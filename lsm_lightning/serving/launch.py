"""A server of one's own: a child process that ends with the run, however the run ends."""

import argparse
import contextlib
import http.client
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.serving.client import API_KEY, KEYLESS, QUOTED, ServerError, authorization

SECONDS_BETWEEN_LOOKS = 0.25
SECONDS_TO_STOP = 20.0
MEMORY_SHARE = 0.92
"""Of a GPU's memory that vLLM 0.32 takes where `--gpu-memory-utilization` says nothing else."""
KEY_OPTIONS = frozenset({"--api-key", "--api_key"})
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
ERROR = re.compile(r"Error: (?!Engine core initialization failed)|^  Value error, ")
"""In a line of a server's output. vLLM ends with the words left out here, whatever its engine has met; and pydantic, by
which it checks its options, writes what is wrong below its error."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How to start vLLM servers, one on each machine or one beside each process.

    Args:
        command: A list: the Python that has vLLM (it needs other versions than training, so an environment of its
            own), `-m`, `vllm.entrypoints.openai.api_server`, and further options, such as `--tensor-parallel-size`.
            Model, precision, address and port are added.
        environment: Variables for it, such as CUDA_VISIBLE_DEVICES for GPUs that the trainer leaves free.
        start_timeout: Seconds until it must answer.
        colocated: Start one for each process of the run, on the GPU of that process; it sleeps while the student is
            trained and holds no weights and no cache meanwhile. `--gpu-memory-utilization` in `command` says what share
            of the GPU's memory it takes while it writes.
    """

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    start_timeout: float = 600.0
    colocated: bool = False

    def __post_init__(self) -> None:
        if API_KEY in self.environment or any(word.partition("=")[0] in KEY_OPTIONS for word in self.command):
            raise ConfigurationError(
                f"servers.launch has a key ({API_KEY} or --api-key), which would be written down with the run's "
                f"settings: set the environment variable {API_KEY} of the run instead, its servers inherit it."
            )
        if self.colocated and VISIBLE_GPUS in self.environment:
            raise ConfigurationError(
                f"servers.launch(colocated=True), and its environment has {VISIBLE_GPUS}="
                f"{self.environment[VISIBLE_GPUS]}: such a server takes the GPU of its process; leave the variable out."
            )

    @property
    def memory_share(self) -> float:
        """Of a GPU's memory that a server takes while it is awake.

        Raises:
            ConfigurationError: The command does not give a number.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        option = "--gpu-memory-utilization"
        parser.add_argument(option, "--gpu_memory_utilization", type=float, default=MEMORY_SHARE)
        try:
            share: float = parser.parse_known_args(self.command)[0].gpu_memory_utilization
        except argparse.ArgumentError as error:
            raise ConfigurationError(f"servers.launch.command: {option} is no number ({error.message}).") from error
        return share


class Server:
    """One server process, started by `start`.

    Args:
        launch: The user's part of the command.
        options: Ours.
        environment: Variables besides the user's.
        logs: The folder for a file of what it says, which stays where the server fails or the run is killed; that for
            temporary files, if None.
    """

    def __init__(
        self, launch: Launch, options: Sequence[str], environment: dict[str, str], logs: Path | None = None
    ) -> None:
        self._launch = launch
        self._logs = logs
        self._options = [*options]
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Path | None = None
        self.url = f"http://127.0.0.1:{_free_port()}"

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self, leaving: threading.Event | None = None) -> None:
        """Start the process and wait until it answers; the address stays the same when it is started again.

        Args:
            leaving: Set by another thread when nobody waits for it any more.

        Raises:
            ServerError: It ended, or was not ready in time; or what it says cannot be written down.
        """
        self.stop()
        address = ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2]]
        command = [*self._launch.command, *self._options, *address]
        try:
            if self._logs is not None:
                self._logs.mkdir(parents=True, exist_ok=True)
            handle, log = tempfile.mkstemp(prefix="vllm-server-", suffix=".log", dir=self._logs)
        except OSError as error:
            raise ServerError(f"What a server says cannot be written into the run's folder: {error}.") from error
        self._log = Path(log)
        with os.fdopen(handle, "wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("keeper.py")), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupt from the keyboard is for the trainer
                env={**os.environ, **self._environment, **self._launch.environment},
            )
        end = time.monotonic() + self._launch.start_timeout
        while not healthy(self.url):
            if leaving is not None and leaving.is_set():
                raise self._failed("was not waited for")
            if not self.alive or time.monotonic() > end:
                raise self._failed("ended before it was ready" if not self.alive else "was not ready in time")
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def stop(self) -> None:
        """End the process; the log of one that had failed is kept."""
        process, self._process = self._process, None
        if process is None:
            return
        orderly = process.poll() is None
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if orderly and self._log is not None:
            self._log.unlink(missing_ok=True)

    def _failed(self, how: str) -> ServerError:
        assert self._log is not None
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if ERROR.search(line)]
        said = f" Its last error: {lines[-1].strip()[:QUOTED]}." if lines else ""
        waited = f"start_timeout={self._launch.start_timeout:g}"
        # Whatever came of it, it shall not go on.
        log, self._log = self._log, None
        self.stop()
        return ServerError(
            f"The server started by `{' '.join(self._launch.command)}` {how} ({waited}).{said} Its output is in {log}."
        )


def healthy(url: str) -> bool:
    """Whether a server answers at all, be it that it demands another key."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy knows this machine's servers
    request = urllib.request.Request(f"{url}/health")
    for name, value in authorization().items():
        request.add_unredirected_header(name, value)
    try:
        with direct.open(request, timeout=5) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code in KEYLESS
    except (OSError, http.client.HTTPException):
        return False


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
