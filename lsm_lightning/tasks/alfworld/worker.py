"""A process that plays games for the trainer: `python -m lsm_lightning.tasks.alfworld.worker FILE_DESCRIPTOR`.

Requests and answers are JSON, one message each, over the connection whose file descriptor it is given; `workers` has
the other end. A request starts a game (and plays commands, where the game is to go on from there), gives one a command,
or ends one; all but the last are answered, in order. It never imports torch.
"""

import json
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.tasks.alfworld import extra
from lsm_lightning.tasks.alfworld.game import Game
from lsm_lightning.tasks.alfworld.running import LocalGame
from lsm_lightning.tasks.alfworld.translation import TranslationCache

if TYPE_CHECKING:
    Channel: TypeAlias = Connection[Any, Any]
else:
    Channel = Connection  # generic for type checkers only

Packet = dict[str, Any]
"""What goes over the connection."""

READY: Packet = {"ready": True}
"""The first thing it says."""


def main() -> None:
    """Play until the other end closes the connection, or is no more."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):  # a scheduler sends them to all processes; they are for the trainer
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    connection: Channel = Connection(int(sys.argv[1]))
    requests: SimpleQueue[Packet] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, requests), daemon=True).start()
    extra.require()
    send(connection, READY)
    games: dict[int, LocalGame] = {}
    while True:
        request = requests.get()
        if request["do"] == "close":
            games.pop(request["number"]).close()
        else:
            send(connection, _answer(games, request))


def _receive(connection: Channel, requests: SimpleQueue[Packet]) -> None:
    """Take requests as they come, so that who sends many never waits for one to be answered, and end with the trainer.

    Without it both sides could wait for the other to read.
    """
    while True:
        try:
            requests.put(receive(connection))
        except (EOFError, OSError):
            os._exit(0)


def _answer(games: dict[int, LocalGame], request: Packet) -> Packet:
    number = request["number"]
    try:
        if request["do"] == "start":
            kept, game = request["kept"], request["game"]
            game["plan"] = tuple(game["plan"])
            games[number] = LocalGame(Game(**game), None if kept is None else TranslationCache(Path(kept)))
        for command in request["commands"]:
            games[number].send(command)
        scene = games[number].scene()
    except ConfigurationError as error:
        return {"number": number, "error": str(error)}
    return {"number": number, "text": scene.text, "admissible": scene.admissible, "won": scene.won}


def send(connection: Channel, message: Packet) -> None:
    """Send one message.

    Raises:
        OSError: The other end is gone.
    """
    connection.send_bytes(json.dumps(message).encode())


def receive(connection: Channel) -> Packet:
    """Wait for one message.

    Raises:
        EOFError, OSError: The other end is gone.
    """
    return json.loads(connection.recv_bytes())


if __name__ == "__main__":
    main()
