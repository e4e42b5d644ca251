"""The public door of the runtime: a photo, a pose clip and a prompt in, frames out."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.config import Geometry, geometry
from ..bundle.errors import BundleError, DeviceError, EdgeError, InputError, Interrupted, UsageError
from ..bundle.manifest import MANIFEST_NAME
from ..bundle.store import Bundle
from .backends.base import Backend, DeviceBackend, Plan
from .denoiser import OVERFLOW, Denoiser, Latents, Step
from .media import as_rate, load_photo, load_pose, photo_to_tensor, pose_to_tensor
from .memory import physical_memory, plan_memory
from .noise import NoiseSource
from .reinit import reinitialised
from .request import Request
from .reuse.fit import check_graphs, plan_with_caches
from .reuse.loop import Reuse
from .reuse.report import ReuseReport
from .reuse.tokens import Touched, drawn_tokens
from .scheduler import Schedule, SchedulerConfig, make_schedule, steps_to_the_end, stops_short
from .text import TextStage
from .tiling import Tiling
from .timeline import Timeline
from .vae import Order, VAEDecoder, VAEEncoder, sample_posterior

__all__ = ["Animator", "Clip", "Prepared", "Request", "Run"]

StepCallback = Callable[["Animator", int, int, dict[str, Any]], "dict[str, Any] | None"]
ProgressCallback = Callable[[str, int, int], None]  # stage, done, total

MAX_THREADS = 1024


@dataclass(frozen=True)
class Clip:
    """A finished clip.

    frames: [N, H, W, 3] uint8 RGB. fps: frames per second. latents: final latents as they go to the VAE decoder, before
    division by the scaling factor and without padding frames, [F, C, H, W] float32. seconds: wall time per stage.
    notices: sentences for the person who asked.
    """

    frames: np.ndarray
    fps: Fraction
    latents: np.ndarray
    seed: int
    seconds: dict[str, float]
    notices: tuple[str, ...]
    reuse: ReuseReport | None = None


@dataclass
class Run:
    """What is known of a request while its frames are still coming: filled stage by stage."""

    request: Request
    geometry: Geometry
    fps: Fraction
    frames: int
    plan: Plan
    notices: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    latents: np.ndarray | None = None
    reuse: ReuseReport | None = None
    touched: Touched | None = None  # tokens that the pose touches, where the policy asks
    timeline: Timeline | None = None  # of the denoising loop, where it is measured

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Prepared:
    """What the denoising loop of one request starts from; `noise` has drawn everything up to `initial`."""

    run: Run
    latents: Latents
    initial: np.ndarray
    noise: NoiseSource


class Animator:
    """A bundle, loaded and ready. One request at a time; `cancel()` may come from any thread.

    Graphs are loaded when they are first needed and weights stay mapped, so creating an animator is quick.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        memory: float | None = None,
        cache: bool = True,
        cuda_graphs: bool = False,
    ):
        """`memory`: budget in GB (1e9 bytes) for the whole process; None: no limit. `cache`: keep prompt embeddings on disk.
        `cuda_graphs`: launch each denoising step as one CUDA graph where that is possible; else a notice says why it is not.

        Raises `BundleError` if the bundle lacks what an animation needs.
        """
        self.bundle, self.backend = bundle, backend
        # A backend that plans its own memory; else the process's counts.
        self._device: DeviceBackend | None = backend if isinstance(backend, DeviceBackend) else None
        manifest = bundle.manifest
        if manifest.text is None:
            raise UsageError(f"The bundle {str(bundle.root)!r} was exported without its text encoder.")
        if memory is not None and not 0 < memory < math.inf:
            raise UsageError(f"--memory {memory} is not possible: give the budget in GB, a number above 0.")
        self.memory = memory
        self.scheduler = SchedulerConfig.from_dict(manifest.scheduler, source=str(bundle.root / MANIFEST_NAME))
        self._text = TextStage(bundle, backend, cache=cache)
        self._denoiser: Denoiser | None = None
        self._cuda_graphs = cuda_graphs
        self._cancelled = threading.Event()
        self._notice = ""  # why this backend, for the person who asked

    @classmethod
    def from_bundle(
        cls,
        path: Path | str,
        *,
        backend: str = "auto",
        memory: float | None = None,
        threads: int | None = None,
        cache: bool = True,
        cuda_graphs: bool = False,
    ) -> Animator:
        """Opens a bundle folder.

        `backend`: onnxruntime (processor), tensorrt (NVIDIA GPU), or auto: the GPU if engines in the bundle fit it, else the
        processor. `threads`: processor cores to use, 1 to 1024, default all. `cuda_graphs`: see the class.

        Raises:
            BundleError: the bundle is missing, damaged or of another version; or, for tensorrt, no engine set fits.
            DeviceError: the backend cannot run here.
            UsageError: an unknown backend, an impossible number of threads or budget.
        """
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise UsageError(f"--threads {threads} is not possible: give a number from 1 to {MAX_THREADS}.")
        bundle = Bundle(path)
        if backend not in ("auto", "onnxruntime", "tensorrt"):
            raise UsageError(f"--backend {backend!r} is not known; use auto, onnxruntime or tensorrt.")
        chosen, notice = _choose(bundle, backend, threads)
        made = cls(bundle, chosen, memory=memory, cache=cache, cuda_graphs=cuda_graphs)
        made._notice = notice
        return made

    def close(self) -> None:
        """Gives a GPU's memory back at once; the animator can make no more clips. No effect on the processor."""
        if self._device is not None:
            self._device.close()

    @property
    def device_peak(self) -> int | None:
        """Bytes of a GPU's memory that the last clip used at once, of what the runtime gives out itself; None on the processor."""
        return None if self._device is None else self._device.peak

    def forget_schedule(self) -> None:
        """The next clip computes the tables of its steps anew, as the first one with another number of steps would."""
        if self._denoiser is not None:
            self._denoiser.forget_schedule()

    def cancel(self) -> None:
        """Ends the request that is running with `Interrupted`, within one block or VAE chunk. No effect if none is."""
        self._cancelled.set()

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Interrupted("The clip was cancelled.")

    def __call__(
        self,
        *,
        callback_on_step_end: StepCallback | None = None,
        progress: ProgressCallback | None = None,
        **arguments: Any,
    ) -> Clip:
        """Makes a clip; the arguments are those of `Request`.

        `callback_on_step_end(animator, step, timestep, {"latents": [1, F, C, H, W] float32})` may return a dict whose
        "latents" replace the loop's, as in diffusers. `progress(stage, done, total)` is called as work proceeds.
        """
        run, chunks = self.start(callback_on_step_end=callback_on_step_end, progress=progress, **arguments)
        frames = np.concatenate(list(chunks))
        if run.latents is None:
            raise RuntimeError("the loop ended without latents")
        return Clip(frames, run.fps, run.latents, run.request.seed, run.seconds, tuple(run.notices), run.reuse)

    def stream(self, **arguments: Any) -> Iterator[np.ndarray]:
        """Like calling the animator, but yields [n, H, W, 3] uint8 chunks while later ones are still being decoded."""
        return self.start(**arguments)[1]

    def start(
        self,
        *,
        callback_on_step_end: StepCallback | None = None,
        progress: ProgressCallback | None = None,
        timeline: Timeline | None = None,
        **arguments: Any,
    ) -> tuple[Run, Iterator[np.ndarray]]:
        """Checks the request and returns its `Run` with the iterator that does the work and yields frames.

        `timeline`: keeps when the denoising loop's parts ran.
        """
        run = self._checked(Request.of(**arguments))
        run.timeline = timeline
        return run, self._frames(run, callback_on_step_end, progress or _unheard)

    def prepare(self, *, progress: ProgressCallback | None = None, **arguments: Any) -> Prepared:
        """Everything before the denoising loop, for callers that run the loop themselves; `Request`'s arguments."""
        run = self._checked(Request.of(**arguments))
        self._cancelled.clear()
        return self._prepared(run, progress or _unheard)

    def _checked(self, request: Request) -> Run:
        """The request's `Run`; refuses what this bundle or this machine's memory cannot do."""
        manifest = self.bundle.manifest
        size = geometry(
            manifest.transformer,
            manifest.vae,
            request.height or manifest.defaults.height,
            request.width or manifest.defaults.width,
            request.num_frames or manifest.defaults.frames,
        )
        if request.drop_prefix >= size.frames:
            raise UsageError(
                f"--drop-prefix {request.drop_prefix} leaves nothing of {size.frames} frames. "
                f"Drop at most {size.frames - 1}, or make more with --frames."
            )
        fps = as_rate(request.fps if request.fps is not None else manifest.defaults.fps)
        guided, policy = request.guided, request.policy
        if policy is not None:
            check_graphs(manifest, str(self.bundle.root), policy, guided=guided)
        if self._device is not None:
            plan: Plan = self._device.plan(size, request, self.memory)
        else:
            plan = self._host_plan(request, size)
        run = Run(request, size, fps, size.frames - request.drop_prefix, plan)
        if self._notice:
            run.notices.append(self._notice)
        if plan.tiled and request.tiling == "auto":
            run.notices.append(
                "The VAE works in tiles to keep within the memory; the clip differs a little from one without."
            )
        steps = request.num_inference_steps
        if stops_short(self.scheduler, steps):
            fewer, more = steps_to_the_end(self.scheduler, steps)
            run.notices.append(
                f"In the published schedule the last of {steps} steps stops short of the end and extrapolates, which makes "
                f"a clip worse; that of {fewer} or {more} steps does not."
            )
        return run

    def _host_plan(self, request: Request, size: Geometry) -> Plan:
        manifest, guided = self.bundle.manifest, request.guided
        return plan_with_caches(
            lambda caches: plan_memory(
                manifest,
                size,
                halves=2 if guided else 1,
                tiling=request.tiling,
                budget=self.memory,
                block=self._block_bytes(),
                physical=physical_memory(),
                caches=caches,
            ),
            request.policy,
            manifest,
            size,
            guided=guided,
        )

    def _block_bytes(self) -> int:
        """Bytes of the largest block."""
        files = self.bundle.manifest.files
        names = [f"weights/block_{i:02d}.safetensors" for i in range(self.bundle.manifest.transformer.num_layers)]
        for name in names:
            if name not in files:
                raise BundleError(
                    f"The bundle {str(self.bundle.root)!r} lists no {name!r}. Export the checkpoint again."
                )
        return max(files[name].bytes for name in names)

    def _verify(self, progress: ProgressCallback) -> None:
        """Finds a damaged file before the work, not after hours of it.

        The text encoder's files are left out: they are checked when they are used, and may be absent on a device whose
        prompts are in the cache.
        """
        names = [name for name in self.bundle.manifest.files if not name.startswith("weights/text")]
        for i, name in enumerate(names):
            progress("verify", i, len(names))
            self._check()
            self.bundle.path(name)

    def _frames(self, run: Run, callback: StepCallback | None, progress: ProgressCallback) -> Iterator[np.ndarray]:
        self._cancelled.clear()
        prepared = self._prepared(run, progress)
        with run.timed("denoise"):
            for step in self._steps(run, prepared.latents, prepared.initial, prepared.noise, progress):
                if callback is not None:
                    result = callback(self, step.index, step.timestep, {"latents": step.latents})
                    replaced = None if result is None else result.get("latents")
                    if replaced is not None:
                        step.replace(replaced)
            final = step.latents[0, run.geometry.padding_frames :].copy()
            del step  # and with it the loop's buffers
        if not np.isfinite(final).all():
            raise DeviceError(f"The denoising loop ended with values that are not finite. {OVERFLOW}")
        run.latents = final
        yield from self._decoded(run, final, progress)

    def _prepared(self, run: Run, progress: ProgressCallback) -> Prepared:
        request = run.request
        noise = NoiseSource(request.seed)
        with run.timed("media"):
            photo, pose = self._media(run)
        with run.timed("verify"):
            self._verify(progress)
            if self._device is not None:
                self._device.begin(run.plan)
        with run.timed("text"):
            progress("text", 0, 1)
            prompts = [request.negative_prompt, request.prompt] if request.guided else [request.prompt]
            embeds, notices = self._text.encode(prompts, check=self._check)
            run.notices += notices
            self._take_turns(run, "text_block")
        with run.timed("encode"):
            progress("encode", 0, 1)
            latents, initial = self._latents(run, photo, pose, embeds, noise)
        return Prepared(run, latents, initial, noise)

    def _media(self, run: Run) -> tuple[np.ndarray, np.ndarray]:
        request, size = run.request, run.geometry
        photo = load_photo(request.image, size.height, size.width, request.fit)
        clip = load_pose(
            request.pose,
            size.height,
            size.width,
            size.pose_frames,
            run.fps,
            request.fit,
            expected=size.frames,
            skip_frames=request.skip_frames,
        )
        run.notices += clip.notices
        if (policy := request.policy) is not None and policy.reuses_tokens:
            run.touched = drawn_tokens(clip.frames, size, self.bundle.manifest.vae.temporal_compression_ratio)
            if policy.token_choice == "pose" and not run.touched.any():
                run.notices.append("Nothing is drawn in the pose clip: the active tokens are spread evenly.")
        return photo_to_tensor(photo), pose_to_tensor(clip.frames)

    def _latents(
        self, run: Run, photo: np.ndarray, pose: np.ndarray, embeds: np.ndarray, noise: NoiseSource
    ) -> tuple[Latents, np.ndarray]:
        """Conditions and initial noise, drawn in the published order: photo's posterior, pose's posterior, latents."""
        size, vae = run.geometry, self.bundle.manifest.vae
        encoder = VAEEncoder(
            self.backend.graph,
            temporal_compression=vae.temporal_compression_ratio,
            tiling=self._tiling(run),
            order=self._order(run),
            check=self._check,
        )
        moments = [encoder.encode(photo[:, :, None]), encoder.encode(pose)]
        self._take_turns(run, *encoder.graphs)
        drawn = [sample_posterior(m, noise.normal((1, m.shape[1] // 2, *m.shape[2:]))) for m in moments]
        # [1, C, F, H, W] -> [1, F, C, H, W]
        image, control = (z.transpose(0, 2, 1, 3, 4) for z in drawn)
        shape = (1, size.latent_frames, vae.latent_channels, size.latent_height, size.latent_width)
        first = np.zeros(shape, np.float32)
        # Checkpoints with this flag were trained on photo latents that are not scaled.
        first[:, :1] = image if vae.invert_scale_latents else image * np.float32(vae.scaling_factor)
        control = np.ascontiguousarray(control * np.float32(vae.scaling_factor))
        initial = noise.normal(shape)
        if run.request.re_init_noise:
            initial = reinitialised(initial, first, noise, run.request.seed, self.scheduler)
        return Latents(embeds, first, control), initial

    def _steps(
        self, run: Run, latents: Latents, initial: np.ndarray, noise: NoiseSource, progress: ProgressCallback
    ) -> Iterator[Step]:
        request = run.request
        schedule = make_schedule(self.scheduler, request.num_inference_steps)
        if self._denoiser is None:
            self._denoiser = Denoiser(self.bundle, self.backend)
        self._denoiser.resident_blocks = run.plan.resident_blocks
        self._denoiser.side_by_side = run.plan.budget is None
        self._denoiser.together = run.plan.batch == 2
        self._denoiser.timeline, self._denoiser.record = run.timeline, self._cuda_graphs
        # In the process's memory this costs nothing; on a device the loop would wait for every step.
        self._denoiser.check_steps = self._device is None if request.check_steps is None else request.check_steps
        reuse = self._reuse(run, self._denoiser, schedule)
        progress("denoise", 0, len(schedule))
        steps = self._denoiser.denoise(
            latents,
            initial,
            schedule,
            request.guidance_scale,
            noise,
            run.geometry.grid,
            self._check,
            None if reuse is None else reuse.make_loop,
        )
        for step in steps:
            yield step
            progress("denoise", step.index + 1, len(schedule))
        if reason := self._denoiser.not_recorded:
            run.notices.append(f"The steps did not run as CUDA graphs: {reason}.")
        if reuse is not None:
            run.reuse = reuse.report(self._denoiser.config, self.bundle.manifest.precision)
            run.notices += run.reuse.notices()

    def _reuse(self, run: Run, denoiser: Denoiser, schedule: Schedule) -> Reuse | None:
        policy = run.request.policy
        if policy is None:
            return None
        table, _ = denoiser.modulation(schedule)
        return Reuse.of(policy, run.geometry, schedule, table, guided=run.request.guided, touched=run.touched)

    def _decoded(self, run: Run, final: np.ndarray, progress: ProgressCallback) -> Iterator[np.ndarray]:
        """uint8 frames in chunks, exactly as many as were asked for."""
        vae = self.bundle.manifest.vae
        # [F, C, H, W] -> [1, C, F, H, W]
        unscaled = np.ascontiguousarray(final.transpose(1, 0, 2, 3)[None]) / np.float32(vae.scaling_factor)
        decoder = VAEDecoder(self.backend.graph, tiling=self._tiling(run), order=self._order(run), check=self._check)
        skip, left = run.request.drop_prefix, run.frames
        progress("decode", 0, run.frames)
        chunks = decoder.decode_stream(unscaled)
        while left > 0:
            with run.timed("decode"):
                pixels = next(chunks, None)
                if pixels is None:
                    raise InputError(f"The VAE gave {run.frames - left} frames where {run.frames} were wanted.")
                frames = to_uint8(pixels)
            skipped = min(skip, len(frames))
            skip -= skipped
            frames = frames[skipped : skipped + left]
            left -= len(frames)
            progress("decode", run.frames - left, run.frames)
            if len(frames):
                yield frames
        self._take_turns(run, *decoder.graphs)

    def _take_turns(self, run: Run, *graphs: str) -> None:
        """Under a budget, a stage's graphs leave before the next stage comes."""
        if run.plan.budget is not None:
            self.backend.drop(*graphs)

    def _order(self, run: Run) -> Order:
        """On a device there is room for the state of one tile; the first frames then wait for the last tile."""
        return "tiles" if self._device is not None and run.plan.tiled else "time"

    def _tiling(self, run: Run) -> Tiling | None:
        if self._device is not None:
            return self._device.tiling(run.plan)
        vae = self.bundle.manifest.vae
        if not run.plan.tiled:
            return None
        return Tiling.published(vae.sample_height, vae.sample_width, vae.spatial_compression)


def _choose(bundle: Bundle, backend: str, threads: int | None) -> tuple[Backend, str]:
    """The backend, and a notice where "auto" passes over a GPU."""
    from .backends.onnxruntime import OnnxRuntimeBackend

    if backend == "onnxruntime":
        return OnnxRuntimeBackend(bundle, threads=threads), ""
    from ..engines.machine import look_at_gpus, look_at_machine
    from .backends.gpu_backend import TensorRTBackend

    found = look_at_gpus()
    if backend == "auto" and not found[0]:
        return OnnxRuntimeBackend(bundle, threads=threads), ""
    try:
        return TensorRTBackend.open(bundle, machine=look_at_machine(gpus=lambda: found)), ""
    except EdgeError as error:
        if backend == "tensorrt":
            raise
        why = str(error)
    try:
        return OnnxRuntimeBackend(bundle, threads=threads), f"Made on the processor, not on the GPU: {why}"
    except DeviceError as error:
        raise DeviceError(f"{error} On the GPU: {why}") from error


def _unheard(stage: str, done: int, total: int) -> None:
    """Progress that nobody asked for."""


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """[1, 3, n, H, W] float32 in -1..1 (not clamped) -> [n, H, W, 3] uint8, rounded half to even as published."""
    scaled = np.clip(pixels[0] * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255)
    return np.ascontiguousarray(np.rint(scaled).astype(np.uint8).transpose(1, 2, 3, 0))
