"""From a bundle to a quantized bundle that animates: what it holds, how good it is, and what happens on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from benchmarks.checkpoints import SPECS, transformer_config
from benchmarks.int8_latency import kernels
from dynamictrl_edge.bundle.config import TransformerConfig
from dynamictrl_edge.bundle.errors import BundleError, DeviceError, InputError, UsageError
from dynamictrl_edge.bundle.manifest import BLOCK_KINDS, graph_form, read_manifest
from dynamictrl_edge.bundle.store import Bundle
from dynamictrl_edge.calibration import calibrate as module
from dynamictrl_edge.calibration import conditioning
from dynamictrl_edge.calibration.block_graph import CONDITIONING_LINEARS, LINEARS
from dynamictrl_edge.calibration.blocks import BlockCandidate
from dynamictrl_edge.calibration.calibrate import Options, calibrate
from dynamictrl_edge.calibration.decide import Settings, snr
from dynamictrl_edge.calibration.measure import Measurer
from dynamictrl_edge.calibration.observe import Observations
from dynamictrl_edge.calibration.samples import Sample
from dynamictrl_edge.runtime import Animator
from tests.calibration_samples import SIZE, block_inputs, quick, some_samples
from tests.cli_samples import listing
from tests.conftest import Export, Quantized
from tests.engine_samples import edit


def latents(bundle: Path, **changes: Any) -> np.ndarray:
    (sample,) = some_samples(1)
    request = {**sample.request(2, 3.0), **changes}
    prepared = Animator.from_bundle(bundle, cache=False, threads=1)
    return prepared(**request).latents


@pytest.mark.parametrize(("scheme", "least"), [("int8", 20.0), ("fp8", 15.0), ("int8-weights", 25.0)])
def test_a_quantized_bundle_animates_nearly_as_the_source(
    quantized: Quantized, bundle15: Path, scheme: str, least: float
) -> None:
    exact = latents(bundle15)
    assert snr(exact, latents(quantized(scheme))) > least


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weights"])
def test_it_says_what_it_is_and_is_smaller(quantized: Quantized, bundle15: Path, scheme: str) -> None:
    source, made = read_manifest(bundle15), read_manifest(quantized(scheme))
    assert (made.label, made.precision) == (scheme, "fp32")
    assert made.quantization is not None and set(made.quantization.blocks) == {"block"}
    assert made.quantization.linears["block"] == LINEARS
    assert made.quantized_linears("block") == (() if scheme == "int8-weights" else LINEARS)
    for name in made.files:
        if name.startswith("weights/block_"):
            assert made.files[name].bytes < 0.32 * source.files[name].bytes
    kinds = {info.dtype for info in Bundle(quantized(scheme)).tensors("block_00").infos.values()}
    assert kinds == {"F32", "F8_E4M3" if scheme == "fp8" else "I8"}
    Bundle(quantized(scheme)).verify()
    assert {"calibration/calibration.json", "calibration/ranges.json"} <= set(made.files)


def test_decisions_and_sensitivities_are_in_the_bundle(quantized: Quantized, bundle15: Path) -> None:
    facts = json.loads((quantized("int8") / "calibration/calibration.json").read_text())
    layers = read_manifest(bundle15).transformer.num_layers
    assert len(facts["linears"]) == 4 * layers
    for row in facts["linears"]:
        assert row["snr"] >= row["plain_snr"] > 10
        assert min(row["alone_snr_db"]) > min(facts["output_snr_db"])
    assert facts["denoiser_bytes"]["after"] < facts["denoiser_bytes"]["before"]


def test_a_half_precision_bundle_can_be_calibrated(quantized: Quantized, exported: Export) -> None:
    source, made = exported("cogvideox15-tiny", "fp16"), quantized("int8", "fp16")
    assert snr(latents(source), latents(made)) > 20
    assert (read_manifest(made).precision, read_manifest(made).label) == ("fp16", "int8")


def test_linears_stay_in_high_precision(quantized: Quantized, bundle15: Path, tmp_path: Path) -> None:
    worst = json.loads((quantized("int8") / "calibration/calibration.json").read_text())
    asked = min(worst["output_snr_db"]) + 1
    made = calibrate(bundle15, tmp_path / "q", some_samples(), quick(min_snr=asked, smooth=True), threads=1)
    assert made.choice.snr.min() >= asked and 0 < made.choice.count < 4 * len(made.decisions)
    manifest = read_manifest(tmp_path / "q")
    assert manifest.quantization is not None
    for block, graph in enumerate(manifest.quantization.blocks):
        tensors = Bundle(tmp_path / "q").tensors(f"block_{block:02d}")
        kinds = {name: tensors.infos[f"{name}_weight"].dtype for name in LINEARS}
        assert {name for name, kind in kinds.items() if kind == "F32"} == made.choice.kept[block]
        for kind in BLOCK_KINDS:
            form = graph_form(kind, graph)
            assert {port.name for port in manifest.graphs[form].inputs} >= set(tensors)
            assert manifest.quantized_linears(form) == manifest.quantized_linears(graph)
    better = snr(latents(bundle15), latents(tmp_path / "q"))
    assert better > snr(latents(bundle15), latents(quantized("int8"))) - 1


def test_a_source_without_the_graphs_of_reuse_gets_none(bundle15: Path, tmp_path: Path) -> None:
    source = shutil.copytree(bundle15, tmp_path / "source")
    edit(
        source, lambda manifest: [manifest["graphs"].pop(name) for name in list(manifest["graphs"]) if "tokens" in name]
    )
    calibrate(source, tmp_path / "q", some_samples(1), quick(), threads=1)
    made = read_manifest(tmp_path / "q")
    assert made.quantization is not None and set(made.quantization.linears) == {
        *("block", "modulation", "conditioning", "text_block")
    }
    assert not any("tokens" in name for name in made.graphs)


def test_the_result_is_the_same_every_time(quantized: Quantized, bundle15: Path, tmp_path: Path) -> None:
    calibrate(bundle15, tmp_path / "q", some_samples(), quick(smooth=True), threads=1)
    first, second = read_manifest(quantized("int8")).files, read_manifest(tmp_path / "q").files
    weights = [name for name in first if name.startswith(("weights/", "graphs/"))]
    assert {name: first[name] for name in weights} == {name: second[name] for name in weights}


def test_where_memory_is_short_blocks_are_read_anew_and_nothing_changes(
    quantized: Quantized, bundle15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[BlockCandidate] = []
    release = BlockCandidate.release

    def counted(candidate: BlockCandidate) -> None:
        released.append(candidate)
        release(candidate)

    monkeypatch.setattr(BlockCandidate, "release", counted)
    monkeypatch.setattr("dynamictrl_edge.calibration.observe.physical_memory", lambda: 1000)
    layers = read_manifest(bundle15).transformer.num_layers
    # It reads blocks anew in any case; what is looked for is that mixtures do as well.
    monkeypatch.setattr(Measurer, "alone", lambda measurer, trajectories, tick: np.zeros((layers, 4, 2)))
    calibrate(bundle15, tmp_path / "q", some_samples(), quick(smooth=True), threads=1)
    assert len(released) > 2 * layers  # each is written once in any case
    first, second = read_manifest(quantized("int8")).files, read_manifest(tmp_path / "q").files
    weights = [name for name in first if name.startswith(("weights/", "graphs/"))]
    assert {name: first[name] for name in weights} == {name: second[name] for name in weights}


def test_the_source_stays_as_it_is(bundle15: Path, tmp_path: Path) -> None:
    source = shutil.copytree(bundle15, tmp_path / "source")
    before = listing(source)
    calibrate(source, tmp_path / "q", some_samples(1), quick(), threads=1)
    assert listing(source) == before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "q"}


class Stopping:
    """Progress that is interrupted in a stage, after so many steps."""

    def __init__(self, stage: str, after: int):
        self.wanted, self.left, self.now = stage, after, ""
        self.stages: list[str] = []

    def stage(self, name: str, total: float | None = None) -> None:
        self.now = name
        self.stages.append(name)

    def advance(self, amount: float = 1) -> None:
        if self.now == self.wanted:
            self.left -= 1
            if self.left <= 0:
                raise KeyboardInterrupt


@pytest.mark.parametrize(("stage", "after"), [("Observing", 3), ("Choosing scales", 6), ("Writing", 2)])
def test_an_interrupted_calibration_goes_on(
    quantized: Quantized, bundle15: Path, tmp_path: Path, stage: str, after: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        calibrate(
            bundle15, tmp_path / "q", some_samples(), quick(smooth=True), threads=1, progress=Stopping(stage, after)
        )
    assert [path.name for path in tmp_path.iterdir()] == [".q.calibration"]
    work = tmp_path / ".q.calibration"
    seen = Observations.load(work / "statistics.npz", read_manifest(bundle15).transformer)
    assert seen is not None and seen.done == (1 if stage == "Observing" else 2)
    decided = len(list(work.glob("block_*.json")))
    assert decided == {"Observing": 0, "Choosing scales": 1}.get(stage, read_manifest(bundle15).transformer.num_layers)
    calibrate(bundle15, tmp_path / "q", some_samples(), quick(smooth=True), threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
    first, second = read_manifest(quantized("int8")).files, read_manifest(tmp_path / "q").files
    assert all(first[name] == second[name] for name in first if name.startswith("weights/block"))


def test_other_settings_begin_anew(bundle15: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        calibrate(bundle15, tmp_path / "q", some_samples(), quick(), threads=1, progress=Stopping("Choosing scales", 1))
    with pytest.raises(KeyboardInterrupt):
        calibrate(bundle15, tmp_path / "q", some_samples(), quick("fp8"), threads=1, progress=Stopping("Observing", 1))
    assert not (tmp_path / ".q.calibration" / "statistics.npz").exists()


# Bad input


def test_a_quantized_bundle_is_refused(quantized: Quantized, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"quantized already \(int8\)"):
        calibrate(quantized("int8"), tmp_path / "q", some_samples(), quick())
    assert list(tmp_path.iterdir()) == []


def test_an_empty_set_is_refused(bundle15: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="calibration set is empty"):
        calibrate(bundle15, tmp_path / "q", [], quick())


def test_too_few_values_for_the_percentile_are_refused(
    bundle15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PERCENTILES", (0.999999,))
    with pytest.raises(InputError, match=r"too few for the 99.9999 % percentile: raise --steps"):
        calibrate(bundle15, tmp_path / "q", some_samples(), quick())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(min_snr=float("nan")), "--min-snr nan"),
        (Options(most_high_precision=-1), "--max-high-precision -1"),
        (Options(settings=Settings(scheme="int3")), "--precision 'int3'"),  # type: ignore[arg-type]
        (Options(steps=0), "number of steps 0"),
    ],
)
def test_options_that_cannot_work_are_refused(bundle15: Path, tmp_path: Path, options: Options, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        calibrate(bundle15, tmp_path / "q", some_samples(), options)


def test_the_output_must_be_new_and_elsewhere(bundle15: Path, tmp_path: Path) -> None:
    source = shutil.copytree(bundle15, tmp_path / "source")
    with pytest.raises(InputError, match="lies in the source bundle"):
        calibrate(source, source / "q", some_samples(), quick())
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(InputError, match="exists already"):
        calibrate(source, tmp_path / "there", some_samples(), quick())
    with pytest.raises(InputError, match="does not exist"):
        calibrate(source, tmp_path / "no" / "q", some_samples(), quick())


def damaged(bundle: Path, into: Path, change: Any) -> Path:
    """A copy whose first block's weights were changed in place, hashes and all."""
    from tests.bundle_samples import entry_of

    made = shutil.copytree(bundle, into)
    name = "weights/block_00.safetensors"
    path = made / name
    info = Bundle(bundle).tensors("block_00").infos["qkv_weight" if change == "zero" else "out_weight"]
    data = bytearray(path.read_bytes())
    values = np.frombuffer(data, np.float32, info.nbytes // 4, info.offset)
    values[:] = np.nan
    path.write_bytes(bytes(data))
    entry = entry_of(bytes(data))
    edit(made, lambda manifest: manifest["files"].update({name: {"sha256": entry.sha256, "bytes": entry.bytes}}))
    return made


def test_activations_that_are_not_finite_are_named(bundle15: Path, tmp_path: Path) -> None:
    bad = damaged(bundle15, tmp_path / "bad", "nan")
    with pytest.raises(
        InputError, match=r"The input of ff_in in block 0 has values that are not finite, in sample 0 at"
    ):
        calibrate(bad, tmp_path / "q", some_samples(), quick(), threads=1)


def test_a_full_disk_leaves_nothing_half_written(
    bundle15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(InputError, match="the disk is full"):
        calibrate(bundle15, tmp_path / "q", some_samples(), quick(), threads=1)
    assert [path.name for path in tmp_path.iterdir()] == [".q.calibration"]
    assert [path.name for path in (tmp_path / ".q.calibration").iterdir()] == ["key"]


def test_samples_of_other_sizes_go_together(bundle15: Path, tmp_path: Path) -> None:
    first, second = some_samples()
    wide = Sample(**{**vars(second), "width": SIZE["width"] + 16})
    calibrate(bundle15, tmp_path / "q", [first, wide], quick(), threads=1)
    assert read_manifest(tmp_path / "q").label == "int8"


def test_without_guidance_one_half_is_seen(bundle15: Path, tmp_path: Path) -> None:
    made = calibrate(bundle15, tmp_path / "q", some_samples(), quick(guidance=1.0), threads=1)
    assert made.choice.snr.min() > 20


def test_the_report_stands_alone(bundle15: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the report needs the extra 'calibrate'")
    calibrate(bundle15, tmp_path / "q", some_samples(1), quick(report=True), threads=1)
    Bundle(tmp_path / "q").verify()
    page = (tmp_path / "q" / "calibration" / "report.html").read_text()
    assert page.count("<svg") == 2 and page.count("data:image/png;base64,") == 12
    assert "<script" not in page and ' src="http' not in page and "<link" not in page
    for words in ("Each linear alone", "Ranges over timesteps", "denoiser, blocks", "ff_out", "int8"):
        assert words in page


def test_a_missing_drawing_library_is_named(bundle15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"'matplotlib'.*--no-report"):
        calibrate(bundle15, tmp_path / "q", some_samples(), quick(report=True))


def test_a_bf16_bundle_is_observed_through_its_float32_export(
    exported: Export, bundle10: Path, bundle15: Path, tmp_path: Path
) -> None:
    source = exported("cogvideox15-tiny", "bf16")
    with pytest.raises(DeviceError, match="--observe-with"):
        calibrate(source, tmp_path / "q", some_samples(), quick(), threads=1)
    with pytest.raises(BundleError, match="another checkpoint"):
        calibrate(source, tmp_path / "q", some_samples(), quick(), observe_with=bundle10, threads=1)
    with pytest.raises(UsageError, match="is bf16; a bundle in fp32 is needed"):
        calibrate(bundle15, tmp_path / "q", some_samples(), quick(), observe_with=source, threads=1)
    made = calibrate(source, tmp_path / "q", some_samples(), quick(), observe_with=bundle15, threads=1)
    assert made.choice.snr.min() > 20
    manifest = read_manifest(tmp_path / "q")
    assert (manifest.precision, manifest.label) == ("bf16", "int8") and "block_cpu" not in manifest.graphs
    kinds = {info.dtype for info in Bundle(tmp_path / "q").tensors("block_00").infos.values()}
    assert kinds == {"I8", "BF16"}


def test_every_quantized_linear_runs_an_integer_kernel(quantized: Quantized, tmp_path: Path) -> None:
    import onnxruntime

    bundle = Bundle(quantized("int8"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    model = bundle.graph("block_cpu")[1]
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    arrays = block_inputs(bundle)
    session.run(None, {port.name: arrays[port.name] for port in session.get_inputs()})
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [e["args"]["op_name"] for e in events if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]
    assert kernels.count("MatMulIntegerToFloat") == 4
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(kernels)


# The conditioning


def test_the_conditioning_becomes_int8_where_its_output_allows(quantized: Quantized, bundle15: Path) -> None:
    made, facts = (
        Bundle(quantized("int8")),
        json.loads((quantized("int8") / "calibration/calibration.json").read_text()),
    )
    found = facts["conditioning"]
    assert set(found["snr"]) == set(CONDITIONING_LINEARS)
    assert found["linears"] == [name for name in CONDITIONING_LINEARS if found["snr"][name] >= conditioning.LEAST_SNR]
    infos, source = made.tensors("denoiser").infos, Bundle(bundle15).tensors("denoiser").infos
    for name in CONDITIONING_LINEARS:
        assert infos[f"{name}_weight"].dtype == ("I8" if name in found["linears"] else "F32")
    narrow = {f"{name}_weight" for name in found["linears"]}
    assert narrow and {n: i.dtype for n, i in infos.items() if n in source and n not in narrow} == {
        n: i.dtype for n, i in source.items() if n not in narrow
    }
    assert made.manifest.quantized_linears("conditioning") == ()  # weights alone


def test_a_conditioning_that_suffers_stays_as_it_is(
    bundle15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditioning, "LEAST_SNR", 1e3)
    made = calibrate(bundle15, tmp_path / "q", some_samples(1), quick(), threads=1)
    assert made.conditioning.linears == ()
    source, files = read_manifest(bundle15).files, read_manifest(tmp_path / "q").files
    assert files["weights/denoiser.safetensors"] == source["weights/denoiser.safetensors"]
    assert files["graphs/conditioning.onnx"] == source["graphs/conditioning.onnx"]
    assert min(made.conditioning.snr.values()) > 20


def test_onnx_runtime_multiplies_integers_in_every_linear(quantized: Quantized, bundle15: Path) -> None:
    made, source = kernels(Bundle(quantized("int8"))), kernels(Bundle(bundle15))
    assert (source["MatMul"], source.get("MatMulIntegerToFloat", 0)) == (4, 0)
    assert (made.get("MatMul", 0), made["MatMulIntegerToFloat"], made["QuantizeLinear"]) == (0, 4, 4)


# Bytes


def loop_bytes(config: TransformerConfig, text_dim: int, vector: int) -> int:
    """Bytes of the tensors that an int8 bundle's loop uses; `vector`: bytes of a number that is not quantized."""
    d, e = config.width, config.time_embed_dim
    patch = config.latent_channels * config.patch_size**2 * (config.patch_size_t or 1)
    linears = 12 * d * d
    biases, scales, norms = 9 * d, 14 * d, 4 * config.attention_head_dim
    block = linears + vector * (biases + scales + norms)
    narrow = (text_dim + 2 * patch) * d + vector * 3 * d  # text, image and pose, and the scales of their products
    wide = 2 * patch * d + patch + 2 * d  # stem and head
    ofs = 0 if config.ofs_embed_dim is None else config.ofs_embed_dim * e + e * e + 2 * e
    times = d * e + e * e + 2 * e + (e + 1) * 2 * d + 2 * d  # timestep, final norm
    return config.num_layers * block + narrow + vector * (wide + ofs + times + 2 * d)


def test_int8_at_full_size_is_within_4_7_gib(quantized: Quantized) -> None:
    made = Bundle(quantized("int8"))
    config = made.manifest.transformer
    names = [f"block_{i:02d}" for i in range(config.num_layers)]
    tensors = [info for name in (*names, "denoiser") for info in made.tensors(name).infos.values()]
    widths = {"F32": 4, "I8": 1}
    found = sum(widths[info.dtype] * int(np.prod(info.shape)) for info in tensors)
    assert found == loop_bytes(config, config.text_embed_dim, 4)
    full = msgspec.convert(transformer_config(SPECS["full"]), TransformerConfig)
    assert loop_bytes(full, full.text_embed_dim, 2) < 4.5 * 2**30
