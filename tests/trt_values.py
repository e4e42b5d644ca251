"""What an expression of a program may be, as `trt_usage` follows it: things of TensorRT, containers and code that hold them.

A `Value` is a set of `Atom`s, because a name may be one thing or another; `Other` stands for whatever is not followed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = [
    "NOTHING",
    "OTHER",
    "Atom",
    "Class",
    "Code",
    "Constant",
    "Context",
    "File",
    "Fixed",
    "Function",
    "Instance",
    "Kind",
    "Maker",
    "Many",
    "Method",
    "Object",
    "Other",
    "Scope",
    "Table",
    "TableMethod",
    "TensorRT",
    "Value",
    "joined",
    "union",
]


class Atom:
    """Something that a value may be."""


Value = frozenset[Atom]


@dataclass(frozen=True)
class Other(Atom):
    pass


@dataclass(frozen=True)
class Constant(Atom):
    value: bool | int | str


@dataclass(frozen=True)
class TensorRT(Atom):
    """The module."""


@dataclass(frozen=True)
class Class(Atom):
    """A class or an enum of the module."""

    name: str


@dataclass(frozen=True)
class Instance(Atom):
    name: str


@dataclass(frozen=True)
class Method(Atom):
    """`bound`: taken from an instance, so that `self` is not an argument."""

    owner: str
    name: str
    bound: bool


@dataclass(frozen=True)
class Function(Atom):
    name: str


@dataclass(frozen=True)
class Maker(Atom):
    """Gives an `_MADE` after so many calls."""

    calls: int


@dataclass(frozen=True)
class Many(Atom):
    """Something to iterate over."""

    item: Value


@dataclass(frozen=True)
class Fixed(Atom):
    """A tuple."""

    items: tuple[Value, ...]


@dataclass(frozen=True)
class Table(Atom):
    """A dictionary."""

    key: Value
    value: Value


@dataclass(frozen=True)
class TableMethod(Atom):
    table: Table
    name: str


@dataclass(frozen=True)
class Context(Atom):
    """What a function made by `contextmanager` returns."""

    yields: Value


@dataclass(frozen=True)
class File(Atom):
    """A module of the program."""

    name: str


@dataclass(frozen=True, eq=False)
class Code(Atom):
    """A function of the program; `owner` is its class. `bound`: taken from an object of it."""

    node: ast.FunctionDef | ast.AsyncFunctionDef
    owner: ast.ClassDef | None
    bound: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Code) and (self.node, self.bound) == (other.node, other.bound)

    def __hash__(self) -> int:
        return hash((self.node, self.bound))


@dataclass(frozen=True)
class Kind(Atom):
    """A class of the program."""

    node: ast.ClassDef


@dataclass(frozen=True)
class Object(Atom):
    node: ast.ClassDef
    parents_only: bool = False  # super()


NOTHING: Value = frozenset()
OTHER: Value = frozenset({Other()})


@dataclass(eq=False)
class Scope:
    """Names of a function, class body or file. `here` is what they are at this point, `ever` what they may be at all."""

    file: str
    parent: Scope | None = None
    function: ast.AST | None = None
    owner: ast.ClassDef | None = None
    here: dict[str, Value] = field(default_factory=dict)
    ever: dict[str, Value] = field(default_factory=dict)

    def bind(self, name: str, value: Value) -> None:
        self.here[name] = value
        self.ever[name] = self.ever.get(name, NOTHING) | value

    def find(self, name: str) -> Value:
        if name in self.here:
            return self.here[name]
        scope: Scope | None = self
        while scope is not None:
            if name in scope.ever:
                return scope.ever[name]
            scope = scope.parent
        return NOTHING


def joined(ends: list[dict[str, Value]]) -> dict[str, Value]:
    """Names after branches that go on together."""
    return {name: union(end.get(name, OTHER) for end in ends) for name in {key for end in ends for key in end}}


def union(values: Iterable[Value]) -> Value:
    return frozenset().union(*values)
