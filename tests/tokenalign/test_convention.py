import json
from types import SimpleNamespace

import pytest
import template_kit as kit
from tokenizer_kit import CHAT, IM_END, SPECIAL, Wrapped, train, with_tokens
from tokenizers import Tokenizer, processors

from tokenalign import Convention, Pair
from tokenalign.tags import TAGS, Held

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
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: its JSON is no tokenizer"):
        Convention.detect(tmp_path)
    with pytest.raises(ValueError, match="smaller than"):
        Pair(tokenizer, tokenizer, student_size=3)


def test_added_token_that_is_not_special_is_no_control_token(tokenizer):
    tagged = with_tokens(tokenizer, ["<x>"])
    assert not Pair(tagged, tagged).student.special[tagged.token_to_id("<x>")]


@pytest.fixture(scope="module")
def controlled() -> Tokenizer:
    return with_tokens(train(special=kit.CONTROLS), ["<think>", "</think>"])


def detect(tokenizer: Tokenizer, template: str, eos: str = "</s>", **options) -> Convention:
    return Convention.detect(Wrapped(tokenizer, template, {"bos_token": "<s>", "eos_token": eos}), **options)


def ends(tokenizer: Tokenizer, found: Convention) -> set[str]:
    return {tokenizer.id_to_token(id) for id in found.turn_end}


def test_empty_reasoning_is_no_part_of_the_header(controlled):
    found = detect(controlled, kit.THINKING, "<|im_end|>")
    assert found.roles["assistant"] == found.generation_prefix == "<|im_start|>assistant\n"
    assert found.reasoning_tags == ("<think>", "</think>")
    assert found.no_reasoning == "<think>\n\n</think>\n\n"
    assert found.tool_tags == ("<tool_call>", "</tool_call>")
    assert found.roles["tool"] == "<|im_start|>user\n<tool_response>\n"
    assert ends(controlled, found) == {"<|im_end|>"}


def test_channels_and_three_ends(controlled):
    found = detect(controlled, kit.CHANNELS, "<|endoftext|>")
    assert ends(controlled, found) == {"<|return|>", "<|call|>", "<|endoftext|>"}
    assert found.own_turn_end == controlled.token_to_id("<|return|>")
    assert found.bos is None
    assert found.roles == {
        "user": "<|start|>user<|message|>",
        "assistant": "<|start|>assistant<|channel|>final<|message|>",
        "system": "<|start|>developer<|message|>Rules:\n",
        "tool": "<|start|>{name}<|message|>",
    }
    assert found.default_system.startswith("Be brief.\nToday: 2")
    assert found.reasoning_tags == ("<|channel|>analysis<|message|>", "<|end|>")
    assert not set(found.reasoning_tags) & set(found.tags)  # headers, which no response holds as text


def test_a_turn_that_only_the_next_role_ends(controlled):
    found = detect(controlled, kit.ROLE_TOKENS, "<|endoftext|>")
    assert ends(controlled, found) == {"<|user|>", "<|observation|>", "<|endoftext|>"}
    assert found.own_turn_end == controlled.token_to_id("<|user|>")
    assert found.bos == controlled.token_to_id("[M]")
    assert found.roles["assistant"] == "<|assistant|>\n"
    assert found.no_reasoning == "<think></think>\n"


def test_bracketed_questions(controlled):
    found = detect(controlled, kit.BRACKETS)
    assert found.roles == {"user": "[INST] ", "assistant": " ", "system": "[INST] <<SYS>>\n"}
    assert found.bos == controlled.token_to_id("<s>")
    assert found.default_system is None
    assert ends(controlled, found) == {"</s>"}


def test_other_names_of_roles_and_no_system(controlled):
    found = detect(controlled, kit.RENAMED, "<|endoftext|>")
    assert found.roles == {"user": "<start_of_turn>user\n", "assistant": "<start_of_turn>model\n"}
    assert ends(controlled, found) == {"<end_of_turn>", "<|endoftext|>"}


def test_dated_default_system_prompt(controlled):
    found = detect(controlled, kit.DATED, "<|eot_id|>")
    assert found.default_system.startswith("Today: ")
    assert found.roles["system"] == "<|start_header_id|>system<|end_header_id|>\n\n"


def test_reasoning_that_the_prefix_opens_or_that_history_loses(controlled):
    found = detect(controlled, kit.OPENED)
    assert found.generation_prefix == "<Assistant><think>\n"
    assert found.reasoning_tags == ("<think>", "</think>")
    silent = detect(controlled, kit.OPENED.replace("<think>\n", ""))
    assert silent.generation_prefix == "<Assistant>"
    assert silent.reasoning_tags == ("<think>", "</think>")
    kept = detect(controlled, kit.OPENED.replace("<think>\n", "").replace(".split('</think>')[-1]", ""))
    assert kept.reasoning_tags == ()


