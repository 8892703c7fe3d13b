"""Resolves `strategy.name=accelerate` from the variables that `accelerate launch` set. Imports no torch."""

from __future__ import annotations

from disttrain.config import Config
from disttrain.config.foreign.accelerate import differing_settings, translate
from disttrain.config.foreign.accelerate_settings import read_environment
from disttrain.config.strategy_options import TRANSLATED
from disttrain.errors import LaunchError, explain
from disttrain.runtime.environment import accelerate_variables, read_launch


def settle_strategy(config: Config) -> Config:
    """Return the config with `strategy.name=accelerate` replaced by what `accelerate launch` asks for. Local.

    Raises LaunchError where something else started this process, and ConfigError for a setting without an equivalent.
    """
    if config.strategy.name != TRANSLATED:
        return config
    launch, handed = read_launch(), accelerate_variables()
    if not handed:
        raise LaunchError(
            explain(
                "strategy.name=accelerate needs `accelerate launch`.",
                f"this process was started by {launch.launcher}",
                "start it with `accelerate launch --config_file FILE -m disttrain.run CONFIG`, "
                "or name the strategy: none, ddp, fsdp or deepspeed",
            )
        )
    return translate(read_environment(handed, launch.world_size), config)


def ignored_settings(config: Config) -> str:
    """Return what `accelerate launch` asks for and the config's strategy ignores; empty for nothing. Local."""
    handed = accelerate_variables()
    return differing_settings(read_environment(handed, read_launch().world_size), config) if handed else ""
