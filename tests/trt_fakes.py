"""Modules with the surface of a recorded TensorRT version, and nothing behind it.

`fake_module("tensorrt-10.3.0")` has that version's classes, enums, functions and properties and no others: what the version
lacks raises `AttributeError`, as in the real module; arguments are held against the recorded signatures, and wrong ones
raise `TypeError`. Every call and every property that is set is kept in `module.calls` as (name, arguments).

Methods return something of the type that they promise: a new object, the first member of an enum, True, 0 or "". What is to
do more goes into `module.behaviours`, by name: `{"Builder.create_network": function}`; it gets the object and the named
arguments. For a property, it gets the object and gives its value. See `trt_fake_compiler`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, ClassVar

from tests.trt_snapshot import Member, Name, Signature, Snapshot, snapshot

__all__ = ["FakeModule", "fake_module"]

_SIZES = {
    "FLOAT": 4,
    "INT32": 4,
    "HALF": 2,
    "BF16": 2,
    "INT64": 8,
    "FP4": 0.5,
    "INT4": 0.5,
}  # DataType.itemsize; else 1


class FakeModule(ModuleType):
    """A module; `calls`, `behaviours` and `surface` (the snapshot) are ours."""

    def __init__(self, surface: Snapshot) -> None:
        super().__init__(surface.module)
        self.surface = surface
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.behaviours: dict[str, Callable[..., Any]] = {}

    def make(self, name: str) -> Any:
        """An object of a class that Python may not construct."""
        made = object.__new__(getattr(self, name))
        object.__setattr__(made, "_ready", True)
        return made

    def called(self, name: str) -> list[dict[str, Any]]:
        """The arguments of every call of "Builder.create_network", in order."""
        return [arguments for known, arguments in self.calls if known == name]


def fake_module(name: str) -> FakeModule:
    """One of `trt_snapshot.ALL`, as a module."""
    module = FakeModule(snapshot(name))
    names = module.surface.names
    for key, entry in names.items():
        if entry.kind == "enum" and "." not in key:
            setattr(module, key, _enum(module, key, entry))
    for key in _bases_first(names):
        setattr(module, key, _class(module, key, names[key]))
    for key, entry in names.items():
        if "." in key:  # ILogger.Severity, which Logger.Severity is as well
            owner, _, inner = key.rpartition(".")
            base = next((b for b in names[owner].bases if f"{b}.{inner}" in names), None)
            found = getattr(getattr(module, base), inner) if base else _enum(module, key, entry)
            setattr(getattr(module, owner), inner, found)
    for key, entry in names.items():
        if entry.kind == "class":
            _set_values(module, key, entry)
        elif entry.kind == "function":
            setattr(module, key, _function(module, key, entry))
        elif entry.kind == "value":
            setattr(module, key, _value(module, entry.value))
    return module


def _bases_first(names: dict[str, Name]) -> Iterator[str]:
    waiting = {key: entry.bases for key, entry in names.items() if entry.kind == "class" and "." not in key}
    while waiting:
        ready = [key for key, bases in waiting.items() if not set(bases) & waiting.keys()]
        for key in ready:
            del waiting[key]
            yield key


# Enums, as pybind11 makes them: not integers, and equal only to their own kind


class _EnumType(type):
    __members__: dict[str, Any]

    def __call__(cls, value: int) -> Any:
        number = operator.index(value)
        known = next((member for member in cls.__members__.values() if member.value == number), None)
        return known if known is not None else cls.make("???", number)

    def make(cls, name: str, value: int) -> Any:
        made: Any = type.__call__(cls)
        made.name, made.value = name, value
        return made


class _Enum:
    name: str
    value: int

    def __int__(self) -> int:
        return self.value

    __index__ = __int__

    def __hash__(self) -> int:
        return self.value

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.value == self.value

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __repr__(self) -> str:
        return f"<{self}: {self.value}>"


def _enum(module: FakeModule, key: str, entry: Name) -> type:
    made: Any = _EnumType(key.rpartition(".")[2], (_Enum,), {"__module__": module.__name__})
    made.__members__ = {name: made.make(name, value) for name, value in entry.numbers.items()}
    for name, member in made.__members__.items():
        setattr(made, name, member)
    if "itemsize" in entry.members:
        made.itemsize = property(lambda self: _SIZES.get(self.name, 1))
    return made


# Classes


class _Type(type):
    """Refuses what pybind11 refuses: objects without a constructor, and subclasses that forget the base's `__init__`."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made: Any = super().__call__(*args, **kwargs)
        if not made.__dict__.get("_ready"):
            raise TypeError(f"{cls.__mro__[1].__name__}.__init__() must be called when overriding __init__")
        return made


