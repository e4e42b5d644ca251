"""The video VAE as ONNX graphs that run one time chunk per call.

| graph | chunk | input | output |
|---|---|---|---|
| `vae_encoder_first` | the first one, 4*k + 1 frames | `pixels` [1, 3, F, H, W] | `moments` [1, 2*C, k + 1, H/8, W/8] |
| `vae_encoder_next` | a later one, 8 frames | `pixels` [1, 3, 8, H, W] | `moments` [1, 2*C, 2, H/8, W/8] |
| `vae_decoder_first` | the first one, odd | `latents` [1, C, f, h, w] | `pixels` [1, 3, 4*f - 3, 8*h, 8*w] |
| `vae_decoder_first_even` | the first one, 2 frames | `latents` [1, C, 2, h, w] | `pixels` [1, 3, 8, 8*h, 8*w] |
| `vae_decoder_next` | a later one, 2 frames | `latents` [1, C, 2, h, w] | `pixels` [1, 3, 8, 8*h, 8*w] |

(4 and 8 are the usual compressions in time and space; those of the configuration are used.) Pixels lie in -1..1, decoded
ones are not clamped; moments are mean, then log variance; latents are unscaled. These are float32 in every precision.

Every convolution that looks back in time hands over the last frames it saw: output `state_out.NAME` of a call is input
`state_in.NAME` of the next one, NAME being the convolution's module path, in the precision of the graph. First chunks have
no past: there the first frame is repeated. In a first chunk of an odd number of frames, the first frame also stays alone
when time is halved or doubled, as in the published implementation, whose branches on frame counts are these graphs.

The arithmetic is that of diffusers' `AutoencoderKLCogVideoX` (https://arxiv.org/abs/2408.06072), written for one chunk over
that model's modules. The one difference is that an upsampling convolution runs before frames are doubled, not after.

Graphs are traced at one small size on the meta device: no weight is ever in memory. Every operation in them is independent
of the sizes (those that would not be have a form of their own, below); each finished graph is checked for that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import onnx
import onnx_ir as ir
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX
from onnx_ir.passes import common as ir_passes
from onnxscript import opset18 as op
from torch import Tensor, nn

from ..bundle.errors import BundleError, InputError
from ..bundle.manifest import Port
from ..bundle.precision import SAFETENSORS_NAME, Precision
from ..bundle.tensors import TensorInfo, read_header
from .trace import IR_VERSION, exporting

__all__ = ["GRAPHS", "GraphInfo", "VaeTensor", "WeightFile", "export_vae_graph", "vae_tensors"]

Kind = Literal["encoder", "decoder"]
GRAPHS = (
    "vae_encoder_first",
    "vae_encoder_next",
    "vae_decoder_first",
    "vae_decoder_first_even",
    "vae_decoder_next",
)

_PREFIXES = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}
ENCODER_CHUNK = 8  # frames per call, as in the published implementation (the first call also takes the remainder)
DECODER_CHUNK = 2  # latent frames per call, likewise


_TYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ELEMENTS = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}
# Convolutions and instance norms know bfloat16 from opset 22 on; TensorRT 10.3 reads 20. The operators that appear here mean
# the same in all of these and in the exporter's own opset, so that no conversion is needed.
_EXPORTER_OPSET = 18
_OPSETS: dict[Precision, int] = {"fp32": 20, "fp16": 20, "bf16": 22}


# Operations whose ordinary ONNX form would contain the traced sizes.
# Each has an eager form, a rule for its shape and an ONNX form. x is always [1, C, F, H, W].


@torch.library.custom_op("dynamictrl_edge::group_norm", mutates_args=())
def _group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Group normalization; statistics over the whole chunk. Weight and bias are [C, 1, 1, 1]."""
    return F.group_norm(x, groups, weight.flatten(), bias.flatten(), eps)


@_group_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return torch.empty_like(x)


