"""Train the embedded models from nothing: a math teacher, an ALFWorld teacher, and one student weak at both.

    python scripts/make_tiny_models.py                      # everything, about half an hour on one core
    python scripts/make_tiny_models.py --only base          # one model; after the base, run several side by side

Steps, each skipped where its result is already in the work folder, so an interrupted run goes on where it stopped:

1. `demonstrations`: a searching expert, which sees only what the prompt shows, plays generated ALFWorld train games.
2. `tokenizers`: one byte-level BPE vocabulary, two tokenizers. The teachers hold `<think>` and `</think>` as single
   tokens and end a turn with `<|end|>`; the student spells both tags in pieces and ends with `<|im_end|>`.
3. `base`: imitates worked additions and the expert, half of the rows in each spelling. All three models start from it,
   as real students and teachers often share a base. It stays in the work folder.
4. `math-teacher` and `alfworld-teacher`: the base trained further on their own task in their own spelling. One row in
   twenty is in the student's, since a teacher has to read what the student writes.
5. `student`: the base trained further, in its own spelling, on a solver who forgets most carries and a player most of
   whose commands are random. It can read and write, and its policy is poor: what distillation repairs on-policy.

Models of 3 layers with tied embeddings, in transformers format with safetensors weights.
"""

import argparse
import json
import pickle
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from rich.progress import track
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lsm_lightning.batching import TokenBatch, hidden_states
from lsm_lightning.pretrained import EMBEDDED_FOLDER
from lsm_lightning.tasks.alfworld.demonstrations import Demonstration, demonstrations, invalid_action_rows
from lsm_lightning.tasks.alfworld.prompts import PROMPTS
from lsm_lightning.tasks.alfworld.world import MINI
from lsm_lightning.tasks.math import sample_problem, sloppy_answer, worked_answer

ModelName = Literal["base", "math-teacher", "alfworld-teacher", "student"]
Row = tuple[str, str]
"""A question and its answer, as text."""

PAD, STUDENT_END, TEACHER_END = "<|pad|>", "<|im_end|>", "<|end|>"
SPECIAL = (PAD, STUDENT_END, TEACHER_END, "<|system|>", "<|user|>", "<|assistant|>")
THINK_TAGS = ("<think>", "</think>")
ACTION_TAGS = ("<action>", "</action>")
TEMPLATE = (
    "{{%- for message in messages -%}}{{{{ '<|' + message['role'] + '|>' + message['content'] }}}}"
    "{{%- if message['role'] == 'assistant' -%}}{{{{ '{end}' }}}}{{%- endif -%}}{{%- endfor -%}}"
    "{{%- if add_generation_prompt -%}}{{{{ '<|assistant|>' }}}}{{%- endif -%}}"
)

GAMES = 5000
MATH_ROWS = 40_000
DEMONSTRATION_SEED = 20_000
"""Apart from the seeds that runs draw their games from."""
VOCABULARY = 1300
DIGITS = 3


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model is made."""

    layers: int = 3
    width: int = 128
    steps: int
    learning_rate: float = 3e-3
    batch: int = 32
    prompt_loss: float = 0.3
    """Weight of predicting the prompt too, which teaches copying early."""


RECIPES: dict[ModelName, Recipe] = {
    "base": Recipe(steps=6000, learning_rate=3e-3),
    "math-teacher": Recipe(steps=500, learning_rate=1e-3),
    "alfworld-teacher": Recipe(steps=2500, learning_rate=2e-3),
    "student": Recipe(steps=300, learning_rate=5e-4),
}
STUDENT_SPELLING_SHARE = 0.05
"""Little enough that top-p 0.9 never makes a teacher write it."""
SLIP = 0.85
"""How often the student's model answers forget a carry."""
WANDER = 0.6
"""Share of the student's ALFWorld rows whose command is a random admissible one."""


# ---- rows -----------------------------------------------------------------------------------------------------------


