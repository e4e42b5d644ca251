"""Which TensorRT names a program uses that a version lacks, found without running it.

`problems(sources, version)` follows every value that comes from the TensorRT module through the program: names that the
module is bound to (imports, `importlib.import_module`, anything called `trt`), aliases, arguments and results of the
program's own functions across its files, attributes of its classes, classes derived from TensorRT's. What methods return is
taken from the recorded signatures, so `builder.create_network(0).get_input(0).nope` is found as well.

A version's gates are evaluated as that version would: in `if has(trt, "Builder.x"):` (also `hasattr(builder, "x")`, negated,
combined, kept in a variable, as a guard that returns or raises, or around all calls of a private function) only what the
version would run is looked at. Nothing else hides a use: not `try`, not a comparison of versions or of flavours.

Not followed: values inside dictionaries of arguments (`**options`), names computed at run time (reported as such).
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from tests.trt_snapshot import ALL, Member, Signature, Snapshot, snapshot
from tests.trt_values import (
    NOTHING,
    OTHER,
    Atom,
    Class,
    Code,
    Constant,
    Context,
    File,
    Fixed,
    Function,
    Instance,
    Kind,
    Maker,
    Many,
    Method,
    Object,
    Other,
    Scope,
    Table,
    TableMethod,
    TensorRT,
    Value,
    joined,
    union,
)

__all__ = ["Problem", "problems", "uses"]

MODULES = {"tensorrt", "tensorrt_rtx", "tensorrt_lean"}
NAMED = MODULES | {"trt"}  # whatever is called so is the module
GATE = "has"
# polygraphy's makers, with how many calls give the TensorRT object: CreateConfig(...)(builder, network)
MAKERS = {"CreateConfig": 2, "CreateConfigRTX": 2, "create_config": 1, "create_config_rtx": 1}
_MADE = "IBuilderConfig"
_ROUNDS = 20


@dataclass(frozen=True, order=True)
class Problem:
    """A use that fails in `version`."""

    file: str
    line: int
    version: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.version}: {self.text}"


def problems(sources: Mapping[str, str], version: str, within: Iterable[str] | None = None) -> list[Problem]:
    """What `version` lacks of what the files use.

    `sources` maps module names without the package ("engines.builder") to source text; `within`: report those files only
    (their values are followed through all of them).
    """
    run = _Run({name: _parse(name, text) for name, text in sources.items()}, snapshot(version))
    found = run.run()
    return sorted(problem for problem in found if within is None or problem.file in set(within))


def uses(sources: Mapping[str, str], version: str) -> set[str]:
    """Every TensorRT name that the files use in `version`, as "Builder.create_network"."""
    run = _Run({name: _parse(name, text) for name, text in sources.items()}, snapshot(version))
    run.run()
    return run.used


@cache
def _parse(name: str, text: str) -> ast.Module:
    return ast.parse(text, name)


class _Run:
    """One walk over the whole program as one version would see it, repeated until nothing new is learned."""

    def __init__(self, files: Mapping[str, ast.Module], version: Snapshot) -> None:
        self.files = files
        self.version = version
        self.globals = {name: Scope(name) for name in files}
        self.arguments: dict[tuple[ast.AST, str], Value] = {}
        self.returns: dict[ast.AST, Value] = {}
        self.attributes: dict[tuple[ast.ClassDef, str], Value] = {}
        self.bases: dict[ast.ClassDef, Value] = {}
        self.reached: set[ast.AST] = set()
        self.waiting: list[tuple[Code, Scope]] = []
        self.found: set[Problem] = set()
        self.used: set[str] = set()
        self.changed = False
        self.file = ""  # the one being walked
        self.mentioned = frozenset().union(*map(_mentioned, files.values()))

    def run(self) -> set[Problem]:
        for _ in range(_ROUNDS):
            self.changed = False
            self.found.clear()
            self.used.clear()
            for name, tree in self.files.items():
                self.file = name
                self.globals[name].here.clear()
                self.block(tree.body, self.globals[name])
                while self.waiting:
                    self.function(*self.waiting.pop(0))
            if not self.changed:
                return self.found
        raise RuntimeError("the analysis does not settle")

    # Functions and classes

    def function(self, code: Code, parent: Scope) -> None:
        node = code.node
        if node.name == GATE and parent.parent is None:
            return  # the gate itself
        private = node.name.startswith("_") and not node.name.startswith("__")
        if private and node.name in self.mentioned and node not in self.reached:
            return  # this version calls it nowhere
        scope = Scope(parent.file, parent, node, code.owner)
        given = node.args.posonlyargs + node.args.args
        for i, argument in enumerate(given + node.args.kwonlyargs):
            value = self.annotation(argument.annotation, scope)
            value |= self.arguments.get((node, argument.arg), NOTHING)
            if i == 0 and code.owner is not None and not _decorated(node, "staticmethod"):
                value = frozenset({Kind(code.owner) if _decorated(node, "classmethod") else Object(code.owner)})
            scope.bind(argument.arg, value or self.by_name(argument.arg))
        for extra in (node.args.vararg, node.args.kwarg):
            if extra is not None:
                scope.bind(extra.arg, OTHER)
        self.returns.setdefault(node, NOTHING)
        self.learn(self.returns, node, self.annotation(node.returns, scope))
        self.block(node.body, scope)

    def define_class(self, node: ast.ClassDef, scope: Scope) -> None:
        bases = NOTHING
        for base in node.bases:
            bases |= self.eval(base, scope)
        self.bases[node] = bases or OTHER
        for decorator in node.decorator_list:
            self.eval(decorator, scope)
        scope.bind(node.name, frozenset({Kind(node)}))
        body = Scope(scope.file, scope, None, node)
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                for decorator in statement.decorator_list:
                    self.eval(decorator, scope)
                code = Code(statement, node)
                self.learn(self.attributes, (node, statement.name), frozenset({code}))
                self.waiting.append((code, scope))
            else:
                self.statement(statement, body)
        for name, value in body.ever.items():
            self.learn(self.attributes, (node, name), value)

    def learn(self, where: dict, key: object, value: Value) -> None:
        before = where.get(key, NOTHING)
        if not value <= before:
            where[key] = before | value
            self.changed = True

    # Statements; each answers whether what follows it may run

    def block(self, body: list[ast.stmt], scope: Scope) -> bool:
        return all(self.statement(statement, scope) for statement in body)

    def statement(self, node: ast.stmt, scope: Scope) -> bool:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                for expression in (*node.decorator_list, *node.args.defaults, *node.args.kw_defaults):
                    if expression is not None:
                        self.eval(expression, scope)
                code = Code(node, None)
                scope.bind(node.name, frozenset({code}))
                self.waiting.append((code, scope))
            case ast.ClassDef():
                self.define_class(node, scope)
            case ast.Return():
                if node.value is not None and scope.function is not None:
                    self.learn(self.returns, scope.function, self.eval(node.value, scope))
                return False
            case ast.Raise():
                self.children(node, scope)
                return False
            case ast.Break() | ast.Continue():
                return False
            case ast.Assert():
                return self.truth(node.test, scope) is not False
            case ast.Assign():
                value = self.eval(node.value, scope)
                for target in node.targets:
                    self.assign(target, value, scope)
            case ast.AnnAssign():
                value = self.annotation(node.annotation, scope)
                if node.value is not None:
                    value |= self.eval(node.value, scope)
                self.assign(node.target, value, scope)
            case ast.AugAssign():
                self.assign(node.target, self.eval(node.target, scope) | self.eval(node.value, scope), scope)
            case ast.If():
                return self.choice(node, scope)
            case ast.For() | ast.AsyncFor() | ast.While():
                return self.loop(node, scope)
            case ast.With() | ast.AsyncWith():
                for item in node.items:
                    value = self.entered(self.eval(item.context_expr, scope))
                    if item.optional_vars is not None:
                        self.assign(item.optional_vars, value, scope)
                return self.block(node.body, scope)
            case ast.Try() | ast.TryStar():
                return self.attempt(node, scope)
            case ast.Match():
                self.eval(node.subject, scope)
                self.branches([case.body for case in node.cases], scope, [case.pattern for case in node.cases])
            case ast.Import():
                for alias in node.names:
                    self.import_(alias, scope)
            case ast.ImportFrom():
                self.import_from(node, scope)
            case _:
                self.children(node, scope)
        return True

    def choice(self, node: ast.If, scope: Scope) -> bool:
        truth = self.truth(node.test, scope)
        if truth is not None:
            return self.block(node.body if truth else node.orelse, scope)
        return self.branches([node.body, node.orelse], scope)

    def branches(self, bodies: list[list[ast.stmt]], scope: Scope, patterns: list[ast.pattern] | None = None) -> bool:
        """Each body from the same start; afterwards names are what any of those that go on made them."""
        start, ends = dict(scope.here), []
        for i, body in enumerate(bodies):
            scope.here = dict(start)
            if patterns is not None:
                for part in ast.walk(patterns[i]):
                    if isinstance(part, ast.MatchValue):
                        self.eval(part.value, scope)
                    elif isinstance(part, ast.MatchAs | ast.MatchStar) and part.name is not None:
                        scope.bind(part.name, OTHER)
            if self.block(body, scope):
                ends.append(scope.here)
        scope.here = joined(ends or [start])
        return bool(ends) or patterns is not None

    def loop(self, node: ast.For | ast.AsyncFor | ast.While, scope: Scope) -> bool:
        for _ in range(2):  # the second time with what the first made of the names
            before = dict(scope.here)
            if isinstance(node, ast.While):
                if self.truth(node.test, scope) is False:
                    return True
            else:
                self.assign(node.target, self.item(self.eval(node.iter, scope)), scope)
            self.block(node.body, scope)
            scope.here = joined([before, scope.here])
        self.block(node.orelse, scope)
        return True

    def attempt(self, node: ast.Try | ast.TryStar, scope: Scope) -> bool:
        before = dict(scope.here)
        goes_on = self.block(node.body, scope) and self.block(node.orelse, scope)
        ends = [scope.here] if goes_on else []
        middle = joined([before, scope.here])
        for handler in node.handlers:
            scope.here = dict(middle)
            if handler.type is not None:
                self.eval(handler.type, scope)
            if handler.name is not None:
                scope.bind(handler.name, OTHER)
            if self.block(handler.body, scope):
                ends.append(scope.here)
        scope.here = joined(ends or [middle])
        return self.block(node.finalbody, scope) and bool(ends)

    def assign(self, target: ast.expr, value: Value, scope: Scope) -> None:
        match target:
            case ast.Name():
                known = value - OTHER
                scope.bind(target.id, value if known else self.by_name(target.id) or value or OTHER)
            case ast.Tuple() | ast.List():
                for i, element in enumerate(target.elts):
                    part = NOTHING
                    for atom in value:
                        if isinstance(atom, Fixed) and len(atom.items) == len(target.elts):
                            part |= atom.items[i]
                        else:
                            part |= self.item(frozenset({atom}))
                    self.assign(element, part, scope)
            case ast.Starred():
                self.assign(target.value, frozenset({Many(self.item(value))}), scope)
            case ast.Attribute():
                for atom in self.eval(target.value, scope):
                    self.store(atom, target, value)
            case ast.Subscript():
                key = self.eval(target.slice, scope)
                self.eval(target.value, scope)
                if isinstance(target.value, ast.Name):
                    self.widen(target.value.id, Table(key, value), scope)

    def store(self, atom: Atom, target: ast.Attribute, value: Value) -> None:
        if isinstance(atom, Instance):
            member = self.version.names[atom.name].members.get(target.attr)
            self.used.add(f"{atom.name}.{target.attr}")
            if member is None:
                self.report(target, f"{atom.name} has no {target.attr}")
            elif not member.writable:
                self.report(target, f"{atom.name}.{target.attr} cannot be set")
        elif isinstance(atom, Object):
            owner = self.tensorrt_base(atom.node)
            member = self.version.names[owner].members.get(target.attr) if owner is not None else None
            if member is None:
                self.learn(self.attributes, (atom.node, target.attr), value)

    def widen(self, name: str, atom: Atom, scope: Scope) -> None:
        """`name` is a list or a dictionary that gets one more."""
        scope.bind(name, scope.find(name) | {atom})

    # Expressions

    def eval(self, node: ast.expr, scope: Scope) -> Value:
        match node:
            case ast.Constant():
                return frozenset({Constant(node.value)}) if isinstance(node.value, bool | int | str) else OTHER
            case ast.Name():
                value = scope.find(node.id) or self.by_name(node.id) or OTHER
                self.reach(value)
                return value
            case ast.Attribute():
                value = NOTHING
                for atom in self.eval(node.value, scope):
                    value |= self.attribute(atom, node.attr, node)
                self.reach(value)
                return value or OTHER
            case ast.Call():
                return self.call(node, scope) or OTHER
            case ast.BoolOp():
                return self.both_or_either(node, scope)
            case ast.UnaryOp(op=ast.Not()):
                truth = self.truth(node.operand, scope)
                return OTHER if truth is None else frozenset({Constant(not truth)})
            case ast.IfExp():
                truth = self.truth(node.test, scope)
                if truth is not None:
                    return self.eval(node.body if truth else node.orelse, scope)
                return self.eval(node.body, scope) | self.eval(node.orelse, scope)
            case ast.NamedExpr():
                value = self.eval(node.value, scope)
                self.assign(node.target, value, scope)
                return value
            case ast.Tuple():
                return frozenset({Fixed(tuple(self.eval(element, scope) for element in node.elts))})
            case ast.List() | ast.Set():
                return frozenset({Many(union(self.eval(element, scope) for element in node.elts))})
            case ast.Dict():
                keys = union(self.eval(key, scope) for key in node.keys if key is not None)
                return frozenset({Table(keys, union(self.eval(value, scope) for value in node.values))})
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
                if not self.generators(node.generators, scope):
                    return frozenset({Many(NOTHING)})
                return frozenset({Many(self.eval(node.elt, scope))})
            case ast.DictComp():
                if not self.generators(node.generators, scope):
                    return frozenset({Table(NOTHING, NOTHING)})
                return frozenset({Table(self.eval(node.key, scope), self.eval(node.value, scope))})
            case ast.Subscript():
                return self.subscript(node, scope)
            case ast.Lambda():
                inner = Scope(scope.file, scope, None, None)
                for argument in node.args.posonlyargs + node.args.args + node.args.kwonlyargs:
                    inner.bind(argument.arg, self.by_name(argument.arg) or OTHER)
                self.eval(node.body, inner)
                return OTHER
            case ast.Yield():
                value = self.eval(node.value, scope) if node.value is not None else OTHER
                if scope.function is not None:
                    self.learn(self.returns, scope.function, value)
                return OTHER
            case ast.Starred() | ast.Await():
                return self.eval(node.value, scope)
        self.children(node, scope)
        return OTHER

    def children(self, node: ast.AST, scope: Scope) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.eval(child, scope)
            else:
                self.children(child, scope)

    def truth(self, node: ast.expr, scope: Scope) -> bool | None:
        """Whether the condition holds in this version; None if that does not depend on the version alone."""
        value = self.eval(node, scope)
        if len(value) == 1 and isinstance(constant := next(iter(value)), Constant):
            return bool(constant.value)
        return None

    def both_or_either(self, node: ast.BoolOp, scope: Scope) -> Value:
        decides = isinstance(node.op, ast.Or)
        value = NOTHING
        for operand in node.values:
            one = self.eval(operand, scope)
            truth = next(iter(one)).value if len(one) == 1 and isinstance(next(iter(one)), Constant) else None  # type: ignore[attr-defined]
            if truth is None:
                value |= one
            elif bool(truth) is decides:
                return value | one if value else one  # the rest is never asked
        return value or frozenset({Constant(not decides)})

    def generators(self, generators: list[ast.comprehension], scope: Scope) -> bool:
        for generator in generators:
            self.assign(generator.target, self.item(self.eval(generator.iter, scope)), scope)
            if any(self.truth(condition, scope) is False for condition in generator.ifs):
                return False
        return True

    def subscript(self, node: ast.Subscript, scope: Scope) -> Value:
        index = self.eval(node.slice, scope)
        value = NOTHING
        for atom in self.eval(node.value, scope):
            at = next((i.value for i in index if isinstance(i, Constant)), None)
            if isinstance(atom, Fixed) and isinstance(at, int) and -len(atom.items) <= at < len(atom.items):
                value |= atom.items[at]
            elif isinstance(atom, Table):
                value |= atom.value
            else:
                value |= self.item(frozenset({atom}))
        return value or OTHER

    def item(self, value: Value) -> Value:
        """What iterating over a value gives."""
        result = NOTHING
        for atom in value:
            match atom:
                case Many():
                    result |= atom.item
                case Fixed():
                    result |= union(atom.items)
                case Table():
                    result |= atom.key
                case Instance(name="INetworkDefinition"):
                    result |= self.typed("ILayer")
        return result or OTHER

    def entered(self, value: Value) -> Value:
        """What `with value as x` binds."""
        result = NOTHING
        for atom in value:
            match atom:
                case Context():
                    result |= atom.yields
                case Object():
                    result |= self.result(self.attribute(atom, "__enter__", None))
                case _:
                    result |= {atom}
        return result

    # Attributes

    def attribute(self, atom: Atom, name: str, node: ast.AST | None) -> Value:
        match atom:
            case TensorRT():
                return self.of_module(name, node)
            case Class():
                return self.of_class(atom.name, name, node)
            case Instance():
                return self.of_instance(atom.name, name, node)
            case Kind():
                return self.inherited(atom.node, name, node, instance=None)
            case Object():
                return self.inherited(atom.node, name, node, instance=atom)
            case File():
                return self.of_file(atom.name, name)
            case Table() if name in ("items", "keys", "values", "get", "pop", "setdefault"):
                return frozenset({TableMethod(atom, name)})
            case Other() if name in NAMED:
                return frozenset({TensorRT()})
        return OTHER

    def of_module(self, name: str, node: ast.AST | None) -> Value:
        if name not in self.version.names:
            if not (name.startswith("__") and name.endswith("__")):
                self.report(node, f"there is no {name}")
            return OTHER
        self.used.add(name)
        found = self.version.names[name]
        match found.kind:
            case "class" | "enum":
                return frozenset({Class(name)})
            case "function":
                return frozenset({Function(name)})
            case "value":  # trt.float16 is "DataType.HALF"
                return self.typed(found.value.partition(".")[0])
        self.report(node, f"{name} needs an import of its own")
        return OTHER

    def of_class(self, owner: str, name: str, node: ast.AST | None) -> Value:
        found = self.version.names[owner]
        if f"{owner}.{name}" in self.version.names:
            return frozenset({Class(f"{owner}.{name}")})
        if name in found.numbers:
            self.used.add(f"{owner}.{name}")
            return frozenset({Instance(owner)})
        if found.kind == "enum" and name == "__members__":
            return frozenset({Table(OTHER, frozenset({Instance(owner)}))})
        if name in found.members:
            return self.member(owner, name, found.members[name], node, bound=False)
        if name == "__init__":
            self.report(node, f"{owner} cannot be constructed")
        elif not hasattr(type, name):
            self.report(node, f"{owner} has no {name}")
        return OTHER

    def of_instance(self, owner: str, name: str, node: ast.AST | None) -> Value:
        found = self.version.names[owner]
        if found.kind == "enum":
            if name in ("name", "value"):
                return OTHER
            return self.of_class(owner, name, node)
        if name in found.members:
            return self.member(owner, name, found.members[name], node, bound=True)
        if not (name.startswith("__") and name.endswith("__")):
            self.report(node, f"{owner} has no {name}")
        return OTHER

    def member(self, owner: str, name: str, member: Member, node: ast.AST | None, bound: bool) -> Value:
        self.used.add(f"{owner}.{name}")
        if member.kind == "method":
            return frozenset({Method(owner, name, bound)})
        if member.kind == "enum":
            return frozenset({Class(member.type)})
        if not member.readable and bound:
            self.report(node, f"{owner}.{name} cannot be read")
        return self.typed(member.type) if bound or member.kind == "value" else OTHER

    def inherited(self, owner: ast.ClassDef, name: str, node: ast.AST | None, instance: Object | None) -> Value:
        """An attribute of a class of the program, or of what it derives from."""
        if (instance is None or not instance.parents_only) and (owner, name) in self.attributes:
            result = NOTHING
            for atom in self.attributes[owner, name]:
                if isinstance(atom, Code):
                    free = instance is None or _decorated(atom.node, "staticmethod")
                    bound = not free or _decorated(atom.node, "classmethod")
                    self.reached_now(atom.node)
                    if _decorated(atom.node, "property", "cached_property") and instance is not None:
                        result |= self.returns.get(atom.node, NOTHING)
                    else:
                        result |= {Code(atom.node, atom.owner, bound)}
                else:
                    result |= {atom}
            return result
        result = NOTHING
        for base in self.bases.get(owner, OTHER):
            match base:
                case Kind():
                    up = None if instance is None else Object(base.node)
                    result |= self.inherited(base.node, name, node, up)
                case Class():
                    one = self.of_class if instance is None else self.of_instance
                    result |= one(base.name, name, node)
        if not result and name in NAMED:
            return frozenset({TensorRT()})
        return result or OTHER

    def tensorrt_base(self, owner: ast.ClassDef) -> str | None:
        for base in self.bases.get(owner, NOTHING):
            if isinstance(base, Class):
                return base.name
            if isinstance(base, Kind) and (found := self.tensorrt_base(base.node)) is not None:
                return found
        return None

    def of_file(self, module: str, name: str) -> Value:
        if f"{module}.{name}" in self.files:
            return frozenset({File(f"{module}.{name}")})
        if module not in self.files:
            return OTHER
        return self.globals[module].ever.get(name, NOTHING) or self.by_name(name) or OTHER

    # Calls

    def call(self, node: ast.Call, scope: Scope) -> Value:
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        special = self.special(name, node, scope)
        if special is not None:
            return special
        called = self.eval(node.func, scope)
        given = [self.eval(argument, scope) for argument in node.args]
        named = {keyword.arg: self.eval(keyword.value, scope) for keyword in node.keywords}
        open_ended = None in named or any(isinstance(argument, ast.Starred) for argument in node.args)
        keywords = {key: value for key, value in named.items() if key is not None}
        if (
            name == "append"
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and given
        ):
            self.widen(node.func.value.id, Many(given[0]), scope)
        result = NOTHING
        for atom in called:
            match atom:
                case Class():
                    result |= self.construct(atom.name, node, None if open_ended else (len(given), set(keywords)))
                case Method():
                    if not open_ended:
                        self.fits(atom, node, len(given) - (not atom.bound), set(keywords))
                    result |= self.result(frozenset({atom}))
                case Code():
                    self.bind(atom, given, keywords)
                    result |= self.result(frozenset({atom}))
                case Kind():
                    start = self.attributes.get((atom.node, "__init__"), NOTHING)
                    for code in start:
                        if isinstance(code, Code):
                            self.bind(Code(code.node, code.owner, bound=True), given, keywords)
                    if not start:
                        self.bind_fields(atom.node, given, keywords)
                    result |= {Object(atom.node)}
                case _:
                    result |= self.result(frozenset({atom}))
        return result

    def special(self, name: str, node: ast.Call, scope: Scope) -> Value | None:
        """Calls that mean more than their signature says; None for all others."""
        first = self.eval(node.args[0], scope) if node.args else NOTHING
        text = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else None
        if name == GATE and len(node.args) == 2 and TensorRT() in first:
            if not isinstance(text, str):
                return None
            return self.gate(text, node)
        if isinstance(node.func, ast.Attribute) and name not in ("import_module", "cast"):
            return None
        match name:
            case "hasattr" if len(node.args) == 2 and isinstance(text, str):
                known = [atom for atom in first if isinstance(atom, TensorRT | Class | Instance)]
                if len(known) != len(first) or not known:
                    return None
                owners = {f"{atom.name}." if isinstance(atom, Class | Instance) else "" for atom in known}
                answers = {self.gate(owner + text, node) for owner in owners}
                return answers.pop() if len(answers) == 1 else OTHER
            case "getattr" if len(node.args) >= 2:
                fallback = self.eval(node.args[2], scope) if len(node.args) == 3 else None
                return self.getattr(first, text, fallback, node)
            case "import_module" | "__import__" if node.args:
                modules = {atom.value for atom in first if isinstance(atom, Constant)}
                return frozenset({TensorRT()}) if modules & MODULES else None
            case "cast" if len(node.args) == 2:
                self.eval(node.args[1], scope)
                return self.annotation(node.args[0], scope) or self.eval(node.args[1], scope)
            case "super" if not node.args and scope.owner is not None:
                return frozenset({Object(scope.owner, parents_only=True)})
            case "list" | "tuple" | "sorted" | "reversed" | "set" | "iter" if len(node.args) == 1:
                return frozenset({Many(self.item(first))})
            case "next" if node.args:
                return self.item(first)
            case "enumerate" if node.args:
                return frozenset({Many(frozenset({Fixed((OTHER, self.item(first)))}))})
            case "zip" if not any(isinstance(argument, ast.Starred) for argument in node.args):
                items = tuple(self.item(self.eval(argument, scope)) for argument in node.args)
                return frozenset({Many(frozenset({Fixed(items)}))})
        return None

    def gate(self, path: str, node: ast.AST) -> Value:
        if not any(snapshot(version).exists(path) for version in ALL):
            self.report(node, f"the gate {path!r} names nothing that any version has")
        return frozenset({Constant(self.version.exists(path))})

    def getattr(self, first: Value, text: object, fallback: Value | None, node: ast.AST) -> Value | None:
        mine = [atom for atom in first if isinstance(atom, TensorRT | Class | Instance)]
        if not mine:
            return None
        result = NOTHING
        for atom in mine:
            path = text if isinstance(atom, TensorRT) else f"{atom.name}.{text}"
            if not isinstance(text, str):
                if fallback is None:
                    self.report(
                        node, "getattr with a computed name cannot be checked: give a fallback, or use __members__"
                    )
                result |= {Instance(atom.name)} if isinstance(atom, Class) else OTHER
            elif fallback is None or self.version.exists(str(path)):
                result |= self.attribute(atom, text, node)
        return result | (fallback or NOTHING)

    def construct(self, owner: str, node: ast.AST, given: tuple[int, set[str]] | None) -> Value:
        if self.version.names[owner].kind == "class":
            start = self.version.names[owner].members.get("__init__")
            if start is None:
                self.report(node, f"{owner} cannot be constructed")
            elif given is not None:
                self.fits(Method(owner, "__init__", bound=True), node, *given)
        return frozenset({Instance(owner)})

    def fits(self, method: Method, node: ast.AST, positional: int, keywords: set[str]) -> None:
        overloads = self.version.names[method.owner].members[method.name].signatures
        if overloads and not any(overload.accepts(positional, keywords) for overload in overloads):
            shown = " or ".join(_shown(overload) for overload in overloads)
            self.report(node, f"{method.owner}.{method.name} takes {shown}")

    def result(self, called: Value) -> Value:
        """What calling gives."""
        value = NOTHING
        for atom in called:
            match atom:
                case Method():
                    member = self.version.names[atom.owner].members[atom.name]
                    value |= union(self.typed(overload.returns) for overload in member.signatures)
                case Function():
                    signatures = self.version.names[atom.name].members["__call__"].signatures
                    value |= union(self.typed(overload.returns) for overload in signatures)
                case Code():
                    returned = self.returns.get(atom.node, NOTHING)
                    if _decorated(atom.node, "contextmanager", "asynccontextmanager"):
                        returned = frozenset({Context(returned)})
                    elif _yields(atom.node):
                        returned = frozenset({Many(returned)})
                    value |= returned
                case Maker():
                    value |= self.typed(_MADE) if atom.calls == 1 else {Maker(atom.calls - 1)}
                case TableMethod():
                    table = atom.table
                    pair: Value = frozenset({Fixed((table.key, table.value))})
                    each = {"items": pair, "keys": table.key, "values": table.value}.get(atom.name)
                    value |= table.value if each is None else frozenset({Many(each)})
                case _:
                    value |= OTHER
        return value

    def bind(self, code: Code, given: list[Value], keywords: dict[str, Value]) -> None:
        """What a call says of the function's arguments."""
        self.reached_now(code.node)
        arguments = code.node.args
        names = [argument.arg for argument in arguments.posonlyargs + arguments.args][int(code.bound) :]
        known = {*names, *(argument.arg for argument in arguments.kwonlyargs)}
        for name, value in [*zip(names, given, strict=False), *keywords.items()]:
            if name in known:
                self.learn(self.arguments, (code.node, name), _followed(value))

    def bind_fields(self, owner: ast.ClassDef, given: list[Value], keywords: dict[str, Value]) -> None:
        """The same for a dataclass."""
        names = [
            statement.target.id
            for statement in owner.body
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        ]
        for name, value in [*zip(names, given, strict=False), *keywords.items()]:
            if name in names:
                self.learn(self.attributes, (owner, name), _followed(value))

    # Names

    def import_(self, alias: ast.alias, scope: Scope) -> None:
        module, *rest = alias.name.split(".")
        if module in MODULES:
            for part in rest:
                if part not in self.version.names:
                    self.report(alias, f"there is no {part}")
            scope.bind(alias.asname or module, frozenset({TensorRT()}))
        else:
            scope.bind(alias.asname or module, OTHER)

    def import_from(self, node: ast.ImportFrom, scope: Scope) -> None:
        module = node.module or ""
        if node.level:
            here = scope.file.split(".")
            module = ".".join([*here[: len(here) - node.level], *filter(None, [module])])
        for alias in node.names:
            if module in MODULES and alias.name == "*":
                self.report(node, "import * cannot be checked")
                continue
            if module in MODULES:
                value = self.of_module(alias.name, node)
            elif module.split(".")[0] == "polygraphy":
                value = frozenset({Maker(MAKERS[alias.name])}) if alias.name in MAKERS else OTHER
            else:
                value = self.of_file(module.removeprefix("dynamictrl_edge."), alias.name)
            scope.bind(alias.asname or alias.name, value)

    def by_name(self, name: str) -> Value:
        return frozenset({TensorRT()}) if name in NAMED else NOTHING

    def reach(self, value: Value) -> None:
        for atom in value:
            if isinstance(atom, Code):
                self.reached_now(atom.node)

    def reached_now(self, node: ast.AST) -> None:
        if node not in self.reached:
            self.reached.add(node)
            self.changed = True

    def typed(self, text: str) -> Value:
        """The value that a type in a signature stands for."""
        if (name := self.version.class_of(text)) is not None:
            return frozenset({Instance(name)})
        head, _, inner = text.partition("[")
        if head in ("List", "list", "collections.abc.Sequence"):
            return frozenset({Many(self.typed(inner.removesuffix("]")))})
        return OTHER

    def annotation(self, node: ast.expr | None, scope: Scope) -> Value:
        """What an annotation says, if it says something of TensorRT or of a class of the program. Reports nothing: the
        interpreter does not evaluate it either."""
        match node:
            case ast.Constant(value=str(text)):
                try:
                    return self.annotation(ast.parse(text, mode="eval").body, scope)
                except SyntaxError:
                    return NOTHING
            case ast.Name() | ast.Attribute():
                before = set(self.found)
                value = self.eval(node, scope)
                self.found = before
                instances: dict[type, type] = {Class: Instance, Kind: Object}
                return frozenset(
                    Instance(atom.name) if isinstance(atom, Class) else Object(atom.node)
                    for atom in value
                    if type(atom) in instances and isinstance(atom, Class | Kind)
                )
            case ast.BinOp():
                return self.annotation(node.left, scope) | self.annotation(node.right, scope)
            case ast.Subscript(value=ast.Name(id="Optional")):
                return self.annotation(node.slice, scope)
            case ast.Subscript(value=ast.Name(id="list" | "Sequence" | "Iterable" | "Iterator")):
                inner = self.annotation(node.slice, scope)
                return frozenset({Many(inner)}) if inner else NOTHING
        return NOTHING

    def report(self, node: ast.AST | None, text: str) -> None:
        if node is not None:
            self.found.add(Problem(self.file, getattr(node, "lineno", 0), self.version.name, text))


def _decorated(node: ast.FunctionDef | ast.AsyncFunctionDef, *names: str) -> bool:
    return any(
        (d.id if isinstance(d, ast.Name) else d.attr if isinstance(d, ast.Attribute) else "") in names
        for d in node.decorator_list
    )


def _followed(value: Value) -> Value:
    """Without constants: an argument that is True at one call may be anything at another."""
    return frozenset(atom for atom in value if not isinstance(atom, Constant | Other))


@cache
def _yields(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Yield | ast.YieldFrom) for part in ast.walk(node))


@cache
def _mentioned(tree: ast.Module) -> frozenset[str]:
    """Every name that the file reads."""
    parts = list(ast.walk(tree))
    names = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}
    return frozenset(names | {part.attr for part in parts if isinstance(part, ast.Attribute)})


def _shown(signature: Signature) -> str:
    return f"({', '.join(parameter.name for parameter in signature.parameters)})"
