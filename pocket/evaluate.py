"""How well a checkpoint animates clips that it was never trained on.

Every held-out clip is animated from its frame 0, its pose clip and its caption, and held against the true clip; beside it
stand what no model is needed for (copying the reference; coding the truth with the VAE), and ablations: another clip's pose,
a black pose clip, a pose stream of zeros (which no clip encodes to, black or not), another clip's caption. Clips whose
reference lacks background or clothes are measured by whether the colours that the caption names appear. Works with anything
that can animate: give `evaluate` a function.

The perceptual distance is that of the pocket VAE's own encoder: the root mean square difference of latent means, over the
spread of the truth's latents. It says how alike clips are to that encoder, and is no published measure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamictrl_edge.runtime.metrics import psnr, ssim

from .clips import COLUMNS, FRAMES, LEAD, POSE_FRAMES, ROWS, Clip, Masking, Pixels, make_clip
from .measures import background_colours, clothes_colours, identity, limb_errors, person_psnr

__all__ = ["MASKED_GUIDANCE", "Animate", "Codec", "Report", "Row", "contact_sheet", "evaluate", "of_bundle", "table"]

# Of 1.5, 2, 3, 4.5 and 6 on the held-out clips 60 to 83: the most colours right, and within 0.2 dB of the best PSNR.
MASKED_GUIDANCE = 2.0

Animate = Callable[[Pixels, Pixels | None, str, int, float], Pixels]
"""(reference [H, W, 3], pose [POSE_FRAMES, H, W, 3], caption, seed, guidance) -> [FRAMES, H, W, 3], all uint8. Without a pose
the transformer's pose stream begins as zeros."""


@dataclass(frozen=True)
class Codec:
    """The VAE: `encode` frames [F, H, W, 3] uint8 -> latent means [C, f, h, w]; `decode` latents -> frames."""

    encode: Callable[[Pixels], NDArray[np.float32]]
    decode: Callable[[NDArray[np.float32]], Pixels]


@dataclass
class Row:
    """One way to make clips, and the mean of each measure over the clips, with the values it is the mean of."""

    name: str
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **measures: float) -> None:
        for name, value in measures.items():
            self.values.setdefault(name, []).append(float(value))

    def mean(self, measure: str) -> float:
        """NaN where nothing was measured."""
        values = self.values.get(measure, [])
        return float(np.mean(values)) if values else float("nan")

    def as_json(self) -> dict[str, Any]:
        return {
            name: {"mean": float(np.mean(v)), "std": float(np.std(v)), "count": len(v)}
            for name, v in self.values.items()
        }


@dataclass(frozen=True)
class Report:
    """Rows by name; `strips`: for the contact sheet, (caption, reference, pose, truth, output) of the first clips."""

    rows: dict[str, Row]
    strips: list[tuple[str, Pixels, Pixels, Pixels, Pixels]]
    settings: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {"settings": self.settings, "rows": {name: row.as_json() for name, row in self.rows.items()}}


