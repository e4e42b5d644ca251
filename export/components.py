"""How each component's graphs and weights come into a bundle under construction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx

from ..bundle.config import TransformerConfig
from .convert import Converter
from .recipe import Recipe
from .trace import trace
from .transformer import graph_modules
from .transformer_weights import block_recipes, modulation_recipes, shared_recipes
from .vae import WeightFile, export_vae_graphs, vae_tensors
from .workspace import Workspace

__all__ = ["export_denoiser", "export_vae"]

Stage = Callable[[str], None]  # told what is being done


def export_denoiser(config: TransformerConfig, converter: Converter, workspace: Workspace, stage: Stage) -> None:
    """Six graphs, traced once; shared weights, and two files per block: the block's and its modulation's."""
    plan = [("denoiser", shared_recipes(config))]
    for i in range(config.num_layers):
        plan.append((f"block_{i:02d}", block_recipes(config, i)))
        plan.append((f"modulation_{i:02d}", modulation_recipes(config, i)))
    converter.write_all(plan, workspace, stage)
    for name, (module, signature) in graph_modules(config, converter.precision).items():
        stage(f"graph {name}")
        workspace.add_graph(name, trace(module, signature, name=name))


def export_vae(config: Mapping[str, Any], converter: Converter, workspace: Workspace, stage: Stage) -> None:
    """Four graphs whose weights are external initializers in the encoder's and the decoder's file."""
    plan = [
        (f"vae_{kind}", [Recipe(t.target, (t.source,), t.shape) for t in vae_tensors(kind, config)])
        for kind in ("encoder", "decoder")
    ]
    converter.write_all(plan, workspace, stage)
    stage("graphs of the VAE")
    files = {name.removeprefix("vae_"): WeightFile.read(workspace.weights_path(name)) for name, _ in plan}
    for graph in export_vae_graphs(config, converter.precision, workspace.root / "graphs", files):
        model = onnx.load(graph.path, load_external_data=False)
        workspace.add_graph(graph.name, model, weights=f"vae_{graph.name.split('_')[1]}")
