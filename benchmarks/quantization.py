"""What quantization costs: ours against ONNX Runtime's `quantize_static`, on the same graphs and data.

    python benchmarks/quantization.py BUNDLE --data SET --held-out SET [--steps 10] [--schemes int8 fp8 int8-weights]
    python benchmarks/quantization.py BUNDLE --pocket 8 50 [...]

A set is a calibration set (docs/calibration.md); `--pocket` draws that many clips to calibrate with and to judge by. All contenders
quantize the same linears, all 4 of every block, and see the same calibration clips. Judged on the held-out ones: the denoiser's
output at every timestep, on the float denoiser's own trajectories; the final latents of whole loops; frames against the float
model's, and against the truth where it is known. `quantize_static` gets each block as a model of its own with its weights as
constants, symmetric int8, weights per channel, and is run without ONNX Runtime's integer kernels, which would saturate on
processors without VNNI. NVIDIA's quantizer is not compared: it pins other versions of onnx and
ONNX Runtime than ours (modelopt 0.47: onnx 1.21, onnxruntime-gpu 1.24). Latency is that of the loop on this machine,
float and ours in turn. The VAE is judged with its weights rounded to int8 per output channel: what int8 would cost at least.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that this file also runs as a script

from benchmarks.receipt import paired, write_receipt
from dynamictrl_edge.bundle.config import TransformerConfig, VaeConfig, geometry
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.calibration.block_graph import LINEARS, inputs_of
from dynamictrl_edge.calibration.calibrate import Options, calibrate
from dynamictrl_edge.calibration.decide import Settings
from dynamictrl_edge.calibration.graphs import read_model
from dynamictrl_edge.calibration.measure import decibels, output_snr
from dynamictrl_edge.calibration.samples import Sample, pocket_samples, read_samples
from dynamictrl_edge.export.workspace import spec_of
from dynamictrl_edge.runtime import Animator
from dynamictrl_edge.runtime.animator import Prepared, to_uint8
from dynamictrl_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend, OrtGraph
from dynamictrl_edge.runtime.denoiser import Denoiser
from dynamictrl_edge.runtime.metrics import psnr
from dynamictrl_edge.runtime.noise import NoiseSource
from dynamictrl_edge.runtime.scheduler import Schedule, make_schedule
from dynamictrl_edge.runtime.vae import VAEDecoder
from pocket.clips import COLUMNS, FRAMES, ROWS, make_clip
from pocket.clips import Clip as Drawn
from pocket.measures import limb_errors

DATA = ("video", "text", "pose", "modulation", "rope_cos", "rope_sin")  # what of a block's inputs is no weight
METHODS = ("MinMax", "Entropy", "Percentile")
MOST_CALLS = 48  # that `quantize_static` calibrates a block with: its histograms keep all that they see

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Clip:
    """A held-out sample, the float model's way through the loop, and the drawn clip that it should be, where there is one."""

    ready: Prepared
    starts: list[np.ndarray]
    predictions: list[np.ndarray]
    final: np.ndarray
    drawn: Drawn | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--pocket", type=int, nargs=2, metavar=("CALIBRATE", "JUDGE"))
    parser.add_argument("--schemes", nargs="+", default=["int8", "fp8", "int8-weights"])
    parser.add_argument("--peers", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=1.0, help="of the clips that are judged")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--name", default="quantization", help="name of the receipt")
    arguments = parser.parse_args()
    if (arguments.pocket is None) == (arguments.data is None or arguments.held_out is None):
        parser.error("give --data and --held-out, or --pocket")
    animator = Animator.from_bundle(arguments.bundle, threads=arguments.threads, cache=False)
    judged: list[tuple[Sample, Drawn | None]]
    if arguments.pocket:
        seen, judged = pocket(animator.bundle, *arguments.pocket)
    else:
        seen = read_samples(arguments.data)
        judged = [(sample, None) for sample in read_samples(arguments.held_out)]

    schedule, guidance = make_schedule(animator.scheduler, arguments.steps), arguments.guidance
    exact = Contender(animator.bundle, _backend(animator), schedule, guidance)
    clips = [exact.walk(prepared(animator, sample, arguments.steps, guidance), drawn) for sample, drawn in judged]
    figures: dict[str, Any] = {"float": {"bytes": weights_bytes(animator.bundle), **frames(animator, clips, None)}}
    with tempfile.TemporaryDirectory() as name:
        for scheme in arguments.schemes:
            folder = Path(name) / scheme
            options = Options(settings=Settings(scheme=scheme), steps=arguments.steps, report=False)
            made = calibrate(arguments.bundle, folder, seen, options, threads=arguments.threads)
            own = Animator.from_bundle(folder, threads=arguments.threads, cache=False)
            contender = Contender(own.bundle, _backend(own), schedule, guidance)
            figures[f"ours {scheme}"] = {
                "bytes": weights_bytes(own.bundle),
                "text_encoder": made.facts()["text_encoder"],
                "modulation": made.facts()["modulation"],
                **judge(contender, clips, animator),
                "seconds_float_ours": paired(
                    lambda: exact.seconds(clips[0]),
                    lambda contender=contender: contender.seconds(clips[0]),  # type: ignore[misc]
                    arguments.rounds,
                ),
            }
            print(json.dumps({scheme: figures[f"ours {scheme}"]}, default=vars), flush=True)
        if arguments.peers:
            ready = [prepared(animator, sample, arguments.steps, Options().guidance) for sample in seen]
            captured = capture(animator, ready, schedule)
        for method in arguments.peers:
            graphs = [
                quantize_static(animator.bundle, block, calls, method, Path(name))
                for block, calls in enumerate(captured)
            ]
            contender = Contender(animator.bundle, Blocks(_backend(animator), graphs), schedule, guidance)
            contender.denoiser.block_graphs = tuple(f"{Blocks.PREFIX}{i}" for i in range(len(graphs)))
            figures[f"quantize_static {method}"] = judge(contender, clips, animator)
            print(json.dumps({method: figures[f"quantize_static {method}"]}), flush=True)
    figures["VAE with int8 weights"] = rounded_vae(animator, clips)
    figures["VAE of the full model"] = vae_operations()
    settings = {
        "bundle": animator.bundle.manifest.provenance,
        "steps": arguments.steps,
        "guidance": guidance,
        "calibrated_with": len(seen),
        "judged_by": len(clips),
        "linears": len(LINEARS) * animator.bundle.manifest.transformer.num_layers,
    }
    print(write_receipt(arguments.name, settings, figures))