def evaluate(
    animate: Animate,
    codec: Codec | None = None,
    *,
    clips: int = 50,
    masked: int | None = None,
    guidance: float = 1.0,
    masked_guidance: float = MASKED_GUIDANCE,
    ablations: bool = True,
    first: int = 0,
    strips: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Measures `clips` held-out clips from number `first` on, and as many (or `masked`) with a masked reference.

    `codec` None: no perceptual distance and no VAE row. `ablations` False: only the animation itself and the copy.
    """
    rows: dict[str, Row] = {}
    shown = []
    masked = clips if masked is None else masked
    spread = 1.0

    def measure(name: str, made: Pixels, clip: Clip) -> None:
        values = {
            "psnr": float(np.minimum(psnr(made, clip.truth), 99).mean()),
            "ssim": float(ssim(made, clip.truth).mean()),
            "person_psnr": person_psnr(made, clip),
            "pose_error": float(limb_errors(made, clip).mean()),
            "identity": identity(made, clip),
        }
        if codec is not None:
            difference = codec.encode(made) - codec.encode(clip.truth)
            values["perceptual"] = float(np.sqrt(np.mean(np.square(difference)))) / spread
        rows.setdefault(name, Row(name)).add(**values)

    for i in range(clips):
        clip, other = make_clip("held-out", first + i, masking="none"), _other(first + i, clips)
        if codec is not None:
            latents = codec.encode(clip.truth)
            spread = max(float(np.sqrt(np.mean(np.square(latents - latents.mean((1, 2, 3), keepdims=True))))), 1e-6)
            measure("VAE alone", codec.decode(latents), clip)
        made = animate(clip.reference, clip.pose, clip.caption, i, guidance)
        measure("animation", made, clip)
        measure("copy of the reference", np.repeat(clip.reference[None], FRAMES, 0), clip)
        if ablations:
            measure("another pose", animate(clip.reference, other.pose, clip.caption, i, guidance), clip)
            measure("black pose", animate(clip.reference, np.zeros_like(clip.pose), clip.caption, i, guidance), clip)
            measure("zeroed pose stream", animate(clip.reference, None, clip.caption, i, guidance), clip)
        if i < strips:
            shown.append((clip.caption, clip.reference, clip.pose[LEAD:], clip.truth, made))
        progress(i + 1, clips + masked)

    for i in range(masked):
        masking: Masking = "background" if i % 2 == 0 else "clothes"
        clip = make_clip("held-out", first + i, masking=masking)
        captions = {"caption": clip.caption}
        if ablations:
            captions["another caption"] = _other(first + i, masked).caption
        for name, text in captions.items():
            made = animate(clip.reference, clip.pose, text, i, masked_guidance)
            hits = background_colours(made, clip) if masking == "background" else clothes_colours(made, clip)
            row = rows.setdefault(f"masked, {name}", Row(f"masked, {name}"))
            for zone, hit in hits.items():
                row.add(colours=hit, **{masking: hit, zone: hit})
            row.add(psnr=float(np.minimum(psnr(made, clip.truth), 99).mean()), person_psnr=person_psnr(made, clip))
            row.add(pose_error=float(limb_errors(made, clip).mean()))
            if name == "caption" and i < strips:
                shown.append((clip.caption, clip.reference, clip.pose[LEAD:], clip.truth, made))
        progress(clips + i + 1, clips + masked)
    settings = {
        "clips": clips,
        "masked": masked,
        "guidance": guidance,
        "masked_guidance": masked_guidance,
        "first": first,
    }
    return Report(rows, shown, settings)


def _other(index: int, clips: int) -> Clip:
    """Another clip, far enough away to have nothing to do with the first."""
    return make_clip("held-out", index + max(clips, 1) + 1000)


COLUMNS_SHOWN = (
    ("psnr", "PSNR dB", "{:.2f}"),
    ("person_psnr", "PSNR of the person dB", "{:.2f}"),
    ("ssim", "SSIM", "{:.3f}"),
    ("perceptual", "perceptual", "{:.3f}"),
    ("pose_error", "pose error px", "{:.2f}"),
    ("identity", "identity", "{:.3f}"),
    ("colours", "colours as the caption says", "{:.0%}"),
)


def table(report: Report) -> str:
    """The report as a Markdown table."""
    lines = [
        "| | " + " | ".join(title for _, title, _ in COLUMNS_SHOWN) + " |",
        "|---" * (len(COLUMNS_SHOWN) + 1) + "|",
    ]
    for row in report.rows.values():
        cells = [form.format(row.mean(key)) if key in row.values else "" for key, _, form in COLUMNS_SHOWN]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def contact_sheet(
    strips: Sequence[tuple[str, Pixels, Pixels, Pixels, Pixels]], times: int = 5, zoom: int = 2
) -> Pixels:
    """[H', W', 3]: per clip a reference and three rows of `times` moments: pose, truth, output."""
    at = np.linspace(0, FRAMES - 1, times).round().astype(int)
    cards = []
    for _, reference, pose, truth, made in strips:
        rows = [np.concatenate(list(clip[at]), axis=1) for clip in (pose, truth, made)]
        column = np.zeros((3 * ROWS, COLUMNS, 3), np.uint8)
        column[:ROWS] = reference
        cards.append(np.pad(np.concatenate([column, np.concatenate(rows)], axis=1), ((3, 3), (3, 3), (0, 0))))
    if len(cards) % 2:
        cards.append(np.zeros_like(cards[0]))
    pairs = [np.concatenate(cards[i : i + 2], axis=1) for i in range(0, len(cards), 2)]
    return np.concatenate(pairs).repeat(zoom, 0).repeat(zoom, 1)


def of_bundle(bundle: Path | str, *, steps: int = 20, threads: int | None = None) -> tuple[Animate, Codec]:
    """What `dynamictrl animate` makes of a bundle, and its VAE."""
    from dynamictrl_edge.runtime import Animator
    from dynamictrl_edge.runtime.animator import Prepared, to_uint8
    from dynamictrl_edge.runtime.media import pose_to_tensor
    from dynamictrl_edge.runtime.vae import VAEDecoder, VAEEncoder

    class PoseAnimator(Animator):
        """Animates with a pose stream of zeros where it is told so."""

        posed = True

        def _prepared(self, *arguments: Any) -> Prepared:
            prepared = super()._prepared(*arguments)
            if self.posed:
                return prepared
            return replace(prepared, latents=replace(prepared.latents, pose=np.zeros_like(prepared.latents.pose)))

    animator = PoseAnimator.from_bundle(bundle, threads=threads, cache=False)

    def animate(reference: Pixels, pose: Pixels | None, caption: str, seed: int, guidance: float) -> Pixels:
        PoseAnimator.posed = pose is not None
        clip = animator(
            image=reference,
            pose=np.zeros((POSE_FRAMES, ROWS, COLUMNS, 3), np.uint8) if pose is None else pose,
            prompt=caption,
            seed=seed,
            guidance_scale=guidance,
            num_inference_steps=steps,
            height=ROWS,
            width=COLUMNS,
            num_frames=FRAMES,
        )
        return clip.frames

    def encode(frames: Pixels) -> NDArray[np.float32]:
        moments = VAEEncoder(animator.backend.graph, temporal_compression=4).encode(pose_to_tensor(frames))
        return np.split(moments[0], 2)[0]

    def decode(latents: NDArray[np.float32]) -> Pixels:
        return to_uint8(VAEDecoder(animator.backend.graph).decode(latents[None]))

    return animate, Codec(encode, decode)
