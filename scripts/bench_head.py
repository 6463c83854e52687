"""The loss from hidden states to gradients, and a teacher's scoring: ours against full logits, Liger and TRL.

    python scripts/bench_head.py --quick            # some minutes, most of them for installing the peers
    python scripts/bench_head.py --env ../bench-env # all sizes, about an hour on two CPU cores; keeps the peers there

Makes an environment of its own, installs torch and the peers from PyPI, and measures every case in a fresh process,
one at a time, on random numbers: hidden states [T, d], output matrix [V, d], K = 32 uniformly drawn ids a position
(no locality to profit from). Writes runs/bench_head.json.

Seconds are the best of several runs after a first one (which also compiles, where a method compiles). Extra memory is
the peak above what was there before (on the CPU the process's resident memory), less the two gradients, which every
method has to return. Loss and gradients are compared with logits of the whole vocabulary in float64.
"""

import argparse
import contextlib
import ctypes
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import linear_regression
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from lsm_lightning.objectives.functional import support_divergence
from lsm_lightning.objectives.head import OutputHead, gather_logits
from lsm_lightning.teacher.scoring import LOGITS_AT_ONCE
from lsm_lightning.teacher.translation import Translation
from tokenalign import VocabMap

ROOT = Path(__file__).resolve().parent.parent
K = 32
LENGTHS = (256, 1024, 4096, 16_384)
MODELS = ((576, 49_152), (896, 151_936), (3584, 152_064))
VOCABULARIES = (16_384, 65_536, 262_144)
NEEDED = ("torch>=2.9,<2.14", "jaxtyping>=0.3", "peft>=0.18", "rich>=13", "transformers>=5.24")
PEERS = ("liger-kernel", "trl")
CHUNK = 256
"""Positions a chunk of the checkpointed logits, as many as in TRL's top-K loss."""
REFERENCE_POSITIONS, REFERENCE_WEIGHTS = 1024, 2 * 10**8
"""Beyond these the float64 reference takes longer than everything else."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement, and all that its process needs to know."""

    method: str
    positions: int
    width: int
    vocabulary: int
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 2
    repeats: int = 3
    weight_gradient: bool = True


# ---- what is measured (runs in the bench's environment) -------------------------------------------------------------


class Inputs:
    """Random student and teacher of one case; what a method does not ask for is not made."""

    def __init__(self, case: Case) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.case = case
        shape = case.positions, K
        self.hidden = self.draw(case.positions, case.width).requires_grad_()
        self.weight = self.draw(case.vocabulary, case.width, scale=case.width**-0.5)
        self.weight.requires_grad_(case.weight_gradient)
        self.ids = torch.randint(case.vocabulary, shape, generator=self.generator).to(case.device)
        self.teacher = torch.randn(shape, generator=self.generator).log_softmax(-1).to(case.device)
        if METHODS[case.method].group == "vocabulary":
            self.teacher_hidden = self.draw(case.positions, case.width)
            self.teacher_weight = self.draw(case.vocabulary, case.width, scale=case.width**-0.5)

    def draw(self, rows: int, width: int, scale: float = 1.0) -> Tensor:
        """Normal numbers, without a second copy of them in memory."""
        dtype = getattr(torch, self.case.dtype)
        return torch.randn(rows, width, generator=self.generator, dtype=dtype).mul_(scale).to(self.case.device)


def ours(inputs: Inputs) -> Tensor:
    """K rows of the output matrix a position."""
    return support_divergence(gather_logits(inputs.hidden, inputs.weight, inputs.ids), inputs.teacher).sum()


def full_logits(inputs: Inputs) -> Tensor:
    """Log-softmax over the whole vocabulary, of which K entries are used."""
    return _full(inputs.hidden, inputs.weight, inputs.ids, inputs.teacher)


def _full(hidden: Tensor, weight: Tensor, ids: Tensor, teacher: Tensor) -> Tensor:
    log_probs = linear(hidden, weight).float().log_softmax(-1)
    return support_divergence(log_probs.gather(-1, ids), teacher).sum()


def checkpointed_logits(inputs: Inputs) -> Tensor:
    """The same, some positions at a time, and computed once more in the backward pass."""
    parts = zip(*(tensor.split(CHUNK) for tensor in (inputs.hidden, inputs.ids, inputs.teacher)), strict=True)
    return sum(checkpoint(_full, part, inputs.weight, *rest, use_reentrant=False) for part, *rest in parts)


