"""Builds engine sets: which sets the targets need, each engine in a process of its own, everything resumable.

A set grows in `engines/.<key>.part/`; every finished engine leaves a small record there, so that a build that was killed goes
on where it stopped. Only a complete set gets its description and is moved to `engines/<key>/`: it is there whole, or it is
not there. A lock keeps two builders from the same set; the system takes it from a builder that dies.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import msgspec

from ..bundle.errors import BundleError, DeviceError, EdgeError, Interrupted, UsageError, from_os_error
from ..bundle.precision import Precision
from ..bundle.store import Bundle
from ..bundle.tensors import sha256_of
from .builder import EngineJob
from .engine_set import (
    ANYWHERE,
    ENGINES_FOLDER,
    ENGINES_NAME,
    SET_FORMAT,
    SET_VERSION,
    BuildOptions,
    EngineEntry,
    EngineSet,
    engine_key,
    graph_digest,
    read_engine_set,
    write_engine_set,
)
from .machine import LIBRARIES, Machine, platform_name
from .profiles import Profile, axes_of, buildable_graphs, profile_of
from .report import read_report
from .rules import broken_rules, expectation, heads_of, quantized_type
from .targets import Capability, Flavour, Target, capability_name
from .worker import Answer

__all__ = ["BuildPlan", "Built", "Watcher", "build_set", "plan_builds"]

_RECORD, _OLD = ".entry.json", ".old"
_PATIENCE = 5.0  # seconds that a cancelled compiler gets to stop by itself


@dataclass(frozen=True)
class BuildPlan:
    """One set to build: what its key is made of."""

    targets: tuple[Target, ...]
    flavour: Flavour
    library_version: str
    platform: str
    options: BuildOptions
    activation_budget: int | None  # bytes; an engine that needs more is refused

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        return tuple(sorted({target.capability for target in self.targets}))


@dataclass(frozen=True)
class Built:
    """Outcome of one set: `fresh` names the engines that were compiled now (none: all was there)."""

    folder: Path
    engines: EngineSet
    fresh: tuple[str, ...]
    seconds: float


class Watcher:
    """What a builder reports; override what is of interest. Called from several threads, one call at a time."""

    def started(self, key: str, graphs: Sequence[str]) -> None:
        """A set's build begins; `graphs` are those still to compile."""

    def progress(self, graph: str, phase: str, done: int, total: int) -> None:
        """A compiler's own account of how far it is."""

    def finished(self, graph: str, entry: EngineEntry) -> None:
        """One engine is ready."""


def plan_builds(
    bundle: Bundle, targets: Sequence[Target], flavour: Flavour | None, options: BuildOptions, machine: Machine
) -> list[BuildPlan]:
    """Groups targets into sets: all those of TensorRT-RTX into one, TensorRT's one by one.

    Raises:
        UsageError: a target does not exist in this flavour.
        DeviceError: a target lacks the bundle's precision; TensorRT is asked for another GPU than this machine's.
    """
    manifest = bundle.manifest
    groups: dict[tuple[Flavour, Capability | None], list[Target]] = {}
    for target in targets:
        chosen = flavour or target.flavours[0]
        if chosen not in target.flavours:
            raise UsageError(
                f"--backend {chosen} does not build for {target.name}. Use --backend {target.flavours[0]}, or leave it out."
            )
        _check_precision(manifest.precision, target, chosen)
        _check_quantized(quantized_type(manifest), target)
        one = target.capability if chosen == "tensorrt" else None
        if one is not None:
            _check_at_home(target, machine)
        groups.setdefault((chosen, one), []).append(target)
    return [
        BuildPlan(
            targets=tuple(sorted(group, key=lambda target: target.name)),
            flavour=chosen,
            library_version=installed_version(chosen, machine),
            platform=ANYWHERE if chosen == "rtx" else platform_name(),
            options=options,
            activation_budget=int(1e9 * min(target.memory_gb for target in group)),
        )
        for (chosen, _), group in groups.items()
    ]


def _check_precision(precision: str, target: Target, flavour: Flavour) -> None:
    if precision in target.types or (precision == "fp32" and flavour == "tensorrt"):
        return
    offered = ", ".join(sorted(target.types))
    raise DeviceError(
        f"{target.name} ({capability_name(target.capability)}) has no {precision}, which this bundle is made of; it has "
        f"{offered}. Export the checkpoint for it: dynamictrl export CHECKPOINT BUNDLE --precision fp16"
    )