def _group_norm_onnx(x: Any, weight: Any, bias: Any, groups: int, eps: float) -> Any:
    # Casts around it are not needed: TensorRT and ONNX Runtime keep the statistics in float32 by themselves.
    grouped = op.Reshape(x, op.Constant(value_ints=[1, groups, -1]))
    ones, zeros = (op.Constant(value=ir.tensor([value] * groups, dtype=x.dtype)) for value in (1.0, 0.0))
    normal = op.Reshape(op.InstanceNormalization(grouped, ones, zeros, epsilon=eps), op.Shape(x))
    return op.Add(op.Mul(normal, weight), bias)


@torch.library.custom_op("dynamictrl_edge::enlarge", mutates_args=())
def _enlarge(x: Tensor, frames: int, pixels: int, odd: bool) -> Tensor:
    """Repeats every frame `frames` times and every row and column `pixels` times (nearest neighbour).

    With `odd`, the first frame stays single: n frames become frames*(n-1) + 1.
    """
    x = x.repeat_interleave(frames, 2)[:, :, frames - 1 if odd else 0 :]
    return x.repeat_interleave(pixels, 3).repeat_interleave(pixels, 4)


@_enlarge.register_fake
def _(x: Tensor, frames: int, pixels: int, odd: bool) -> Tensor:
    batch, channels, count, height, width = x.shape
    count = frames * count - (frames - 1 if odd else 0)
    return x.new_empty((batch, channels, count, height * pixels, width * pixels))


def _enlarge_onnx(x: Any, frames: int, pixels: int, odd: bool) -> Any:
    # Without the batch axis: [C, F, H, W] is what the fast nearest kernels of ONNX Runtime know.
    flat = op.Squeeze(x, op.Constant(value_ints=[0]))
    scales = op.Constant(value_floats=[1.0, float(frames), float(pixels), float(pixels)])
    flat = op.Resize(
        flat, None, scales, mode="nearest", nearest_mode="floor", coordinate_transformation_mode="asymmetric"
    )
    if odd and frames > 1:
        flat = _slice_onnx(flat, 1, frames - 1)
    return op.Unsqueeze(flat, op.Constant(value_ints=[0]))


@torch.library.custom_op("dynamictrl_edge::halve_frames", mutates_args=())
def _halve_frames(x: Tensor, odd: bool) -> Tensor:
    """Means of pairs of frames. With `odd`, the first frame is left alone: n frames become (n + 1) / 2."""
    # Alone is paired with itself, which is the same to the last bit.
    return F.avg_pool3d(torch.cat([x[:, :, :1], x], 2) if odd else x, (2, 1, 1))


