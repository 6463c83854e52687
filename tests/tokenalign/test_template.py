"""A chat template is a program from somebody else: whatever it does, rendering it is short and small."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenalign import bounds
from tokenalign.bounds import Budget, ExceededError, size_of
from tokenalign.template import ChatTemplate, render

MESSAGES = [{"role": "user", "content": "hi <é>"}]


def repeated(start: str, step: str, passes: int = 60) -> str:
    """A template that puts `step` in place of `n.x` again and again."""
    return f"{{% set n = namespace(x={start}) %}}{{% for i in range({passes}) %}}{{% set n.x = {step} %}}{{% endfor %}}"


HOSTILE = {
    "escape": "{{ messages[0].__class__.__mro__ }}",
    "mutate": "{{ messages.append(1) }}",
    "refuse": "{{ raise_exception('no') }}",
    "mistake": "{{ 1 / 0 }}",
    "syntax": "{% if %}",
    "include": "{% include 'x' %}",
    "nested loops": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "loops over a list": "{% set a = range(2000) | list %}{% for i in a %}{% for j in a %}{% endfor %}{% endfor %}",
    "loop over characters": "{% for i in 'x' * 900000 %}{% endfor %}",
    "output of a loop": "{% for i in range(2000) %}{{ 'x' * 1000 }}{% endfor %}",
    "text of a loop": "{% for i in range(90000) %}" + "x" * 1000 + "{% endfor %}",
    "set block": "{% set a %}{% for i in range(90000) %}" + "x" * 1000 + "{% endfor %}{% endset %}{{ a | length }}",
    "macros": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "macros that double": "{% macro a(n) %}{% if n %}{{ a(n - 1) ~ a(n - 1) }}{% endif %}x{% endmacro %}{{ a(99) }}",
    "macro of our name": "{% macro step() %}{% endmacro %}{% for i in 'x' * 900000 %}{% endfor %}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([[1], [1]]) }}{% endfor %}",
    "repeat": "{{ 'a' * 10**9 }}",
    "repeat a list": "{{ [1] * 10**9 }}",
    "repeat in a filter block": "{% filter center(10**9) %}x{% endfilter %}",
    "power": "{{ 9 ** 10000000 }}",
    "power of powers": repeated("10", "n.x ** 9"),
    "squares": repeated("10", "n.x * n.x"),
    "doubling by ~": repeated("'ab'", "n.x ~ n.x"),
    "doubling by +": repeated("'ab'", "n.x + n.x"),
    "doubling of lists": repeated("[1]", "[n.x, n.x]") + "{{ n.x }}",
    "doubling of tuples": repeated("(1,)", "(n.x, n.x)") + "{{ {n.x: 1} }}",
    "doubling of dictionaries": repeated("{}", "{1: n.x, 2: n.x}"),
    "doubling of namespaces": repeated("1", "namespace(a=n.x, b=n.x)") + "{{ raise_exception(n.x ~ n.x) }}",
    "dict()": repeated("{}", "dict(a=n.x, b=n.x)"),
    "deep list": repeated("[]", "[n.x]", 90000) + "{{ n.x }}",
    "center": "{{ 'x' | center(10**9) }}",
    "indent": "{{ 'x\\ny' | indent(10**9) }}",
    "tojson": "{{ [[1]] | tojson(indent=10**9) }}",
    "tojson of a nest": repeated("[]", "[n.x]", 900) + "{{ n.x | tojson(indent=999) }}",
    "wordwrap": "{{ 'x' | wordwrap(1, wrapstring='y' * 900000) }}{{ ('x ' * 400000) | wordwrap(1) }}",
    "urlize": "{{ ('(' * 200000 ~ 'http://a' ~ ')' * 200000) | urlize }}",
    "striptags": "{{ ('<!--' * 200000) | striptags }}",
    "pprint": "{{ range(90000) | list | pprint }}",
    "sum of lists": "{{ (range(90000) | batch(1) | list) | sum(start=[]) | length }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "slices of slices": "{% for a in range(90000) | slice(1000) | map('slice', 100000) %}{{ a | list }}{% endfor %}",
    "round": "{{ 1.5 | round(10**9) }}",
    "lazy texts": "{{ range(1000) | map('string') | map('center', 90000) | list | length }}",
    "lazy join": "{{ range(90000) | map('string') | map('center', 90000) | join }}",
    "select": "{{ range(90000) | select('in', range(90000) | list) | list | length }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "zfill": "{{ 'x'.zfill(10**9) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**9) }}",
    "replace": "{{ ('a' * 10000).replace('a', 'b' * 10000) }}",
    "replace filter": "{{ ('a' * 10000) | replace('a', 'b' * 10000) }}",
    "join": "{{ ('a' * 10000).join(['b'] * 10000) }}",
    "join filter": "{{ (['b'] * 10000) | join('a' * 10000) }}",
    "join of what comes one by one": "{{ ('a' * 10000).join(range(90000) | map('string')) }}",
    "join filter of what comes one by one": "{{ range(90000) | map('string') | join('a' * 10000) }}",
    "reversed": "{{ ('a' * 10000).join('b' * 90000 | reverse) }}{{ ('a' * 10000).join([0] * 90000 | reverse) }}",
    "translate": "{{ ('a' * 10000).translate({97: 'b' * 10000}) }}",
    "to_bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "escaped text": "{{ ('x' | e).center(10**9) }}",
    "format width": "{{ '%1000000000d' % 1 }}",
    "format width twice": "{{ '%99999d' * 1000 % ((1,) * 1000) }}",
    "format precision": "{{ '%.999999999f' % 1.0 }}",
    "format star": "{{ '%*d' % (10**9, 1) }}",
    "format key": "{{ '%(a(b))99999999d' % {'a(b)': 1} }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "str.format": "{{ '{:>999999999}'.format(1) }}",
    "str.format computed": "{{ '{:>{}}'.format(1, 10**9) }}",
    "str.format computed from text": "{{ '{:{}}'.format('x', '>1000000000') }}",
    "str.format again": "{{ ('{0}' * 1000).format('x' * 10000) }}",
    "format_map": "{{ '{a:>999999999}'.format_map({'a': 1}) }}",
    "range": "{{ range(10**12) | list }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "strftime": "{{ strftime_now('%999999999Y') }}",
    "in text": "{% set a = 'a' * 900000 %}{% for i in range(90000) %}{% if (a ~ i) in a %}{% endif %}{% endfor %}",
    "equal lists": "{% set a = [0] * 90000 %}{% set b = [0] * 90000 %}{% for i in b %}{{ a == b }}{% endfor %}",
    "many slices": "{% set a = 'a' * 900000 %}{% set b = (" + "a[1:]," * 3000 + ") %}",
    "slices in a loop": repeated("'a' * 900000", "n.x[1:] ~ 'a'", 90000),
    "many comparisons": "{% set a = 'a' * 900000 %}{% set b = a ~ 'a' %}" + "{{ 'aaab' * 9 in a }}" * 900,
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "attributes": "{{ messages" + ".a" * 20000 + " }}",
    "minus": "{{ " + "- " * 20000 + "1 }}",
    "conditions": "{% if 0 %}" + "{% elif 0 %}" * 5000 + "{% endif %}",
    "huge source": "x" * 200_000,
    "huge message": "{{ raise_exception('x' * 900000) }}",
}
SECONDS, MEGABYTES = 0.3, 900
"""The clock is set to so much, that the tests be short; one operation may go past it."""

PROBE = """
import json, resource, sys, time
from tokenalign import bounds
from tokenalign.template import render
bounds.MAX_SECONDS, bounds.MAX_SIZE = {seconds}, {max_size}
resource.setrlimit(resource.RLIMIT_AS, ({megabytes} << 20,) * 2)
for name, template in json.load(sys.stdin).items():
    start = time.process_time()
    try:
        outcome = f"rendered {{len(render(template, [{{'role': 'user', 'content': 'hi'}}]))}}"
    except ValueError as error:
        outcome = str(error)
    print(json.dumps([name, outcome, time.process_time() - start]), flush=True)
