"""Reads and validates configs, and resolves the targets that they name. Imports no torch.

The functions here are used by every package above this one.
"""

from disttrain.config.files.yaml_lines import parse_value
from disttrain.config.problems import ConfigProblem, ConfigProblemsError
from disttrain.config.read import TRAINED_FROM, load_config, load_to_train
from disttrain.config.render import render_config
from disttrain.config.schema import Config, Target
from disttrain.config.strategy_options import StrategyEntry, StrategyOptions
from disttrain.config.targets.resolve import build_nested, build_target, check_arguments, prefer_folder, resolve_target

__all__ = [
    "TRAINED_FROM",
    "Config",
    "ConfigProblem",
    "ConfigProblemsError",
    "StrategyEntry",
    "StrategyOptions",
    "Target",
    "build_nested",
    "build_target",
    "check_arguments",
    "load_config",
    "load_to_train",
    "parse_value",
    "prefer_folder",
    "render_config",
    "resolve_target",
]
