"""The components of a checkpoint on their way into a bundle: all of them are checked first, then come weights, then graphs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from torch import nn

from ..bundle.config import TextConfig, TransformerConfig
from ..bundle.manifest import OWN
from .convert import Converter
from .recipe import Recipe
from .reuse import reuse_modules
from .text_encoder import EMBEDDING_ALIASES, TextBlock, text_block_signature, text_layer_recipe, text_shared_recipe
from .trace import Signature, trace
from .transformer import graph_modules
from .transformer_weights import block_recipes, modulation_recipes, shared_recipes
from .vae import GRAPHS as VAE_GRAPHS
from .vae import WeightFile, export_vae_graph, vae_tensors
from .workspace import Workspace

__all__ = ["Component", "denoiser", "text_encoder", "vae"]

AddGraph = Callable[[Workspace], None]


@dataclass(frozen=True)
class Component:
    """What becomes of one component.

    `plan` lists weight files (name under weights/, recipes); `graphs` says for each graph how it comes into a workspace
    that holds those files; `unused` are names that the checkpoint may have for nothing.
    """

    converter: Converter
    plan: Sequence[tuple[str, Sequence[Recipe]]]
    graphs: Mapping[str, AddGraph]
    unused: Collection[str] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that will be written."""
        return sum(self.converter.nbytes(recipe) for _, recipes in self.plan for recipe in recipes)

    def check(self) -> None:
        """Refuses (`InputError`) missing, mis-shaped and extra tensors; reads headers only."""
        self.converter.check([recipe for _, recipes in self.plan for recipe in recipes], self.unused)

    def write_weights(self, workspace: Workspace, stage: Callable[[str], None]) -> None:
        """Writes every file of the plan; `stage` is told which. `InputError` names a tensor that is not finite."""
        for name, recipes in self.plan:
            stage(f"weights {name}")
            workspace.add_weights(name, self.converter.write(workspace.weights_path(name), recipes))


def denoiser(config: TransformerConfig, converter: Converter, reuse: bool) -> Component:
    """The loop's graphs and, if asked for, those of reuse between steps; shared weights, and two files per block: the block's
    and its modulation's."""
    plan = [("denoiser", shared_recipes(config))]
    for i in range(config.num_layers):
        plan.append((f"block_{i:02d}", block_recipes(config, i)))
        plan.append((f"modulation_{i:02d}", modulation_recipes(config, i)))
    modules = graph_modules(config, converter.precision)
    if reuse:
        modules |= reuse_modules(config, converter.precision)
    return Component(converter, plan, {name: _traced(name, *made) for name, made in modules.items()})


def text_encoder(config: TextConfig, converter: Converter) -> Component:
    """One graph; the weights outside the layers, and one file per layer."""
    plan = [("text", text_shared_recipe(config, converter.source))]
    plan += [(f"text_block_{i:02d}", text_layer_recipe(config, i)) for i in range(config.num_layers)]
    module, signature = TextBlock(config, converter.precision), text_block_signature(config, converter.precision)
    return Component(converter, plan, {"text_block": _traced("text_block", module, signature)}, EMBEDDING_ALIASES)


def vae(config: Mapping[str, Any], converter: Converter) -> Component:
    """Graphs whose weights are external initializers in the encoder's and the decoder's file.

    Raises `InputError` for a configuration of another kind of VAE.
    """
    plan = [
        (f"vae_{kind}", [Recipe(t.target, (t.source,), t.shape) for t in vae_tensors(kind, config)])
        for kind in ("encoder", "decoder")
    ]

    def exported(name: str) -> AddGraph:
        weights = "_".join(name.split("_")[:2])  # vae_encoder or vae_decoder

        def add(workspace: Workspace) -> None:
            file = WeightFile.read(workspace.weights_path(weights))
            graph = export_vae_graph(name, config, converter.precision, workspace.root / "graphs", file)
            workspace.add_graph(name, onnx.load(graph.path, load_external_data=False), weights=weights)

        return add

    return Component(converter, plan, {name: exported(name) for name in VAE_GRAPHS})


def _traced(name: str, module: nn.Module, signature: Signature) -> AddGraph:
    def add(workspace: Workspace) -> None:
        device = "cpu" if name.endswith(OWN) else "meta"
        workspace.add_graph(name, trace(module, signature, name=name, device=device))

    return add