def trl_top_k(inputs: Inputs) -> Tensor:
    """TRL's loss over a teacher's top tokens: the same number, from checkpointed logits."""
    from trl.experimental.async_distillation import async_distillation_trainer as trainer

    return trainer._chunked_jsd_loss(
        hidden_valid=inputs.hidden,
        lm_head_weight=inputs.weight,
        lm_head_bias=None,
        logit_scale=1.0,
        final_logit_softcapping=None,
        target_ids=inputs.ids,
        teacher_target_logps=inputs.teacher,
        valid_candidate_mask=torch.ones_like(inputs.ids, dtype=torch.bool),
        beta=1.0,
        temperature=1.0,
        add_tail_bucket=False,
        teacher_id_idx=None,
        num_teachers=1,
        chunk_size=trainer._CHUNKED_LM_HEAD_CHUNK_SIZE,
    )[0]


def ours_with_teacher(inputs: Inputs) -> Tensor:
    """The teacher's top K from its hidden states, then our loss: as much work as whole-vocabulary losses include."""
    inputs.ids, inputs.teacher = _top_k(inputs.teacher_hidden, inputs.teacher_weight)
    return ours(inputs)


def liger(inputs: Inputs) -> Tensor:
    """Liger's chunked loss (plain torch, compiled): reverse KL over the whole vocabulary, a mean over positions."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)
    labels = inputs.ids[:, 0]
    return len(labels) * loss(inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight, labels)


def liger_triton(inputs: Inputs) -> Tensor:
    """Liger's Triton kernels for the same."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    labels = inputs.ids[:, 0]
    loss = LigerFusedLinearJSD(jsd_beta=1.0)
    return len(labels) * loss(inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight, labels)


def trl_vocabulary(inputs: Inputs) -> Tensor:
    """TRL's loss for a teacher in the same process: reverse KL over the whole vocabulary, in tiles."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = (inputs.hidden, inputs.weight, None), (inputs.teacher_hidden, inputs.teacher_weight, None)
    return ChunkedDivergenceFunction.apply(*student, *teacher, 1.0)[0].sum()


def teacher_chunked(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What `LocalTeacher` does with hidden states."""
    return _top_k(inputs.hidden, inputs.weight)