def pocket(bundle: Bundle, calibrate_with: int, judge_by: int) -> tuple[list[Sample], list[tuple[Sample, Drawn]]]:
    """The built-in set to calibrate with; held-out people, with the truth, to judge by."""
    seen = pocket_samples(bundle.manifest, str(bundle.root), calibrate_with)
    judged = []
    for i in range(judge_by):
        clip = make_clip("held-out", i, masking="none")
        size = {"height": ROWS, "width": COLUMNS, "frames": FRAMES}
        judged.append((Sample(clip.reference, clip.pose, clip.caption, seed=i, **size), clip))
    return seen, judged


def prepared(animator: Animator, sample: Sample, steps: int, guidance: float) -> Prepared:
    return animator.prepare(**sample.request(steps, guidance))


def _backend(animator: Animator) -> OnnxRuntimeBackend:
    assert isinstance(animator.backend, OnnxRuntimeBackend)
    return animator.backend


def weights_bytes(bundle: Bundle) -> dict[str, int]:
    """Bytes of the denoiser's weights: what the loop uses, and the modulation, which works once per schedule."""
    parts = {"loop": ("weights/block_", "weights/denoiser."), "modulation": ("weights/modulation_",)}
    files = bundle.manifest.files.items()
    return {part: sum(e.bytes for name, e in files if name.startswith(starts)) for part, starts in parts.items()}


class Contender:
    """A denoiser to be judged."""

    def __init__(self, bundle: Bundle, backend: Any, schedule: Schedule, guidance: float):
        self.denoiser, self.schedule, self.guidance = Denoiser(bundle, backend), schedule, guidance

    def _steps(self, ready: Prepared, initial: np.ndarray) -> Iterator[Any]:
        noise = NoiseSource(ready.run.request.seed)  # the same for every contender
        return self.denoiser.denoise(
            ready.latents, initial, self.schedule, self.guidance, noise, ready.run.geometry.grid
        )

    def walk(self, ready: Prepared, drawn: Drawn | None) -> Clip:
        """Denoises and keeps everything."""
        starts, predictions = [ready.initial.copy()], []
        for step in self._steps(ready, ready.initial):
            predictions.append(step.prediction.copy())
            starts.append(step.latents.copy())
        return Clip(replace(ready), starts[:-1], predictions, starts[-1], drawn)

    def final(self, clip: Clip) -> np.ndarray:
        for step in self._steps(clip.ready, clip.ready.initial):
            last = step.latents
        return last.copy()

    def seconds(self, clip: Clip) -> float:
        start = time.perf_counter()
        self.final(clip)
        return time.perf_counter() - start

    def sums(self, clip: Clip) -> np.ndarray:
        """[2, steps] signal and noise of the output, every step begun where the float denoiser began it."""
        found = np.zeros((2, len(self.schedule)))
        for step in self._steps(clip.ready, clip.starts[0]):
            found[:, step.index] = output_snr(clip.predictions[step.index], step.prediction)
            if step.index + 1 < len(clip.starts):
                np.copyto(step.latents, clip.starts[step.index + 1])
        return found


