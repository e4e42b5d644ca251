"""What the tests of calibration share: small sets, and blocks of the golden models with random inputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from PIL import Image

from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.calibration.calibrate import Options
from dynamictrl_edge.calibration.decide import Settings
from dynamictrl_edge.calibration.samples import Sample
from tests.media_samples import noise

Arrays = dict[str, np.ndarray]
SIZE = {"height": 32, "width": 48, "frames": 9}


def some_samples(count: int = 2) -> list[Sample]:
    """The quickest clips that a golden model makes."""
    height, width, frames = SIZE["height"], SIZE["width"], SIZE["frames"]
    return [
        Sample(
            noise(height, width, 3, seed=2 * i),
            noise(frames, height, width, 3, seed=2 * i + 1),
            f"person {i} walks",
            seed=i,
            height=height,
            width=width,
            frames=frames,
            fit="stretch",
        )
        for i in range(count)
    ]


def quick(scheme: str = "int8", *, smooth: bool = False, **changes: object) -> Options:
    """Options of the quickest calibration."""
    values: dict[str, object] = {"steps": 2, "report": False, **changes}
    return Options(settings=Settings(scheme=scheme, smooth=smooth), **values)  # type: ignore[arg-type]


def write_set(folder: Path, count: int = 2) -> Path:
    """`some_samples` as a folder for `--data`."""
    folder.mkdir()
    entries = []
    for i, sample in enumerate(some_samples(count)):
        Image.fromarray(sample.image).save(folder / f"{i}.png")
        (folder / f"pose{i}").mkdir()
        for number, frame in enumerate(sample.pose):
            Image.fromarray(frame).save(folder / f"pose{i}" / f"{number:03d}.png")
        entries.append({"image": f"{i}.png", "pose": f"pose{i}", "prompt": sample.prompt, "seed": i})
    listed = {"samples": entries, **SIZE, "fit": "stretch"}
    (folder / "samples.json").write_text(json.dumps(listed))
    return folder


def block_inputs(bundle: Bundle, block: int = 0, tokens: int = 24, seed: int = 0) -> Arrays:
    """Everything that the block's graph takes, at batch 1: random streams and modulation, the block's weights."""
    config = bundle.manifest.transformer
    d, text = config.width, 7
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape).astype(np.float32)

    half = config.attention_head_dim // 2
    angles = normal(text + tokens, half)
    return {
        "video": normal(1, tokens, d) * np.exp(normal(d)),  # channels of different sizes
        "text": normal(1, text, d),
        "pose": normal(1, tokens, d),
        "modulation": 0.5 * normal(15, d) + 0.2,
        "rope_cos": np.cos(angles),
        "rope_sin": np.sin(angles),
        **{name: np.array(array) for name, array in bundle.tensors(f"block_{block:02d}").items()},
    }


def run(model: onnx.ModelProto, arrays: Arrays) -> Arrays:
    """A model's outputs by name, computed by ONNX Runtime without its rewriting of graphs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {port.name: arrays[port.name] for port in session.get_inputs()})
    return dict(zip(names, values, strict=True))
