"""The graphs of reuse as TensorRT-RTX engines: any number of active tokens, attention fused, weights as inputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamictrl_edge.bundle.manifest import BLOCK_KINDS, graph_form, graph_kind, read_manifest
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.engines.build import build_set
from dynamictrl_edge.engines.engine_set import EngineSet
from dynamictrl_edge.engines.rules import CONSTANTS_LIMIT
from tests.conftest import Export, Quantized
from tests.engine_samples import needs_rtx, plan_for, some_graphs

pytestmark = needs_rtx

GRAPHS = (
    *("tokens_keep", "tokens_reuse", "tokens_take", "tokens_put"),
    *("cache_narrow", "cache_widen"),
    *("trunk_keep", "trunk_reuse", "trunk_probe", "head_reuse"),
)


@pytest.fixture(scope="module")
def engines(exported: Export, tmp_path_factory: pytest.TempPathFactory) -> EngineSet:
    """One build for SM86, SM89 and SM120; it refuses engines that break a rule."""
    source = exported("cogvideox15-tiny", "fp16")
    bundle = Bundle(some_graphs(source, tmp_path_factory.mktemp("reuse") / "bundle", GRAPHS))
    return build_set(bundle, plan_for(bundle.root, "rtx3060", "rtx4090", "rtx5090")).engines


def test_all_of_them_build_for_three_generations_without_a_broken_rule(engines: EngineSet) -> None:
    assert engines.capabilities == ((8, 6), (8, 9), (12, 0))
    assert set(engines.engines) == set(GRAPHS)
    assert all(entry.broken == () for entry in engines.engines.values())


@pytest.mark.parametrize("name", ["tokens_keep", "tokens_reuse"])
def test_attention_is_fused_and_no_weight_is_inside(name: str, engines: EngineSet, exported: Export) -> None:
    entry = engines.engines[name]
    assert entry.fused_attention == 1
    block = Bundle(exported("cogvideox15-tiny", "fp16")).tensors("block_00").nbytes
    assert entry.weights_bytes < min(block / 4, CONSTANTS_LIMIT)


@pytest.mark.parametrize(
    ("scheme", "targets"), [("int8", ("rtx3060", "rtx4090", "rtx5090")), ("fp8", ("rtx4090", "rtx5090"))]
)
def test_token_steps_of_quantized_bundles_multiply_in_the_quantized_type(
    scheme: str, targets: tuple[str, ...], quantized: Quantized, tmp_path: Path
) -> None:
    """In every mixture. A build that computes a quantized linear on dequantized values breaks a rule, and is refused."""
    source = quantized(scheme, "fp16", 3)
    mixtures = read_manifest(source).block_graphs
    assert len(set(mixtures)) > 1
    names = tuple(dict.fromkeys(graph_form(kind, name) for kind in BLOCK_KINDS for name in mixtures))
    bundle = Bundle(some_graphs(source, tmp_path / "bundle", names))
    engines = build_set(bundle, plan_for(bundle.root, *targets)).engines
    assert set(engines.engines) == set(names)
    for name, entry in engines.engines.items():
        assert entry.fused_attention == 1 and entry.broken == () and entry.weights_bytes < CONSTANTS_LIMIT
        assert bundle.manifest.quantized_linears(name) == bundle.manifest.quantized_linears(_block_of(name))


def _block_of(name: str) -> str:
    return name.replace(graph_kind(name), "block")


def test_the_number_of_active_tokens_is_free(engines: EngineSet) -> None:
    least, best, most = engines.engines["tokens_reuse"].profile["video"]
    whole = engines.engines["tokens_keep"].profile["video"]
    assert (least[1], most[1]) == (1, whole[2][1])
    assert least[1] < best[1] < most[1]
    keys = engines.engines["tokens_reuse"].profile["keys"]
    assert (keys[0][1], keys[2][1]) == (1, whole[2][1])
