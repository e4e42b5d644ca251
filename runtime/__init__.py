"""The lean runtime: numpy, av, pillow, tokenizers and one backend. Never torch, transformers, diffusers or onnx.

>>> from dynamictrl_edge.runtime import Animator
>>> animator = Animator.from_bundle("bundle")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .animator import Animator, Clip, Request

__all__ = ["Animator", "Clip", "Request"]


def __getattr__(name: str) -> Any:
    # Importing the package costs nothing until an animator is wanted.
    if name in __all__:
        from . import animator

        return getattr(animator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
