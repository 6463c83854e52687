"""A server of one's own: a child that is waited for, started again, and ends with whoever started it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from lsm_lightning.serving import Launch, ServerError
from lsm_lightning.serving.launch import Server, healthy

SERVER = """
import http.server, subprocess, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
print("worker", worker.pid, flush=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def server(program: str = SERVER, **settings: float) -> Server:
    return Server(Launch(command=[sys.executable, "-c", program], **settings), ["--model", "x"], {"MARK": "1"})


def descendants(made: Server) -> list[psutil.Process]:
    assert made._process is not None
    return psutil.Process(made._process.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=20)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_it_is_there_when_start_returns_and_gone_when_stop_does():
    made = server()
    made.start()
    processes = descendants(made)
    assert healthy(made.url)
    assert made.alive
    assert len(processes) == 2  # with its worker
    made.stop()
    assert not made.alive
    assert gone(processes)
    assert not healthy(made.url)


def test_one_that_was_killed_leaves_no_worker_and_starts_again_at_its_address(tmp_path):
    made = Server(Launch(command=[sys.executable, "-c", SERVER]), [], {}, tmp_path / "run")
    made.start()
    first, worker = descendants(made)
    url = made.url
    first.kill()
    assert gone([first, worker])
    while made.alive:
        time.sleep(0.01)
    made.start()
    assert made.url == url
    assert healthy(url)
    made.stop()
    assert len([*tmp_path.glob("run/*.log")]) == 1  # that of the one that was killed


def test_it_ends_with_its_parent_even_if_that_is_killed(tmp_path):
    program = f"""
import sys
from lsm_lightning.serving.launch import Launch, Server
made = Server(Launch(command=[sys.executable, "-c", {SERVER!r}]), [], {{}})
made.start()
print(made.url, flush=True)
input()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        processes = psutil.Process(parent.pid).children(recursive=True)
        assert healthy(url)
        parent.send_signal(signal.SIGKILL)
        assert len(processes) == 3
        assert gone(processes)
    assert not healthy(url)


@pytest.mark.parametrize(
    ("program", "settings", "told"),
    [
        ("raise ValueError('no such device')", {}, "ended before it was ready .*ValueError: no such device"),
        (
            "raise SystemExit('ValidationError: 1 error\\n  Value error, no sleep here\\n    see value_error')",
            {},
            "ended before it was ready .*: Value error, no sleep here",
        ),
        (
            "print('ValueError: no memory'); raise RuntimeError('Engine core initialization failed. See above.')",
            {},
            "ended before it was ready .*: ValueError: no memory",
        ),
        ("import time; time.sleep(100)", {"start_timeout": 0.5}, r"was not ready in time \(start_timeout=0\.5\)"),
    ],
)
def test_one_that_does_not_start_is_told_with_its_own_words(program, settings, told):
    with pytest.raises(ServerError, match=f"{told}.* Its output is in ") as error:
        server(program, **settings).start()
    log = Path(str(error.value).rpartition(" is in ")[2].rstrip("."))
    assert log.exists()
    log.unlink()


def test_nobody_waits_for_one_that_is_not_wanted_any_more():
    made, leaving = server("import time; time.sleep(1000)", start_timeout=300.0), threading.Event()
    threading.Timer(0.5, leaving.set).start()
    started = time.monotonic()
    with pytest.raises(ServerError, match="not waited for"):
        made.start(leaving)
    assert time.monotonic() - started < 60
    assert not made.alive
