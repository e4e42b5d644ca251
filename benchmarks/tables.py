"""Writes the tables of README.md and docs/ from the receipts in `benchmarks/results/`.

    python benchmarks/tables.py [--check]

Each table stands between `<!-- NAME -->` and `<!-- end -->`. `--check` changes nothing and fails if a table
does not match its receipt.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that this file also runs as a script

from benchmarks.receipt import ROOT
from benchmarks.reuse import STEPS_GROUP, Row, table


def exact_loop(receipt: dict[str, Any]) -> list[str]:
    figures = receipt["figures"]
    lines = [
        f"Denoising loop, {receipt['settings']['steps']} steps, guidance {receipt['settings']['guidance']:g}, float32, against the "
        "published computation in eager PyTorch, same weights and inputs, one process each, in turn "
        f"(median of {receipt['settings']['rounds']}; {source(receipt, 'exact_loop')}):",
        "",
        "| model | tokens | PyTorch | ours | faster (min to max) | peak memory, PyTorch / ours | share of GEMM ceiling | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in figures.items():
        if not name.startswith("bench"):
            continue
        seconds, memory = row["seconds"], row["peak_rss_mb"]
        lines.append(
            f"| {row['parameters_m']:.0f} M, width {row['width']}, {row['blocks']} blocks | {row['video_tokens']} + {row['text_tokens']} "
            f"| {seconds['a_median']:.2f} s | {seconds['b_median']:.2f} s | {row['latency_ratio']:.2f}× "
            f"({seconds['ratio_min']:.2f} to {seconds['ratio_max']:.2f}) | {memory['torch']:.0f} / {memory['ours']:.0f} MB "
            f"({row['rss_ratio']:.2f}) | {100 * row['share_of_gemm_ceiling']:.0f} % | {row['max_difference']:.1e} |"
        )
    ceiling = figures["gemm_ceiling_gflops"]["gflops"]
    lines += [
        "",
        f"The ceiling, {ceiling:.0f} GFLOP/s, is this machine's best float32 matrix product among numpy, PyTorch and ONNX Runtime.",
    ]
    return lines


def full_export(receipt: dict[str, Any]) -> list[str]:
    figures = receipt["figures"]
    copies = figures["copy_seconds"]
    return [
        f"Export of a full-size random checkpoint ({figures['parameters']['transformer'] / 1e9:.2f} B-parameter transformer, VAE and "
        f"{receipt['settings']['t5_layers']} layers of T5-XXL, {figures['checkpoint_bytes'] / 1e9:.1f} GB, {receipt['settings']['precision']}): "
        f"**{figures['export_seconds']:.0f} s** and **{figures['peak_rss_gb']:.2f} GB** peak memory; copying the same bytes takes "
        f"{min(copies):.0f} to {max(copies):.0f} s here. The weights take {figures['weights_over_copy']:.1f}× the copy, tracing the graphs "
        f"{figures['graphs_seconds']:.0f} s whatever the size ({source(receipt, 'full_export')}).",
    ]


def full_build(receipt: dict[str, Any]) -> list[str]:
    figures, settings = receipt["figures"], receipt["settings"]
    lines = [
        f"All 12 engines of a full-size random bundle with TensorRT-RTX {receipt['versions']['tensorrt_rtx']}, for {settings['size']} and "
        f"smaller, without a GPU, {settings['workers']} compilers at once ({source(receipt, 'full_build')}):",
        "",
        "| precision | GPUs | all engines | of these the denoiser and text encoder | peak memory of a compiler, VAE / others | engines on disk | the same call again |",
        "|---|---|---|---|---|---|---|",
    ]
    for precision, row in figures.items():
        lines.append(
            f"| {precision} | {', '.join(settings['targets'][precision])} | {row['seconds']:.0f} s | {row['denoiser_seconds']:.1f} s "
            f"| {row['vae_peak_rss'] / 1e9:.2f} / {row['denoiser_peak_rss'] / 1e9:.2f} GB | {row['engine_bytes'] / 1e9:.2f} GB "
            f"| {row['seconds_again']:.2f} s |"
        )
    lines += [
        "",
        "The block of DynamiCtrl-5B, as the compiler reports it:",
        "",
        "| precision | clip | tokens | guidance halves | kernels | matrix products | attention | activations | engine | built in |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for precision, row in figures.items():
        for block in row["block"]:
            lines.append(
                f"| {precision} | {block['size']} | {block['tokens']:,} + 226 | {block['batch']} | {block['kernels']} | {block['gemms']} "
                f"| {'fused' if block['fused_attention'] == 1 else 'not fused'} | {block['activation_bytes'] / 1e9:.2f} GB "
                f"| {block['bytes'] / 1e6:.1f} MB | {block['seconds']:.1f} s |"
            )
    return lines


POCKET_ROWS = {
    "VAE alone": "truth, through the VAE alone",
    "animation": "**the pocket model**",
    "copy of the reference": "the photo, repeated",
    "another pose": "with another clip's pose",
    "black pose": "with a black pose clip",
    "zeroed pose stream": "with a pose stream of zeros",
    "masked, caption": "photo without background or clothes",
    "masked, another caption": "the same, another clip's caption",
}
POCKET_COLUMNS = (
    ("psnr", "PSNR", "{:.1f} dB"),
    ("person_psnr", "of the person", "{:.1f} dB"),
    ("ssim", "SSIM", "{:.3f}"),
    ("perceptual", "perceptual", "{:.2f}"),
    ("pose_error", "pose error", "{:.2f} px"),
    ("identity", "identity", "{:.2f}"),
    ("colours", "colours as the caption says", "{:.0%}"),
)


def pocket(receipt: dict[str, Any]) -> list[str]:
    figures, settings = receipt["figures"], receipt["settings"]
    lines = [
        f"{settings['clips']} held-out clips of {settings['size']}, {settings['steps']} steps, guidance {settings['guidance']:g} (masked photos: "
        f"{settings['masked_guidance']:g}), {figures['clip_seconds']['median']:.1f} s a clip ({source(receipt, 'pocket')}):",
        "",
        "| | " + " | ".join(title for _, title, _ in POCKET_COLUMNS) + " |",
        "|---" * (len(POCKET_COLUMNS) + 1) + "|",
    ]
    for name, title in POCKET_ROWS.items():
        row = figures["rows"][name]
        cells = [form.format(row[key]["mean"]) if key in row else "" for key, _, form in POCKET_COLUMNS]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Pose error: how far limbs are from where they should be (96 rows). Identity: colours of clothes and hair against the photo's. "
        "Perceptual: distance of the pocket VAE's own latents, no published measure.",
    ]
    return lines


def pocket_aims(receipt: dict[str, Any]) -> list[str]:
    """What the pocket model should reach, from before it was trained, and what it does."""
    settings, rows = receipt["settings"], receipt["figures"]["rows"]
    rows_of_frame = int(settings["size"].split("x")[1])

    def mean(row: str, measure: str) -> float:
        return float(rows[row][measure]["mean"])

    def above(other: str) -> float:
        return mean("animation", "person_psnr") - mean(other, "person_psnr")

    error, zeroed, black = (mean(row, "pose_error") for row in ("animation", "zeroed pose stream", "black pose"))
    # What, unit, digits, wanted, found, whether more is better.
    aims = [
        ("PSNR of the truth through the VAE", " dB", 1, 28.0, mean("VAE alone", "psnr"), True),
        ("PSNR of the animation", " dB", 1, 24.0, mean("animation", "psnr"), True),
        ("of the person, above repeating the photo", " dB", 1, 4.0, above("copy of the reference"), True),
        ("of the person, above another clip's pose", " dB", 1, 3.0, above("another pose"), True),
        ("pose error, of the frame's height", " %", 1, 1.5, 100 * error / rows_of_frame, False),
        ("pose error with a pose stream of zeros, times that", "×", 1, 4.0, zeroed / error, True),
        ("the same with a black pose clip", "×", 1, 4.0, black / error, True),
        ("colours as the caption says", " %", 0, 80.0, 100 * mean("masked, caption", "colours"), True),
    ]
    lines = [
        f"{settings['clips']} held-out clips, {settings['steps']} steps ({source(receipt, 'pocket')}):",
        "",
        "| | aimed for | found | |",
        "|---|---|---|---|",
    ]
    for what, unit, digits, wanted, found, more in aims:
        reached = found >= wanted if more else found <= wanted
        verdict = "reached" if reached else f"missed by {abs(found - wanted):.{digits + 1}f}{unit}"
        bound = f"{'at least' if more else 'at most'} {wanted:.{digits}f}{unit}"
        lines.append(f"| {what} | {bound} | {found:.{digits + 1}f}{unit} | {verdict} |")
    return lines


def quantization(receipt: dict[str, Any]) -> list[str]:
    figures, settings = receipt["figures"], receipt["settings"]
    exact = figures["float"]
    lines = [
        f"The pocket model, {settings['judged_by']} held-out clips, {settings['steps']} steps, guidance {settings['guidance']:g}, "
        f"calibrated with {settings['calibrated_with']} other clips; all {settings['linears']} linears quantized "
        f"({source(receipt, 'quantization')}):",
        "",
        "| | PSNR to truth | pose error | PSNR to float | final latents, SNR | denoiser's output, SNR by timestep | bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    whole = sum(exact["bytes"].values())
    lines.append(f"| float32 | {exact['psnr_to_truth_db']:.2f} dB | {exact['pose_error_px']:.2f} px | | | | 1 |")
    for name, row in figures.items():
        if "output_snr_db" in row:
            snr, share = row["output_snr_db"], ""
            if "bytes" in row:
                share = f"{sum(row['bytes'].values()) / whole:.2f}"
            lines.append(
                f"| {name} | {row['psnr_to_truth_db']:.2f} dB | {row['pose_error_px']:.2f} px | {row['psnr_to_float_db']:.1f} dB "
                f"| {row['final_latent_snr_db']['median']:.1f} dB | {min(snr):.1f} to {max(snr):.1f} dB | {share} |"
            )
    vae = figures["VAE with int8 weights"]["psnr_to_float_db"]
    full = figures["VAE of the full model"]
    lines += [
        "",
        f"The VAE stays float. With its weights alone rounded to int8 per output channel, frames are {vae:.1f} dB from the float "
        f"ones. At full size its decoder does {full['decoder'] / full['denoising']:.1%} of the operations of 25 denoising steps, so "
        "that int8 could save half of that at most, for errors that nothing after it smooths. (Convolutions over time and space "
        "with Q/DQ do become integer kernels in TensorRT-RTX; where reuse makes denoising a few times faster, this may be worth "
        "another look.)",
    ]
    return lines


def int8_latency(receipt: dict[str, Any]) -> list[str]:
    figures, settings = receipt["figures"], receipt["settings"]
    pairs = figures["seconds_float_int8"]
    kernels = figures["kernels"]["int8"]
    return [
        f"Denoising loop of the 27 M benchmark model (width {figures['width']}, {figures['blocks']} blocks, "
        f"{figures['video_tokens']} + {figures['text_tokens']} tokens, {settings['steps']} steps with guidance) on "
        f"{receipt['machine']['cores']} cores, float32 and int8 in turn, median of {settings['rounds']} "
        f"({source(receipt, 'int8_latency')}): {pairs['a_median']:.2f} s and {pairs['b_median']:.2f} s, "
        f"**{pairs['ratio_median']:.2f}× as fast** ({pairs['ratio_min']:.2f} to {pairs['ratio_max']:.2f}), with "
        f"{figures['peak_rss_mb']['float']:.0f} and {figures['peak_rss_mb']['int8']:.0f} MB of peak memory. ONNX Runtime's profile of a block names "
        f"{kernels.get('MatMulIntegerToFloat', 0)} integer products and {kernels.get('MatMul', 0)} float ones.",
    ]


def full_int8(receipt: dict[str, Any]) -> list[str]:
    figures, settings = receipt["figures"], receipt["settings"]
    before, after = (n / 2**30 for n in figures["calibration"]["denoiser_bytes"])
    return [
        f"A random checkpoint of DynamiCtrl-5B's size ({figures['parameters']['transformer'] / 1e9:.2f} B parameters, "
        f"{settings['layers']} blocks), exported to {settings['precision']} and calibrated ({source(receipt, 'full_int8')}): what "
        f"the denoising loop uses is **{figures['loop_gib']:.2f} GiB** ({figures['blocks_gib']:.2f} of it the blocks); the "
        f"modulation, which works once per schedule, {after - figures['loop_gib']:.2f} GiB more; together {after:.2f} where "
        f"{settings['precision']} has {before:.2f}. Calibrating took **{figures['calibration']['peak_rss'] / 1e9:.1f} GB** at its "
        f"peak, mapped files included, told that the machine has {settings['memory_gb']:g} GB.",
    ]


def reuse(receipt: dict[str, Any]) -> list[str]:
    """Presets, and what else nothing beats."""
    rows, whole, narrow = reuse_rows(receipt)
    presets = {text: name for name, text in receipt["figures"]["presets"].items() if text is not None}
    shown = [row for row in rows if row.name in presets or row.group == STEPS_GROUP]
    lines = table(
        [*shown, *(row for row in narrow if row.name.removeprefix("int8, ") in (*presets, whole.name))], whole
    )
    for text, name in presets.items():
        lines = lines.replace(f" {text} |", f" `--reuse {name}` |").replace(
            f" int8, {text} |", f" int8, `--reuse {name}` |"
        )
        lines = lines.replace(f" **{text}** |", f" `--reuse {name}` |").replace(
            f" **int8, {text}** |", f" int8, `--reuse {name}` |"
        )
    return [reuse_caption(receipt), "", *lines.splitlines()]


def reuse_sweep(receipt: dict[str, Any]) -> list[str]:
    """Everything that was measured."""
    rows, whole, narrow = reuse_rows(receipt)
    return [reuse_caption(receipt), "", *table([*rows, *narrow], whole).splitlines()]


def reuse_rows(receipt: dict[str, Any]) -> tuple[list[Row], Row, list[Row]]:
    figures = receipt["figures"]
    return [Row(**row) for row in figures["rows"]], Row(**figures["full"]), [Row(**row) for row in figures["int8"]]


def reuse_caption(receipt: dict[str, Any]) -> str:
    settings = receipt["settings"]
    return (
        f"The pocket model, {settings['clips']} held-out clips, {settings['steps']} steps, guidance {settings['guidance']:g} "
        f"({source(receipt, 'reuse')}):"
    )


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "exact_loop": exact_loop,
    "full_export": full_export,
    "full_build": full_build,
    "pocket": pocket,
    "pocket_aims": pocket_aims,
    "quantization": quantization,
    "int8_latency": int8_latency,
    "full_int8": full_int8,
    "reuse": reuse,
    "reuse_sweep": reuse_sweep,
}
RECEIPTS = {"pocket_aims": "pocket", "reuse_sweep": "reuse"}  # where it has another name than the table
PAGES = ("README.md", "pocket/model/README.md", "docs/pocket.md", "docs/calibration.md", "docs/reuse.md")


def source(receipt: dict[str, Any], name: str) -> str:
    machine = receipt["machine"]
    return f"{machine.get('cpu', 'CPU')}, {machine.get('cores')} cores, `benchmarks/results/{name}.json`"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        changed = text
        for name, made in TABLES.items():
            if f"<!-- {name} -->" not in text:
                continue
            receipt = json.loads((ROOT / "benchmarks" / "results" / f"{RECEIPTS.get(name, name)}.json").read_text())
            body = "\n".join(made(receipt))
            pattern = re.compile(rf"<!-- {name} -->\n.*?<!-- end -->|<!-- {name} -->", re.DOTALL)
            changed = pattern.sub(lambda _, name=name, body=body: f"<!-- {name} -->\n{body}\n<!-- end -->", changed)  # type: ignore[misc]
        if check and changed != text:
            print(f"{page} does not match benchmarks/results/; run python benchmarks/tables.py", file=sys.stderr)
            return 1
        if not check:
            path.write_text(changed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
