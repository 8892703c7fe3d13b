"""Finds out how many processes `accelerate launch` was asked to start, from its command line and its config file.

accelerate does not pass that number to the processes it starts. Where its command line cannot be read (another
operating system, a shell in between), the number stays unknown. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

_COMMANDS = ("accelerate-launch", "accelerate.commands.launch", "accelerate/commands/launch.py")


def asked_processes(environ: Mapping[str, str]) -> int | None:
    """Return the `num_processes` of the launcher above this process, None if unknown. Reads /proc and the file."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")
    except (OSError, UnicodeDecodeError):
        return None
    options = launch_options(words)
    if options is None:
        return None
    try:
        if "num_processes" in options:
            return int(options["num_processes"])
        found = yaml.safe_load(Path(options.get("config_file") or _default_file(environ)).read_text(encoding="utf-8"))
        return int(found["num_processes"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def launch_options(words: Sequence[str]) -> dict[str, str] | None:
    """Return accelerate's options that have a value; None where the command line is not `accelerate launch`. Pure."""
    places = [at + 1 for at, word in enumerate(words) if word.endswith(_COMMANDS)]
    places += [
        at + 2 for at, word in enumerate(words[:-1]) if Path(word).name == "accelerate" and words[at + 1] == "launch"
    ]
    if not places:
        return None
    options: dict[str, str] = {}
    rest = list(words[min(places) :])
    while rest and not rest[0].endswith(".py") and rest[0] not in ("-m", "--module", "--no_python", "--no-python"):
        name, equals, value = rest.pop(0).partition("=")
        if name.startswith("--"):
            following = rest[0] if rest and not rest[0].startswith("-") else ""
            options.setdefault(name[2:].replace("-", "_"), value if equals else following)
    return options


def _default_file(environ: Mapping[str, str]) -> str:
    """Return the file that `accelerate config` writes, as in accelerate's commands/config/config_args.py."""
    home = environ.get("HOME", "~")
    cache = environ.get("HF_HOME") or f"{environ.get('XDG_CACHE_HOME') or f'{home}/.cache'}/huggingface"
    return f"{cache}/accelerate/default_config.yaml"
