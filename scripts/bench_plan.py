"""Plans against measured peaks: one real step of a model of random weights, in a fresh process for each size.

    python scripts/bench_plan.py              # three sizes, minutes on one CPU core
    python scripts/bench_plan.py --sizes 5M   # one

A step is run twice, and the second one, in which the optimizer has its state, is measured phase by phase: the process's
peak resident memory above what it had before the models were loaded, less what its tokenizers take. Freed memory goes
back to the system at once (MALLOC_MMAP_THRESHOLD_), so that the step is measured and not the allocator; --allocator
default shows what the allocator adds. Linux only. Writes runs/bench_plan.json.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lsm_lightning.datamodule import AlternatingTasks
from lsm_lightning.module import OnPolicyDistillation
from lsm_lightning.planning import plan
from lsm_lightning.rollout import LocalEngine
from lsm_lightning.tasks.math import AdditionProblems
from lsm_lightning.teacher import LocalTeacher
from lsm_lightning.teacher import local as teacher_module

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
END = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SHAPES: dict[str, dict[str, int]] = {
    "5M": {
        "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 768, "vocab_size": 8192,
    },
    "30M": {
        "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
        "intermediate_size": 1408, "vocab_size": 16384,
    },
    "135M": {
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "vocab_size": 49152,
    },
}  # fmt: skip
STEPS: dict[str, dict[str, int]] = {
    "5M": {"prompts": 16, "samples": 4, "new": 64, "micro_batch_tokens": 8192, "batch_tokens": 16384, "rows": 64},
    "30M": {"prompts": 8, "samples": 4, "new": 64, "micro_batch_tokens": 4096, "batch_tokens": 8192, "rows": 32},
    "135M": {"prompts": 4, "samples": 2, "new": 48, "micro_batch_tokens": 1024, "batch_tokens": 2048, "rows": 8},
}
PHASES = ("load", "rollout", "teacher", "update")


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of so many tokens: all bytes, pairs of bytes, and one that ends a turn."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters][: size - len(letters) - 1]
    vocabulary = {token: i for i, token in enumerate([END, *letters, *(a + b for a, b in pairs)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_model(size: str, folder: Path) -> Path:
    """A model of random weights in transformers format."""
    shape = SHAPES[size]
    config = LlamaConfig(**shape, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer_of(shape["vocab_size"]).save_pretrained(folder)
    return folder


def parts(size: str, folder: Path) -> tuple[OnPolicyDistillation, AlternatingTasks, dict[str, Any]]:
    """Module, data and the trainer's settings of a run whose student and teacher are the same model."""
    step = STEPS[size]
    module = OnPolicyDistillation(
        str(folder),
        {"math": LocalTeacher(str(folder), batch_tokens=step["batch_tokens"])},
        engine=LocalEngine(batch_size=step["rows"]),
        mask="none",
        micro_batch_tokens=step["micro_batch_tokens"],
    )
    task = AdditionProblems(max_new_tokens=step["new"], instruction="Think about it carefully. " * 12)
    data = AlternatingTasks({"math": task}, prompts_per_step=step["prompts"], samples_per_prompt=step["samples"])
    return module, data, {"accelerator": "cpu", "devices": 1, "precision": "32-true"}


# ---- measured, in a process of its own ------------------------------------------------------------------------------


