"""Fixtures for every test, and checks that a test restores the environment and leaves no process group."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

# A package of its own, with tests that need it installed: test_plugin.py does both.
collect_ignore = ["plugin_package"]

# No deadline on a busy machine. In CI the same examples every time: what a search for new ones finds is for the one who
# runs it to mend.
settings.register_profile("here", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("here")


@pytest.fixture(autouse=True)
def left_as_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Environment, import path, process group and children are as they were."""
    environ, path = dict(os.environ), list(sys.path)
    yield
    monkeypatch.undo()
    sys.path[:] = path
    for name in set(os.environ) - set(environ):
        del os.environ[name]
    os.environ.update(environ)
    torch = sys.modules.get("torch")
    if torch is not None:
        assert not torch.distributed.is_initialized(), "a test left a process group behind"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB, to be filled."""
    place = tmp_path / "small"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)
