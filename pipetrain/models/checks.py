"""Checks in a traced forward: an `assert`, or an `if` of which one side only raises.

A trace does not know what the condition will be. Of a check, and of nothing else, it may assume that it passes: the
assumption is recorded and tested whenever the layer runs. Which part of which condition is being decided follows from
the position of the running instruction in the source, since Python decides `a and b` and `a < b < c` part by part.
"""

import ast
import builtins
import dis
import linecache
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import FrameType
from typing import Any

Part = tuple[Any, bool]  # a value, and what it should be
Position = tuple[int | None, int | None, int | None, int | None]

# What can be evaluated ahead of its turn: it neither fails nor does anything.
_HARMLESS = (
    *(ast.Compare, ast.Name, ast.Attribute, ast.Constant, ast.Tuple, ast.List, ast.UnaryOp, ast.USub, ast.cmpop),
    *(ast.operator, ast.expr_context, ast.Slice, ast.keyword),
)
# What can fail, but not where the same was evaluated before.
_MAY_FAIL = (ast.Call, ast.Subscript, ast.BinOp)


class _Unknown(Exception):
    """What is being decided is no part of a check, or nobody can say what it should be."""


@dataclass(frozen=True)
class Assumed:
    """What a branch takes in the trace, and what must hold when the layer runs: one of the parts is as it should be."""

    taken: bool
    parts: tuple[Part, ...]


def assume(frame: FrameType | None, value: Any) -> Assumed | None:
    """What may be assumed of a value that Python wants as True or False, or None where that is not known.

    Args:
        frame: of the user's code that is running.
    """
    if frame is None:
        return None
    source = "".join(linecache.getlines(frame.f_code.co_filename))
    here = _Here(frame, value)
    try:
        for statement, should_be in _checks(source):
            if _holds(statement, here.position):
                parts = here.decided_in(statement, should_be)
                return Assumed(parts[0][1], tuple(parts))
    except _Unknown:
        pass
    return None


@lru_cache(maxsize=16)
def _checks(source: str) -> list[tuple[ast.Assert | ast.If, bool]]:
    """The checks of a file, inner ones first, each with what its condition should be."""
    found: list[tuple[ast.Assert | ast.If, bool]] = []
    try:
        tree = ast.parse(source)
    except SyntaxError:  # the file was changed since it was imported
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found.append((node, True))
        elif isinstance(node, ast.If) and (_only_raises(node.body) or _only_raises(node.orelse)):
            found.append((node, not _only_raises(node.body)))
    return found[::-1]


def _only_raises(body: Sequence[ast.stmt]) -> bool:
    leaves = (ast.Return, ast.Break, ast.Continue)
    inner = [node for statement in body for node in ast.walk(statement)]
    return bool(body) and isinstance(body[-1], ast.Raise) and not any(isinstance(node, leaves) for node in inner)


