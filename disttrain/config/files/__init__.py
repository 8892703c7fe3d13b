"""Reads YAML files, `extends`, overrides and `${...}` references into the draft of a config."""
