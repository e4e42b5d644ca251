"""Reading a diffusers-layout checkpoint folder: configs as JSON, weights lazily from safetensors, nothing unpickled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch

from ..bundle.errors import InputError, from_os_error
from ..bundle.precision import DTYPES
from ..bundle.tensors import TensorInfo, read_header

__all__ = ["Checkpoint", "ComponentTensors"]

T = TypeVar("T")

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CLASSES = {
    "transformer": "DynamiCtrlTransformerModel",
    "vae": "AutoencoderKLCogVideoX",
    "text_encoder": "T5EncoderModel",
    "scheduler": "CogVideoXDPMScheduler",
}
# Published checkpoints were saved with the DDIM scheduler's class name in some revisions; the numbers are the same
# and the published pipeline always builds the DPM scheduler from them.
SCHEDULER_ALIASES = ("CogVideoXDPMScheduler", "CogVideoXDDIMScheduler")


class ComponentTensors:
    """The tensors of one component by name, over one or many safetensors files; each read is one `pread`, no mapping.

    Files are read rather than mapped so that peak memory is one tensor, not the file.
    """

    def __init__(self, folder: Path, stem: str):
        self.folder = folder
        self._where: dict[str, tuple[Path, TensorInfo]] = {}
        for path in _weight_files(folder, stem):
            for name, info in read_header(path).items():
                if name in self._where:
                    other = str(self._where[name][0])
                    raise InputError(
                        f"The tensor {name!r} is in {other!r} and again in {str(path)!r}. Which one counts?"
                    )
                self._where[name] = (path, info)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape; `InputError` naming the tensor if the checkpoint lacks it."""
        if name not in self._where:
            raise InputError(
                f"The checkpoint {str(self.folder)!r} lacks the tensor {name!r}. Is the download complete?"
            )
        return self._where[name][1]

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored; `InputError` if it is missing, no float, or the file ends early."""
        info = self.info(name)
        path = self._where[name][0]
        if info.dtype not in TORCH_DTYPES:
            raise InputError(
                f"{str(path)!r}: tensor {name!r} has dtype {info.dtype}; floating-point weights are needed."
            )
        buffer = np.empty(info.nbytes, np.uint8)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(info.offset)
                view = buffer.data
                done = 0
                while done < info.nbytes:  # one read may return less than asked
                    count = file.readinto(view[done:])
                    if not count:
                        raise InputError(f"{str(path)!r} ends inside tensor {name!r}. Is the download complete?")
                    done += count
        except OSError as error:
            raise from_os_error(error, "read", path) from error
        if info.dtype == "BF16":
            return torch.from_numpy(buffer.view(np.int16)).view(torch.bfloat16).reshape(info.shape)
        return torch.from_numpy(buffer.view(DTYPES[info.dtype])).reshape(info.shape)


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of a component: `<stem>.safetensors`, or the shards that its index names."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.exists():
        table = _json(index)
        named = table.get("weight_map") if isinstance(table, dict) else None
        if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
            raise InputError(f"{str(index)!r} has no 'weight_map'; it is not a safetensors index.")
        shards = sorted(set(named.values()))
        for name in shards:
            if Path(name).name != name or name in ("", ".."):
                raise InputError(f"{str(index)!r} names the shard {name!r}, which lies outside its folder. Refused.")
            if not (folder / name).exists():
                raise InputError(f"The shard {str(folder / name)!r} is missing. Is the download complete?")
        return [folder / name for name in shards]
    if single.exists():
        return [single]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES) if folder.is_dir() else []
    if pickles:
        raise InputError(
            f"{str(folder)!r} holds its weights as {pickles[0]!r}, a pickle, which can run code when it is opened and is "
            "therefore never read. Get the safetensors variant, or convert it where you trust it "
            "(from_pretrained, then save_pretrained(safe_serialization=True))."
        )
    raise InputError(f"{str(folder)!r} has no {single.name} (nor {index.name}). Is the download complete?")


def _json(path: Path) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise from_os_error(error, "read", path) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is not valid JSON: {error}.") from error


class Checkpoint:
    """A checkpoint folder as diffusers' `save_pretrained` writes it."""

    def __init__(self, root: Path | str):
        """Raises `InputError` unless `model_index.json` exists and names the components of a DynamiCtrl pipeline."""
        self.root = Path(root)
        if not self.root.is_dir():
            raise InputError(f"There is no checkpoint folder {str(self.root)!r}.")
        path = self.root / "model_index.json"
        if not path.exists():
            raise InputError(
                f"{str(self.root)!r} is not a checkpoint folder in the diffusers layout: it has no model_index.json."
            )
        index = _json(path)
        for component, wanted in CLASSES.items():
            entry = index.get(component) if isinstance(index, dict) else None
            found = entry[-1] if isinstance(entry, list) and entry else None
            allowed = SCHEDULER_ALIASES if component == "scheduler" else (wanted,)
            if found not in allowed:
                raise InputError(
                    f"{str(path)!r}: {component} is {found!r}; a DynamiCtrl checkpoint has {wanted!r} there."
                )

    def folder(self, component: str) -> Path:
        path = self.root / component
        if not path.is_dir():
            raise InputError(
                f"The checkpoint {str(self.root)!r} lacks the folder {component!r}. Is the download complete?"
            )
        return path

    def json(self, component: str, name: str = "config.json") -> dict[str, Any]:
        """A component's JSON configuration."""
        path = self.folder(component) / name
        value = _json(path)
        if not isinstance(value, dict):
            raise InputError(f"{str(path)!r} is not a JSON object.")
        return value

    def config(self, component: str, kind: type[T]) -> T:
        """A component's configuration as a validated structure; `InputError` names the field that does not fit."""
        try:
            return msgspec.convert(self.json(component), kind)
        except msgspec.ValidationError as error:
            path = self.folder(component) / "config.json"
            raise InputError(f"{str(path)!r} does not describe a DynamiCtrl {component}: {error}.") from error

    def tensors(self, component: str) -> ComponentTensors:
        """A component's weights."""
        stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
        return ComponentTensors(self.folder(component), stem)
