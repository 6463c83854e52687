"""Chat templates, rendered as Hugging Face does but with bounds: a template is a program from somebody else."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from types import GeneratorType
from typing import Any, NoReturn

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from tokenalign.bounds import Budget, ExceededError, size_of, size_of_layout

MAX_SOURCE = 100_000
"""Characters of a template's source."""

_STANDARD = {"messages": (), "tools": None, "documents": None, "add_generation_prompt": False}
"""What every template may expect to be there."""
_FRAME = frozenset(["_loop_vars", "_block_vars"])
"""Arguments by which Jinja hands on what is visible where a call stands."""
_SUPERLINEAR = frozenset(["pprint", "striptags", "sum", "truncate", "urlize", "wordwrap"])
"""Filters that may take the square of their input's size in time."""


class ChatTemplate:
    """A chat template, ready to be rendered again and again.

    The bounds hold for each rendering, the clock for all of them together.

    Args:
        source: The Jinja source.

    Raises:
        ValueError: It is malformed.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise ValueError(f"the chat template has {len(source)} characters, more than {MAX_SOURCE}. Shorten it.")
        self._environment = _Environment()
        self.variables: frozenset[str]
        """What the template reads that is not always there."""
        try:
            tree = self._environment.parse(source)
            self.variables = frozenset(meta.find_undeclared_variables(tree) - _STANDARD.keys())
            self._compiled = self._environment.from_string(_Bounded().visit(tree))
        except Exception as error:
            raise _unusable(error) from error

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text of a conversation, see `render`."""
        budget = self._environment.budget
        budget.start()
        try:
            return self._compiled.render(_STANDARD | {"messages": [dict(m) for m in messages]} | variables)
        except Exception as error:  # a program's mistakes can be of any kind
            raise _unusable(error) from error
        finally:
            budget.stop()


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
    return ChatTemplate(template).render(messages, **variables)


def _unusable(error: Exception) -> ValueError:
    return ValueError(f"the chat template cannot be rendered: {str(error)[:300] or type(error).__name__}")


class _Environment(ImmutableSandboxedEnvironment):
    """Weighs every filter, test, call and operator before it runs, and counts every result."""

    intercepted_binops = frozenset(["*", "**", "+", "-", "/", "//", "%"])

    def __init__(self) -> None:
        self.budget = Budget()
        self.take = self.budget.take
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, finalize=self.take, extensions=[_Generation, loopcontrols]
        )
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _refuse,
            "strftime_now": self._strftime,
            "range": self._range,
            "namespace": _Namespace,
        }
        self.filters["tojson"] = _tojson
        self.filters = {name: self._weighed_filter(name, function) for name, function in self.filters.items()}
        self.tests = {name: self._weighed_test(function) for name, function in self.tests.items()}

    def step(self) -> str:
        """A pass of a loop; nothing is written."""
        self.budget.step()
        return ""

    def join_values(self, *values: Any) -> str:
        """What `~` does."""
        return self.concat(map(str, values))

    def concat(self, pieces: Iterable[str]) -> str:
        """Every text that consists of pieces is made here: macros, `set` blocks and the output."""
        return self.budget.join(pieces)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.budget.step()
        return super().getitem(obj, argument)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # the sandbox wraps `str.format`
        if owner is self:
            return super().call(context, function, *args, **kwargs)
        args = tuple(map(_settled, args))
        values = [*args, *(value for name, value in kwargs.items() if name not in _FRAME)]
        # A macro does what its own operations do, and a namespace holds what it is given; a method may fill up a text.
        if owner is not None:
            is_format = isinstance(owner, str) and getattr(function, "__name__", "") in ("format", "format_map")
            own = size_of_layout(owner) if is_format else size_of(owner)
            self.budget.weigh(own, sum(size_of(value, counts=True) for value in values))
        elif not isinstance(function, Macro):
            self.budget.weigh(sum(map(size_of, values)))
        return self.take(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator in "+-":
            self.budget.weigh(size_of(left) + size_of(right))
        elif operator == "%" and isinstance(left, str):
            self.budget.weigh(size_of_layout(left), size_of(right, counts=True))
        else:
            repeats = operator == "**" or not all(isinstance(side, int | float) for side in (left, right))
            self.budget.weigh(size_of(left), size_of(right, counts=repeats))
        return self.take(super().call_binop(context, operator, left, right))

    def _weighed_filter(self, name: str, function: Any) -> Callable[..., Any]:
        skip = hasattr(function, "jinja_pass_arg")  # what Jinja itself passes first

        @wraps(function)
        def weighed(*args: Any, **kwargs: Any) -> Any:
            args = tuple(map(_settled, args))
            value, *others = args[skip:] if len(args) > skip else (None,)
            size = size_of_layout(value) if name == "format" and isinstance(value, str) else size_of(value)
            arguments = sum(size_of(other, counts=True) for other in (*others, *kwargs.values()))
            self.budget.weigh(size, size if name in _SUPERLINEAR else 1, arguments)
            return self.take(function(*args, **kwargs))

        return weighed

    def _weighed_test(self, function: Any) -> Callable[..., Any]:
        @wraps(function)
        def weighed(*args: Any, **kwargs: Any) -> Any:
            self.budget.weigh(sum(map(size_of, (*args, *kwargs.values()))))
            return function(*args, **kwargs)

        return weighed

    def _range(self, *bounds: int) -> range:
        self.budget.step(len(range(*bounds)))
        return range(*bounds)

    def _strftime(self, format: str) -> str:
        self.budget.weigh(256 * size_of_layout(format))  # the C library may make so much of it
        return self.take(datetime.now().strftime(format))


def _settled(value: Any) -> Any:
    """What would come one by one as a list, whose size can be told."""
    return list(value) if isinstance(value, GeneratorType | reversed) else value


class _Namespace(Namespace):
    """Is not written out with all that it holds: two namespaces could hold each other many times over."""

    __repr__ = object.__repr__


class _Bounded(NodeTransformer):
    """Brings to the environment what it would not see: loop passes, `~`, comparisons, slices and containers.

    It is called by nodes that a template cannot write, so that none can call it or put something in its place.
    """

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("step", []), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("join_values", node.nodes)

    def _taken(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _call("take", [node])

    visit_Compare = visit_Dict = visit_List = _taken  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        return self._taken(node) if node.ctx == "load" else node  # else the names that a loop or a `set` assigns

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        if isinstance(node.arg, nodes.Slice):
            return self._taken(node)
        self.generic_visit(node)
        return node


def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


class _Generation(Extension):
    """`{% generation %}` marks what a trainer learns from; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (so does the base class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    if indent is not None and indent > 16:  # each level would be indented by as much again
        raise ExceededError(f"it indents JSON by {indent}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
