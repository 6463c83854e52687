"""What the processes of a run agree on: who does a thing for all, and that a failure of one is one of all."""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import distributed

from lsm_lightning.errors import ConfigurationError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands among all."""

    rank: int = 0
    processes: int = 1
    first_here: int = 0
    """Rank of the first process on this machine."""

    @classmethod
    def find(cls) -> "Place":
        """All processes call it together."""
        hosts = gather(socket.gethostname())
        rank = distributed.get_rank() if len(hosts) > 1 else 0
        return cls(rank=rank, processes=len(hosts), first_here=hosts.index(hosts[rank]))

    @property
    def is_first_here(self) -> bool:
        """Whether this process does what is done once on each machine."""
        return self.rank == self.first_here


def gather(value: T) -> list[T]:
    """The values of all processes, by rank; all call it together."""
    if not distributed.is_initialized():
        return [value]
    values: list[T] = [value] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def together(work: Callable[[], T]) -> T:
    """Do this process's part, in which none waits for another, and wait for the others; where one fails, all do.

    Raises:
        ConfigurationError: The first failure, of whatever kind of it; `agreed`.
    """
    failure: ConfigurationError | None = None
    try:
        result = work()
    except ConfigurationError as error:
        failure = error
    failures = [error for error in gather(failure) if error is not None]
    if failures:
        failures[0].agreed = True
        raise failures[0]
    return result


def share(servers: Sequence[str], rank: int, processes: int) -> list[str]:
    """The servers that a process asks: every processes-th; where there are fewer than processes, several share one.

    >>> share(["a", "b", "c"], 1, 2), share(["a", "b"], 2, 3)
    (['b'], ['a'])
    """
    return [*servers[rank::processes]] or [servers[rank % len(servers)]]