def play_demonstrations(work: Path, jobs: int) -> list[Demonstration]:
    """Turns of `GAMES` games, and turns after invalid commands, in random order."""
    path = work / "demonstrations.pkl"
    if not path.exists():
        chunks = [(first, min(50, GAMES - first)) for first in range(0, GAMES, 50)]
        with ProcessPoolExecutor(jobs) as pool:
            played = list(track(pool.map(_play, chunks), "playing demonstrations", total=len(chunks)))
        rows = [row for chunk in played for row in chunk]
        rows += invalid_action_rows(rows, DEMONSTRATION_SEED, share=0.35)
        random.Random(DEMONSTRATION_SEED).shuffle(rows)
        _write_atomically(path, pickle.dumps(rows))
    rows = pickle.loads(path.read_bytes())  # our own file of a minute ago
    return rows


def _play(chunk: tuple[int, int]) -> list[Demonstration]:
    return list(demonstrations(DEMONSTRATION_SEED, *chunk))


def alfworld_rows(turns: Sequence[Demonstration], wander: float, seed: int) -> Iterator[Row]:
    """The expert's answers; with probability `wander` a random admissible command in its stead."""
    template, rng = PROMPTS["compact"], random.Random(seed)
    for turn in turns:
        answer = turn.answer()
        if rng.random() < wander:
            action = rng.choice([action for action in turn.admissible if action not in template.hide])
            answer = f"<think>try {action}.</think><action>{action}</action>"
        yield turn.prompt(template), answer


def math_rows(slip: float, seed: int) -> Iterator[Row]:
    """Worked additions of the train split, without end; carries are forgotten with probability `slip`."""
    rng, index = random.Random(seed), 0
    while True:
        problem = sample_problem(seed, "train", index, DIGITS)
        yield problem.question, sloppy_answer(problem, rng, slip) if slip else worked_answer(problem)
        index += 1


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def make_tokenizers(work: Path, turns: Sequence[Demonstration]) -> dict[str, PreTrainedTokenizerFast]:
    """The student's and the teachers' tokenizer, over one vocabulary."""
    paths = {name: work / f"{name}-tokenizer.json" for name in ("student", "teacher")}
    if not all(path.exists() for path in paths.values()):
        rows = [*alfworld_rows(turns[:4000], wander=0.3, seed=0), *islice(math_rows(slip=0.5, seed=0), 3000)]
        vocabulary = json.loads(_train_bpe([text for row in rows for text in row]).to_str())
        for name, tags in (("student", ACTION_TAGS), ("teacher", (*ACTION_TAGS, *THINK_TAGS))):
            added = [
                {**token, "special": token["content"] in SPECIAL}
                for token in vocabulary["added_tokens"]
                if token["content"] in (*SPECIAL, *tags)
            ]
            _write_atomically(paths[name], json.dumps({**vocabulary, "added_tokens": added}).encode())
    return {
        "student": _hf_tokenizer(paths["student"], STUDENT_END),
        "teacher": _hf_tokenizer(paths["teacher"], TEACHER_END),
    }


def _train_bpe(texts: list[str]) -> Tokenizer:
    """Byte-level BPE. Digits and tag brackets stand alone, "drawer 2" is one token, prose merges across spaces."""
    nouns = "|".join(sorted({*MINI.receptacles, *MINI.objects}, key=len, reverse=True))
    pattern = rf" ?\b(?:{nouns})\b(?: \d+)?|\d|</?|>|[+={{}}\\]|\n+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL, *THINK_TAGS, *ACTION_TAGS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _hf_tokenizer(path: Path, end: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token=PAD, eos_token=end)
    tokenizer.chat_template = TEMPLATE.format(end=end)
    return tokenizer


# ---- models ---------------------------------------------------------------------------------------------------------


def examples(
    name: ModelName, turns: Sequence[Demonstration], tokenizers: dict[str, PreTrainedTokenizerFast]
) -> list[tuple[list[int], list[int]]]:
    """Prompt and response ids of every training row of a model."""
    mathematics = list(islice(math_rows(SLIP if name == "student" else 0.0, seed=1), MATH_ROWS))
    games = list(alfworld_rows(turns, WANDER if name == "student" else 0.0, seed=1))
    rows, share = {
        "base": (mathematics + games, 0.5),
        "math-teacher": (mathematics, STUDENT_SPELLING_SHARE),
        "alfworld-teacher": (games, STUDENT_SPELLING_SHARE),
        "student": (mathematics + games[: len(mathematics)], 1.0),
    }[name]
    random.Random(1).shuffle(rows)
    foreign = int(len(rows) * share)
    return _encode(tokenizers["student"], rows[:foreign]) + _encode(tokenizers["teacher"], rows[foreign:])