@_halve_frames.register_fake
def _(x: Tensor, odd: bool) -> Tensor:
    batch, channels, count, height, width = x.shape
    return x.new_empty((batch, channels, (count + int(odd)) // 2, height, width))


def _halve_frames_onnx(x: Any, odd: bool) -> Any:
    x = op.Concat(_slice_onnx(x, 2, 0, 1), x, axis=2) if odd else x
    return op.AveragePool(x, kernel_shape=[2, 1, 1], strides=[2, 1, 1])


@torch.library.custom_op("dynamictrl_edge::halve_pixels", mutates_args=())
def _halve_pixels(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution [1, k, k] with stride 2 over rows and columns; zeros are padded at the bottom and the right only."""
    return F.conv3d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=(1, 2, 2))


@_halve_pixels.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    (batch, _, count, height, width), kernel = x.shape, weight.shape[3]
    return x.new_empty((batch, weight.shape[0], count, (height + 1 - kernel) // 2 + 1, (width + 1 - kernel) // 2 + 1))


def _halve_pixels_onnx(x: Any, weight: Any, bias: Any) -> Any:
    return op.Conv(x, weight, bias, kernel_shape=list(weight.shape[2:]), strides=[1, 2, 2], pads=[0, 0, 0, 0, 1, 1])


def _slice_onnx(x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    # The exporter's own form casts and reshapes every bound; these are plain constants here.
    bounds = (0 if start is None else start, _END if end is None else min(end, _END), dim, step)
    return op.Slice(x, *(op.Constant(value_ints=[bound]) for bound in bounds))


_END = 2**31 - 1
_TRANSLATIONS = {
    torch.ops.dynamictrl_edge.group_norm.default: _group_norm_onnx,
    torch.ops.dynamictrl_edge.enlarge.default: _enlarge_onnx,
    torch.ops.dynamictrl_edge.halve_frames.default: _halve_frames_onnx,
    torch.ops.dynamictrl_edge.halve_pixels.default: _halve_pixels_onnx,
    torch.ops.aten.slice.Tensor: _slice_onnx,
}


# One time chunk.


class _Chunk(nn.Module):
    """What encoder and decoder share: the walk over a chunk, and the state of the causal convolutions.

    `first`: there is no past. `odd`: the first frame stays alone when time is halved or doubled.
    The VAE is taken over: some of its parameters become views that suit the graph (`_as_volumes`).
    """

    def __init__(self, vae: AutoencoderKLCogVideoX, kind: Kind) -> None:
        super().__init__()
        coder = getattr(vae, kind)
        self.add_module(kind, coder)  # under its own name, so that parameters keep the checkpoint's names
        _as_volumes(coder)
        self.kind = kind
        self.first = True
        self.odd = False
        self.states = {module: name for name, module in coder.named_modules() if _looks_back(module)}
        self.past: dict[str, Tensor] = {}
        self.future: dict[str, Tensor] = {}

    def forward(self, chunk: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A chunk, and the past in the order of `states` -> the result in float32, then the past of the next chunk."""
        self.past = {} if self.first else dict(zip(self.states.values(), past, strict=True))
        self.future = {}
        result = self.run(chunk.to(next(self.parameters()).dtype))
        return (result.float(), *(self.future[name] for name in self.states.values()))

    def run(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def causal(self, module: nn.Module, x: Tensor) -> Tensor:
        """A causal convolution: the frames before the chunk are the past's, or the first frame repeated."""
        if module in self.states:
            name = self.states[module]
            before = module.time_kernel_size - 1
            x = torch.cat([x[:, :, :1]] * before + [x] if self.first else [self.past[name], x], dim=2)
            self.future[name] = x[:, :, -before:]
        return _convolve(module.conv, x)

    def resnet(self, block: nn.Module, x: Tensor) -> Tensor:
        y = self.causal(block.conv1, block.nonlinearity(self.norm(block.norm1, x)))
        y = self.causal(block.conv2, block.nonlinearity(self.norm(block.norm2, y)))
        if block.in_channels != block.out_channels:
            x = self.causal(block.conv_shortcut, x) if block.use_conv_shortcut else _convolve(block.conv_shortcut, x)
        return x + y

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        raise NotImplementedError


class _EncoderChunk(_Chunk):
    """Pixels [1, 3, F, H, W] -> moments [1, 2*C, f, h, w]."""

    def __init__(self, vae: AutoencoderKLCogVideoX) -> None:
        super().__init__(vae, "encoder")
        self.quant_conv = vae.quant_conv

    def run(self, x: Tensor) -> Tensor:
        encoder = self.encoder
        x = self.causal(encoder.conv_in, x)
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                x = self.resnet(resnet, x)
            for sampler in block.downsamplers or ():
                x = _halve_frames(x, self.odd) if sampler.compress_time else x
                x = _halve_pixels(x, sampler.conv.weight, sampler.conv.bias)
        for resnet in encoder.mid_block.resnets:
            x = self.resnet(resnet, x)
        x = self.causal(encoder.conv_out, encoder.conv_act(self.norm(encoder.norm_out, x)))
        return x if self.quant_conv is None else _convolve(self.quant_conv, x)

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        return _group_norm(x, module.weight, module.bias, module.num_groups, module.eps)


class _DecoderChunk(_Chunk):
    """Latents [1, C, f, h, w] -> pixels [1, 3, F, H, W]."""

    def __init__(self, vae: AutoencoderKLCogVideoX) -> None:
        super().__init__(vae, "decoder")
        self.post_quant_conv = vae.post_quant_conv

    def run(self, x: Tensor) -> Tensor:
        decoder = self.decoder
        x = x if self.post_quant_conv is None else _convolve(self.post_quant_conv, x)
        self.guide = x  # what the norms look at; grows with x
        x = self.causal(decoder.conv_in, x)
        for resnet in decoder.mid_block.resnets:
            x = self.resnet(resnet, x)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self.resnet(resnet, x)
            for sampler in block.upsamplers or ():
                frames = 2 if sampler.compress_time else 1
                x = _convolve(sampler.conv, _enlarge(x, 1, 2, False), padding=(0, *sampler.conv.padding))
                x = x if frames == 1 else _enlarge(x, frames, 1, self.odd)
                self.guide = _enlarge(self.guide, frames, 2, self.odd)
        return self.causal(decoder.conv_out, decoder.conv_act(self.norm(decoder.norm_out, x)))

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        """Group norm, scaled and shifted by maps of the chunk's latents (https://arxiv.org/abs/2209.09002)."""
        group = module.norm_layer
        normal = _group_norm(x, group.weight, group.bias, group.num_groups, group.eps)
        # These maps could be made before the guide grows; but then compilers keep all of them, full-sized, alive at once.
        return normal * self.causal(module.conv_y, self.guide) + self.causal(module.conv_b, self.guide)


def _looks_back(module: nn.Module) -> bool:
    # A causal convolution over one frame has no past (the published code carries an unused cache for it).
    return getattr(module, "time_kernel_size", 1) > 1


def _convolve(conv: nn.Module, x: Tensor, padding: tuple[int, ...] | None = None) -> Tensor:
    # Not the module's own forward: that one splits large inputs, with branches on sizes.
    return F.conv3d(x, conv.weight, conv.bias, padding=conv.padding if padding is None else padding)


def _as_volumes(module: nn.Module) -> None:
    """Views weights as the graph needs them: norms' [C] as [C, 1, 1, 1], frame kernels' [O, I, k, k] as [O, I, 1, k, k]."""
    for part in module.modules():
        if isinstance(part, nn.GroupNorm):
            part.weight = nn.Parameter(part.weight.detach().view(-1, 1, 1, 1))
            part.bias = nn.Parameter(part.bias.detach().view(-1, 1, 1, 1))
        elif isinstance(part, nn.Conv2d):
            part.weight = nn.Parameter(part.weight.detach().unsqueeze(2))


# Weights.


class VaeTensor(NamedTuple):
    """One weight: its name in the bundle's weight file, its name in the checkpoint, its shape (the same in both)."""

    target: str
    source: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightFile:
    """The layout of a safetensors file. Graphs refer to it by its file name only, relative to the weights folder."""

    path: Path
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def read(cls, path: Path) -> WeightFile:
        """Reads the header. Raises `BundleError` if the file is missing or damaged."""
        return cls(path, read_header(path, error=BundleError))


def vae_tensors(kind: Kind, config: Mapping[str, Any]) -> list[VaeTensor]:
    """The weights of the VAE's encoder or decoder for a checkpoint's `vae/config.json`. Together: every one, once.

    Raises:
        InputError: the configuration is not one of an `AutoencoderKLCogVideoX`.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in _meta_vae(config, torch.float32).state_dict().items()}
    return [VaeTensor(name, name, shape) for name, shape in shapes.items() if name.startswith(_PREFIXES[kind])]


# Export.


@dataclass(frozen=True)
class GraphInfo:
    """A written graph. A size in its ports is a number, a name (`frames`) or a multiple of one (`8*latent_width`)."""

    name: str
    path: Path
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: str
    """Name of the file in the bundle's weights folder that holds the initializers."""


def export_vae_graph(
    name: str, config: Mapping[str, Any], precision: Precision, out_dir: Path, weight_file: WeightFile
) -> GraphInfo:
    """Writes one of `GRAPHS` as `out_dir/NAME.onnx`.

    Args:
        name: which one.
        config: the checkpoint's `vae/config.json`.
        precision: `fp32`, `fp16` or `bf16`: the type of weights, state and arithmetic.
        out_dir: an existing folder.
        weight_file: the file with the tensors of `vae_tensors`. The graph's initializers point into it, by its name.

    Raises:
        InputError: the configuration is not one of a VAE that can be exported.
        BundleError: the weight file lacks a tensor, or has it in another shape or type.
    """
    kind: Kind = "encoder" if "encoder" in name else "decoder"
    _check_weights(weight_file, vae_tensors(kind, config), SAFETENSORS_NAME[precision])
    model, inputs, outputs = _trace(name, config, precision)
    _attach_weights(model, weight_file)
    path = out_dir / f"{name}.onnx"
    path.write_bytes(_checked(ir.to_proto(model)).SerializeToString(deterministic=True))
    return GraphInfo(name, path, inputs, outputs, weight_file.path.name)


def _meta_vae(config: Mapping[str, Any], dtype: torch.dtype) -> AutoencoderKLCogVideoX:
    """The model on the meta device: shapes and names only."""
    class_name = config.get("_class_name", "AutoencoderKLCogVideoX")
    if class_name != "AutoencoderKLCogVideoX":
        raise InputError(f"The checkpoint's VAE is a {class_name!r}; only AutoencoderKLCogVideoX can be exported.")
    ratio = config.get("temporal_compression_ratio", 4)
    if ratio not in (1, 2, 4, 8):
        raise InputError(f"The VAE's temporal_compression_ratio is {ratio!r}; it must be 1, 2, 4 or 8.")
    try:
        with exporting(), torch.device("meta"), _default_dtype(dtype):
            vae = AutoencoderKLCogVideoX.from_config(dict(config)).eval()
    except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise InputError(f"The checkpoint's vae/config.json describes no VAE that can be built: {error}") from error
    if ratio > 2 ** (levels := len(vae.config.block_out_channels) - 1):
        raise InputError(
            f"The VAE's temporal_compression_ratio is {ratio}, but its {levels + 1} levels halve time {levels} times."
        )
    return vae


def _trace(
    name: str, config: Mapping[str, Any], precision: Precision
) -> tuple[ir.Model, tuple[Port, ...], tuple[Port, ...]]:
    """The graph with symbolic sizes and weights without data, and its inputs and outputs."""
    vae = _meta_vae(config, _TYPES[precision])
    module = _EncoderChunk(vae) if "encoder" in name else _DecoderChunk(vae)
    with exporting():
        example, inputs, outputs = _interface(module, vae.config, name)
        program = torch.onnx.export(
            module.eval(),
            example,
            dynamo=True,
            optimize=False,
            opset_version=_EXPORTER_OPSET,
            input_names=[port.name for port in inputs],
            output_names=[port.name for port in outputs],
            custom_translation_table=_TRANSLATIONS,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    model: ir.Model = program.model
    model.opset_imports[""] = _OPSETS[precision]
    _tidy(model, name)
    for values, ports in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, port in zip(values, ports, strict=True):
            value.shape = ir.Shape(port.shape)
    return model, inputs, outputs


def _interface(module: _Chunk, config: Any, name: str) -> tuple[tuple[Any, ...], tuple[Port, ...], tuple[Port, ...]]:
    """Arguments to trace with, and the graph's inputs and outputs with symbolic sizes. Sets `module.first`."""
    rows, columns = 4, 6
    scale = 2 ** (len(config.block_out_channels) - 1)
    encoder = module.kind == "encoder"
    chunk = ENCODER_CHUNK if encoder else DECODER_CHUNK
    first, odd = "_first" in name, name.endswith("_first")
    size = (3 * chunk + 1 if odd else chunk, *((scale * rows, scale * columns) if encoder else (rows, columns)))
    x = torch.empty(
        1, config.in_channels if encoder else config.latent_channels, *size, dtype=torch.float32, device="meta"
    )
    module.first, module.odd = True, odd
    result, *states = module(x, ())
    module.first = first

    def port(name: str, tensor: Tensor) -> Port:
        frames: int | str = tensor.shape[2]
        if odd and not name.startswith("state"):
            frames = "frames" if name == "pixels" else "latent_frames"
        high, wide = tensor.shape[3] // rows, tensor.shape[4] // columns
        height = "latent_height" if high == 1 else f"{high}*latent_height"
        width = "latent_width" if wide == 1 else f"{wide}*latent_width"
        return Port(name, _ELEMENTS[tensor.dtype].name.lower(), (1, tensor.shape[1], frames, height, width))

    named = list(zip(module.states.values(), states, strict=True))
    past = [] if first else [port(f"state_in.{name}", state) for name, state in named]
    future = [port(f"state_out.{name}", state) for name, state in named]
    inputs = (port("pixels" if encoder else "latents", x), *past)
    outputs = (port("moments" if encoder else "pixels", result), *future)
    return (x, () if first else tuple(states)), inputs, outputs


def _tidy(model: ir.Model, name: str) -> None:
    """Removes what tracing left behind: sources' paths, repeated and unused nodes, the example's sizes."""
    model.graph.name = name
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "dynamictrl-edge", None
    for graph_pass in (
        ir_passes.ClearMetadataAndDocStringPass(),
        ir_passes.IdentityEliminationPass(),
        ir_passes.CommonSubexpressionEliminationPass(size_limit=64),
        ir_passes.RemoveUnusedNodesPass(),
        ir_passes.RemoveUnusedFunctionsPass(),
        ir_passes.RemoveUnusedOpsetsPass(),
    ):
        graph_pass(model)
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
        # A node that has weights is named after them; builders' reports show it.
        weights = [value.name for value in node.inputs if value is not None and value.is_initializer() and value.name]
        if weights:
            node.name = weights[0].removesuffix(".weight")


def _check_weights(file: WeightFile, tensors: Sequence[VaeTensor], dtype: str) -> None:
    for name, _, shape in tensors:
        stored = file.tensors.get(name)
        if stored is None:
            raise BundleError(f"The weight file {str(file.path)!r} lacks the tensor {name!r}.")
        if (stored.dtype, stored.shape) != (dtype, shape):
            raise BundleError(
                f"The weight file {str(file.path)!r} has the tensor {name!r} as {stored.dtype} {list(stored.shape)}; "
                f"the graph needs {dtype} {list(shape)}."
            )


def _attach_weights(model: ir.Model, file: WeightFile) -> None:
    """Points every initializer at its bytes in `file`."""
    for name, value in model.graph.initializers.items():
        if value.shape is None or value.dtype is None:
            raise RuntimeError(f"the initializer {name} has no type")
        stored = file.tensors[name]
        # Its own shape: the graph may see the tensor with additional axes of length 1 (`_as_volumes`).
        value.const_value = ir.ExternalTensor(
            file.path.name, stored.offset, stored.nbytes, value.dtype, shape=value.shape, name=name
        )


def _checked(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns `model` if it is valid and takes any number of frames, rows and columns; raises `RuntimeError` if not.

    The weights, which are elsewhere, count as inputs for the check.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    external = [tensor for tensor in bare.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in external:
        bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        bare.graph.initializer.remove(tensor)
    try:
        onnx.checker.check_model(bare)
        inferred = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise RuntimeError(f"the exported graph {model.graph.name} is not valid ONNX: {error}") from error
    weights = {tensor.name for tensor in external}
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        sizes = value.type.tensor_type.shape.dim  # of activations: [1, C, F, H, W]
        if len(sizes) == 5 and value.name not in weights and any(size.HasField("dim_value") for size in sizes[3:]):
            raise RuntimeError(f"the exported graph {model.graph.name} fixes the size of {value.name}")
    return model


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