class _Object(metaclass=_Type):
    """What all classes of a fake derive from. Only classes of the program that derive from them take new attributes."""

    _module: ClassVar[FakeModule]
    _own: ClassVar[bool] = True

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def __init_subclass__(cls) -> None:
        cls._own = "_module" in cls.__dict__

    def __setattr__(self, name: str, value: Any) -> None:
        if self._own and not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)

    @property
    def state(self) -> dict[str, Any]:
        """What the fake remembers of the object; not part of the surface."""
        return self.__dict__.setdefault("_state", {})


class _Sized(_Object):
    """A network is a sequence of layers."""

    def __len__(self) -> int:
        return len(self.state.get("layers", ()))

    def __getitem__(self, index: int) -> Any:
        return self.state.get("layers", ())[index]


class _Truth(_Object):
    """A profile is true while what it holds is in order."""

    def __bool__(self) -> bool:
        return bool(self._module.behaviours.get("IOptimizationProfile.__bool__", lambda self: True)(self))


class _Shape(_Object):
    """Dims"""

    def __iter__(self) -> Iterator[int]:
        return iter(self.state["shape"])

    def __len__(self) -> int:
        return len(self.state["shape"])

    def __getitem__(self, index: Any) -> Any:
        return self.state["shape"][index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Iterable) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return str(tuple(self))


class _Memory(bytearray):
    """IHostMemory: a buffer, without a length of its own."""

    def __len__(self) -> int:
        raise TypeError("object of type 'IHostMemory' has no len()")

    def __bool__(self) -> bool:
        return True

    @property
    def nbytes(self) -> int:
        return memoryview(self).nbytes


_BASES: dict[str, type] = {"INetworkDefinition": _Sized, "IOptimizationProfile": _Truth, "Dims": _Shape}
_MANAGED = (
    "Builder",
    "INetworkDefinition",
    "IBuilderConfig",
    "OnnxParser",
    "Runtime",
    "ICudaEngine",
    "IExecutionContext",
)


def _class(module: FakeModule, key: str, entry: Name) -> type:
    if key == "IHostMemory":
        return type(key, (_Memory,), {"__module__": module.__name__, "dtype": property(lambda _: module.DataType.INT8)})
    bases = tuple(getattr(module, base) for base in entry.bases if hasattr(module, base)) or (_BASES.get(key, _Object),)
    inherited = {m for base in entry.bases if base in module.surface.names for m in module.surface.names[base].members}
    body: dict[str, Any] = {"__module__": module.__name__, "_module": module}
    for name, member in entry.members.items():
        if member.kind == "method" and (name == "__init__" or name not in inherited):
            body[name] = _method(module, key, name, member)
        elif member.kind == "property" and name not in inherited:
            body[name] = _property(module, key, name, member)
    if "__init__" not in entry.members:
        body["__init__"] = _no_constructor(key)
    if key in _MANAGED:
        body["__enter__"] = lambda self: self
        body["__exit__"] = lambda self, *_: None
    return _Type(key, bases, body)


def _no_constructor(key: str) -> Callable[..., None]:
    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise TypeError(f"{key}: No constructor defined!")

    return refuse


