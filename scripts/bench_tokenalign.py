"""How fast tokenalign is, beside the aligners one can install today, in one run on one core.

    python scripts/bench_tokenalign.py                 # some minutes; writes runs/bench_tokenalign.json
    python scripts/bench_tokenalign.py --student A --teacher B --corpus FOLDER

By default two byte-level BPE tokenizers (32K and 64K) are trained on the spot, on the Python files of the standard
library, and all texts are of these. The peers are installed from PyPI into an environment of their own (`--env`), kept
for the next run; what cannot be installed is said in the table. tokenkit is not among them: on PyPI that name is
another package.

Rates are tokens of the student a second. Compare inside a table, not across machines.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import sysconfig
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

import tokenalign as ta

ROW = 1024
"""Tokens of a row, as long as an ordinary response."""
ROWS = 128
"""Rows of a batch."""
PEERS = {"spacy-alignments": ["spacy-alignments"], "TRL, GOLD trainer": ["torch>=2.9,<2.14", "trl"]}

PEER_CODE = {
    "spacy-alignments": """
import spacy_alignments
def align(student, teacher): return spacy_alignments.get_alignments(student, teacher)
def prepare(pieces): return pieces
""",
    "TRL, GOLD trainer": """
from itertools import accumulate
from trl.experimental.gold.gold_trainer import ULDLoss
align = ULDLoss._align_by_byte_offsets
def prepare(pieces):
    ends = list(accumulate(len(piece.encode()) for piece in pieces))
    return list(zip([0, *ends], ends))
""",
}
"""Both are given the tokens' texts; from these the trainer's aligner needs byte offsets. Ours is given ids."""

PEER_LOOP = """
import json, sys, time
rows = json.load(open(sys.argv[1]))
align(prepare(rows[0][0]), prepare(rows[0][1]))
best = 0.0
for _ in range(3):
    start = time.perf_counter()
    for s, t in rows: align(prepare(s), prepare(t))
    best = max(best, sum(len(s) for s, _ in rows) / (time.perf_counter() - start))
print(best)
"""


def seconds(work: Callable[[], Any], times: int = 3) -> float:
    """Of the fastest of several runs."""
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        spent.append(time.perf_counter() - start)
    return min(spent)


def read_texts(folder: Path) -> list[str]:
    """All readable text files of a folder, in an order that mixes their subjects."""
    files = sorted(path for end in ("*.py", "*.txt", "*.md") for path in folder.rglob(end))
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in files if "site-packages" not in path.parts]
    random.Random(0).shuffle(texts)
    return [text for text in texts if text]


def train(texts: Sequence[str], size: int, pattern: str) -> Tokenizer:
    """A byte-level BPE tokenizer that splits by a pattern."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def enlarged(tokenizer: Tokenizer, size: int, seed: int) -> str:
    """The tokenizer as JSON, with made-up merges until the vocabulary has so many tokens."""
    spec = json.loads(tokenizer.to_str())
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    words = sorted(token for token in vocab if token.isascii() and token.isalpha())
    generator = random.Random(seed)
    while len(vocab) < size:
        left, right = generator.choice(words), generator.choice(words)
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append([left, right])
    return json.dumps(spec)


def batches(ids: np.ndarray) -> Iterator[np.ndarray]:
    """`[ROWS, ROW]` one after the other."""
    for start in range(0, len(ids) - ROWS * ROW + 1, ROWS * ROW):
        yield ids[start : start + ROWS * ROW].reshape(ROWS, ROW)


def bench_align(pair: ta.Pair, student: Tokenizer, teacher: Tokenizer, texts: list[str], env: Path) -> list[dict]:
    """Ours and the peers on the same pairs of token rows."""
    documents = [text[:6000] for text in texts if text.isascii()][:300]
    ours = [(student.encode(text).ids, teacher.encode(text).ids) for text in documents]
    arrays = [(np.array(s), np.array(t)) for s, t in ours]
    tokens = sum(len(s) for s, _ in ours)
    rows = [{"aligner": "tokenalign", "M tokens/s": tokens / seconds(lambda: [pair.align(*a) for a in arrays]) / 1e6}]
    sample = env / "rows.json"
    pieces = [
        [
            [vocabulary.pieces[id].decode() for id in ids]
            for ids, vocabulary in zip(row, (pair.student, pair.teacher), strict=True)
        ]
        for row in ours
    ]
    sample.write_text(json.dumps(pieces))
    for name, code in PEER_CODE.items():
        command = [env / "bin" / "python", "-c", code + PEER_LOOP, sample]
        done = subprocess.run(command, capture_output=True, text=True)
        rate = float(done.stdout) / 1e6 if done.returncode == 0 else float("nan")
        reason = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["not installed"])[-1][:60]
        rows.append({"aligner": name, "M tokens/s": rate} | ({"reason": reason} if reason else {}))
    for row in rows:
        row["tokenalign is faster by"] = rows[0]["M tokens/s"] / row["M tokens/s"]
    return rows