def judge(contender: Contender, clips: Sequence[Clip], animator: Animator) -> dict[str, Any]:
    """Output SNR by timestep over all clips, final-latent SNR by clip, frames."""
    sums = np.sum([contender.sums(clip) for clip in clips], axis=0)
    finals = [contender.final(clip) for clip in clips]
    latents = [
        float(decibels(*(np.asarray(x) for x in output_snr(c.final, f)))) for c, f in zip(clips, finals, strict=True)
    ]
    return {
        "output_snr_db": [round(float(x), 3) for x in decibels(sums[0], sums[1])],
        "final_latent_snr_db": {"median": float(np.median(latents)), "least": min(latents), "greatest": max(latents)},
        **frames(animator, clips, finals),
    }


def frames(animator: Animator, clips: Sequence[Clip], finals: Sequence[np.ndarray] | None) -> dict[str, float]:
    """Mean PSNR of the frames against the float model's and against the truth, and the pose error against the truth."""
    found: dict[str, list[float]] = {}
    for i, clip in enumerate(clips):
        exact = decoded(animator, clip, clip.final)
        made = exact if finals is None else decoded(animator, clip, finals[i])
        if finals is not None:
            found.setdefault("psnr_to_float_db", []).append(float(np.minimum(psnr(made, exact), 99).mean()))
        if clip.drawn is not None:
            found.setdefault("psnr_to_truth_db", []).append(float(np.minimum(psnr(made, clip.drawn.truth), 99).mean()))
            found.setdefault("pose_error_px", []).append(float(limb_errors(made, clip.drawn).mean()))
    return {name: float(np.mean(values)) for name, values in found.items()}


def decoded(animator: Animator, clip: Clip, latents: np.ndarray) -> np.ndarray:
    """Frames [N, H, W, 3] of a clip's latents [1, F, C, H, W], as many as were asked for."""
    run, vae = clip.ready.run, animator.bundle.manifest.vae
    kept = latents[0, run.geometry.padding_frames :].transpose(1, 0, 2, 3)[None]
    pixels = VAEDecoder(animator.backend.graph).decode(np.ascontiguousarray(kept) / np.float32(vae.scaling_factor))
    return to_uint8(pixels)[: run.frames]


# quantize_static


class Blocks:
    """A backend with a graph of its own for every block."""

    PREFIX = "peer_"
    lanes = 1
    name = "onnxruntime"

    def __init__(self, backend: OnnxRuntimeBackend, graphs: Sequence[Any]):
        self._backend, self._graphs = backend, graphs

    def graph(self, name: str, lane: int = 0, lanes: int = 1) -> Any:
        if name.startswith(self.PREFIX):
            return self._graphs[int(name.removeprefix(self.PREFIX))]
        return self._backend.graph(name)

    def drop(self, *names: str) -> None:
        self._backend.drop(*names)


class Recorder:
    """The float block, which keeps copies of what it is given."""

    def __init__(self, graph: OrtGraph):
        self.spec, self._graph, self.calls = graph.spec, graph, list[Arrays]()

    def prepare(self, arrays: Mapping[str, np.ndarray]) -> Callable[[], None]:
        call = self._graph.prepare(arrays)

        def run() -> None:
            self.calls.append({name: np.array(arrays[name]) for name in DATA})
            call()

        return run


