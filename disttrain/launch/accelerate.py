"""`strategy.name=accelerate` settled: this process's launch brought to the config. Imports no torch."""

from __future__ import annotations

from disttrain.config import Config
from disttrain.config.foreign.accelerate import asked_otherwise, translate
from disttrain.config.foreign.accelerate_settings import read_environment
from disttrain.config.strategy_options import TRANSLATED
from disttrain.errors import LaunchError, explain
from disttrain.runtime.environment import accelerate_variables, read_launch


def settle_strategy(config: Config) -> Config:
    """The config that runs: `strategy.name=accelerate` as what `accelerate launch` asks for. Local.

    Raises LaunchError where something else started this process, ConfigError for what cannot be honoured.
    """
    if config.strategy.name != TRANSLATED:
        return config
    launch, handed = read_launch(), accelerate_variables()
    if not handed:
        raise LaunchError(
            explain(
                "strategy.name=accelerate takes the strategy from `accelerate launch`.",
                f"a process started by {launch.launcher}",
                "start it with `accelerate launch --config_file FILE -m disttrain.run CONFIG`, "
                "or name the strategy: none, ddp, fsdp or deepspeed",
            )
        )
    return translate(read_environment(handed, launch.world_size), config)


def unheeded(config: Config) -> str:
    """What `accelerate launch` asks for and a config that names its strategy does not do; empty for nothing. Local."""
    handed = accelerate_variables()
    return asked_otherwise(read_environment(handed, read_launch().world_size), config) if handed else ""