def _check_quantized(dtype: str | None, target: Target) -> None:
    if dtype is None or dtype in target.types:
        return
    raise DeviceError(
        f"{target.name} ({capability_name(target.capability)}) has no {dtype}, in which this bundle's linears are; it has "
        f"{', '.join(sorted(target.types))}. Calibrate for it: dynamictrl calibrate BUNDLE OUT --data FOLDER --precision int8"
    )


def _check_at_home(target: Target, machine: Machine) -> None:
    here = machine.gpu
    if here is not None and here.capability == target.capability:
        return
    found = f"this one has {here.name} ({capability_name(here.capability)})" if here else "this one has no NVIDIA GPU"
    raise DeviceError(
        f"TensorRT builds on the GPU that it builds for: run this on a machine with {target.name} "
        f"({capability_name(target.capability)}); {found}. With trtexec there: dynamictrl build BUNDLE --target "
        f"{target.name} --print-trtexec. TensorRT-RTX builds anywhere, for the targets that name it."
    )


def installed_version(flavour: Flavour, machine: Machine) -> str:
    """Version of the installed TensorRT; `DeviceError` with the command that installs it."""
    version = machine.flavours.get(flavour)
    if version is None:
        raise DeviceError(
            f"Building {flavour} engines needs the package {LIBRARIES[flavour].package}. "
            f'Install it: pip install "dynamictrl-edge[build,{flavour}]"'
        )
    return version


def build_set(
    bundle: Bundle,
    plan: BuildPlan,
    *,
    workers: int = 1,
    force: bool = False,
    watcher: Watcher | None = None,
    keep_broken: bool = False,
) -> Built:
    """Builds the engines of `plan` into `engines/<key>/` of the bundle, or finds them there.

    Args:
        workers: compilers at work at once; each needs up to 3 GB at full size.
        force: build again what is there.
        keep_broken: build even where a rule about what the compiler did is broken (the report says so).

    Raises:
        BundleError: a graph is damaged or refused by the compiler, or a rule is broken.
        DeviceError: no memory, no GPU where one is needed, or another builder is at work on the set.
        InputError: the bundle's folder cannot be written to, or the disk is full.
        Interrupted: cancelled by Ctrl-C in a child.
    """
    start = time.perf_counter()
    watcher = watcher or Watcher()
    manifest = bundle.manifest
    graphs = buildable_graphs(manifest)
    axes = axes_of(manifest, plan.options)
    key = engine_key(
        manifest, graphs, plan.flavour, plan.library_version, plan.platform, plan.capabilities, plan.options
    )
    root = bundle.root / ENGINES_FOLDER
    folder = root / key
    try:
        root.mkdir(exist_ok=True)
        with _lock(root / f".{key}.lock"):
            if not force and (engines := _complete(folder, key, keep_broken)) is not None:
                missing = set(plan_names(plan)) - set(engines.targets)
                if missing:  # other cards of the same capabilities
                    engines = msgspec.structs.replace(engines, targets=tuple(sorted({*engines.targets, *missing})))
                    _rewrite(folder, engines)
                return Built(folder, engines, (), time.perf_counter() - start)
            part = root / f".{key}.part"
            if force:
                shutil.rmtree(part, ignore_errors=True)
            part.mkdir(exist_ok=True)
            done = {name: entry for name in graphs if (entry := _finished(part, name, keep_broken)) is not None}
            todo = [name for name in graphs if name not in done]
            watcher.started(key, todo)
            jobs = {
                name: _job(bundle, plan, name, profile_of(name, manifest.graphs[name], axes), part) for name in todo
            }
            built = _run_all(jobs, plan, bundle, part, workers, watcher, keep_broken)
            entries = {**done, **built}
            engines = EngineSet(
                format=SET_FORMAT,
                version=SET_VERSION,
                key=key,
                precision=manifest.label,
                flavour=plan.flavour,
                library_version=plan.library_version,
                platform=plan.platform,
                capabilities=plan.capabilities,
                targets=plan_names(plan),
                options=plan.options,
                axes=axes,
                engines={name: entries[name] for name in graphs},
                provenance=_provenance(),
            )
            _publish(part, folder, engines)
    except OSError as error:
        raise from_os_error(error, "build engines in", root) from error
    return Built(folder, engines, tuple(todo), time.perf_counter() - start)


def plan_names(plan: BuildPlan) -> tuple[str, ...]:
    return tuple(sorted({target.name for target in plan.targets}))


