"""Runs a command that ends when whoever started this goes away, however that comes about: its pipe closes then.

Started as a script in a session of its own; knows the standard library only.
"""

import os
import signal
import subprocess
import sys
import threading
import time

SECONDS_TO_END = 10.0
"""Between a request to end and the end."""


def main() -> None:
    """The arguments are the command; its process group ends as a whole."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # not SIG_IGN, which the command would inherit
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_pipe, daemon=True).start()
    status = command.wait()
    print(f"The command has ended with status {status}.", flush=True)
    os.killpg(0, signal.SIGKILL)


def _end_with_pipe() -> None:
    while sys.stdin.buffer.read(1):
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(SECONDS_TO_END)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
