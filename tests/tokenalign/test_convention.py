import json

import pytest
from tokenizer_kit import CHAT, IM_END, SPECIAL, Wrapped, train, with_tokens
from tokenizers import Tokenizer, models, processors

from tokenalign import Convention, Pair
from tokenalign.tags import TAGS

QWEN_LIKE = (
    "{%- if messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{% if m.role != 'system' %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)
LLAMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' ~ m.content ~ ' [/INST]' }}"
    "{% else %}{{ ' ' ~ m.content ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(special=[*SPECIAL, "<s>", "</s>"])


def test_default_system_prompt_and_opened_tag(tokenizer):
    found = Convention.detect(tokenizer, QWEN_LIKE)
    assert found.default_system == "Be kind."
    assert found.generation_prefix == "<|im_start|>assistant\n<think>\n"
    assert found.reasoning_tags == ("<think>", "</think>")
    assert found.bos is None
    assert found.turn_end == {tokenizer.token_to_id("<|im_end|>")}
    assert found.roles == {role: f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")}


def test_bos_that_only_the_template_adds_and_a_refused_role(tokenizer):
    found = Convention.detect(Wrapped(tokenizer, LLAMA_LIKE, {"bos_token": "<s>", "eos_token": "</s>"}))
    assert found.bos == tokenizer.token_to_id("<s>")
    assert found.turn_end == {tokenizer.token_to_id("</s>")}
    assert "system" not in found.roles


def test_declared_bos_that_nothing_adds_is_none(tokenizer):
    assert Convention.detect(Wrapped(tokenizer, IM_END, {"bos_token": "<|im_start|>"})).bos is None


def test_bos_that_the_tokenizer_adds(tokenizer):
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", copy.token_to_id("<s>"))])
    assert Convention.detect(copy).bos == copy.token_to_id("<s>")


def test_tags_around_reasoning_are_read_from_the_rendering(tokenizer):
    template = IM_END.replace(
        "m.content", "('[PLAN]' + m.reasoning_content + '[/PLAN]' if m.reasoning_content else '') + m.content"
    )
    assert Convention.detect(tokenizer, template).reasoning_tags == ("[PLAN]", "[/PLAN]")
    wrapped = Wrapped(tokenizer, template)
    assert Pair(wrapped, wrapped, tags=["<note>"]).tags == (*TAGS, "[PLAN]", "[/PLAN]", "<note>")


def test_template_that_wants_contents_in_parts(tokenizer):
    parts = CHAT.replace("END", "'<|end|>'").replace("m.content", "m.content[0]['text']")
    assert Convention.detect(tokenizer, parts).turn_end == {tokenizer.token_to_id("<|end|>")}


def test_broken_template_is_reported_not_raised(tokenizer):
    found = Convention.detect(Wrapped(tokenizer, "{% if %}", {"eos_token": "</s>"}))
    assert "cannot be rendered" in found.problem
    assert found.turn_end == {tokenizer.token_to_id("</s>")}


def save(folder, tokenizer, **files):
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_folder_with_settings(tmp_path, tokenizer):
    save(
        tmp_path,
        tokenizer,
        tokenizer_config={"chat_template": "x", "pad_token": {"content": "<|endoftext|>"}, "eos_token": "<|im_end|>"},
        generation_config={"eos_token_id": [tokenizer.token_to_id("<|end|>"), 10_000]},
    )
    (tmp_path / "chat_template.jinja").write_text(QWEN_LIKE)
    found = Convention.detect(tmp_path)
    assert found.turn_end == {tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|end|>")}
    assert found.pad == tokenizer.token_to_id("<|endoftext|>")
    assert found.default_system == "Be kind."
    assert Pair(tmp_path, tmp_path / "tokenizer.json").conventions[1].pad is None


def test_named_templates_use_the_default(tmp_path, tokenizer):
    named = [{"name": "tools", "template": "y"}, {"name": "default", "template": QWEN_LIKE}]
    save(tmp_path, tokenizer, tokenizer_config={"chat_template": named})
    assert Convention.detect(tmp_path).default_system == "Be kind."


def test_what_cannot_be_read_is_named(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist\. Give a folder"):
        Convention.detect("nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        Convention.detect(tmp_path)
    with pytest.raises(ValueError, match="int is no tokenizer"):
        Convention.detect(3)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match="sentencepiece model files are not supported yet"):
        Convention.detect(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no tokenizer\.json"):
        Convention.detect(tmp_path)
    with pytest.raises(ValueError, match="smaller than"):
        Pair(tokenizer, tokenizer, student_size=3)


@pytest.mark.parametrize(
    "model", [models.WordPiece({"a": 0}, unk_token="a"), models.WordLevel({"a": 0}, unk_token="a"), models.BPE()]
)
def test_other_kinds_are_refused_rather_than_read_wrongly(model):
    with pytest.raises(ValueError, match="not supported yet"):
        Pair(Tokenizer(model), Tokenizer(model))


def test_added_token_that_is_not_special_is_no_control_token(tokenizer):
    tagged = with_tokens(tokenizer, ["<x>"])
    assert not Pair(tagged, tagged).student.special[tagged.token_to_id("<x>")]
