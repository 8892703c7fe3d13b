"""Adapts the config to the launcher that started the processes. Reads no config file and starts no process."""
