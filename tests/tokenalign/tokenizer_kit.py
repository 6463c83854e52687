import json
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "the train leaves at 14:05 and it thinks about what to think, then an ink pot and the thick drink think ink",
    "<answer> 12 + 30 = 42 </answer> if a < b and b > c then <b>bold</b> or \\boxed{42} </a> <a href> think> <th>",
    "naïve café, 東京は雨です, Привет! 🙂 e\u0301 and so on\n\n  def f(x):\n    return x ** 2\n",
    "| im | start | end | <| |> user assistant system im_end im_start",
] * 4

CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + END + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IM_END = CHAT.replace("END", "'<|im_end|>'")
END = CHAT.replace("END", "'<|end|>'")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end|>"]
TAGS = ["<think>", "</think>"]


@dataclass
class Wrapped:
    """As a fast Hugging Face tokenizer looks from outside."""

    backend_tokenizer: Tokenizer
    chat_template: str | None = None
    special_tokens_map: dict[str, str] | None = None


def train(vocab_size: int = 400, special: Iterable[str] = SPECIAL) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def train_metaspace(scheme: str = "first") -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, limit_alphabet=60, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [entry for entry in spec["added_tokens"] if not entry["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(spec))


def with_tokens(tokenizer: Tokenizer, tokens: Iterable[str], special: bool = False) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())
    added = [AddedToken(token, special=special, normalized=False) for token in tokens]
    (copy.add_special_tokens if special else copy.add_tokens)(added)
    return copy


def unreachable(tokenizer: Tokenizer, tokens: Iterable[str]) -> Tokenizer:
    """The tokenizer with further ordinary tokens that no merge makes."""
    spec = json.loads(tokenizer.to_str())
    for token in tokens:
        spec["model"]["vocab"][token] = len(spec["model"]["vocab"])
    return Tokenizer.from_str(json.dumps(spec))