"""


def probe(templates: dict[str, str], max_size: int = bounds.MAX_SIZE) -> dict[str, tuple[str, float]]:
    """What became of each template in a process with little memory, and its seconds."""
    code = PROBE.format(megabytes=MEGABYTES, seconds=SECONDS, max_size=max_size)
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], input=json.dumps(templates), capture_output=True, text=True, timeout=300
    )
    lines = map(json.loads, run.stdout.splitlines())
    return {name: (outcome, seconds) for name, outcome, seconds in lines} | {"stderr": (run.stderr, 0)}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[str, float]]:
    return probe(HOSTILE)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_refused_soon_and_in_little_memory(outcomes, name):
    assert name in outcomes, outcomes["stderr"]
    outcome, seconds = outcomes[name]
    assert "the chat template" in outcome
    assert "MemoryError" not in outcome
    assert len(outcome) < 500
    assert seconds < 10 * SECONDS


def test_control_without_a_bound_the_memory_is_used_up():
    name = "center"
    assert "MemoryError" in probe({name: HOSTILE[name]}, max_size=10**12)[name][0]


HONEST = {
    "{% for m in messages %}{{ m | tojson }}{% endfor %}": '{"role": "user", "content": "hi <é>"}',
    "{{ messages | tojson(indent=4) }}": json.dumps(MESSAGES, indent=4, ensure_ascii=False),
    "{{ messages[0].content ~ 1 }}": "hi <é>1",
    "{% for i in range(2000) %}{% if i % 1000 == 0 %}{{ i }} {% endif %}{% endfor %}": "0 1000 ",
    "{{ range(5) | list }}{{ range(2, 4) | sum }}": "[0, 1, 2, 3, 4]5",
    "{{ 'x' | center(5) }}|{{ 'x'.ljust(3) }}|{{ '7'.zfill(3) }}": "  x  |x  |007",
    "{{ '%05.1f' % 2.5 }} {{ '{:>4}'.format('a') }} {{ '%s-%s' | format(1, 'b') }}": "002.5    a 1-b",
    "{{ 'a<think>b'.split('<think>')[-1].strip() }}": "b",
    "{{ 'aXbX' | replace('X', '--') }}{{ ['a', 'b'] | join(', ') }}": "a--b--a, b",
    "{{ 'a\nb' | indent(2, first=true) }}": "  a\n  b",
    "{{ [1, 2, 3] | batch(2) | list }}{{ [3, 1] | sort }}": "[[1, 2], [3]][1, 3]",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}": "['hi <é>']",
    "{% set ns = namespace(n=0, l=[]) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}{% set ns.l = ns.l + [i] %}"
    "{% endfor %}{{ ns.n }}{{ ns.l }}": "3[1, 2]",
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{% if caller %}{{ caller() }}{% endif %}{% endmacro %}"
    "{% call f(1) %}!{% endcall %}": "12!",
    "{% set t %}a{{ 1 }}{% endset %}{{ t }}{% filter upper %}b{% endfilter %}": "a1B",
    "{{ {'a': [1]}['a'][0] }}{{ dict(a=1).get('a') }}": "11",
    "{% for key, value in {'x': 1}.items() %}{{ key }}{{ value }}{% endfor %}": "x1",
    "{% set a, b = 1, 2 %}{{ b }}{{ 'abc'[1:] }}{{ 2 ** 10 }}{{ 7 // 2 }}{{ 'b' in 'abc' }}": "2bc10243True",
    "{{ 'some words here' | wordwrap(5) | length }}{{ '<b>x</b>' | striptags }}": "15x",
    "{{ 'x' * 3 }}{{ 2.345 | round(1) }}{{ 'a b' | wordcount }}{{ 20251126 | string }}": "xxx2.3220251126",
    "{% set ns = namespace(a='x' * 2000, b='y' * 2000, c=range(500) | list) %}{{ ns.a | length }}": "2000",
    "{{ ('word ' * 4000).replace('word', '<word>') | length }}": "28000",
    "{{ 2000000 is gt 1000000 }}{{ range(3) | map('string') | reverse | join('-') }}": "True2-1-0",
    "{{ strftime_now('%Y') | length }}{{ strftime_now(format='%d') | length }}": "42",
    "{%- for m in messages %}\n    {% if m.role == 'x' %}{% continue %}{% endif %}\n"
    "{% generation %}{{ m.content ~ loop.index }}{% endgeneration %}{% break %}{% endfor %}{{ tools is none }}": (
        "hi <é>1True"
    ),
}


@pytest.mark.parametrize("template", HONEST)
def test_honest_template_is_rendered_as_ever(template):
    assert render(template, MESSAGES) == HONEST[template]


def test_a_long_honest_conversation_is_rendered():
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] | trim }}{% endfor %}"
    messages = [{"role": "user", "content": " word" * 5000}] * 30
    assert len(render(template, messages)) > 30 * 20_000


def test_steps_count_for_each_rendering_and_seconds_for_all(monkeypatch):
    template = ChatTemplate("{% for i in range(n) %}{% endfor %}")
    monkeypatch.setattr(template._environment.budget, "seconds", 60.0)  # on a busy machine too
    for _ in range(4):
        assert template.render([], n=bounds.MAX_STEPS // 4) == ""
    monkeypatch.setattr(template._environment.budget, "seconds", 0.0)
    with pytest.raises(ValueError, match=r"more than 2\.0 seconds"):
        template.render([], n=1)


def test_what_a_template_reads_is_told():
    assert ChatTemplate("{{ date_string }}{% for m in messages %}{{ m }}{% endfor %}").variables == {"date_string"}


nested = st.recursive(
    st.integers(-1000, 1000) | st.text(max_size=5) | st.booleans(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


def slow_size(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return len(value) + sum(len(key) + slow_size(inner) for key, inner in value.items())
    if isinstance(value, list):
        return len(value) + sum(map(slow_size, value))
    return 1 if isinstance(value, bool) else abs(value)


@given(nested)
def test_size_counts_what_is_nested(value):
    assert size_of(value, counts=True) == slow_size(value)


def test_budget_weighs_products_and_adds_results():
    budget = Budget()
    budget.weigh(1000, 1000)
    with pytest.raises(ExceededError, match="at once"):
        budget.weigh(1000, 1001)
    for _ in range(bounds.MAX_TOTAL // bounds.MAX_SIZE):
        budget.take("x" * bounds.MAX_SIZE)
    with pytest.raises(ExceededError, match="in all"):
        budget.take("x")
