"""The denoiser's exported graphs, run by ONNX Runtime, against the published implementation's numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
from dynamictrl_edge.runtime.denoiser import OFS, Denoiser
from dynamictrl_edge.runtime.embeddings import timestep_sinusoid
from tests.golden import case, max_abs, relative_rms

CASES = {
    "transformer10_a": "bundle10",
    "transformer10_b": "bundle10",
    "transformer15_a": "bundle15",
    "transformer15_b": "bundle15",
    "transformer10_learnedpos": "learned_bundle",
}
Arrays = dict[str, np.ndarray]


def forward(root: Path, tensors: Arrays, row: int, sinusoid: np.ndarray) -> dict[str, list[np.ndarray]]:
    """One batch row through all graphs: the streams after every block and the prediction."""
    bundle = Bundle(root)
    backend = OnnxRuntimeBackend(bundle)
    denoiser = Denoiser(bundle, backend)
    config, shared = denoiser.config, dict(bundle.tensors("denoiser"))
    time: Arrays = {"time_sinusoid": sinusoid, **shared}
    if config.ofs_embed_dim is not None:
        time["ofs_sinusoid"] = timestep_sinusoid([OFS], config.ofs_embed_dim)

    channels = config.latent_channels
    noisy = np.ascontiguousarray(tensors["hidden_states"][row : row + 1, :, :channels])
    conditions = backend.graph("conditioning")(
        {
            "prompt_embeds": tensors["encoder_hidden_states"][row : row + 1],
            "image_latents": np.ascontiguousarray(tensors["hidden_states"][row : row + 1, :, channels:]),
            "pose_latents": np.ascontiguousarray(tensors["control_hidden_states"][row : row + 1]),
            **shared,
        }
    )
    text, pose = conditions["text"], conditions["pose"]
    video = backend.graph("stem")({"latents": noisy, "image_tokens": conditions["image_tokens"], **shared})["video"]
    frames, _, height, width = noisy.shape[1:]
    cos, sin = denoiser.rope(config.token_grid(frames, height, width), text.shape[1])
    streams: dict[str, list[np.ndarray]] = {"hidden": [], "text": [], "control": []}
    for i in range(config.num_layers):
        table = backend.graph("modulation")({**time, **bundle.tensors(f"modulation_{i:02d}")})["table"]
        outputs = backend.graph("block")(
            {
                "video": video,
                "text": text,
                "pose": pose,
                "modulation": table[0],
                "rope_cos": cos,
                "rope_sin": sin,
                **bundle.tensors(f"block_{i:02d}"),
            }
        )
        video, text, pose = outputs["video_out"], outputs["text_out"], outputs["pose_out"]
        for name, stream in (("hidden", video), ("text", text), ("control", pose)):
            streams[name].append(stream)
    zeros = np.zeros_like(noisy)
    head = {
        "video": video,
        "modulation": backend.graph("head_modulation")(time)["table"][0],
        "latents": zeros,
        "x0_old": zeros,
        "noise": zeros,
        "coefficients": np.zeros(7, np.float32),
        **shared,
    }
    streams["prediction"] = [backend.graph("head")(head)["prediction"]]
    return streams


@pytest.mark.parametrize("name", CASES)
def test_every_block_and_the_prediction_equal_the_published_ones(name: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(CASES[name])
    tensors, _ = case(name)
    for row in range(len(tensors["timestep"])):
        got = forward(
            root, tensors, row, timestep_sinusoid(tensors["timestep"][row : row + 1], tensors["time_sinusoid"].shape[1])
        )
        for stream in ("hidden", "text", "control"):
            for i, value in enumerate(got[stream]):
                wanted = tensors[f"block_{i}_{stream}"]
                wanted = wanted[row : row + 1] if len(wanted) > 1 else wanted
                assert max_abs(value, wanted) < 1e-3
                assert relative_rms(value, wanted) < 1e-4
        prediction, wanted = got["prediction"][0], tensors["output"][row : row + 1]
        assert max_abs(prediction, wanted) < 2e-4
        assert relative_rms(prediction, wanted) < 5e-5


@pytest.mark.parametrize("name", CASES)
def test_with_the_given_sinusoid_the_prediction_is_ten_times_closer(name: str, request: pytest.FixtureRequest) -> None:
    tensors, _ = case(name)
    for row in range(len(tensors["timestep"])):
        got = forward(request.getfixturevalue(CASES[name]), tensors, row, tensors["time_sinusoid"][row : row + 1])
        assert max_abs(got["prediction"][0], tensors["output"][row : row + 1]) < 2e-5


def test_both_guidance_halves_in_one_batch_equal_one_after_the_other(bundle10: Path) -> None:
    bundle = Bundle(bundle10)
    block = OnnxRuntimeBackend(bundle).graph("block")
    d = bundle.manifest.transformer.width
    random = np.random.default_rng(1)
    normal: Callable[..., np.ndarray] = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    angle = normal(5 + 6, 32)
    feeds = {
        "pose": normal(1, 6, d),
        "modulation": normal(15, d),
        "rope_cos": np.cos(angle),
        "rope_sin": np.sin(angle),
        **bundle.tensors("block_00"),
    }
    video, text = normal(2, 6, d), normal(2, 5, d)
    together = block({"video": video, "text": text, **feeds})
    for h in range(2):
        apart = block({"video": video[h : h + 1], "text": text[h : h + 1], **feeds})
        assert max_abs(together["video_out"][h : h + 1], apart["video_out"]) < 2e-5
        assert max_abs(together["text_out"][h : h + 1], apart["text_out"]) < 2e-5
        assert max_abs(together["pose_out"], apart["pose_out"]) == 0


def test_the_head_guides_and_steps_like_the_scheduler(bundle15: Path) -> None:
    from dynamictrl_edge.runtime.scheduler import SchedulerConfig, advance, make_schedule

    bundle = Bundle(bundle15)
    config = bundle.manifest.transformer
    random = np.random.default_rng(2)
    shape = (1, 2, 16, 4, 6)
    latents, x0_old, noise = (random.standard_normal(shape).astype(np.float32) for _ in range(3))
    tokens = 1 * 2 * 3
    video = random.standard_normal((2, tokens, config.width)).astype(np.float32)
    modulation = random.standard_normal((2, config.width)).astype(np.float32)
    step = make_schedule(SchedulerConfig.from_dict(bundle.manifest.scheduler), 4).steps[1]
    guidance = np.float32(3.5)
    outputs = OnnxRuntimeBackend(bundle).graph("head")(
        {
            "video": video,
            "modulation": modulation,
            "latents": latents,
            "x0_old": x0_old,
            "noise": noise,
            "coefficients": np.concatenate([[guidance], step.as_array()]).astype(np.float32),
            **bundle.tensors("denoiser"),
        }
    )
    negative, positive = outputs["prediction"][:1], outputs["prediction"][1:]
    wanted, x0 = advance(step, latents, negative + guidance * (positive - negative), x0_old, noise)
    assert max_abs(outputs["latents_out"], wanted) < 2e-5
    assert max_abs(outputs["x0"], x0) < 2e-5


@pytest.mark.parametrize("fixture", ["bundle10", "bundle15"])
def test_the_cpu_block_equals_the_portable_one(fixture: str, request: pytest.FixtureRequest) -> None:
    """Both graphs are shipped; only the CPU uses the one in ONNX Runtime's own operators."""
    import onnxruntime

    bundle = Bundle(request.getfixturevalue(fixture))
    d = bundle.manifest.transformer.width
    random = np.random.default_rng(3)
    angle = random.standard_normal((5 + 12, 32)).astype(np.float32)
    feeds = {
        "video": random.standard_normal((2, 12, d)).astype(np.float32),
        "text": random.standard_normal((2, 5, d)).astype(np.float32),
        "pose": random.standard_normal((1, 12, d)).astype(np.float32),
        "modulation": random.standard_normal((15, d)).astype(np.float32),
        "rope_cos": np.cos(angle),
        "rope_sin": np.sin(angle),
        **bundle.tensors("block_00"),
    }
    outputs = []
    for name in ("block", "block_cpu"):
        session = onnxruntime.InferenceSession(bundle.graph(name)[1], providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, {port.name: feeds[port.name] for port in session.get_inputs()}))
    for portable, own in zip(*outputs, strict=True):
        assert max_abs(portable, own) < 2e-5


def test_only_the_cpu_blocks_use_operators_that_other_runtimes_lack(bundle15: Path) -> None:
    onnx = pytest.importorskip("onnx")
    bundle = Bundle(bundle15)
    for name in bundle.manifest.graphs:
        domains = {node.domain for node in onnx.load_from_string(bundle.graph(name)[1]).graph.node}
        assert domains <= ({"", "com.microsoft"} if name.endswith("_cpu") else {""}), name