def _top_k(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        head, vocabulary = OutputHead(weight=weight), len(weight)
        nothing = torch.zeros(0, dtype=torch.long, device=weight.device)
        same = np.arange(vocabulary, dtype=np.int32)
        translation = Translation(
            vocab=VocabMap(to_teacher=same, to_student=same),
            members=torch.ones(vocabulary, dtype=torch.bool, device=weight.device),
            to_teacher=torch.arange(vocabulary, device=weight.device),
            ends=nothing,
            rivals=nothing,
        )
        parts = [
            translation.translate(head.all_logits(part).log_softmax(-1), K, nothing.expand(len(part), 0))
            for part in hidden.split(max(1, LOGITS_AT_ONCE // vocabulary))
        ]
        ids, log_probs, _ = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        return ids, log_probs


def teacher_naive(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """All logits at once, their log-softmax, and its top K."""
    with torch.no_grad():
        log_probs, ids = linear(inputs.hidden, inputs.weight).float().log_softmax(-1).topk(K, -1)
        return ids, log_probs


@dataclass(frozen=True)
class Method:
    """A way to compute something."""

    label: str
    run: Callable[[Inputs], Any]
    group: str
    """What it computes: methods of one group are compared, with the group's first as ours."""
    package: str | None = None


METHODS = {
    method.run.__name__: method
    for method in (
        Method("K rows (ours)", ours, "support"),
        Method("full logits, log-softmax", full_logits, "support"),
        Method("full logits, chunked and checkpointed", checkpointed_logits, "support"),
        Method("TRL top-K loss", trl_top_k, "support", "trl"),
        Method("K rows (ours) and the teacher's top K", ours_with_teacher, "vocabulary"),
        Method("Liger JSD loss, chunked", liger, "vocabulary", "liger-kernel"),
        Method("Liger JSD loss, Triton", liger_triton, "vocabulary", "liger-kernel"),
        Method("TRL divergence, tiled", trl_vocabulary, "vocabulary", "trl"),
        Method("chunked top K (ours)", teacher_chunked, "teacher"),
        Method("full logits, top K", teacher_naive, "teacher"),
    )
}
GROUPS = {
    "support": "Loss over K given tokens",
    "vocabulary": "Reverse KL with the teacher's logits computed as well (peers: whole vocabulary; ours: top K)",
    "teacher": "A teacher's top K and log-probs, no gradient",
}


def measure(case: Case) -> dict[str, Any]:
    """Run a case in this process."""
    torch.set_num_threads(case.threads)
    method = METHODS[case.method]
    inputs = Inputs(case)
    memory = Memory(case.device)
    result: Any = None

    def run() -> tuple[float, float]:
        nonlocal result
        result = inputs.hidden.grad = inputs.weight.grad = None
        memory.synchronise()
        started, others = time.perf_counter(), busy_elsewhere()
        result = method.run(inputs)
        if method.group != "teacher":
            result.backward()
        memory.synchronise()
        seconds = time.perf_counter() - started
        return seconds, (busy_elsewhere() - others) / seconds

    run()
    result = inputs.hidden.grad = inputs.weight.grad = None
    memory.start()
    runs = [run()]
    leaves = [leaf.grad for leaf in (inputs.hidden, inputs.weight) if leaf.grad is not None]
    extra = memory.peak() - sum(gradient.nbytes for gradient in leaves)
    while len(runs) < case.repeats and sum(seconds for seconds, _ in runs) < 20:
        runs.append(run())
    seconds, others = min(runs)
    row = {"seconds": seconds, "runs": len(runs), "cores_busy_elsewhere": others}
    row |= {"extra_mib": extra / 2**20, "base_mib": memory.base / 2**20}
    return row | _differences(case, method, inputs, result)


def busy_elsewhere() -> float:
    """Seconds that the machine's cores have worked for other processes since it started; 0 where nobody tells."""
    with contextlib.suppress(OSError):
        ticks = [int(number) for number in Path("/proc/stat").read_text().split()[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK") - time.process_time()
    return 0.0


class Memory:
    """Peak memory of this process or of a GPU, in bytes."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.cuda if device.startswith("cuda") else None
        self.base = math.nan

    def synchronise(self) -> None:
        """Wait for a GPU."""
        if self.cuda:
            self.cuda.synchronize()

    def start(self) -> None:
        """Forget former peaks, and give freed memory back, so that what is taken from now on is seen."""
        if self.cuda:
            self.cuda.reset_peak_memory_stats()
            self.base = self.cuda.memory_allocated()
        else:
            with contextlib.suppress(OSError, AttributeError):  # Linux with glibc; elsewhere memory is not measured
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")
                self.base = _status("VmRSS")

    def peak(self) -> float:
        """Above the start."""
        if math.isnan(self.base):
            return math.nan
        return (self.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")) - self.base


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024


def _differences(case: Case, method: Method, inputs: Inputs, result: Any) -> dict[str, Any]:
    """Relative distance of loss and gradients from the float64 reference; of a teacher's log-probs, the largest."""
    if method.group == "teacher":
        naive = teacher_naive(inputs) if case.positions <= REFERENCE_POSITIONS else result
        return {"loss_differs": float((result[1] - naive[1]).abs().max())}
    small = case.positions <= REFERENCE_POSITIONS and case.width * case.vocabulary <= REFERENCE_WEIGHTS
    if method.run is ours_with_teacher or not small or not case.weight_gradient:
        return {}
    gradients = inputs.hidden.grad, inputs.weight.grad
    loss, *exact = _reference(inputs, whole=method.group == "vocabulary")
    distances = [
        float(torch.dist(gradient.double(), true) / true.norm())
        for gradient, true in zip(gradients, exact, strict=True)
    ]
    return {"loss_differs": abs(result.item() - loss) / abs(loss), "gradient_differs": max(distances)}


def _reference(inputs: Inputs, *, whole: bool) -> tuple[float, Tensor, Tensor]:
    """Loss and gradients from float64 logits of the whole vocabulary, some positions at a time."""
    weight = inputs.weight.detach().double().requires_grad_()
    if whole:
        teacher_weight = inputs.teacher_weight.double()
    total, gradients = 0.0, []
    for part in torch.arange(inputs.case.positions, device=weight.device).split(64):
        hidden = inputs.hidden.detach()[part].double().requires_grad_()
        log_pi = (hidden @ weight.T).log_softmax(-1)
        if whole:
            log_q = (inputs.teacher_hidden[part].double() @ teacher_weight.T).log_softmax(-1)
        else:
            log_pi = log_pi.gather(-1, inputs.ids[part]).log_softmax(-1)
            log_q = inputs.teacher[part].double().log_softmax(-1)
        loss = (log_pi.exp() * (log_pi - log_q)).sum()
        loss.backward()
        total += loss.item()
        gradients.append(hidden.grad)
    return total, torch.cat(gradients), weight.grad


def work(case: Case) -> None:
    """Print what a case measured, or why it could not be."""
    try:
        row = measure(case)
    except Exception as error:  # whatever a peer raises is its result
        lines = str(error).strip().splitlines() or [""]
        row = {"reason": f"{type(error).__name__}: {lines[0][:160]}"}
    print(json.dumps(row))


# ---- the bench around it --------------------------------------------------------------------------------------------


def install(folder: Path) -> tuple[Path, dict[str, str]]:
    """The environment's interpreter, and of each peer that could not be installed the reason."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    missing = {}
    for requirement in (*NEEDED, *PEERS):
        print(f"installing {requirement}", file=sys.stderr)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            missing[requirement] = f"not installed: {(errors or ['pip failed'])[-1][:160]}"
    if failed := [requirement for requirement in NEEDED if requirement in missing]:
        sys.exit(f"{failed[0]}: {missing[failed[0]]}")
    return python, missing


def ask(python: Path, *arguments: str, timeout: float | None = None) -> dict[str, Any]:
    """The JSON that a process of this script prints last."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [str(python), str(Path(__file__).resolve()), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"reason": f"stopped after {timeout:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["out of memory?"])[-1]
        return {"reason": f"its process ended with {done.returncode}: {last[:160]}"}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def about() -> dict[str, Any]:
    """Versions, and whether there is a GPU."""
    versions = {}
    for name in ("torch", "transformers", "liger-kernel", "trl", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"versions": versions, "gpu": gpu}


class Bench:
    """Runs cases one after the other and keeps their rows."""

    def __init__(self, python: Path, missing: dict[str, str], options: argparse.Namespace) -> None:
        self.python, self.missing, self.options = python, missing, options
        self.about = ask(python, "--about")
        self.rows: list[dict[str, Any]] = []

    def run(self, case: Case, shorter: dict[str, Any] | None = None) -> dict[str, Any]:
        """Measure a case, unless the row of a quarter of its positions says that it would take too much."""
        package = METHODS[case.method].package
        answer = {"reason": self.missing[package]} if package in self.missing else self._too_much(shorter)
        if answer is None:
            self._wait()
            timeout = 4 * self.options.budget + 300  # compiling takes a while
            answer = ask(self.python, "--work", json.dumps(asdict(case)), timeout=timeout)
        row = asdict(case) | answer
        self.rows.append(row)
        written = self.about | {"budget_s": self.options.budget, "not_installed": self.missing, "rows": self.rows}
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        self.options.out.write_text(json.dumps(written, indent=2) + "\n")
        told = f"{row['seconds']:.3g} s, {row['extra_mib']:.0f} MiB" if "seconds" in row else row["reason"]
        print(f"{case.method} T={case.positions} d={case.width} V={case.vocabulary}: {told}", file=sys.stderr)
        return row

    def _wait(self) -> None:
        """Until other processes leave the cores alone, or patience ends."""
        until = time.monotonic() + self.options.patience
        while time.monotonic() < until:
            before = busy_elsewhere()
            time.sleep(2)
            if busy_elsewhere() - before < 0.1:
                break

    def _too_much(self, shorter: dict[str, Any] | None) -> dict[str, Any] | None:
        if shorter is None:
            return None
        if "seconds" not in shorter:
            return {"reason": shorter["reason"] if "over" in shorter["reason"] else "see above"}
        if (seconds := 2 * 4 * shorter["seconds"]) > self.options.budget:  # a first run and one that counts
            return {"reason": f"over the budget: {seconds:.0f} s"}
        if (mib := 4 * shorter["extra_mib"] + shorter["base_mib"]) > 0.85 * available_mib():
            return {"reason": f"over the memory: {mib / 1024:.0f} GiB"}
        return None


def available_mib() -> float:
    """Of main memory."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) / 1024
    return math.inf


def tables(bench: Bench, base: Case, quick: bool) -> None:
    """Measure and print everything on one device."""
    lengths, models = (LENGTHS[:2], MODELS[:1]) if quick else (LENGTHS, MODELS)
    for width, vocabulary in models:
        for group, title in GROUPS.items():
            rows: dict[str, list[dict[str, Any]]] = {}
            for method in (name for name in METHODS if METHODS[name].group == group):
                shorter = None
                for positions in lengths:
                    case = replace(base, method=method, positions=positions, width=width, vocabulary=vocabulary)
                    shorter = bench.run(case, shorter)
                    rows.setdefault(method, []).append(shorter)
            place = bench.about["gpu"] if base.device != "cpu" else f"CPU, {base.threads} threads"
            show(f"{title}. d={width:,}, V={vocabulary:,}, {base.dtype}, {place}", rows)
    growth: dict[str, list[dict[str, Any]]] = {}
    for method, both in (("ours", True), ("ours", False), ("full_logits", True)):
        label = METHODS[method].label + ("" if both else ", weight frozen")
        for vocabulary in VOCABULARIES[: 2 if quick else 3]:
            case = replace(base, method=method, positions=1024, width=576, vocabulary=vocabulary, weight_gradient=both)
            growth.setdefault(label, []).append(bench.run(case))
    show_growth(growth)


def show(title: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Print one row a method and length, each compared with the first method, and the growth in T."""
    table = Table(title=title)
    for name in ("T", "method", "seconds", "x ours", "extra MiB", "x ours", "loss off by", "gradient off by"):
        table.add_column(name, justify="left" if name == "method" else "right")
    first = next(iter(rows.values()))
    for number, mine in enumerate(first):
        for method, of_method in rows.items():
            row = of_method[number]
            cells = [f"{row['positions']:,}", METHODS[method].label]
            if "seconds" not in row:
                cells += [row["reason"]]
            else:
                faster = row["seconds"] / mine["seconds"] if "seconds" in mine else math.nan
                smaller = row["extra_mib"] / mine["extra_mib"] if mine.get("extra_mib", 0) > 0 else math.nan
                cells += [f"{row['seconds']:.3g}", f"{faster:.3g}", f"{row['extra_mib']:,.0f}", f"{smaller:.3g}"]
                cells += [f"{row[key]:.0e}" if key in row else "" for key in ("loss_differs", "gradient_differs")]
            table.add_row(*cells, end_section=method == list(rows)[-1])
    console = Console(width=160)
    console.print(table)
    for method, of_method in rows.items():
        done = [row for row in of_method if "seconds" in row]
        if len(done) > 1:
            slope = exponent([row["positions"] for row in done], [row["seconds"] for row in done])
            last = exponent([row["positions"] for row in done[-2:]], [row["seconds"] for row in done[-2:]])
            console.print(f"  {METHODS[method].label}: seconds grow as T^{slope:.2f} (last step: T^{last:.2f})")


def show_growth(growth: dict[str, list[dict[str, Any]]]) -> None:
    """Print seconds by size of the vocabulary."""
    table = Table(title="Growth with the vocabulary: seconds at T=1,024, d=576 (unless frozen, a gradient of V x d)")
    table.add_column("method")
    for row in next(iter(growth.values())):
        table.add_column(f"V={row['vocabulary']:,}", justify="right")
    table.add_column("grows as", justify="right")
    for label, rows in growth.items():
        cells = [f"{row['seconds']:.3g}" if "seconds" in row else row["reason"] for row in rows]
        done = [row for row in rows if "seconds" in row]
        slope = exponent([row["vocabulary"] for row in done], [row["seconds"] for row in done])
        table.add_row(label, *cells, f"V^{slope:.2f}")
    Console(width=160).print(table)


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """Of the power law that fits best."""
    if len(sizes) < 2:
        return math.nan
    return linear_regression([math.log(size) for size in sizes], [math.log(second) for second in seconds]).slope


def main() -> None:
    """Install the peers, measure, print tables and write all rows down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest model only, two lengths")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, help="runs that count, fewer after 20 s (default: 5)")
    parser.add_argument(
        "--budget", type=float, default=120, help="leave out a case whose two runs take more seconds (default: 120)"
    )
    parser.add_argument(
        "--patience", type=float, default=60, help="seconds to wait before a case while others are busy (default: 60)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of states and weights")
    parser.add_argument("--env", type=Path, help="folder of the peers' environment, kept; else a temporary one")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_head.json"), help="where all rows are written")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--about", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(Case(**json.loads(options.work)))
    if options.about:
        return print(json.dumps(about()))
    with tempfile.TemporaryDirectory() as temporary:
        python, missing = install(options.env or Path(temporary) / "env")
        bench = Bench(python, missing, options)
        print(", ".join(f"{name} {version}" for name, version in bench.about["versions"].items()))
        base = Case(
            method="", positions=0, width=0, vocabulary=0, dtype=options.dtype, threads=options.threads,
            repeats=options.repeats,
        )  # fmt: skip
        for device in ["cpu"] + (["cuda"] if bench.about["gpu"] else []):
            tables(bench, replace(base, device=device), options.quick)
    print(f"A case was left out where a first and a counted run would take more than {options.budget:.0f} s.")
    shares = [row["cores_busy_elsewhere"] for row in bench.rows if "seconds" in row]
    print(f"Other processes kept {max(shares):.2f} cores busy at most, {sum(shares) / len(shares):.2f} on average.")


if __name__ == "__main__":
    main()
