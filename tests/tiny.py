"""Models and tokenizers small enough to be made anew for each test run."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

PAD, STUDENT_END, TEACHER_END = "<|pad|>", "<|im_end|>", "<|end|>"
SPECIAL = (PAD, STUDENT_END, TEACHER_END, "<|user|>", "<|assistant|>")
THINK_TAGS = ("<think>", "</think>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ 'END' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CORPUS = [
    "Tom has 12 coins and finds 30 more. How many coins does Tom have now? The total is 42.",
    "A shop sold 7 cards on Monday and 5 on Tuesday. How many cards were sold? <think>7+5=12</think>\\boxed{12}",
    "Say the word again: apple river stone. You said apple, now say river. thinking and ink and a drink",
] * 3


def train_bpe(corpus: Sequence[str] = CORPUS, size: int = 340) -> Tokenizer:
    """Byte-level BPE over one vocabulary that holds every control token and tag of both sides."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*SPECIAL, *THINK_TAGS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def chat_tokenizer(bpe: Tokenizer, end: str, whole_tags: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One side's tokenizer: `whole_tags` are single tokens, all other tags are spelled in pieces."""
    spec = json.loads(bpe.to_str())
    spec["added_tokens"] = [
        {**token, "special": token["content"] in SPECIAL}
        for token in spec["added_tokens"]
        if token["content"] in (*SPECIAL, *whole_tags)
    ]
    backend = Tokenizer.from_str(json.dumps(spec))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=end)
    tokenizer.chat_template = TEMPLATE.replace("END", end)
    return tokenizer


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES = {
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2-untied": (Qwen2Config, {"tie_word_embeddings": False}),
    "gemma2-soft-cap": (Gemma2Config, {"head_dim": 16, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "granite-scaled": (GraniteConfig, {"logits_scaling": 3.0}),
    "cohere-scaled": (CohereConfig, {"logit_scale": 0.25}),
    "phi-bias": (PhiConfig, {"partial_rotary_factor": 0.5, "num_key_value_heads": 2}),
}


def tiny_model(
    family: str = "llama-tied", *, vocabulary: int = 340, seed: int = 0, **settings: object
) -> PreTrainedModel:
    """Random weights, eval mode, float32; large enough weights that no two tokens look alike to it."""
    kind, extra = FAMILIES[family]
    config = kind(vocab_size=vocabulary, **{**SIZES, **extra, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[kind](config)
        if (bias := model.get_output_embeddings().bias) is not None:
            torch.nn.init.normal_(bias)
    return model.eval()


def save_tiny(folder: Path, tokenizer: PreTrainedTokenizerFast, **settings: object) -> Path:
    """A model folder in transformers format."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tiny_model(vocabulary=len(tokenizer), **ids, **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_ids(seed: int, length: int, *, vocabulary: int = 340, first: int = len(SPECIAL)) -> list[int]:
    """Tokens of ordinary text."""
    rng = random.Random(seed)
    return [rng.randrange(first, vocabulary) for _ in range(length)]
