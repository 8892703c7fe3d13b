"""Runs the commands by `python -m disttrain.cli`."""

from disttrain.cli import main

main()
