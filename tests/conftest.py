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

# The plug-in is a separate package. Its tests need it installed, and test_plugin.py installs and runs it.
collect_ignore = ["plugin_package"]

# No deadline, because machines can be busy. CI uses the same examples every time. A search for new ones is run by hand.
settings.register_profile("here", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("here")


@pytest.fixture(autouse=True)
def unchanged_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Environment, import path, process group and children are unchanged after each test."""
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
    """A file system of one MiB that tests can fill."""
    place = tmp_path / "small"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)