def test_end_of_text_after_the_last_message_is_no_part_of_a_turn(controlled):
    found = detect(controlled, kit.CLOSED, "<|endoftext|>")
    assert found.roles == {role: f"<|{role}|>\n" for role in ("user", "assistant", "system")}
    assert found.generation_prefix == "<|assistant|>\n"
    assert found.own_turn_end == controlled.token_to_id("<|end|>")


def test_of_two_ends_in_a_row_the_declared_one(controlled):
    found = detect(controlled, kit.NESTED, "</TURN>")
    assert ends(controlled, found) == {"</TURN>"}
    assert found.roles["user"] == "<TURN><USER>"
    assert found.generation_prefix == found.roles["assistant"] == "<TURN><ASSISTANT><ANSWER>"


def test_a_format_without_control_tokens(controlled):
    found = detect(controlled, kit.PLAIN)
    assert found.roles == {role: f"{role.upper()}: " for role in ("user", "assistant", "system")}
    assert ends(controlled, found) == {"</s>"}


@pytest.mark.parametrize("needs", ["tools", "date_string", "documents"])
def test_template_that_insists_on_something_is_given_it(controlled, needs):
    insisting = "{% if not " + needs + " %}{{ raise_exception('missing') }}{% endif %}" + kit.CHATML
    found = detect(controlled, insisting, "<|im_end|>")
    assert (found.problem is None) == (needs != "documents")
    assert found.problem is None or "missing" in found.problem


def test_calls_whose_arguments_must_be_text(controlled):
    text_only = kit.THINKING.replace("call.function.arguments | tojson", "call.function.arguments")
    assert detect(controlled, text_only, "<|im_end|>").tool_tags == ("<tool_call>", "</tool_call>")


def test_reasoning_as_a_typed_part_and_calls_in_control_tokens():
    tokenizer = train(special=["<s>", "</s>", "[THINK]", "[/THINK]", "[CALL]", "[INST]", "[/INST]"])
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
        "{% elif m.role == 'assistant' %}"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        "{{ '[THINK]' + part.thinking[0].text + '[/THINK]' if part.type == 'thinking' else part.text }}"
        "{% endfor %}{% endif %}"
        "{% for call in m.tool_calls or [] %}{{ '[CALL]' + call.function.name + call.function.arguments | tojson }}"
        "{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    found = detect(tokenizer, template)
    assert found.reasoning_tags == ("[THINK]", "[/THINK]")
    assert found.tool_tags == ("[CALL]",)
    assert found.tags["[THINK]"] is Held.SPECIAL
    assert "tool" not in found.roles


def test_how_a_tag_is_held():
    tokenizer = with_tokens(with_tokens(train(), ["<think>"]), ["</think>"], special=True)
    found = Convention.detect(tokenizer, tags=["<note>", "a"]).tags
    assert found == dict.fromkeys((*TAGS, "<note>"), Held.PIECES) | {
        "<think>": Held.TOKEN,
        "</think>": Held.SPECIAL,
        "a": Held.TOKEN,
    }


def test_a_token_that_no_merge_makes_does_not_hold_the_tag(base):
    assert base.token_to_id("<think>") is not None
    assert Convention.detect(base).tags["<think>"] is Held.PIECES


def test_both_sides_of_a_pair_tell_of_the_tags_of_both(student, teacher):
    pair = Pair(student, teacher, tags=["[X]"])
    assert [list(convention.tags) for convention in pair.conventions] == [list(pair.tags)] * 2
    assert [convention.tags["<think>"] for convention in pair.conventions] == [Held.PIECES, Held.TOKEN]
    assert pair.tags[-1] == "[X]"


@pytest.mark.parametrize(("tags", "message"), [("<x>", "one text"), ([""], "'' is no tag"), ([3], "3 is no tag")])
def test_tags_are_texts(student, tags, message):
    with pytest.raises(ValueError, match=message):
        Pair(student, student, tags=tags)
    with pytest.raises(ValueError, match=message):
        Convention.detect(student, tags=tags)


def test_generation_settings_of_an_object_and_of_its_folder(tmp_path, tokenizer):
    end = tokenizer.token_to_id("<|end|>")
    wrapped = Wrapped(tokenizer, IM_END)
    wrapped.name_or_path = str(tmp_path)
    assert end not in Convention.detect(wrapped).turn_end
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    assert end in Convention.detect(wrapped).turn_end
    wrapped.generation_config = SimpleNamespace(eos_token_id=end)
    wrapped.name_or_path = ""
    assert end in Convention.detect(wrapped).turn_end


def test_a_hostile_template_is_a_problem_and_soon_told(tokenizer):
    found = Convention.detect(Wrapped(tokenizer, "{{ 'x' | center(10**9) }}", {"eos_token": "</s>"}))
    assert "more than 1000000 characters" in found.problem
    assert found.turn_end == {tokenizer.token_to_id("</s>")}
