"""Stores checkpoint files on a disk or in an object store, and reads them chunk by chunk."""
