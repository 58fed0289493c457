"""Limits on what a chat template may do while it renders one conversation.

Jinja's sandbox keeps a template away from Python's internals and limits `range`. It does not limit
nested loops, macros that call each other, or texts that are doubled in a loop. Here the compiled
template counts the rounds of its loops and the calls of its macros and blocks, and checks the
processor time and the size of every text and list that it makes. No signals or threads are needed,
so templates may be rendered in any thread and process.

A single filter or method, such as `'x'|center(10**9)`, is not watched while it runs; its result is
checked when it becomes part of the text.
"""

import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import jinja2
import transformers
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, optimizeconst
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from engine.data.messages import EXHAUSTION, BadSample

# The longest conversations render in less than a hundredth of these limits.
MAX_ROUNDS = 10_000_000  # rounds of loops, and calls of macros and blocks
MAX_SECONDS = 10.0  # processor time of the thread
MAX_SIZE = 1 << 25  # characters of a text, entries of a list
MAX_BITS = 1 << 12  # of an integer
ROUNDS_BETWEEN_LOOKS = 64  # rounds after which the limits are compared
FEW_PARTS = 16  # parts of a text that are measured only when they are joined
SIZED = (str, list, tuple)
# Fields of a `%` format that pad their value to a width of seven digits or more, and to a width that is a value too.
WIDE_FIELD = re.compile(r"%(\([^)]*\))?[-+ #.\d]*\d{7}")
VARIABLE_FIELD = re.compile(r"%(\([^)]*\))?[-+ #.\d]*\*")
FIX = "correct the template, or name another one in data.template"


class TemplateLimitError(jinja2.TemplateError):
    """Error for a chat template that loops for too long, or whose text grows too much."""


def exceeds_limits(error: BadSample) -> bool:
    """Return whether a sample was refused because its template ran for too long or made too much.

    `range` raises OverflowError above 100,000, and a macro that calls itself for ever RecursionError.
    """
    return isinstance(error.__cause__, (TemplateLimitError, *EXHAUSTION))


class BoundedContext(Context):
    """The variables of one rendering, with what it has used up so far.

    num_rounds: rounds of loops, and calls of macros and blocks. began_s: processor time of the thread
    at the first look at it; None = it was not looked at.
    """

    num_rounds = 0
    began_s: float | None = None


class BoundedTemplate(jinja2.Template):
    """A template whose output is measured while it is generated."""

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        return measured(super().generate(*args, **kwargs))


