"""Chat templates, rendered as Hugging Face does but with bounds: a template is a program from somebody else."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_CHARACTERS = 1_000_000
"""Of the output, and of any text or list that a template builds by `*`, `+` or `~`."""
MAX_STEPS = 200_000
"""Loop passes, calls and operators in one rendering."""

_MISTAKES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a template's own mistakes raise."""


def render(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The text of a conversation.

    Args:
        template: The chat template's source.
        messages: `{"role": ..., "content": ...}` each.
        variables: What else the template sees, such as `add_generation_prompt` and `bos_token`.

    Raises:
        ValueError: The template is malformed, refuses the conversation, or exceeds the bounds.

    >>> render("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", [{"role": "user", "content": "hi"}])
    '<user>hi'
    """
    environment = _Environment()
    try:
        compiled = environment.from_string(_Bounded().visit(environment.parse(template)))
        variables = {"tools": None, "documents": None, "add_generation_prompt": False} | variables
        return _bounded_join(compiled.generate(messages=[dict(message) for message in messages], **variables))
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(f"the chat template cannot be rendered: {error}") from error


def _bounded_join(pieces: Iterable[str]) -> str:
    text, size = [], 0
    for piece in pieces:
        text.append(piece)
        size += len(piece)
        _require(size)
    return "".join(text)


def _require(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise SecurityError(f"it builds more than {MAX_CHARACTERS} characters")


class _Environment(ImmutableSandboxedEnvironment):
    """Counts steps, so that a template cannot run or grow without end. Built per rendering: the count is its state."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.steps = 0
        self.filters["tojson"] = _tojson
        self.globals |= {
            "raise_exception": _refuse,
            "strftime_now": lambda layout: datetime.now().strftime(layout),
            "range": self._range,
            _Bounded.STEP: self.step,
            _Bounded.CONCAT: self._concat,
        }

    def step(self, cost: int = 1) -> str:
        self.steps += cost
        if self.steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")
        return ""

    def _range(self, *bounds: int) -> range:
        self.step(len(range(*bounds)))
        return range(*bounds)

    def _concat(self, *values: Any) -> str:
        texts = [str(value) for value in values]
        _require(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.step()
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.step()
        sizes = [len(side) if isinstance(side, str | list | tuple) else 1 for side in (left, right)]
        if operator == "*" and max(sizes) > 1:
            _require(max(sizes) * max(side for side in (left, right) if isinstance(side, int)))
        if operator == "**" and abs(right) > 64:
            raise SecurityError(f"it raises a number to the power {right}")
        if operator == "+":
            _require(sum(sizes))
        return super().call_binop(context, operator, left, right)


class _Bounded(NodeTransformer):
    """Adds a step to every loop pass and turns `~` into a call, neither of which the sandbox sees otherwise."""

    STEP, CONCAT = "tokenalign_step", "tokenalign_concat"

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call(self.STEP, []), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call(self.CONCAT, node.nodes)


def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), arguments, [], None, None)


class _Generation(Extension):
    """`{% generation %}` marks what a trainer learns from; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (so does the base class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