def _method(module: FakeModule, owner: str, name: str, member: Member) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        signature, bound = _chosen(module, name, member.signatures, args, kwargs)
        module.calls.append((f"{owner}.{name}", bound))
        if name == "__init__":
            object.__setattr__(self, "_ready", True)
        behaviour = module.behaviours.get(f"{owner}.{name}")
        return behaviour(self, **bound) if behaviour is not None else _anything(module, signature.returns)

    method.__name__ = name
    return method


def _property(module: FakeModule, owner: str, name: str, member: Member) -> property:
    def get(self: Any) -> Any:
        behaviour = module.behaviours.get(f"{owner}.{name}")
        if behaviour is not None:
            return behaviour(self)
        if name not in self.state:
            found = module.surface.class_of(member.type)
            is_class = found is not None and module.surface.names[found].kind == "class"
            return None if is_class else _anything(module, member.type, of_bool=False)
        return self.state[name]

    def put(self: Any, value: Any) -> None:
        if value is not None and not _is_a(module, member.type, value):
            raise TypeError(f"{owner}.{name}: incompatible function arguments: {value!r} is no {member.type}")
        module.calls.append((f"{owner}.{name}", {"value": value}))
        self.state[name] = value

    return property(get if member.readable else None, put if member.writable else None)


def _set_values(module: FakeModule, key: str, entry: Name) -> None:
    for name, member in entry.members.items():
        if member.kind == "value":
            owner: Any = module
            for part in member.type.split("."):
                owner = getattr(owner, part)
            setattr(getattr(module, key), name, getattr(owner, name))


def _function(module: FakeModule, key: str, entry: Name) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        signature, bound = _chosen(module, key, entry.members["__call__"].signatures, args, kwargs)
        module.calls.append((key, bound))
        behaviour = module.behaviours.get(key)
        return behaviour(**bound) if behaviour is not None else _anything(module, signature.returns)

    return function


def _value(module: FakeModule, text: str) -> Any:
    owner, _, name = text.partition(".")
    if name and hasattr(module, owner):  # DataType.HALF
        return getattr(getattr(module, owner), name)
    return text.strip("'")


# Signatures


def _chosen(
    module: FakeModule, name: str, signatures: tuple[Signature, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Signature, dict[str, Any]]:
    """The first overload that takes these arguments, and the arguments by name."""
    for signature in signatures:
        if not signature.accepts(len(args), set(kwargs)):
            continue
        types = {parameter.name: parameter.type for parameter in signature.parameters}
        bound = dict(zip(types, args, strict=False)) | kwargs
        if all(_is_a(module, types[key], value) for key, value in bound.items()):
            return signature, bound
    given = ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())])
    raise TypeError(f"{name}(): incompatible function arguments: {given}")


def _is_a(module: FakeModule, type_: str, value: Any) -> bool:
    """Whether pybind11 would take the value for this type."""
    found = module.surface.class_of(type_)
    if found is not None:
        kind: Any = module
        for part in found.split("."):
            kind = getattr(kind, part)
        sequence = found == "Dims" and isinstance(value, Iterable) and all(hasattr(n, "__index__") for n in value)
        return isinstance(value, kind) or sequence or found == "Weights"
    match type_:
        case "int" | "typing.SupportsInt":
            return hasattr(value, "__index__")
        case "bool":
            return isinstance(value, bool)
        case "float" | "typing.SupportsFloat":
            return isinstance(value, float | int)
        case "str":
            return isinstance(value, str)
        case "buffer" | "typing_extensions.Buffer":
            return isinstance(value, bytes | bytearray | memoryview)
    return True


def _anything(module: FakeModule, type_: str, of_bool: bool = True) -> Any:
    """Something of this type."""
    found = module.surface.class_of(type_)
    if found is not None:
        if module.surface.names[found].kind == "class":
            return module.make(found)
        kind: Any = module
        for part in found.split("."):
            kind = getattr(kind, part)
        return min(kind.__members__.values(), key=int)
    simple = {"bool": of_bool, "int": 0, "str": "", "float": 0.0}
    if type_ in simple:
        return simple[type_]
    return [] if type_.lower().startswith("list") else None
