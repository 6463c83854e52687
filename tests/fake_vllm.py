"""A server that answers as vLLM does, with a tiny model, and that can be made to misbehave; or a process with one."""

import argparse
import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from lsm_lightning.pretrained import load_model
from lsm_lightning.rollout import LocalEngine, Sampling
from lsm_lightning.rollout.base import Request

COMPLETIONS = "/v1/completions"
LOADING = threading.Lock()
"""Of transformers, which loads one model at a time."""


@dataclass
class Fault:
    """What goes wrong with the next requests to a path."""

    kind: str
    times: int = 1
    path: str = COMPLETIONS
    seconds: float = 0.0
    """That a slow answer takes."""


class RefusedError(Exception):
    """Answered with status 400."""


@dataclass
class FakeServer:
    """Serves the model of a folder until `stop`.

    Attributes:
        folder: With model and tokenizer.
        port: 0: any.
        max_logprobs: As vLLM's option.
        deaf: Whether new weights are accepted and not loaded.
        forgets: Whether the prefix cache is emptied when it should be.
        sleepless: Whether it is told to sleep and does not.
        key: Demanded where vLLM demands one, on paths that begin with /v1.
    """

    folder: Path
    port: int = 0
    tokenizer: Path | None = None
    max_logprobs: int = 20
    deaf: bool = False
    forgets: bool = True
    sleepless: bool = False
    key: str | None = None
    faults: list[Fault] = field(default_factory=list)
    log: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Paths and bodies of what was posted."""

    def __post_init__(self) -> None:
        self.model = load_model(str(self.folder), "float32")
        self.words = AutoTokenizer.from_pretrained(self.tokenizer or self.folder)
        self.lock = threading.Lock()
        self.cached: dict[tuple[int, ...], PreTrainedModel] = {}
        """Prompts, and whose keys and values are kept of them."""
        self.paused = False
        self.asleep: set[str] = set()
        """What it has given back: weights, kv_cache."""
        self.lives = 0
        self.version = "default"
        self.listen()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def listen(self) -> None:
        """At first, or after `stop`, at the same address."""
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self))
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """What is under way is not answered any more; nothing is computed when this returns."""
        self.lives += 1
        self.server.shutdown()
        self.server.server_close()
        with self.lock:
            pass

    def restart(self) -> None:
        """As a supervisor does it: with the weights of the beginning."""
        self.model, self.cached, self.version = load_model(str(self.folder), "float32"), {}, "default"
        self.paused, self.asleep = False, set()
        self.listen()

    def fault_of(self, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.path == path and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        with self.lock:
            if self.server.fileno() == -1:
                return None  # to nobody; Python must not find a thread inside torch at its end
            self.log.append((path, body))
            path, _, query = path.partition("?")
            if path == COMPLETIONS:
                return self.complete(body)
            if path == "/sleep" and not self.sleepless:
                self.sleep(query)
            if path == "/wake_up":
                self.wake_up(query.removeprefix("tags="))
            if path == "/collective_rpc" and "weights" in self.asleep:
                raise RefusedError("there is no memory to load weights into")
            if path == "/collective_rpc" and not self.deaf:
                assert body["method"] == "reload_weights"
                assert self.paused
                with LOADING:
                    self.model = load_model(body["kwargs"]["weights_path"], "float32")
            if path == "/reset_prefix_cache" and self.forgets:
                self.cached.clear()
            if path == "/update_weight_version":
                self.version = body["new_version"]
            self.paused = {"/pause": True, "/resume": False}.get(path, self.paused)
            return {}

    def sleep(self, query: str) -> None:
        """Weights are not kept at level 2, keys and values at none."""
        self.paused, self.asleep = True, {"weights", "kv_cache"}
        self.cached.clear()
        with torch.no_grad():
            for parameter in self.model.parameters() if query == "level=2" else ():
                parameter.zero_()

    def wake_up(self, tag: str) -> None:
        """As vLLM, which goes on with all it has; one that is awake is only told to go on."""
        self.asleep.discard(tag)
        self.paused = bool(self.asleep)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.asleep:
            raise RefusedError("asleep")
        assert not self.paused
        ids = body["prompt"] if isinstance(body["prompt"], list) else self.words(body["prompt"])["input_ids"]
        limit = self.model.config.max_position_embeddings
        if len(ids) + body["max_tokens"] > limit:
            raise RefusedError(f"maximum context length is {limit} tokens")
        for name in ("logprobs", "prompt_logprobs"):
            if (body.get(name) or 0) > self.max_logprobs:
                raise RefusedError(f"requested {body[name]} logprobs, more than max_logprobs={self.max_logprobs}")
        # Of a prompt that was seen before the keys and values are kept, whatever the weights are by now.
        model = self.cached.setdefault(tuple(ids), self.model)
        stop = tuple(body.get("stop") or ())
        sampling = Sampling(temperature=body["temperature"], top_p=body.get("top_p", 1.0), stop=stop)
        (written,) = LocalEngine.around(model).generate(
            [Request(ids=ids, seed=body.get("seed") or 0)],
            sampling,
            max_new_tokens=body["max_tokens"],
            turn_end=frozenset(body.get("stop_token_ids", ())),
            tokenizer=self.words,
        )
        text = self.words.decode(written.ids)
        choice: dict[str, Any] = {
            "index": 0,
            "text": text,
            "finish_reason": "length" if written.truncated else "stop",
            "stop_reason": next((string for string in stop if string in text), None) if written.stopped else None,
            "logprobs": None,
            "prompt_logprobs": None,
            "token_ids": list(written.ids),
            "prompt_token_ids": ids,
        }
        if body.get("logprobs") is not None:
            choice["logprobs"] = {
                "tokens": [f"token_id:{i}" for i in written.ids],
                "token_logprobs": list(written.log_probs),
                "top_logprobs": [{} for _ in written.ids],
            }
            if body["logprobs"]:
                rows = self.log_probs(model, [*ids, *written.ids])[len(ids) - 1 : -1]
                choice["logprobs"]["top_logprobs"] = [
                    {f"token_id:{i}": row[i].item() for i in _ranks(row, body["logprobs"], token)}
                    for row, token in zip(rows, written.ids, strict=True)
                ]
        if body.get("prompt_logprobs") is not None:
            rows = self.log_probs(self.model, ids)[:-1]
            choice["prompt_logprobs"] = [None] + [
                {
                    str(i): {"logprob": row[i].item(), "rank": rank, "decoded_token": ""}
                    for i, rank in _ranks(row, body["prompt_logprobs"], token).items()
                }
                for row, token in zip(rows, ids[1:], strict=True)
            ]
        return {"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": {}}

    @torch.no_grad()
    def log_probs(self, model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
        return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


def _ranks(row: torch.Tensor, k: int, token: int) -> dict[int, int]:
    """Of the actual token and the K most probable ones."""
    top = row.topk(k).indices.tolist()
    return {token: int((row >= row[token]).sum())} | {i: rank + 1 for rank, i in enumerate(top)}


def _handler(fake: FakeServer) -> type[BaseHTTPRequestHandler]:
    life = fake.lives

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def refused(self) -> bool:
            known = fake.key is None or self.headers["Authorization"] == f"Bearer {fake.key}"
            if known or not self.path.startswith("/v1"):
                return False
            self.send({"error": "Unauthorized"}, 401)
            return True

        def do_GET(self) -> None:
            if self.refused():
                return
            context = fake.model.config.max_position_embeddings
            told = {
                "/v1/models": {"data": [{"id": "tiny", "max_model_len": context, "root": str(fake.folder)}]},
                "/weight_info": {"weight_version": fake.version},
                "/is_sleeping": {"is_sleeping": fake.paused or bool(fake.asleep)},
            }
            self.send(told.get(self.path, {}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
            if self.refused():
                return
            fault = fake.fault_of(self.path.partition("?")[0])
            kind = fault.kind if fault is not None else ""
            if kind == "500":
                self.send({"error": {"message": "out of memory"}}, 500)
                return
            if kind == "404":
                self.send({"detail": "Not Found"}, 404)
                return
            if kind == "dies":
                fake.stop()
            if kind in ("dies", "hangs up"):
                self.connection.close()
                return
            if fault is not None and fault.seconds:
                time.sleep(fault.seconds)
            try:
                answer = fake.answer(self.path, body)
                if fake.lives == life:
                    self.send(_spoilt(kind, answer), cut=kind == "truncated JSON")
            except RefusedError as refusal:
                self.send({"error": {"message": str(refusal), "code": 400}}, 400)

        def send(self, answer: Any, status: int = 200, cut: bool = False) -> None:
            text = json.dumps(answer).encode()
            text = text[: len(text) // 2] if cut else text
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)
            except (BrokenPipeError, ConnectionResetError):
                pass  # whoever asked has given up

    return Handler


def _spoilt(kind: str, answer: Any) -> Any:
    if not kind:
        return answer
    choice = answer["choices"][0]
    log_probs = (choice["logprobs"] or {}).get("token_logprobs", [])
    if kind == "a log-prob too few":
        del log_probs[-1:]
        del (choice["prompt_logprobs"] or [])[-1:]
    elif kind == "a place too poor":
        (choice["prompt_logprobs"] or [{}])[-1].popitem()
    elif kind == "not finite":
        log_probs[-1:] = [math.nan]
        for entry in (choice["prompt_logprobs"] or [{}])[-1].values():
            entry["logprob"] = math.nan
    elif kind == "fields ignored":
        for name in ("token_ids", "prompt_token_ids", "prompt_logprobs"):
            del choice[name]
    elif kind == "another prompt":
        choice["prompt_token_ids"] = choice["prompt_token_ids"][1:]
    elif kind == "stops early":
        choice["token_ids"] = choice["token_ids"][:-1]
        log_probs[-1:], choice["logprobs"]["tokens"][-1:] = [], []
    return answer


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[FakeServer]:
    fake = FakeServer(folder, **settings)
    try:
        yield fake
    finally:
        fake.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for option in ("--model", "--tokenizer", "--port", "--host", "--dtype", "--served-model-name", "--max-logprobs"):
        parser.add_argument(option)
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--enable-sleep-mode", action="store_true")
    options = parser.parse_args()
    if options.fail:
        raise ValueError("no such device")
    torch.set_num_threads(1)
    FakeServer(
        Path(options.model),
        port=int(options.port),
        tokenizer=options.tokenizer and Path(options.tokenizer),
        max_logprobs=int(options.max_logprobs or 20),
        sleepless=not options.enable_sleep_mode,
    )
    threading.Event().wait()
