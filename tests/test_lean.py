"""The runtime stays lean: quick to import, and without the libraries that only export needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.golden import case

HEAVY = (
    "torch",
    "transformers",
    "diffusers",
    "onnx",
    "onnxscript",
    "sentencepiece",
    "safetensors",
    "tensorrt",
    "tensorrt_lean",
    "tensorrt_rtx",
    "pycuda",
)

# The beginning of a program in which they cannot be imported.
WITHOUT_HEAVY = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ImportError("not part of the base install: " + name)
sys.meta_path.insert(0, Refuse())
"""


def run(code: str, *arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True).stdout


def test_importing_the_runtime_takes_under_300_ms_and_loads_nothing_heavy() -> None:
    """Of processor time: on an idle machine that is what a person waits."""
    code = (
        "import sys, time; start = time.process_time(); import dynamictrl_edge.runtime; "
        "print(time.process_time() - start, *sorted(m.partition('.')[0] for m in sys.modules))"
    )
    runs = [run(code).split() for _ in range(3)]
    assert min(float(words[0]) for words in runs) < 0.3
    assert not set(HEAVY) & set(runs[0][1:])


def test_the_animator_itself_imports_quickly_too() -> None:
    code = "import time; s = time.process_time(); from dynamictrl_edge.runtime import Animator; print(time.process_time() - s)"
    assert min(float(run(code)) for _ in range(3)) < 0.6


def test_a_clip_is_made_where_the_heavy_libraries_cannot_be_imported(bundle10: Path, tmp_path: Path) -> None:
    tensors, facts = case("pipeline10_nocfg")
    np.savez(tmp_path / "inputs.npz", image=tensors["image_u8"], pose=tensors["control_u8"])
    code = f"""
{WITHOUT_HEAVY}
import numpy as np
from dynamictrl_edge.cli.main import cli
from dynamictrl_edge.runtime import Animator
given = np.load(sys.argv[2])
clip = Animator.from_bundle(sys.argv[1], cache=False)(
    image=given["image"], pose=given["pose"], prompt={facts["settings"]["prompt"]!r}, steps=2, guidance=1.0,
    height=32, width=48, frames=9,
)
print(clip.frames.shape)
"""
    assert run(code, str(bundle10), str(tmp_path / "inputs.npz")).strip() == "(9, 32, 48, 3)"


DOORS = {"cuda.py": "pycuda"}  # the one file of the runtime that may name it; TensorRT is found by its name at run time


def test_no_source_of_the_runtime_names_a_heavy_library() -> None:
    import ast

    import dynamictrl_edge.bundle
    import dynamictrl_edge.runtime

    for package in (dynamictrl_edge.runtime, dynamictrl_edge.bundle):
        for file in Path(str(package.__file__)).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module or ""]
                assert not {name.partition(".")[0] for name in names} & set(HEAVY) - {DOORS.get(file.name)}, file


def test_one_file_of_the_runtime_loads_tensorrt() -> None:
    import dynamictrl_edge.runtime

    folder = Path(str(dynamictrl_edge.runtime.__file__)).parent
    loading = [file.name for file in folder.rglob("*.py") if "import_module" in file.read_text()]
    assert loading == ["tensorrt.py"]