class _Here:
    """The instruction that wants a value as True or False, and the names around it."""

    def __init__(self, frame: FrameType, value: Any) -> None:
        self._frame, self._value = frame, value
        self._instructions = list(dis.get_instructions(frame.f_code))
        running = next(i for i in self._instructions if i.offset == frame.f_lasti)
        self._opname = running.opname
        self.position = _position_of(running)
        # From 3.13 on a comparison and the branch on its result may be one instruction.
        branches = ("POP_JUMP", "TO_BOOL", *(("COMPARE_OP",) if sys.version_info >= (3, 13) else ()))
        self._is_branch = running.opname.startswith(branches)

    def decided_in(self, statement: ast.Assert | ast.If, should_be: bool) -> list[Part]:
        """The part of a check that is being decided; behind it those of which one as it should be is enough."""
        test = statement.test
        if self.position != _position(statement):
            return self._decided_in(test, should_be)
        # A plain name has no position of its own in 3.11, nor have the asserts that pytest has rewritten.
        name, should_be = _without_not(test, should_be)
        rewritten = isinstance(statement, ast.Assert) and name is test and not isinstance(test, ast.BoolOp | ast.IfExp)
        if not self._is_branch or not (rewritten or isinstance(name, ast.Name | ast.NamedExpr)):
            raise _Unknown
        return [(self._value, should_be)]

    def _decided_in(self, test: ast.expr, should_be: bool) -> list[Part]:
        test, should_be = _without_not(test, should_be)
        if isinstance(test, ast.BoolOp):
            return self._decided_in_several(test, should_be)
        if _position(test) != self.position:
            raise _Unknown
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.In | ast.NotIn):
            return self._element_of(test, should_be is isinstance(test.ops[0], ast.In))
        if isinstance(test, ast.Compare) and len(test.ops) > 1:
            return self._one_of_a_chain(test, should_be)
        if not (self._is_branch or self._is_call_of_bool(test)):
            raise _Unknown
        return [(self._value, should_be)]

    def _decided_in_several(self, test: ast.BoolOp, should_be: bool) -> list[Part]:
        """Of `a and b` that should be true, both must be; of one that should be false, one of them."""
        place = next((i for i, part in enumerate(test.values) if _holds(part, self.position)), None)
        if place is None:
            raise _Unknown
        first = self._decided_in(test.values[place], should_be)
        if should_be is isinstance(test.op, ast.And):
            return first
        rest = [_without_not(part, should_be) for part in test.values[place:]]
        if not all(_is_one_decision(part) for part, _ in rest):
            raise _Unknown
        return first + [(self._evaluate(part, rest[0][0]), value) for part, value in rest[1:]]

    def _one_of_a_chain(self, test: ast.Compare, should_be: bool) -> list[Part]:
        """`a < b < c` is `a < b and b < c`."""
        operands = [test.left, *test.comparators]
        pairs = [ast.Compare(a, [op], [b]) for a, op, b in zip(operands, test.ops, operands[1:], strict=False)]
        before = [i for i in self._instructions if i.opname in ("COMPARE_OP", "IS_OP") and i.offset <= self._lasti]
        number = sum(_position_of(i) == self.position for i in before)
        if not self._is_branch or not 1 <= number <= len(pairs) or not all(map(_is_one_decision, pairs)):
            raise _Unknown
        rest = [] if should_be else [(self._evaluate(pair, pairs[number - 1]), False) for pair in pairs[number:]]
        return [(self._value, should_be), *rest]

    def _element_of(self, test: ast.Compare, should_be: bool) -> list[Part]:
        """`a in b` compares with one element after the other; the value is such a comparison."""
        if self._opname != "CONTAINS_OP" or len(test.ops) > 1:
            raise _Unknown
        if not should_be:
            return [(self._value, False)]
        left, elements = (self._evaluate(part, test.left) for part in (test.left, test.comparators[0]))
        if not isinstance(elements, list | tuple):
            raise _Unknown
        return [(left == element, True) for element in elements]

    def _is_call_of_bool(self, test: ast.expr) -> bool:
        named = isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "bool"
        scope = {**vars(builtins), **self._frame.f_globals, **self._frame.f_locals}
        return named and self._opname.startswith("CALL") and scope["bool"] is bool

    @property
    def _lasti(self) -> int:
        return self._frame.f_lasti

    def _evaluate(self, expression: ast.expr, done: ast.expr) -> Any:
        """The value of a harmless expression, ahead of its turn.

        Args:
            done: what has been evaluated before; parts of it may be in the expression, too.
        """
        known = {ast.dump(node) for node in ast.walk(done)}
        for node in ast.walk(expression):
            again = isinstance(node, _MAY_FAIL) and ast.dump(node) in known
            if not (again or isinstance(node, _HARMLESS)):
                raise _Unknown
        code = compile(ast.fix_missing_locations(ast.Expression(expression)), "<check>", "eval")
        return eval(code, self._frame.f_globals, self._frame.f_locals)


def _is_one_decision(test: ast.expr) -> bool:
    if isinstance(test, ast.Compare):
        return len(test.ops) == 1 and not isinstance(test.ops[0], ast.In | ast.NotIn)
    return not isinstance(test, ast.BoolOp | ast.IfExp)


def _without_not(test: ast.expr, should_be: bool) -> tuple[ast.expr, bool]:
    while isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test, should_be = test.operand, not should_be
    return test, should_be


def _position(node: ast.expr | ast.stmt) -> Position:
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset


def _position_of(instruction: dis.Instruction) -> Position:
    found = instruction.positions
    return (found.lineno, found.end_lineno, found.col_offset, found.end_col_offset) if found else (None,) * 4


def _holds(node: ast.expr | ast.stmt, position: Position) -> bool:
    line, end_line, column, end_column = position
    if None in position:
        return False
    begin, end = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
    return begin <= (line, column) and (end_line, end_column) <= end
