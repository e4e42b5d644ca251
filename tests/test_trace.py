"""Tracing one module: names, axes, what is refused, and what PyTorch need not do twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnxruntime
import pytest

pytest.importorskip("torch", reason="exporting needs the extra 'export'")

import torch
from torch import Tensor
from torch.onnx._internal.exporter import _fx_passes

from dynamictrl_edge.export.trace import Signature, _replaced, trace
from tests.export_samples import axes


class Product(torch.nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y


def signature(out: tuple[int | str, ...], x: tuple[int | str, ...] = ("B", 4)) -> Signature:
    f32 = torch.float32
    return Signature((("x", f32, x), ("y", f32, (4, 3))), (("out", f32, out),), {"B": 5})


def test_a_trace_keeps_names_and_axes_and_nothing_of_the_machine() -> None:
    model = trace(Product(), signature(("B", 3)), name="product")
    assert [axes(value.type.tensor_type.shape) for value in model.graph.input] == [("B", 4), (4, 3)]
    assert axes(model.graph.output[0].type.tensor_type.shape) == ("B", 3)
    assert b".py" not in model.SerializeToString()
    again = trace(Product(), signature(("B", 3)), name="product")
    assert model.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)


class Fixed(torch.nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x[: int(x.shape[0])].reshape(5, 4) @ y


@pytest.mark.parametrize(
    ("module", "out", "words"),
    [
        (Fixed(), ("B", 3), "specialised to 5"),
        (Product(), ("B", 2), "specialised to 3"),
        (Product(), ("B", 3, 1), "where .* was declared"),
    ],
)
def test_a_trace_that_is_not_what_was_declared_is_an_error(
    module: torch.nn.Module, out: tuple[int | str, ...], words: str
) -> None:
    with pytest.raises(RuntimeError, match=words):
        trace(module, signature(out), name="product")


class Reworded(torch.nn.Module):
    """Conversions that change something, that change nothing, and that are outputs; a square; reshaping."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = x.float().to(torch.float16)
        wide = half.float()
        product = (wide.square() + x.to(x)) @ y
        return product.reshape(x.shape[0], 3), half, wide.float()


class Decomposed(torch.nn.Module):
    """Holds an operator that has no translation, unless it is decomposed."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.huber_loss(x, x.square(), reduction="none") @ y


class Changed(torch.nn.Module):
    """Writes in place."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = x * 2
        z.add_(1)
        return z @ y


@pytest.mark.parametrize(
    ("module", "again"), [(Reworded(), False), (Decomposed(), True), (Changed(), True)], ids=lambda v: type(v).__name__
)
def test_only_what_has_no_translation_is_traced_again(
    module: torch.nn.Module, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, asked = _fx_passes.decompose_with_registry, []

    def counted(*given: Any) -> Any:
        asked.append(given)
        return original(*given)

    monkeypatch.setattr(_fx_passes, "decompose_with_registry", counted)
    x, y = torch.randn(5, 4), torch.randn(4, 3)
    wanted = module(x, y)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    outputs = tuple((f"out{i}", value.dtype, ("B", *value.shape[1:])) for i, value in enumerate(wanted))
    f32 = torch.float32
    model = trace(module, Signature((("x", f32, ("B", 4)), ("y", f32, (4, 3))), outputs, {"B": 5}), name="product")
    assert bool(asked) == again
    got = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy(), "y": y.numpy()})
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-5, atol=1e-5)


def test_the_short_way_gives_the_graph_of_the_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    f32 = torch.float32
    outputs = (("a", f32, ("B", 3)), ("b", torch.float16, ("B", 4)), ("c", f32, ("B", 4)))
    ports = Signature((("x", f32, ("B", 4)), ("y", f32, (4, 3))), outputs, {"B": 5})
    short = trace(Reworded(), ports, name="product")
    monkeypatch.setattr("dynamictrl_edge.export.trace._has_translation", lambda *_: False)
    long = trace(Reworded(), ports, name="product")
    assert Counter(n.op_type for n in short.graph.node) == Counter(n.op_type for n in long.graph.node)


@pytest.mark.parametrize(
    ("module", "path"),
    [
        ("torch.nothing_of_the_kind", "x"),
        ("torch.onnx", "Nothing.x"),
        ("torch.onnx", "nothing"),
        ("torch.nn", "Linear.nothing"),
    ],
)
def test_what_pytorch_does_not_have_is_not_replaced(module: str, path: str) -> None:
    with _replaced(module, path, lambda *_: pytest.fail("nothing to replace")):
        pass


def test_what_was_replaced_is_put_back() -> None:
    before = vars(torch.nn.Linear)["extra_repr"]
    with _replaced("torch.nn", "Linear.extra_repr", lambda owner, old: (owner, old)):
        assert vars(torch.nn.Linear)["extra_repr"] == (torch.nn.Linear, before)
    assert vars(torch.nn.Linear)["extra_repr"] is before