def status(name: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024


def settled() -> int:
    """Resident bytes once nothing is left that could be given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


class Peaks:
    """Peak resident memory of functions, by a name given to each."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def watch(self, name: str, owner: Any, function: str) -> None:
        """Measure each call; the last one stays."""
        right: Callable[..., Any] = getattr(owner, function)

        def watched(*arguments: Any, **options: Any) -> Any:
            settled()
            Path("/proc/self/clear_refs").write_text("5")
            result = right(*arguments, **options)
            self.found[name] = status("VmHWM")
            return result

        setattr(owner, function, watched)


class Growth:
    """How much resident memory functions leave behind."""

    def __init__(self) -> None:
        self.bytes = 0

    def watch(self, owner: Any, function: str) -> None:
        """Measure each call."""
        right: Callable[..., Any] = getattr(owner, function)

        def watched(*arguments: Any, **options: Any) -> Any:
            before = settled()
            result = right(*arguments, **options)
            self.bytes += settled() - before
            return result

        setattr(owner, function, watched)


def fit(module: OnPolicyDistillation, data: AlternatingTasks, settings: dict[str, Any]) -> None:
    """Two steps and nothing around them."""
    Trainer(
        **settings, max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, val_check_interval=10**9, check_val_every_n_epoch=None, max_epochs=-1,
        num_sanity_val_steps=0, use_distributed_sampler=False,
    ).fit(module, data)  # fmt: skip


def measure(size: str, folder: Path) -> dict[str, Any]:
    """Bytes above the start by phase, and how long the longest prompt was."""
    torch.set_num_threads(1)
    embedded = OnPolicyDistillation("embedded:student", {"math": LocalTeacher("embedded:math-teacher")}, mask="none")
    _, data, settings = parts(size, folder)
    data.prompts_per_step, data.samples_per_prompt = {"math": 2}, {"math": 1}
    fit(embedded, data, settings)  # loads what is loaded at first use
    del embedded, data
    module, data, settings = parts(size, folder)
    peaks, tokenizers = Peaks(), Growth()
    from lsm_lightning import module as own_module

    tokenizers.watch(own_module, "load_tokenizer")
    tokenizers.watch(teacher_module, "load_tokenizer")
    tokenizers.watch(module.teachers["math"], "_pair")
    peaks.watch("load", module, "configure_model")
    peaks.watch("rollout", module, "rollout")
    peaks.watch("teacher", module.teachers["math"], "score")
    peaks.watch("update", module, "update")
    lengths: list[int] = []
    score = module.teachers["math"].score

    def noted(turns: Any, added: Any) -> Any:
        lengths.extend(len(turn.prompt.ids) for turn in turns)
        return score(turns, added)

    module.teachers["math"].score = noted  # type: ignore[method-assign]
    base = settled()
    fit(module, data, settings)
    above = {name: peaks.found[name] - base - tokenizers.bytes for name in PHASES}
    return {"measured": above, "tokenizers": tokenizers.bytes, "base": base, "prompt": max(lengths)}


def planned(size: str, folder: Path, prompt: int) -> dict[str, int]:
    """Bytes by phase as a plan sees them."""
    module, data, settings = parts(size, folder)
    made = plan(module, data, settings, evaluate=False, prompt_tokens=prompt, tflops=1, bandwidth=1)
    peaks = {phase.name: phase.peak for phase in made.tasks[0].rehearsal.phases}
    peaks["update"] = max(peaks["update"], peaks.pop("optimiser"))
    return {name: peaks[name] for name in PHASES}


# ---- the bench ------------------------------------------------------------------------------------------------------


def compare(size: str, folder: Path, *, trimmed: bool = True) -> dict[str, Any]:
    """Plan and measurement of one size."""
    save_model(size, folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if trimmed:
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--measure", size, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    row["planned"] = planned(size, folder, row["prompt"])
    row["off"] = {name: row["planned"][name] / row["measured"][name] - 1 for name in PHASES}
    return {"size": size, **row}


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--allocator", choices=("trimmed", "default"), default="trimmed")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench_plan.json")
    parser.add_argument("--measure", nargs=2, metavar=("SIZE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]))))
        return
    rows = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(size, Path(folder), trimmed=options.allocator == "trimmed"))
        print(f"{size} done", file=sys.stderr)
    table = Table(title="Peak above the base: planned / measured MiB")
    for column in ("parameters", *PHASES):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [
            f"{row['planned'][name] / MIB:,.0f} / {row['measured'][name] / MIB:,.0f} ({100 * row['off'][name]:+.1f} %)"
            for name in PHASES
        ]
        table.add_row(row["size"], *cells)
    Console(width=140).print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
