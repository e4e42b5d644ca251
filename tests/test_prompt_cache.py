"""Prompt embeddings on disk: damage is a miss, size is bounded, nothing that goes wrong there stops the work."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamictrl_edge.runtime import prompt_cache
from dynamictrl_edge.runtime.prompt_cache import PromptCache, prompt_key

KEY = prompt_key("a woman", 16, "encoder")
ARRAY = np.arange(32, dtype=np.float32).reshape(16, 2)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text("ab1"), st.integers(1, 300))
def test_key_depends_on_every_part(text: str, identity: str, length: int) -> None:
    key = prompt_key(text, length, identity)
    assert key == prompt_key(text, length, identity)
    assert len({key, prompt_key(text + "1", length, identity), prompt_key(text, length + 1, identity)}) == 3
    assert key != prompt_key(text, length, identity + "1")


def test_what_was_put_comes_back(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path / "new" / "folder")
    assert cache.get(KEY) is None
    assert cache.put(KEY, ARRAY)
    found = cache.get(KEY)
    assert found is not None
    assert found.dtype == np.float32
    assert np.array_equal(found, ARRAY)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [f"{KEY}.npy"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 300), bit=st.integers(0, 7), cut=st.booleans())
def test_damaged_file_is_a_miss_and_is_overwritten(tmp_path: Path, position: int, bit: int, cut: bool) -> None:
    cache = PromptCache(tmp_path)
    cache.put(KEY, ARRAY)
    path = tmp_path / f"{KEY}.npy"
    raw = bytearray(path.read_bytes())
    position %= len(raw)
    raw[position] ^= 1 << bit
    path.write_bytes(raw[:position] if cut else raw)
    assert cache.get(KEY) is None
    assert cache.put(KEY, ARRAY)
    assert cache.get(KEY) is not None


def test_pickles_are_never_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    data = buffer.getvalue()
    (tmp_path / f"{KEY}.npy").write_bytes(data + hashlib.sha256(data).digest())
    assert PromptCache(tmp_path).get(KEY) is None


def test_least_recently_used_files_leave_first(tmp_path: Path) -> None:
    size = 128 + ARRAY.nbytes + 32
    cache = PromptCache(tmp_path, limit=3 * size)
    for i, key in enumerate("abc"):
        cache.put(key, ARRAY)
        os.utime(tmp_path / f"{key}.npy", (i + 1, i + 1))
    assert cache.get("a") is not None  # used again: now `b` is the oldest
    cache.put("d", ARRAY)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "c", "d"]


def test_array_beyond_the_limit_is_not_kept(tmp_path: Path) -> None:
    assert not PromptCache(tmp_path, limit=100).put(KEY, ARRAY)
    assert list(tmp_path.iterdir()) == []


def test_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    old, new = tmp_path / ".x.1234.part.npy", tmp_path / ".y.1234.part.npy"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    PromptCache(tmp_path).put(KEY, ARRAY)
    assert not old.exists()
    assert new.exists()


def test_place_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert not PromptCache(tmp_path / "file").put(KEY, ARRAY)
    cache = PromptCache(tmp_path)
    cache.put(KEY, ARRAY)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "read-only")

    # A read-only folder cannot be made for root, who runs some test machines.
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    assert not cache.put("other", ARRAY)
    assert cache.get(KEY) is not None


def test_place_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNAMICTRL_CACHE", str(tmp_path))
    assert PromptCache.default().folder == tmp_path / "prompts"
    monkeypatch.setenv("DYNAMICTRL_CACHE", "")
    off = PromptCache.default()
    assert off.folder is None
    assert not off.put(KEY, ARRAY)
    assert off.get(KEY) is None
    monkeypatch.delenv("DYNAMICTRL_CACHE")
    monkeypatch.setattr(prompt_cache, "cache_folder", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert PromptCache.default().folder is None


def test_each_prompt_is_encoded_once(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def encode(prompts: Sequence[str]) -> np.ndarray:
        calls.append(list(prompts))
        return np.stack([np.full((16, 2), len(prompt), np.float32) for prompt in prompts])

    cache = PromptCache(tmp_path)
    for prompts in (["", "aa"], ["aa", "", "aa"], ["bbb", "aa"]):
        embeds = cache.embeddings(prompts, encode, length=16, identity="x")
        assert embeds.shape == (len(prompts), 16, 2)
        assert embeds[:, 0, 0].tolist() == [len(prompt) for prompt in prompts]
    assert calls == [["", "aa"], ["bbb"]]
    cache.embeddings(["aa"], encode, length=16, identity="other weights")
    assert calls[-1] == ["aa"]


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from dynamictrl_edge.runtime.prompt_cache import PromptCache;"
        "cache = PromptCache(sys.argv[1], limit=40_000)\n"
        "for i in range(60):\n"
        "    cache.put(str(i % 7), np.full((16, 64), i % 7, np.float32))\n"
        "    found = cache.get(str((i * 3) % 7))\n"
        "    assert found is None or (found == (i * 3) % 7).all()\n"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    assert 0 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= 40_000
