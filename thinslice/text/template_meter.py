"""The meter of one template's rendering, and how it gets into a template.

Every value that a template makes is paid for out of a fixed amount of fuel, about one unit per
byte; every loop turn, call, filter, test, attribute and comparison costs a step and looks at the
clock. The calls and the operators are metered by the environment, template_sandbox.py.
"""

import math
import time
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

# What an element of a container costs, in bytes, roughly: its place and its object.
ELEMENT_COST = 16
# What one step costs: a million steps use up 64 MiB of fuel.
_STEP_COST = 64
MAX_INTEGER_BITS = 4096
# Names of filters that the metering puts into a template; a template may use them, to no effect.
STEP, PAY, PAY_SLICE, PAY_SPREAD = "_step", "_pay", "_pay_slice", "_pay_spread"
JOIN_TEXT = "_join_text"


class TooCostlyError(Exception):
    """A template used up its fuel or its time."""


class Meter:
    """What is left of one rendering's fuel and time (CPU seconds of this thread)."""

    def __init__(self, fuel: int, seconds: float) -> None:
        self._fuel = fuel
        self._deadline = time.thread_time() + seconds

    def charge(self, cost: int = 0) -> None:
        """Pay for one step and for ``cost`` bytes. Errors: TooCostlyError."""
        assert cost >= 0, "a negative cost would be a gift"
        self._fuel -= cost + _STEP_COST
        if self._fuel < 0:
            raise TooCostlyError("takes too many steps or makes too much text")
        if time.thread_time() > self._deadline:
            raise TooCostlyError("runs too long")

    def charge_value(self, value: Any) -> None:
        """Pay for a value and everything in it, parts that are there twice counted twice.

        A namespace inside a value is refused: it may hold itself.
        """
        self.charge(weight(value, self._fuel))


def weight(value: Any, at_most: int) -> int:
    """Bytes of a value, roughly, with everything in it. Errors: TooCostlyError over ``at_most``."""
    total = 0
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, int):
            if item.bit_length() > MAX_INTEGER_BITS:
                raise TooCostlyError("makes too large a number")
            total += 1
        elif isinstance(item, Mapping):
            total += 2 * ELEMENT_COST * (1 + len(item))
            if total <= at_most:
                pending += item.keys()
                pending += item.values()
        elif isinstance(item, list | tuple | set | KeysView | ValuesView | ItemsView):
            total += ELEMENT_COST * (1 + len(item))
            if total <= at_most:
                pending += item
        elif isinstance(item, Namespace) and item is not value:
            raise SecurityError("a namespace inside another value")
        else:
            total += ELEMENT_COST
        if total > at_most:
            raise TooCostlyError("takes too many steps or makes too much text")
    return total


class Metering(NodeTransformer):
    """Puts the meter into a parsed template wherever work is done without a call or a filter."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        self.generic_visit(node)
        step = nodes.ExprStmt(_filtered(nodes.Const(None), STEP), lineno=node.lineno)
        node.body.insert(0, step)
        if isinstance(node.test, nodes.Expr):
            node.test = _filtered(node.test, STEP)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.Tuple(node.nodes, "load"), JOIN_TEXT)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, PAY_SLICE) if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, PAY) if node.ctx == "load" else node

    def visit_Const(self, node: nodes.Const) -> nodes.Const:  # noqa: N802
        """Jinja writes 1e999 into its Python as inf, which is no literal."""
        if isinstance(node.value, float) and not math.isfinite(node.value):
            raise TemplateSyntaxError("a number too large", node.lineno)
        return node

    def visit_Name(self, node: nodes.Name) -> nodes.Expr:  # noqa: N802
        """A macro's surplus arguments are a container that no other node makes."""
        is_made = node.ctx == "load" and node.name in ("varargs", "kwargs")
        return _filtered(node, PAY) if is_made else node

    def _visit_container(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, PAY)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, STEP)

    def _visit_call(self, node: nodes.Call | nodes.Filter | nodes.Test) -> nodes.Expr:
        """``f(*text)`` makes an object of every character."""
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = _filtered(node.dyn_args, PAY_SPREAD)
        return node

    def _refuse(self, node: nodes.Stmt) -> nodes.Node:
        raise TemplateSyntaxError("a chat template stands alone", node.lineno)

    visit_List = visit_Dict = _visit_container
    visit_Call = visit_Filter = visit_Test = _visit_call
    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refuse


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
