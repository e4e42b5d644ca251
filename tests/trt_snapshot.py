"""The public names of six TensorRT builds, as recorded in `tests/trt_api` (its README gives the format)."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

__all__ = ["ALL", "BUILDERS", "Member", "Name", "Parameter", "Signature", "Snapshot", "snapshot"]

FOLDER = Path(__file__).parent / "trt_api"
ALL = (
    "tensorrt-10.3.0",
    "tensorrt-10.13.3.9",
    "tensorrt-10.16.1.11",
    "tensorrt-11.4.0.106",
    "tensorrt_rtx-1.7.1.116",
    "tensorrt_lean-11.4.0.106",
)
BUILDERS = tuple(name for name in ALL if not name.startswith("tensorrt_lean"))


@dataclass(frozen=True)
class Parameter:
    """One argument of a signature; `default` is its source text, None where there is none."""

    name: str
    type: str
    default: str | None = None


@dataclass(frozen=True)
class Signature:
    """One overload, without `self`."""

    parameters: tuple[Parameter, ...]
    returns: str

    def accepts(self, positional: int, keywords: set[str]) -> bool:
        """Whether a call with so many positional arguments and these keywords fits."""
        names = [parameter.name for parameter in self.parameters]
        given = set(names[:positional])
        if positional > len(names) or given & keywords or not keywords <= set(names):
            return False
        required = {parameter.name for parameter in self.parameters if parameter.default is None}
        return required <= given | keywords


@dataclass(frozen=True)
class Member:
    """A member of a class: `kind` is method, property, or value (`type` then names the enum or class it is of)."""

    kind: str
    signatures: tuple[Signature, ...] = ()
    type: str = ""
    readable: bool = True
    writable: bool = False


@dataclass(frozen=True)
class Name:
    """A public name: `kind` is class, enum, function, value or submodule; `value` is the source text of a value."""

    kind: str
    bases: tuple[str, ...] = ()
    members: dict[str, Member] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    value: str = ""


@dataclass(frozen=True)
class Snapshot:
    """One build: `module` is what one imports."""

    name: str
    module: str
    version: str
    names: dict[str, Name]

    def exists(self, path: str) -> bool:
        """Whether "BuilderFlag.FP16" or "IStreamWriter" is there."""
        if path in self.names:
            return True
        owner, _, member = path.rpartition(".")
        found = self.names.get(owner)
        return found is not None and (member in found.members or member in found.numbers)

    def class_of(self, type_: str) -> str | None:
        """The public class or enum that a type in a signature means ("nvinfer1::IBuilder" is "Builder")."""
        bare = re.sub(r"^(\w+::)+", "", type_)
        for candidate in (bare, bare.removeprefix("I")):
            if candidate in self.names and self.names[candidate].kind in ("class", "enum"):
                return candidate
        return None


@cache
def snapshot(name: str) -> Snapshot:
    """Reads one of `ALL`."""
    raw = json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))
    return Snapshot(name, raw["module"], raw["version"], {key: _name(entry) for key, entry in raw["names"].items()})


def _name(entry: dict[str, object]) -> Name:
    kind = str(entry["kind"])
    raw = entry.get("members", {})
    bases = entry.get("bases", [])
    assert isinstance(raw, dict) and isinstance(bases, list)
    if kind == "enum":
        extra = entry.get("attributes", {})
        assert isinstance(extra, dict)
        return Name(kind, numbers=dict(raw), members={key: _member(text) for key, text in extra.items()})
    if kind == "class":
        return Name(kind, tuple(bases), {key: _member(text) for key, text in raw.items()})
    doc = str(entry.get("doc", ""))
    members = {"__call__": Member("method", _signatures(doc))} if kind == "function" else {}
    return Name(kind, members=members, value=doc)


def _member(text: str) -> Member:
    if text.startswith("property"):
        found = re.match(r"property(?: \([^)]*\))?(?: -> (?P<type>.*?))?(?:, (?P<how>[a-z-]+))?$", text)
        assert found is not None, text
        how = found["how"]
        return Member("property", (), found["type"] or "", how != "write-only", how in ("writable", "write-only"))
    if text.startswith("value "):  # "value ILogger.Severity.ERROR = 1"
        return Member("value", type=text.removeprefix("value ").split(" = ")[0].rpartition(".")[0])
    if text.startswith("enum "):
        return Member("enum", type=text.removeprefix("enum "))
    return Member("method", _signatures(text))


def _signatures(text: str) -> tuple[Signature, ...]:
    """ "f(self: A, b: int = 0) -> C | f(self: A) -> D" gives two."""
    name = text.split("(", 1)[0]
    overloads = re.split(rf" \| (?={re.escape(name)}\()", text) if name else [text]
    return tuple(_signature(overload) for overload in overloads if "(" in overload)


def _signature(text: str) -> Signature:
    arguments, _, returns = text.partition("(")[2].rpartition(")")
    parameters = []
    for part in _split(arguments):
        head, _, default = part.partition(" = ")
        name, _, type_ = head.partition(": ")
        parameters.append(Parameter(name.strip(), type_.strip(), default.strip() or None))
    if parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    return Signature(tuple(parameters), returns.removeprefix(" -> ").strip())


def _split(text: str) -> list[str]:
    """Cuts at commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([<{") - (character in ")]>}")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part for part in parts if part.strip()]
