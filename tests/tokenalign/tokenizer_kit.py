import base64
import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

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


def train_metaspace(scheme: str = "first", split: bool = True, mark: str = "▁") -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(mark, prepend_scheme=scheme, split=split)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(mark, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
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


LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CJK_SPLIT = r"[一-龥ぁ-ゟァ-ヿ]+"
DEEPSEEK_SPLIT = (
    r"[!-/:-~]?[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(
    *patterns: str,
    normalizer: normalizers.Normalizer | None = None,
    prefix: bool = False,
    unigram: bool = False,
    **model: Any,
) -> Tokenizer:
    """Byte-level, split by the patterns in turn, or by the library's own where there is none."""
    tokenizer = Tokenizer(models.Unigram() if unigram else models.BPE(**model))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not patterns)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    tokenizer.decoder = decoders.ByteLevel()
    settings: dict[str, Any] = {
        "vocab_size": 400,
        "special_tokens": [*SPECIAL],
        "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
        "show_progress": False,
    }
    trainer = trainers.UnigramTrainer(**settings) if unigram else trainers.BpeTrainer(**settings)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def words(model: str = "WordPiece", prefix: str = "##") -> Tokenizer:
    """WordPiece or WordLevel over lower-cased words, as BERT has them."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    if model == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", continuing_subword_prefix=prefix))
        trainer = trainers.WordPieceTrainer(
            vocab_size=300, special_tokens=special, continuing_subword_prefix=prefix, show_progress=False
        )
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def train_sentencepiece(model_type: str = "unigram", **settings: Any) -> bytes:
    """The content of a `.model` file."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    settings = {
        "byte_fallback": True,
        "vocab_size": 420,
        "hard_vocab_limit": False,
        "character_coverage": 0.99,
    } | settings
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type=model_type, minloglevel=2, **settings
    )
    return model.getvalue()


def llama2() -> Tokenizer:
    """A sentencepiece BPE as converters write it: the normaliser puts the prefix and the marks."""
    tokenizer = train_metaspace("never")
    spec = json.loads(tokenizer.to_str())
    spec["pre_tokenizer"] = None
    spec["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    return Tokenizer.from_str(json.dumps(spec))


def unigram(*before: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """A sentencepiece Unigram as converters write it, without a byte fallback."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizer or normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, pre_tokenizers.Metaspace(prepend_scheme="always")])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=260, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def ranks() -> dict[bytes, int]:
    """Bytes by rank: every byte, then the beginnings of words, each one byte longer than one before it."""
    found = {bytes([byte]): byte for byte in range(256)}
    for word in sorted({match[0].encode() for line in CORPUS for match in re.finditer(r" ?[a-z]+|東京|雨", line)}):
        for size in range(2, len(word) + 1):
            found.setdefault(word[:size], len(found))
    return found


def train_tiktoken() -> Any:
    """A `tiktoken.Encoding`."""
    found = ranks()
    special = {token: len(found) + place for place, token in enumerate(SPECIAL)}
    tiktoken = pytest.importorskip("tiktoken")
    return tiktoken.Encoding("kit", pat_str=LLAMA_SPLIT, mergeable_ranks=found, special_tokens=special)


def tekken(**more: Any) -> dict[str, Any]:
    """The content of a `tekken.json`, which has room for one control token and lists one ordinary token too many."""
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks().items()
    ]
    config = {
        "pattern": LLAMA_SPLIT,
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": len(vocab) - 1 + 24,
        "default_num_special_tokens": 24,
        "version": "v3",
    }
    return {"config": config, "vocab": vocab} | more
