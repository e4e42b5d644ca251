"""`calibration/report.html`: what calibration found and decided, in one file that needs nothing else.

Plots are SVG inside the page, frames are PNG inside the page; there is no script and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from .block_graph import LINEARS

__all__ = ["make_report"]

MOST_FRAMES = 6
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } td, th { padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } svg { max-width: 100%; height: auto; }
tr.kept { background: #fff3d6; } .strip img { image-rendering: pixelated; width: 15%; margin-right: 0.5%; }
"""


def make_report(
    facts: Mapping[str, Any],
    ranges: Sequence[Mapping[str, Any]],
    timesteps: Sequence[int],
    sizes: Mapping[str, tuple[int, int]],
    strips: Mapping[str, np.ndarray],
) -> str:
    """The page.

    Args:
        facts: of `Calibration.facts`. ranges: least and greatest value per (block, linear) and timestep.
        timesteps: of all observed steps. sizes: part of the bundle -> bytes before and after.
        strips: title -> frames [N, H, W, 3] uint8 of one clip, source first.
    """
    scheme = html.escape(str(facts["scheme"]))
    output = ", ".join(
        f"{snr:.1f} dB at t = {t}" for t, snr in zip(facts["timesteps"], facts["output_snr_db"], strict=True)
    )
    graphs = ", ".join(f"{count} × {html.escape(name)}" for name, count in facts["graphs"].items())
    text = facts["text_encoder"]
    parts = [
        f"<p>The denoiser's output against the source, on its own trajectories: {output}. Blocks run: {graphs}.</p>",
        _other_parts(facts, text),
        *(["<h2>Frames</h2>"] if strips else []),
        *(_strip(title, frames) for title, frames in strips.items()),
        "<h2>Size</h2>",
        _sizes(sizes),
        "<h2>Each linear alone</h2>"
        "<p>Signal to noise at the end of its block, the worst timestep, with only that linear quantized.</p>",
        _alone(facts),
        "<h2>Ranges over timesteps</h2><p>Largest magnitude that goes into a linear; one line per block.</p>",
        _ranges(ranges, timesteps),
        "<h2>Decisions</h2>",
        _decisions(facts),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Calibration: {scheme}</title>'
        f"<style>{_STYLE}</style>\n<h1>Calibration: {scheme}</h1>\n{body}\n</html>\n"
    )


def _other_parts(facts: Mapping[str, Any], text: Mapping[str, Any] | None) -> str:
    def said(what: str, found: Mapping[str, Any] | None) -> str:
        if found is None:
            return f"{what}: left as it was, as asked."
        how = "int8 weights" if found["narrow"] else "left as it was"
        return f"{what}: {how} ({found['snr']:.1f} dB)."

    shared = facts["conditioning"]
    told = ", ".join(f"{name} {quality:.1f} dB" for name, quality in shared["snr"].items())
    conditioning = f"Conditioning: int8 weights of {', '.join(shared['linears']) or 'no linear'} ({told})."
    vae = "VAE: left as it was; it is a few percent of a full-size bundle, and its errors are seen directly."
    return f"<p>{said('Modulation', facts['modulation'])} {conditioning} {said('Text encoder', text)} {vae}</p>"


def _strip(title: str, frames: np.ndarray) -> str:
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, min(len(frames), MOST_FRAMES)).round().astype(int))]
    images = "".join(f'<img alt="frame" src="data:image/png;base64,{_png(frame)}">' for frame in chosen)
    return f'<p>{html.escape(title)}</p><div class="strip">{images}</div>'


def _png(frame: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _sizes(sizes: Mapping[str, tuple[int, int]]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(part)}<td>{before / 1e6:,.2f}<td>{after / 1e6:,.2f}<td>{after / max(1, before):.2f}</tr>"
        for part, (before, after) in sizes.items()
    )
    return f"<table><tr><th>part<th>MB before<th>MB after<th>ratio</tr>{rows}</table>"


def _alone(facts: Mapping[str, Any]) -> str:
    figure, axes = _figure(1, 1, height=3.2)
    blocks = sorted({row["block"] for row in facts["linears"]})
    width = 0.8 / len(LINEARS)
    for place, name in enumerate(LINEARS):
        rows = [row for row in facts["linears"] if row["linear"] == name]
        x = [row["block"] + (place - 1.5) * width for row in rows]
        axes[0].bar(x, [min(row["alone_snr_db"]) for row in rows], width, label=name)
    axes[0].set(xlabel="block", ylabel="dB", xticks=blocks if len(blocks) <= 12 else blocks[:: len(blocks) // 10])
    axes[0].legend(ncols=4, frameon=False, loc="lower right")
    return _svg(figure)


def _ranges(ranges: Sequence[Mapping[str, Any]], timesteps: Sequence[int]) -> str:
    figure, axes = _figure(1, len(LINEARS), height=2.8)
    for axis, name in zip(axes, LINEARS, strict=True):
        for one in ranges:
            if one["linear"] == name:
                largest = np.maximum(np.abs(one["least"]), np.abs(one["greatest"]))
                axis.semilogy(timesteps, largest, linewidth=1)
        axis.set(title=name, xlabel="timestep")
        axis.invert_xaxis()
    return _svg(figure)


def _decisions(facts: Mapping[str, Any]) -> str:
    head = "<tr><th>linear<th>alpha<th>scale<th>compensated<th>product dB<th>plain dB<th>alone dB<th></tr>"
    rows = [head]
    for row in facts["linears"]:
        alpha = "–" if row["alpha"] is None else f"{row['alpha']:g}"
        kept = ("kept", "high precision") if row["kept"] else ("", "")
        rows.append(
            f'<tr class="{kept[0]}"><td>{row["block"]} {row["linear"]}<td>{alpha}<td>{html.escape(row["method"])}'
            f"<td>{'yes' if row['compensated'] else 'no'}<td>{row['snr']:.1f}<td>{row['plain_snr']:.1f}"
            f"<td>{min(row['alone_snr_db']):.1f}<td>{kept[1]}</tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def _figure(rows: int, columns: int, height: float) -> tuple[Any, list[Any]]:
    # The drawing library's objects are used without its global state, which would need a display and grow.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, list(np.ravel(figure.subplots(rows, columns)))


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "dynamictrl-edge", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