def capture(animator: Animator, samples: Sequence[Prepared], schedule: Schedule) -> list[list[Arrays]]:
    """For every block, what it was given in evenly chosen calls."""
    backend, layers = _backend(animator), animator.bundle.manifest.transformer.num_layers
    recorders = [Recorder(backend.graph("block")) for _ in range(layers)]
    contender = Contender(animator.bundle, Blocks(backend, recorders), schedule, Options().guidance)
    contender.denoiser.block_graphs = tuple(f"{Blocks.PREFIX}{i}" for i in range(layers))
    every = max(1, -(-2 * len(samples) * len(schedule) // MOST_CALLS))
    kept: list[list[Arrays]] = [[] for _ in range(layers)]
    for number, ready in enumerate(samples):
        contender.walk(ready, None)
        for block, recorder in enumerate(recorders):
            kept[block] += list(itertools.islice(recorder.calls, number % every, None, every))
            recorder.calls.clear()
    return kept


def quantize_static(bundle: Bundle, block: int, calls: Sequence[Arrays], method: str, folder: Path) -> OrtGraph:
    """The block of this number, quantized by ONNX Runtime."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as run

    model = with_constants(read_model(bundle, "block"), bundle.tensors(f"block_{block:02d}"))
    wanted = set(inputs_of(model).values())
    nodes = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[0] in wanted]
    nodes = [node.name for node in model.graph.node if node.name in nodes and node.input[1].endswith("_weight")]
    source, target = folder / f"{method}-{block}.onnx", folder / f"{method}-{block}-int8.onnx"
    onnx.save(model, source)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(calls)

        def get_next(self) -> Arrays | None:
            return next(self._left, None)

    run(
        source,
        target,
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        nodes_to_quantize=nodes,
        calibrate_method=getattr(CalibrationMethod, method),
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    made = onnx.load(target)
    quantizers = [n for n in made.graph.node if n.op_type == "QuantizeLinear"]
    if len({node.input[0] for node in quantizers} & wanted) != len(wanted):
        raise RuntimeError(f"quantize_static quantized other products than the {len(wanted)} that were named")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return OrtGraph(f"block {block} by quantize_static", spec_of(made, ""), session)


def with_constants(model: onnx.ModelProto, weights: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The block with its weights as initializers instead of inputs."""
    inputs = [port for port in model.graph.input if port.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.array(a), name) for name, a in weights.items())
    return model


# The VAE


def rounded_vae(animator: Animator, clips: Sequence[Clip]) -> dict[str, float]:
    """PSNR of frames that are decoded with weights rounded to int8 per output channel, against the float decoder's."""
    import onnxruntime

    bundle, graphs = animator.bundle, {}
    for name in VAEDecoder.graphs:
        spec, _ = bundle.graph(name)
        weights = bundle.tensors(Path(str(spec.weights)).stem)
        model = read_model(bundle, name)
        for tensor in model.graph.initializer:
            values = np.array(weights[tensor.name]) if tensor.name in weights else onnx.numpy_helper.to_array(tensor)
            values = values.reshape(tuple(tensor.dims))  # the graph's shapes have further axes of length 1
            if values.ndim == 5 and values.dtype == np.float32:
                step = np.abs(values).max(axis=(1, 2, 3, 4), keepdims=True) / 127
                values = np.rint(values / np.maximum(step, 1e-12)) * step
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        graphs[name] = OrtGraph(name, spec, session)
    found = []
    for clip in clips:
        kept = clip.final[0, clip.ready.run.geometry.padding_frames :].transpose(1, 0, 2, 3)[None]
        latents = np.ascontiguousarray(kept) / np.float32(bundle.manifest.vae.scaling_factor)
        rough = to_uint8(VAEDecoder(lambda name, *_: graphs[name]).decode(latents))[: clip.ready.run.frames]
        found.append(float(np.minimum(psnr(rough, decoded(animator, clip, clip.final)), 99).mean()))
    return {"psnr_to_float_db": float(np.mean(found))}


def vae_operations() -> dict[str, float]:
    """Operations of the full-size VAE's decoder for a clip of 1360x768x37, and of 25 denoising steps with guidance."""
    import torch
    from diffusers import AutoencoderKLCogVideoX

    from benchmarks.checkpoints import SPECS, transformer_config, vae_config

    height, width, frames, steps = 768, 1360, 37, 25
    config = vae_config(SPECS["full"])
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX.from_config(config)
    found = 0

    def count(layer: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal found
        found += 2 * output.numel() * layer.weight[0].numel()

    for layer in vae.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Conv3d)):
            layer.register_forward_hook(count)
    with torch.no_grad():
        vae.decode(
            torch.empty(1, config["latent_channels"], (frames - 1) // 4 + 1, height // 8, width // 8, device="meta")
        )
    shape = msgspec.convert(transformer_config(SPECS["full"]), TransformerConfig)
    size = geometry(shape, msgspec.convert(config, VaeConfig), height, width, frames)
    n, d = size.video_tokens + shape.max_text_seq_length, shape.width
    denoising = 2 * steps * shape.num_layers * (24 * n * d**2 + 4 * n**2 * d)
    return {"decoder": float(found), "denoising": float(denoising)}


if __name__ == "__main__":
    main()
