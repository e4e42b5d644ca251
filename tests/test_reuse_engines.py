"""The graphs of reuse as TensorRT-RTX engines: any number of active tokens, attention fused, weights as inputs."""

from __future__ import annotations

import pytest

from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.engines.build import build_set
from dynamictrl_edge.engines.engine_set import EngineSet
from dynamictrl_edge.engines.rules import CONSTANTS_LIMIT
from tests.conftest import Export
from tests.engine_samples import needs_rtx, plan_for, some_graphs

pytestmark = needs_rtx

GRAPHS = (
    *("tokens_keep", "tokens_reuse", "tokens_take", "tokens_put"),
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


def test_the_number_of_active_tokens_is_free(engines: EngineSet) -> None:
    least, best, most = engines.engines["tokens_reuse"].profile["video"]
    whole = engines.engines["tokens_keep"].profile["video"]
    assert (least[1], most[1]) == (1, whole[2][1])
    assert least[1] < best[1] < most[1]
    keys = engines.engines["tokens_reuse"].profile["keys"]
    assert (keys[0][1], keys[2][1]) == (1, whole[2][1])
