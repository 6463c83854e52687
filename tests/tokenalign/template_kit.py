"""Chat templates in the shapes that are in use, in our own words."""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The last answer keeps its reasoning, an empty block included; earlier ones lose it. Tools and results are in tags.
THINKING = (
    "{% macro block(m) %}{% if m.reasoning_content is string %}{{ m.reasoning_content }}"
    "{% elif '</think>' in m.content %}{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}{% endif %}"
    "{% endmacro %}"
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.last %}{{ '<think>\n' + block(m) + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1].strip() }}"
    "{% for call in m.tool_calls or [] %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \''
    " + call.function.arguments | tojson + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Every message names its channel; an answer ends otherwise than a message before another, and a call otherwise again.
CHANNELS = (
    "{{ '<|start|>system<|message|>Be brief.\nToday: ' + strftime_now('%Y') + '<|end|>' }}"
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ '<|start|>developer<|message|>Rules:\n' + m.content + '<|end|>' }}"
    "{% elif m.role == 'assistant' and m.tool_calls %}"
    "{{ '<|start|>assistant to=' + m.tool_calls[0].function.name + '<|channel|>call<|message|>'"
    " + m.tool_calls[0].function.arguments | tojson + '<|call|>' }}"
    "{% elif m.role == 'assistant' %}"
    "{% if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + (m.name or m.role) + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)

# Nothing ends a turn but the token that opens the next; tool results open with a token of their own.
ROLE_TOKENS = (
    "[M]<sop>{% for m in messages %}{% if m.role == 'tool' %}{{ '<|observation|>\n' + m.content }}"
    "{% else %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think>' ~ (m.reasoning_content or '') ~ '</think>\n' }}{% endif %}"
    "{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function.name + '\n' }}"
    "{% for key, value in call.function.arguments.items() %}{{ key + '=' + value }}{% endfor %}</tool_call>{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# The question is bracketed, a system prompt sits inside of the first one, and roles must alternate.
BRACKETS = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if loop.first and first %}{{ '<<SYS>>\n' + first + '\n<</SYS>>\n\n' }}{% endif %}{{ m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)

# The model is called otherwise, and there is no system role.
RENAMED = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# A system prompt with a date is always there; what the conversation says follows in the same turn.
DATED = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set own = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n\n' + (own or '')"
    " + '<|eot_id|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# The answer is to begin with reasoning, which earlier answers lose.
OPENED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<User>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<Assistant>' + m.content.split('</think>')[-1] | trim + eos_token }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}"
)

# Whatever does not wait for an answer is closed by the end of text.
CLOSED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# An answer's text and its turn end one after the other.
NESTED = (
    "{{ bos_token }}{% for m in messages %}{{ '<TURN><' + m.role | upper + '>' }}"
    "{% if m.role == 'assistant' %}{{ '<ANSWER>' + m.content + '</ANSWER>' }}{% else %}{{ m.content }}{% endif %}"
    "</TURN>{% endfor %}{% if add_generation_prompt %}<TURN><ASSISTANT><ANSWER>{% endif %}"
)

# No control token at all.
PLAIN = (
    "{% for m in messages %}{{ m.role | upper + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)

CONTROLS = [
    *(
        "<|endoftext|>",
        "<s>",
        "</s>",
        "<|im_start|>",
        "<|im_end|>",
        "<|start|>",
        "<|end|>",
        "<|message|>",
        "<|channel|>",
    ),
    *("<|return|>", "<|call|>", "[M]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<User>"),
    *("<Assistant>", "<TURN>", "</TURN>", "<USER>", "<SYSTEM>", "<ASSISTANT>", "<ANSWER>", "</ANSWER>"),
]
