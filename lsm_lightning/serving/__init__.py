"""vLLM servers: found or started, shared out over processes, asked many questions at once, and believed in nothing."""

from lsm_lightning.serving.client import ServerError
from lsm_lightning.serving.fleet import Fleet, Servers
from lsm_lightning.serving.launch import Launch

__all__ = ["Fleet", "Launch", "ServerError", "Servers"]