class BoundedCode(CodeGenerator):
    """Code of a template that counts its rounds of loops, and its calls of macros and blocks."""

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        for part in node.find_all((nodes.For, nodes.Macro, nodes.Block)):
            marker = nodes.ExprStmt(nodes.EnvironmentAttribute("compare_limits", lineno=part.lineno), lineno=part.lineno)
            part.body.insert(0, marker)  # type: ignore[attr-defined]  # all three have a body
        super().visit_Template(node, frame)

    def visit_ExprStmt(self, node: nodes.ExprStmt, frame: Frame) -> None:
        if not isinstance(node.node, nodes.EnvironmentAttribute):  # not a marker
            super().visit_ExprStmt(node, frame)
            return
        self.writeline("context.num_rounds += 1", node)
        self.writeline(f"if context.num_rounds % {ROUNDS_BETWEEN_LOOKS} == 0:")
        self.indent()
        self.writeline(f"environment.compare_limits(context, {node.lineno})")
        self.outdent()

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Write code for the operator `~`."""
        self.write("environment.join_operands((")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write("))")

    @optimizeconst
    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        """Write code for the operator `+`."""
        self.write("environment.add(")
        self.visit(node.left, frame)
        self.write(", ")
        self.visit(node.right, frame)
        self.write(")")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which loops, macros and growing texts of a template are limited.

    Its methods raise TemplateLimitError.
    """

    code_generator_class = BoundedCode
    context_class = BoundedContext
    template_class = BoundedTemplate
    intercepted_binops = frozenset({"*", "**", "%"})  # these are also not computed while a template is compiled

    def compare_limits(self, context: BoundedContext, line: int) -> None:
        """Compare what a rendering has used up with the limits. line: where its current loop or macro begins."""
        now_s = time.thread_time()
        if context.began_s is None:
            context.began_s = now_s
        if context.num_rounds > MAX_ROUNDS:
            used_up = f"{MAX_ROUNDS:,} rounds of loops and calls of macros"
        elif now_s - context.began_s > MAX_SECONDS:
            used_up = f"{MAX_SECONDS:g} s"
        else:
            return
        raise TemplateLimitError(f"rendering took more than {used_up}, the last in line {line} of the template; {FIX}")

    def concat(self, parts: Iterable[str]) -> str:
        """Return the output of a template, of a macro or of a block."""
        if isinstance(parts, list) and len(parts) <= FEW_PARTS:
            text = "".join(parts)
            check_size(len(text))
            return text
        return "".join(measured(parts))

    def join_operands(self, operands: tuple[Any, ...]) -> str:
        """Return the result of the operator `~`."""
        text = "".join(map(str, operands))
        check_size(len(text))
        return text

    def add(self, left: Any, right: Any) -> Any:
        """Return the result of the operator `+`."""
        result = left + right
        if isinstance(result, SIZED):
            check_size(len(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return the result of an intercepted operator."""
        check = _CHECKS.get(operator)
        if check is not None:
            check(left, right)
        result = self.binop_table[operator](left, right)
        if isinstance(result, SIZED):
            check_size(len(result))
        return result


def measured(parts: Iterable[str]) -> Iterator[str]:
    """Yield parts of a text. Raises TemplateLimitError when they are longer than `MAX_SIZE` together."""
    size = 0
    for part in parts:
        size += len(part)
        if size > MAX_SIZE:
            check_size(size)
        yield part


def check_size(size: int) -> None:
    """Raise TemplateLimitError if a text or a list of this size is too large."""
    if size > MAX_SIZE:
        raise TemplateLimitError(f"it makes a text of more than {MAX_SIZE:,} characters, or a list of as many entries; {FIX}")


def _check_product(left: Any, right: Any) -> None:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, SIZED) and isinstance(other, int):
            check_size(len(one) * other)
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * right)


def _check_bits(num_bits: int) -> None:
    if num_bits > MAX_BITS:
        raise TemplateLimitError(f"it computes an integer of more than {MAX_BITS:,} bits; {FIX}")


def _check_format(left: Any, right: Any) -> None:
    """Raise TemplateLimitError if the format of `format % value` has a wide field."""
    if not isinstance(left, str):
        return
    if WIDE_FIELD.search(left):
        check_size(MAX_SIZE + 1)
    if VARIABLE_FIELD.search(left):
        values = right if isinstance(right, tuple) else (right,)
        check_size(sum(value for value in values if isinstance(value, int)))


_CHECKS: dict[str, Callable[[Any, Any], None]] = {"*": _check_product, "**": _check_power, "%": _check_format}


def bound_chat_templates() -> None:
    """Let Transformers compile chat templates in a `BoundedEnvironment`, in this process.

    Transformers offers no other place for this, and rendering without it would have to repeat how it
    prepares messages and arguments.
    Warns if this version of Transformers compiles templates in another way, without these limits.
    """
    vars(chat_template_utils)["ImmutableSandboxedEnvironment"] = BoundedEnvironment
    compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
    with suppress(AttributeError):
        compile_template.cache_clear()  # type: ignore[union-attr]  # what was compiled before has no limits
    compiled = None if compile_template is None else compile_template("{{ 1 }}")
    if not isinstance(getattr(compiled, "environment", None), BoundedEnvironment):
        problem = f"the limits on chat templates do not work with transformers {transformers.__version__}"
        warnings.warn(f"{problem}; constraints.txt names a version with which they do", stacklevel=2)