def bench_flags(pair: ta.Pair, teacher: Tokenizer, ids: np.ndarray) -> list[dict[str, Any]]:
    """Flags of new batches of one corpus, and the teacher's library encoding the same texts, decoded already."""
    rates = []
    for batch in batches(ids):
        start = time.perf_counter()
        pair.flags(batch)
        rates.append(batch.size / (time.perf_counter() - start) / 1e6)
    repeated = batch.size / seconds(lambda: pair.flags(batch)) / 1e6
    texts = [pair.student.text(row).decode(errors="replace") for row in batch]
    encoding = batch.size / seconds(lambda: teacher.encode_batch_fast(texts, add_special_tokens=False)) / 1e6
    rows = {
        "re-encoding by the teacher": encoding,
        "flags, the first batch": rates[0],
        f"flags, a new batch after {len(rates) // 2}": float(
            np.median(rates[len(rates) // 2 - 2 : len(rates) // 2 + 3])
        ),
        f"flags, a new batch after {len(rates) - 5}": float(np.median(rates[-5:])),
        "flags, a batch again": repeated,
    }
    return [{"what": what, "M tokens/s": rate, "× re-encoding": rate / encoding} for what, rate in rows.items()]


def bench_size(pair: ta.Pair, student: Tokenizer, teacher: Tokenizer, text: str) -> list[dict[str, Any]]:
    """Time and memory per token, from ten thousand to ten million tokens; `flags` with known segments."""
    ours, theirs = (np.array(side.encode(text).ids, np.int32) for side in (student, teacher))
    return [_bench_size(pair, ours, theirs, size) for size in (10**4, 10**5, 10**6, 10**7)]


def _bench_size(pair: ta.Pair, ours: np.ndarray, theirs: np.ndarray, size: int) -> dict[str, Any]:
    """One text, cut or repeated until it has about so many tokens."""
    if size < len(ours):
        student = ours[:size]
        teacher = pair.to_teacher(student).ids[0]
    else:
        student, teacher = (np.tile(side, size // len(ours)) for side in (ours, theirs))
    batch = student[: len(student) // ROW * ROW].reshape(-1, ROW)

    def align() -> None:
        pair.align(student, teacher)

    def flags() -> None:
        pair.flags(batch)

    flags()
    return {
        "tokens": len(student),
        "align, ns a token": seconds(align) / len(student) * 1e9,
        "bytes a token of both sides": peak_memory(align) / (len(student) + len(teacher)),
        "flags, ns a token": seconds(flags) / batch.size * 1e9,
        "bytes a token": peak_memory(flags) / batch.size,
    }


def peak_memory(work: Callable[[], Any]) -> int:
    """Bytes, beyond what there was before."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def bench_start(tokenizers: Sequence[Tokenizer], folder: Path) -> list[dict[str, Any]]:
    """Importing, and building a pair of two vocabularies of 256K, each with the vocabulary map and the relation."""
    sides = []
    for seed, tokenizer in enumerate(tokenizers):
        sides.append(folder / f"{seed}.json")
        sides[-1].write_text(enlarged(tokenizer, 262_144, seed))
    code = (
        "import time; t = [time.perf_counter()]\nimport tokenalign as ta\nt.append(time.perf_counter())\n"
        f"for _ in range(2):\n  p = ta.Pair({str(sides[0])!r}, {str(sides[1])!r}); p.vocab, p.relation, p.collisions\n"
        "  t.append(time.perf_counter())\nprint(*(b - a for a, b in zip(t, t[1:])))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(3)
    ]
    names = ("import tokenalign", "Pair of two 256K vocabularies", "the same again in one process")
    return [
        {"what": name, "seconds": min(map(float, column))}
        for name, column in zip(names, zip(*runs, strict=True), strict=True)
    ]


def install_peers(env: Path) -> None:
    """An environment for what is compared with, made once."""
    if (env / "installed").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", env], check=True)
    for name, packages in PEERS.items():
        print(f"installing {name} ...", flush=True)
        for package in packages:
            subprocess.run([env / "bin" / "pip", "install", "--quiet", package], capture_output=True)
    (env / "installed").touch()


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of one shape as a table."""
    table = Table(title=title)
    for name in dict.fromkeys(name for row in rows for name in row):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            *(f"{v:,.3g}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for v in row.values())
        )
    Console().print(table)


def main() -> None:
    """Run the measurements, print them, write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, help="tokenizer.json; trained on the spot if not given")
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--corpus", type=Path, default=Path(sysconfig.get_path("stdlib")), help="folder of texts")
    parser.add_argument("--env", type=Path, default=Path("runs/bench_tokenalign_env"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench_tokenalign.json"))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    install_peers(arguments.env)
    texts = read_texts(arguments.corpus)
    print(f"{sum(map(len, texts)) / 1e6:.0f} M characters of text; preparing tokenizers ...", flush=True)
    # In the manner of Llama 3 and of Qwen, as short as the point allows: digits by threes and one by one.
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    given = [Tokenizer.from_file(str(p)) if p else None for p in (arguments.student, arguments.teacher)]
    student = given[0] or train(texts[::3], 32_000, words % r"\p{N}{1,3}")
    teacher = given[1] or train(texts[1::3], 64_000, words % r"\p{N}")
    pair = ta.Pair(student, teacher)
    ids = np.array([id for row in student.encode_batch_fast(texts, add_special_tokens=False) for id in row.ids])
    pair.flags(ids[:10])  # the encoder loads at first use
    longest = "".join(texts)[:4_000_000]
    results: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "python": sys.version.split()[0]}
    for title, run in {
        "Aligning two tokenizations of one text": lambda: bench_align(pair, student, teacher, texts, arguments.env),
        f"Flags, {ROWS} rows of {ROW} tokens": lambda: bench_flags(pair, teacher, ids),
        "Cost by size": lambda: bench_size(pair, student, teacher, longest),
        "Starting": lambda: bench_start((student, teacher), arguments.env),
    }.items():
        print(f"{title} ...", flush=True)
        results[title] = run()
        show(title, results[title])
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
