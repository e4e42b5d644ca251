"""The compiler's own words for why it failed, without what misleads: one paragraph from a log of hundreds of lines."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["cause_of"]

# Lines that follow almost every error on a machine without a GPU, whatever went wrong.
_NOISE = re.compile(
    r"CUDA lib|cudaError(InsufficientDriver)?\b.*\b35\b|cudaError 35|CUDA initialization failure|CUDA_ERROR|"
    r"no optimization profile has been defined",
    re.IGNORECASE,
)
_PLACE = re.compile(r"\s*\(?\[?(?:In [\w:<>~]+ at /|at /_src/|/_src/|/build/)\S*?:\d+\]?\)?")
_PREFIX = re.compile(r"^(?:IBuilder::\w+: |I\w+::\w+: )?")
_TAIL = re.compile(r"\s*In (?:compileGraph|[\w:~]+) at .*$", re.DOTALL)
_MAX = 600


def cause_of(messages: Iterable[str]) -> str:
    """The error lines of a log, cleaned and without repetitions, in order; "" if nothing but noise is there.

    Dropped: complaints about the missing GPU that TensorRT adds to other errors on machines without one, "no optimization
    profile" where a refused profile is the cause, and places in the compiler's own source.
    """
    lines: list[str] = []
    noise: list[str] = []
    for message in messages:
        text = _clean(message)
        kept = noise if _NOISE.search(message) else lines
        if text and text not in kept:
            kept.append(text)
    # Noise is dropped only beside something better: without a GPU, "no driver" may be the truth.
    text = " ".join(line if line.endswith((".", "!", "?")) else f"{line}." for line in lines or noise)
    return text if len(text) <= _MAX else text[: _MAX - 1].rstrip() + "…"


def _clean(message: str) -> str:
    text = _PREFIX.sub("", message.strip())
    text = _TAIL.sub("", text)
    text = _PLACE.sub("", text)
    text = " ".join(text.split()).strip(" :")
    # "(…)" that lost its end with the tail
    return text + ")" * max(0, text.count("(") - text.count(")"))
