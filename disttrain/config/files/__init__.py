"""Reads YAML files, `extends`, overrides and `${...}` references into a draft of a config."""