def _encode(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> list[tuple[list[int], list[int]]]:
    if not rows:
        return []
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question, _ in rows
    ]
    answers = [answer + tokenizer.eos_token for _, answer in rows]
    encoded = [tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, answers)]
    return list(zip(*encoded, strict=True))


def build(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model for a tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        num_hidden_layers=recipe.layers,
        intermediate_size=3 * recipe.width,
        num_attention_heads=recipe.width // 32,
        num_key_value_heads=max(1, recipe.width // 64),
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.04,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM, rows: Sequence[tuple[list[int], list[int]]], recipe: Recipe, checkpoint: Path, seed: int
) -> None:
    """Imitate the rows: AdamW, linear decay, batches of like length; a checkpoint every 500 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    step = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["recipe"] == asdict(recipe):  # else it is of another attempt
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            step = saved["step"]
    order = islice(_batches(rows, recipe.batch, seed), step, recipe.steps)
    running = 0.0
    for indices in track(order, f"training {checkpoint.stem}", total=recipe.steps - step):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1, (step + 1) / 50, max(0.02, 1 - step / recipe.steps))
        loss, prompt_loss = _losses(model, [rows[i] for i in indices])
        (loss + recipe.prompt_loss * prompt_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running += loss.item()
        step += 1
        if step % 500 == 0:
            print(f"{checkpoint.stem} step {step}: answer loss {running / 500:.4f}", flush=True)
            running = 0.0
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "recipe": asdict(recipe),
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)


def _losses(model: LlamaForCausalLM, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of the answers and of the prompts."""
    batch = TokenBatch.pad(
        [prompt[:1] for prompt, _ in rows], [prompt[1:] + answer for prompt, answer in rows], model.device
    )
    losses = cross_entropy(model.lm_head(hidden_states(model, batch)), batch.targets, reduction="none")
    prompt_lengths = torch.tensor([len(prompt) for prompt, _ in rows])
    is_answer = batch.column >= prompt_lengths[batch.row] - 1
    return losses[is_answer].mean(), losses[~is_answer].mean()


def _batches(rows: Sequence[tuple[list[int], list[int]]], size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of rows of like length, in an order that depends on the seed only."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(len(rows)), len(rows))
        batches = []
        for first in range(0, len(order), 32 * size):
            chunk = sorted(order[first : first + 32 * size], key=lambda i: len(rows[i][0]))
            batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        rng.shuffle(batches)
        yield from batches


def make_model(
    name: ModelName,
    turns: Sequence[Demonstration],
    tokenizers: dict[str, PreTrainedTokenizerFast],
    work: Path,
    out: Path,
) -> None:
    """Train one model and write its folder."""
    recipe, seed = RECIPES[name], list(RECIPES).index(name)
    tokenizer = tokenizers["student" if name == "student" else "teacher"]
    torch.manual_seed(seed)
    model = build(recipe, tokenizer)
    if name != "base":
        model.load_state_dict(LlamaForCausalLM.from_pretrained(work / "base").state_dict())
    train(model, examples(name, turns, tokenizers), recipe, work / f"{name}.pt", seed)
    folder = (work if name == "base" else out) / name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{name}: {model.num_parameters() / 1e6:.2f} M parameters, {size:.1f} MB in {folder}")


def _write_atomically(path: Path, content: bytes) -> None:
    path.with_suffix(".tmp").write_bytes(content)
    path.with_suffix(".tmp").replace(path)


def main() -> None:
    """Run the steps that are still to be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(RECIPES), help="make this model only")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_models"), help="demonstrations and checkpoints")
    parser.add_argument("--out", type=Path, default=EMBEDDED_FOLDER, help="where the model folders go")
    parser.add_argument("--jobs", type=int, default=2, help="processes that play demonstrations")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small run no faster on two
    arguments.work.mkdir(parents=True, exist_ok=True)
    turns = play_demonstrations(arguments.work, arguments.jobs)
    tokenizers = make_tokenizers(arguments.work, turns)
    for name in RECIPES if arguments.only is None else [arguments.only]:
        if name == "base" and (arguments.work / "base" / "model.safetensors").exists():
            continue
        make_model(name, turns, tokenizers, arguments.work, arguments.out)


if __name__ == "__main__":
    main()
