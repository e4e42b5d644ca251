"""What README.md shows is what works: its snippet runs, its commands exist, its tables are those of the receipts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_snippet_runs_as_written(
    bundle10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from dynamictrl_edge.runtime.media import open_writer

    random = np.random.default_rng(0)
    (tmp_path / "bundle").symlink_to(bundle10)
    Image.fromarray(random.integers(0, 255, (120, 200, 3), dtype=np.uint8)).save(tmp_path / "photo.jpg")
    with open_writer(tmp_path / "pose.mp4", 8, 96, 160) as writer:
        writer.write(random.integers(0, 255, (9, 96, 160, 3), dtype=np.uint8))
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(snippets[0], "README.md", "exec"), {})  # noqa: S102
    printed = capsys.readouterr().out
    assert "(9, 96, 160, 3) 8" in printed
    assert "9 frames decoded" in printed


def test_the_commands_named_exist_and_all_are_named() -> None:
    from dynamictrl_edge.cli.main import VERBS

    assert set(re.findall(r"\| `dynamictrl (\w+)", README)) == set(VERBS)
    targets = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    phony = re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text())
    assert phony is not None
    assert targets == set(phony.group(1).split())


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_tables_are_those_of_the_receipts() -> None:
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"], check=True)


def test_files_that_are_linked_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