def _provenance() -> dict[str, str]:
    versions = {}
    for package in ("dynamictrl-edge", "polygraphy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    try:
        from filelock import FileLock, Timeout
    except ModuleNotFoundError:
        raise DeviceError(
            "Building engines needs the package 'filelock'. Install it: pip install \"dynamictrl-edge[build]\""
        ) from None
    try:
        with FileLock(path, timeout=0):
            yield
    except Timeout:
        raise DeviceError(
            f"Another process is building this engine set (it holds {str(path)!r}). Wait until it is done, then run this again."
        ) from None


def _complete(folder: Path, key: str, keep_broken: bool) -> EngineSet | None:
    """The set in `folder` if it is whole (readable, of this key, every file there with its size) and breaks no rule."""
    try:
        engines = read_engine_set(folder)
    except BundleError:
        return None
    whole = engines.key == key and all(
        _size(folder / entry.file) == entry.bytes
        and _size(folder / entry.report) is not None
        and (keep_broken or not entry.broken)
        for entry in engines.engines.values()
    )
    return engines if whole else None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _finished(part: Path, graph: str, keep_broken: bool) -> EngineEntry | None:
    """The record of an engine that an earlier, unfinished build left, if its files are what the record says."""
    try:
        entry = msgspec.json.decode((part / f"{graph}{_RECORD}").read_bytes(), type=EngineEntry)
        whole = sha256_of(part / entry.file) == entry.sha256 and sha256_of(part / entry.report) == entry.report_sha256
    except (OSError, msgspec.DecodeError):
        return None
    return entry if whole and (keep_broken or not entry.broken) else None


def _job(bundle: Bundle, plan: BuildPlan, graph: str, profile: Profile, part: Path) -> EngineJob:
    spec = bundle.manifest.graphs[graph]
    path = bundle.path(spec.file)  # verified
    weights = bundle.path(spec.weights) if spec.weights is not None else path
    return EngineJob(
        graph=graph,
        onnx=str(path),
        sha256=bundle.manifest.files[spec.file].sha256,
        weights=str(weights.parent),
        ports=tuple(port.name for port in spec.inputs),
        profile=profile,
        flavour=plan.flavour,
        capabilities=plan.capabilities,
        engine=str(part / f"{graph}.engine.tmp"),
        report=str(part / f"{graph}.report.json"),
        workspace=plan.options.workspace,
        version_compatible=plan.options.version_compatible,
        optimization_level=plan.options.optimization_level,
    )


def _run_all(
    jobs: dict[str, EngineJob],
    plan: BuildPlan,
    bundle: Bundle,
    part: Path,
    workers: int,
    watcher: Watcher,
    keep_broken: bool,
) -> dict[str, EngineEntry]:
    """Runs the jobs, `workers` at a time, the longest first; the first failure or Ctrl-C stops the others."""
    calls = threading.Lock()
    compilers = _Compilers()

    def one(name: str) -> EngineEntry:
        def told(answer: Answer) -> None:
            with calls:
                watcher.progress(name, answer.phase, answer.done, answer.total)

        answer = compilers.run(jobs[name], told)
        entry = _record(jobs[name], answer, plan, bundle, part, keep_broken)
        with calls:
            watcher.finished(name, entry)
        return entry

    # Convolutions take longest.
    order = sorted(jobs, key=lambda name: (bundle.manifest.graphs[name].weights is None, name))
    built: dict[str, EngineEntry] = {}
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        waiting: dict[Future[EngineEntry], str] = {pool.submit(one, name): name for name in order}
        try:
            while waiting:
                # The main thread must wake up for signals on every platform.
                ready, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in ready:
                    built[waiting.pop(future)] = future.result()
        except BaseException:
            for future in waiting:
                future.cancel()
            compilers.stop()
            raise
    return built


class _Compilers:
    """The child processes at work."""

    def __init__(self) -> None:
        self._children: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()
        self._stopped = False

    def run(self, job: EngineJob, told: Callable[[Answer], None]) -> Answer:
        """Runs one worker to its end; its last answer, which holds a product. Raises what its failure says."""
        command = [sys.executable, "-m", f"{__package__}.worker"]
        with self._guard:
            if self._stopped:
                raise Interrupted("The build was cancelled.")
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # so that Ctrl-C in a terminal reaches us alone
            )
            self._children.add(child)
        last: Answer | None = None
        noise: list[bytes] = []
        try:
            if child.stdin is None or child.stdout is None or child.stderr is None:
                raise RuntimeError("the compiler's process has no pipes")
            reader = threading.Thread(target=_drain, args=(child.stderr, noise), daemon=True)
            reader.start()
            with contextlib.suppress(BrokenPipeError):  # it died at once; its end tells
                child.stdin.write(msgspec.json.encode(job) + b"\n")
                child.stdin.flush()  # stays open: its end is how the child learns of ours
            for line in child.stdout:
                answer = msgspec.json.decode(line, type=Answer)
                if answer.product is None and answer.failure is None:
                    told(answer)
                else:
                    last = answer
            child.wait()
            reader.join(timeout=1)
        finally:
            with self._guard:
                self._children.discard(child)
            for pipe in (child.stdin, child.stdout, child.stderr):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        if last is None:
            raise _died(job.graph, child.returncode, b"".join(noise))
        if last.failure is not None:
            raise last.failure.error()
        return last

    def stop(self) -> None:
        """Cancels all; waits for them, kills those that do not stop."""
        with self._guard:
            self._stopped = True
            children = list(self._children)
        for child in children:
            child.terminate()
        limit = time.monotonic() + _PATIENCE
        for child in children:
            try:
                child.wait(max(0.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()


def _drain(stream: IO[bytes], into: list[bytes]) -> None:
    for line in stream:
        into.append(line)
        del into[:-50]


def _died(graph: str, code: int, noise: bytes) -> EdgeError:
    tail = " ".join(noise.decode(errors="replace").split())[-400:]
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    why = (
        " The system kills processes when memory runs out: use --workers 1, or smaller --tile."
        if code == -9
        else " Run again; if it stays, build this graph alone with trtexec: --print-trtexec."
    )
    return DeviceError(f"The compiler of {graph!r} {how}.{why}{f' It said: {tail}' if tail else ''}")


def _record(
    job: EngineJob, answer: Answer, plan: BuildPlan, bundle: Bundle, part: Path, keep_broken: bool
) -> EngineEntry:
    """Holds the report against the rules, gives the engine its name and leaves the record that makes it count."""
    product = answer.product
    if product is None:
        raise RuntimeError("an answer without a product")
    report = read_report(Path(job.report))
    manifest = bundle.manifest
    wanted = expectation(
        job.graph,
        cast(Precision, manifest.precision),
        heads=heads_of(manifest, job.graph),
        quantized_linears=len(manifest.quantized_linears(job.graph)),
        quantized_type=quantized_type(manifest),
        activation_budget=plan.activation_budget,
    )
    broken = broken_rules(report, wanted)
    if broken and not keep_broken:
        Path(job.engine).unlink(missing_ok=True)
        raise BundleError(
            f"The engine of {job.graph!r} was built, but not as it must be: {' '.join(broken)} "
            "(--keep-broken builds the set nevertheless)"
        )
    name = f"{job.graph}.engine"
    os.replace(job.engine, part / name)
    entry = EngineEntry(
        file=name,
        sha256=product.sha256,
        bytes=product.bytes,
        report=Path(job.report).name,
        report_sha256=sha256_of(Path(job.report)),
        graph_digest=graph_digest(manifest, job.graph),
        profile=job.profile,
        activation_bytes=report.activation_bytes,
        weights_bytes=report.weights_bytes,
        kernels=len(report.kernels),
        fused_attention=report.fused_attention,
        seconds=round(product.seconds, 3),
        peak_rss=answer.peak_rss,
        broken=tuple(broken),
    )
    mark = part / f"{job.graph}{_RECORD}"
    temporary = mark.with_name(f"{mark.name}.tmp")
    temporary.write_bytes(msgspec.json.encode(entry))
    os.replace(temporary, mark)
    return entry


def _publish(part: Path, folder: Path, engines: EngineSet) -> None:
    """Makes the finished work folder the set; an old one gives way."""
    write_engine_set(part, engines)
    if folder.exists():
        os.replace(folder, folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{_OLD}"))
    os.replace(part, folder)
    # The records have served; what else is no part of the set was left by compilers that were killed.
    entries = engines.engines.values()
    kept = {ENGINES_NAME, *(entry.file for entry in entries), *(entry.report for entry in entries)}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    for old in folder.parent.glob(f".{folder.name}.*{_OLD}"):
        shutil.rmtree(old, ignore_errors=True)


def _rewrite(folder: Path, engines: EngineSet) -> None:
    temporary = folder / f".{ENGINES_NAME}.tmp"
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(engines), indent=1) + b"\n")
    os.replace(temporary, folder / ENGINES_NAME)
