"""Stands in for a server that is started: the same interface, and the fake one in this process."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import FakeServer

from lsm_lightning.serving import Launch
from lsm_lightning.serving import fleet as fleet_module


class InProcess:
    """See `lsm_lightning.serving.launch.Server`."""

    def __init__(self, launch: Launch, options: Sequence[str], environment: Mapping[str, str], *_: object) -> None:
        self.options = [*options]
        self.environment = {**environment, **launch.environment}
        self.starts = 0
        self.fake: FakeServer
        self.url = ""

    @classmethod
    def in_place_of_servers(cls, monkeypatch: pytest.MonkeyPatch) -> list["InProcess"]:
        """All that are started from now on, in this order."""
        started: list[InProcess] = []

        def start(*arguments: Any) -> "InProcess":
            started.append(cls(*arguments))
            return started[-1]

        start.stop = cls.stop  # type: ignore[attr-defined]
        monkeypatch.setattr(fleet_module, "Server", start)
        return started

    @property
    def alive(self) -> bool:
        return self.starts > 0 and self.fake.server.fileno() != -1

    def start(self, leaving: object = None) -> None:
        self.stop()
        self.starts += 1
        if self.starts == 1:
            said = dict(zip(self.options[::2], self.options[1::2], strict=False))
            self.fake = FakeServer(Path(said["--model"]), tokenizer=Path(said["--tokenizer"]))
            self.url = self.fake.url
        else:
            self.fake.restart()

    def stop(self) -> None:
        if self.alive:
            self.die()

    def die(self) -> None:
        self.fake.stop()
