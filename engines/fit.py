"""Whether an engine set fits this machine, this bundle and this clip: answered before anything is deserialized.

TensorRT itself answers late and in its own terms (an engine comes back as None, a shape is refused at the first step), so
everything that its refusals are about is compared here first. Each answer is a sentence or two for a person: what does not
fit, with both values, and the command that mends it.

What is assumed of NVIDIA's libraries, from their manuals:

- TensorRT-RTX: an engine runs with the very release that built it ("not compatible between different releases").
- TensorRT: likewise, unless it was built version-compatible: then also with later versions, with the lean runtime too. Across
  major versions only some pairs work, so the major must be the same here.
- Engines are for the compute capabilities that they were built for. TensorRT's are for the operating system and processor of
  their builder, too; TensorRT-RTX's are portable.
- A library made for CUDA 12 needs driver 525, one for CUDA 13 driver 580 (Windows: 528 and 580). On Jetson the driver belongs to
  JetPack and has other numbers; there it is not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..bundle.config import Geometry, geometry
from ..bundle.errors import BundleError
from ..bundle.manifest import Manifest, inside
from ..bundle.precision import PRECISIONS
from ..bundle.tensors import sha256_of
from .engine_set import (
    ANYWHERE,
    ENGINES_FOLDER,
    SET_VERSION,
    ClipSize,
    EngineSet,
    engine_key,
    graph_digest,
    read_engine_set,
)
from .lengths import lengths_of
from .machine import LEAN, LIBRARIES, OLDEST, Machine, needed_driver, release
from .mend import ON_PROCESSOR, build_command, name_of, pip_command, target_here
from .mismatch import Fit, Mismatch, Request
from .profiles import Profile, buildable_graphs, profile_of
from .rules import quantized_type
from .targets import TARGETS, Flavour, capability_name, types_of

__all__ = ["Fit", "Mismatch", "Request", "check_fit", "find_fitting", "same_version"]


def check_fit(engines: EngineSet, folder: Path, manifest: Manifest, machine: Machine, request: Request) -> Fit:
    """Whether the set `engines`, read from `folder` (BUNDLE/engines/NAME), fits; if not, the first reason.

    Args:
        manifest: of the bundle that the set is used with.
        machine: as `look_at_machine` sees it.

    Raises:
        UsageError: the model cannot make a clip of the requested size, whatever the engines.
    """
    wanted = _geometry(manifest, request.size)
    return next(_Case(engines, folder, manifest, machine, request, wanted).refusals(), Fit())


def find_fitting(bundle_root: Path, manifest: Manifest, machine: Machine, request: Request) -> tuple[Path, EngineSet]:
    """The folder and description of a set under `bundle_root`/engines that fits.

    Of several, one of this very version (no version-compatible one), then the one that was made for the requested size, then one
    that needs least memory.

    Raises:
        BundleError: none fits; the text gives the reason of the nearest one.
        UsageError: the model cannot make a clip of the requested size.
    """
    _geometry(manifest, request.size)  # said before anything about engines
    here = name_of(target_here(machine))
    fitting: list[tuple[Path, EngineSet]] = []
    refused: list[tuple[Path, Fit]] = []
    for folder in _set_folders(bundle_root):
        try:
            engines = read_engine_set(folder)
        except BundleError as error:
            # Without its description nothing else can be said about it.
            build = build_command(bundle_root, manifest, (here,), force=True)
            refused.append((folder, Fit(Mismatch.UNREADABLE, f"{error} Build it again: {build}")))
            continue
        fit = check_fit(engines, folder, manifest, machine, request)
        if fit:
            fitting.append((folder, engines))
        else:
            refused.append((folder, fit))
    if fitting:
        return min(fitting, key=lambda found: _preference(found[1], request.size))
    if not refused and machine.gpu is None:
        raise BundleError(
            f"The bundle {str(bundle_root)!r} has no engines, and this machine no NVIDIA GPU to run them "
            f"({machine.no_gpu or 'none found'}). Use the processor: {ON_PROCESSOR}"
        )
    if not refused:
        raise BundleError(
            f"The bundle {str(bundle_root)!r} has no engines. Build them: "
            + build_command(bundle_root, manifest, (here,), backend=request.backend, sizes=(request.size,))
        )
    order = list(Mismatch)
    folder, nearest = max(refused, key=lambda found: order.index(found[1].mismatch or Mismatch.UNREADABLE))
    if len(refused) == 1:
        raise BundleError(f"The engine set {folder.name!r} does not fit. {nearest.reason}")
    raise BundleError(f"None of {len(refused)} engine sets fits; the nearest is {folder.name!r}. {nearest.reason}")


def same_version(one: str, other: str) -> bool:
    """Whether two versions are the same release; one may lack the build number that the other has (JetPack's "10.3.0")."""
    a, b = release(one), release(other)
    known = min(len(a), len(b))
    return one == other or (known >= 3 and a[:known] == b[:known])


@dataclass(frozen=True)
class _Case:
    """One question: a set, where it would be used, and for what."""

    engines: EngineSet
    folder: Path
    manifest: Manifest
    machine: Machine
    request: Request
    wanted: Geometry

    def refusals(self) -> Iterator[Fit]:
        """At most one refusal per check. Later checks rely on earlier ones: only the first counts."""
        checks: tuple[Callable[[], Fit | None], ...] = (
            self._description,
            self._device,
            self._library,
            self._driver,
            self._graphs,
            self._integrity,
            self._files,
            self._longest,
            self._shortest,
            self._memory,
            self._content,
        )
        return (refusal for check in checks if (refusal := check()) is not None)

    # --- the set as such ---

    def _description(self) -> Fit | None:
        engines, backend = self.engines, self.request.backend
        if engines.version != SET_VERSION:
            return Fit(
                Mismatch.FORMAT,
                f"The set has format version {engines.version}; this program reads version {SET_VERSION}. "
                f"Update dynamictrl-edge, or build the set again: {self._rebuild()}",
            )
        if not engines.engines:
            return Fit(
                Mismatch.EMPTY,
                f"The set has no engines; the bundle has {len(buildable_graphs(self.manifest))} graphs. "
                f"Build them: {self._rebuild()}",
            )
        if backend is not None and engines.flavour != backend:
            return Fit(
                Mismatch.BACKEND,
                f"The set is for {_title(engines.flavour)}; {_title(backend)} was asked for. "
                f"Build one: {self._build_here(backend=backend)}",
            )
        return None

    # --- the machine ---

    def _device(self) -> Fit | None:
        engines, gpu = self.engines, self.machine.gpu
        chips = ", ".join(map(capability_name, sorted(engines.capabilities))) or "no GPU"
        if gpu is None:
            return Fit(
                Mismatch.NO_GPU,
                f"The engines are for {chips}; this machine has no NVIDIA GPU "
                f"({self.machine.no_gpu or 'none found'}). Use the processor: {ON_PROCESSOR}",
            )
        here = f"{gpu.name} is {capability_name(gpu.capability)}"
        if gpu.capability < OLDEST:
            return Fit(
                Mismatch.GPU_TOO_OLD,
                f"{here}; engines need {capability_name(OLDEST)} or later. Use the processor: {ON_PROCESSOR}",
            )
        precision, types = self.manifest.precision, types_of(gpu.capability)
        if precision not in types and not (precision == "fp32" and engines.flavour == "tensorrt"):
            offered = [name for name in PRECISIONS if name in types]
            return Fit(
                Mismatch.GPU_PRECISION,
                f"The bundle is in {precision}; {here} and has {', '.join(offered)}. "
                f"Export for it: dynamictrl export CHECKPOINT BUNDLE --precision {offered[-1]}",
            )
        narrow = quantized_type(self.manifest)
        if narrow is not None and narrow not in types:
            return Fit(
                Mismatch.GPU_PRECISION,
                f"The bundle is quantized to {narrow}; {here} and has {', '.join(sorted(types))}. Calibrate for it: dynamictrl "
                "calibrate BUNDLE OUT --data FOLDER --precision int8",
            )
        if engines.platform not in (ANYWHERE, self.machine.platform):
            return Fit(
                Mismatch.PLATFORM,
                f"The engines were built on {engines.platform}; this machine is {self.machine.platform}. "
                f"Build them here: {self._build_here()}",
            )
        if gpu.capability not in engines.capabilities:
            return Fit(Mismatch.CAPABILITY, f"The engines are for {chips}; {here}. Build for it: {self._build_here()}")
        return None

    def _library(self) -> Fit | None:
        engines, machine = self.engines, self.machine
        flavour, built = engines.flavour, engines.library_version
        library, compatible = LIBRARIES[flavour], self._compatible
        whole, lean = self._installed()
        install = pip_command(library.package, built)
        if whole is None and lean is None:
            other = next((f"; {_title(name)} {version} is" for name, version in machine.flavours.items()), "")
            if machine.gpu is not None and machine.gpu.is_jetson:
                install = "sudo apt install python3-libnvinfer"  # JetPack's own: the one that fits its driver
            return Fit(
                Mismatch.NOT_INSTALLED,
                f"The engines need {library.title} {built}, which is not installed{other}. Install it: {install}",
            )
        if whole is None and not compatible:
            return Fit(
                Mismatch.LEAN_ONLY,
                f"The engines need the whole {library.title} {built}: they are not version-compatible, and only "
                f"{LEAN.title} {lean} is installed. Install it: {install}, or build others where it is: "
                f"{self._rebuild(version_compatible=True)}",
            )
        if self._runner() is not None:
            return None
        here, package = (whole, library.package) if whole is not None else (lean or "", LEAN.package)
        mend = f"Build again: {self._build_here()}, or install that version: {pip_command(package, built)}"
        values = f"The engines were built with {library.title} {built}; this machine has {here}"
        if not compatible:
            return Fit(Mismatch.VERSION, f"{values}, and they run with the version that built them only. {mend}")
        if release(here)[:1] != release(built)[:1]:
            return Fit(Mismatch.VERSION_MAJOR, f"{values}, which is another major version. {mend}")
        return Fit(Mismatch.VERSION_OLDER, f"{values}, which is older than they allow. {mend}")

    def _installed(self) -> tuple[str | None, str | None]:
        """Versions of the whole library and of its lean runtime, of the set's flavour."""
        flavour = self.engines.flavour
        return self.machine.flavours.get(flavour), self.machine.lean if flavour == "tensorrt" else None

    @property
    def _compatible(self) -> bool:
        """Whether later versions than the builder's can run the engines: TensorRT-RTX knows nothing of the kind."""
        return self.engines.flavour == "tensorrt" and self.engines.options.version_compatible

    def _runner(self) -> str | None:
        """The installed package that can run these engines, the whole library before the lean runtime."""
        whole, lean = self._installed()
        if whole is not None and self._runs_with(whole):
            return LIBRARIES[self.engines.flavour].package
        if lean is not None and self._compatible and self._runs_with(lean):
            return LEAN.package
        return None

    def _runs_with(self, version: str) -> bool:
        built = self.engines.library_version
        here, there = release(version), release(built)
        later = bool(there) and here[:1] == there[:1] and here > there
        return same_version(version, built) or (self._compatible and later)

    def _driver(self) -> Fit | None:
        gpu, runner = self.machine.gpu, self._runner()
        cuda = self.machine.cuda.get(runner or "")
        if gpu is None or gpu.driver is None or gpu.is_jetson or cuda is None:
            return None
        needed, has = needed_driver(cuda, self.machine.platform), release(gpu.driver)
        if needed is None or not has or has[0] >= needed:
            return None
        return Fit(
            Mismatch.DRIVER,
            f"The installed {runner} is made for CUDA {cuda}, which needs driver {needed} or later; this machine has driver "
            f"{gpu.driver}. Update the driver: https://www.nvidia.com/drivers",
        )

    # --- the bundle ---

    def _graphs(self) -> Fit | None:
        engines, manifest = self.engines, self.manifest
        if engines.precision != manifest.label:
            return Fit(
                Mismatch.PRECISION,
                f"The engines compute in {engines.precision}; the bundle is in {manifest.label}. "
                f"Build them for it: {self._rebuild()}",
            )
        needed = buildable_graphs(manifest)
        for graph in needed:
            if graph not in engines.engines:
                return Fit(
                    Mismatch.GRAPH_MISSING,
                    f"The bundle has a graph {graph!r}; the set has no engine for it (it has {', '.join(engines.engines)}). "
                    f"Build it: {self._rebuild()}",
                )
        for graph in engines.engines:
            if graph not in needed:
                return Fit(
                    Mismatch.GRAPH_UNKNOWN,
                    f"The set has an engine {graph!r}; the bundle has no such graph (it has {', '.join(needed)}). "
                    f"Build for this bundle: {self._rebuild()}",
                )
        for graph, entry in engines.engines.items():
            digest = graph_digest(manifest, graph)
            if entry.graph_digest != digest:
                return Fit(
                    Mismatch.GRAPH_CHANGED,
                    f"The bundle's graph {graph!r} is {digest[:12]}; the engine was made from {entry.graph_digest[:12]}: the "
                    f"bundle was exported again since. Build for it: {self._rebuild()}",
                )
        return None

    def _integrity(self) -> Fit | None:
        engines, manifest = self.engines, self.manifest
        key = engine_key(
            manifest,
            tuple(engines.engines),
            engines.flavour,
            engines.library_version,
            engines.platform,
            engines.capabilities,
            engines.options,
        )
        if key != engines.key:
            return Fit(
                Mismatch.KEY,
                f"engines.json was edited: it names the set {engines.key!r}, but what it describes is {key!r}. "
                f"Build the set again: {self._rebuild(force=True)}",
            )
        for graph, entry in engines.engines.items():
            why = self._contradiction(graph, entry.profile)
            if why:
                return Fit(
                    Mismatch.AXES,
                    f"engines.json contradicts itself: {why} Build the set again: {self._rebuild(force=True)}",
                )
        return None

    def _contradiction(self, graph: str, taken: Profile) -> str:
        """What is wrong between the axes and the shapes that an engine takes; "" if nothing is."""
        try:
            given = profile_of(graph, self.manifest.graphs[graph], self.engines.axes)
        except BundleError as error:
            return str(error)
        for name in sorted({*given, *taken}):
            if given.get(name) != taken.get(name):
                return f"for input {name!r} of {graph!r} the axes give {given.get(name)}, the engine takes {taken.get(name)}."
        return ""

    # --- the files ---

    def _files(self) -> Fit | None:
        again = f"Build the set again: {self._rebuild(force=True)}"
        for graph, entry in self.engines.engines.items():
            for name in (entry.file, entry.report):
                try:
                    inside(self.folder, name)
                except BundleError:
                    return Fit(
                        Mismatch.FILE_OUTSIDE,
                        f"The file {name!r} of engine {graph!r} lies outside of the set's folder {str(self.folder)!r}. "
                        f"{again}",
                    )
            size = _size(self.folder / entry.file)
            if size is None:
                return Fit(
                    Mismatch.ENGINE_MISSING,
                    f"The engine of {graph!r}, {str(self.folder / entry.file)!r}, is not there; it should have "
                    f"{entry.bytes} bytes. {again}",
                )
            if size != entry.bytes:
                return Fit(
                    Mismatch.ENGINE_SIZE,
                    f"The engine of {graph!r}, {str(self.folder / entry.file)!r}, has {size} bytes; it was built with "
                    f"{entry.bytes}. {again}",
                )
            if _size(self.folder / entry.report) is None:
                return Fit(
                    Mismatch.REPORT_MISSING,
                    f"The report of {graph!r}, {str(self.folder / entry.report)!r}, is not there; it should have SHA-256 "
                    f"{entry.report_sha256[:12]}. {again}",
                )
        return None

    def _content(self) -> Fit | None:
        if not self.request.verify:
            return None
        again = f"Build the set again: {self._rebuild(force=True)}"
        for graph, entry in self.engines.engines.items():
            for kind, name, wanted in (
                (Mismatch.ENGINE_CHANGED, entry.file, entry.sha256),
                (Mismatch.REPORT_CHANGED, entry.report, entry.report_sha256),
            ):
                path = self.folder / name
                try:
                    found = sha256_of(path)
                except OSError as error:
                    return Fit(
                        Mismatch.FILE_UNREADABLE,
                        f"{str(path)!r} of engine {graph!r} should have SHA-256 {wanted[:12]}; it cannot be read: "
                        f"{error.strerror}. {again}",
                    )
                if found != wanted:
                    return Fit(
                        kind,
                        f"{str(path)!r} of engine {graph!r} has SHA-256 {found[:12]}; it was built with {wanted[:12]}. {again}",
                    )
        return None

    # --- the clip ---

    def _longest(self) -> Fit | None:
        for length in lengths_of(self.manifest, self.wanted, self.request):
            most = min((extent.most for extent in length.extents(self.engines.axes)), default=length.needed)
            if length.needed > most:
                instead = length.instead.format(most=length.show(most))
                return Fit(
                    length.kind,
                    f"The engines take {length.what} of at most {length.show(most)} {length.unit}; "
                    f"{length.show(length.needed)} is needed. {f'Give {instead}, or b' if instead else 'B'}uild for it: "
                    f"{self._build_for(length.kind)}",
                )
        return None

    def _shortest(self) -> Fit | None:
        for length in lengths_of(self.manifest, self.wanted, self.request):
            least = max((extent.least for extent in length.extents(self.engines.axes)), default=length.needed)
            if length.needed < least:
                return Fit(
                    Mismatch.TOO_SMALL,
                    f"The engines take {length.what} of at least {length.show(least)} {length.unit}; "
                    f"{length.show(length.needed)} is needed. Build for it: {self._build_for(length.kind)}",
                )
        return None

    def _memory(self) -> Fit | None:
        gpu = self.machine.gpu
        if gpu is None or gpu.memory_bytes is None:
            return None
        graph, entry = max(
            self.engines.engines.items(), key=lambda item: item[1].activation_bytes + item[1].weights_bytes
        )
        needed = entry.activation_bytes + entry.weights_bytes
        if needed <= gpu.memory_bytes:
            return None
        return Fit(
            Mismatch.MEMORY,
            f"The engine of {graph!r} needs {needed / 1e9:.2f} GB for activations and weights; {gpu.name} has "
            f"{gpu.memory_bytes / 1e9:.2f} GB. Build for a smaller clip or tile: {self._build_here(sizes=())} "
            "--size WxHxF --tile WxH",
        )

    # --- commands ---

    def _rebuild(self, *, force: bool = False, version_compatible: bool = False) -> str:
        """The command that built this set; `force` builds over what is there."""
        engines, options = self.engines, self.engines.options
        return build_command(
            self.folder.parent.parent,
            self.manifest,
            tuple(name for name in engines.targets if name in TARGETS) or (name_of(target_here(self.machine)),),
            backend=engines.flavour,
            sizes=options.sizes,
            tile=options.tile,
            steps=options.steps,
            batch=options.batch,
            workspace=options.workspace,
            version_compatible=options.version_compatible or version_compatible,
            optimization_level=options.optimization_level,
            force=force,
        )

    def _build_for(self, kind: Mismatch) -> str:
        """The command that builds a set which takes what is requested, where this one's axes of some kind do not."""
        request = self.request
        if kind is Mismatch.TEXT:
            return self._rebuild()
        if kind is Mismatch.BATCH:
            return self._build_here(batch=request.batch)
        if kind is Mismatch.STEPS:
            return self._build_here(steps=request.steps)
        if kind is Mismatch.TILE:
            return self._build_here(tile=request.tile)
        return self._build_here(sizes=(request.size,))

    def _build_here(
        self,
        *,
        backend: Flavour | None = None,
        sizes: tuple[ClipSize, ...] | None = None,
        tile: tuple[int, int] | None = None,
        steps: int | None = None,
        batch: int | None = None,
    ) -> str:
        """The command that builds a set for the same clips, but for this machine's GPU, and as the arguments say."""
        options, target = self.engines.options, target_here(self.machine)
        if backend is None and (target is None or self.engines.flavour in target.flavours):
            backend = self.engines.flavour
        return build_command(
            self.folder.parent.parent,
            self.manifest,
            (name_of(target),),
            backend=backend,
            sizes=options.sizes if sizes is None else sizes,
            tile=tile,
            steps=options.steps if steps is None else steps,
            batch=options.batch if batch is None else batch,
            version_compatible=options.version_compatible,
        )


def _geometry(manifest: Manifest, size: ClipSize) -> Geometry:
    return geometry(manifest.transformer, manifest.vae, size.height, size.width, size.frames)


def _set_folders(bundle_root: Path) -> list[Path]:
    """The sets of a bundle by name; those that begin with a dot are being built."""
    try:
        found = sorted((bundle_root / ENGINES_FOLDER).iterdir())
    except OSError:
        return []
    return [folder for folder in found if folder.is_dir() and not folder.name.startswith(".")]


def _preference(engines: EngineSet, size: ClipSize) -> tuple[bool, bool, bool, int]:
    """Smallest for the set to take. Version-compatible engines come last: the whole library needs the lean one for them."""
    sizes = engines.options.sizes
    memory = max(entry.activation_bytes for entry in engines.engines.values())
    return engines.options.version_compatible, sizes[:1] != (size,), size not in sizes, memory


def _size(path: Path) -> int | None:
    """Bytes of a file; None if there is none."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _title(flavour: Flavour) -> str:
    return LIBRARIES[flavour].title
