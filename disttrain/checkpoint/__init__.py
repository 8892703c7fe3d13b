"""Checkpoints: one form for all strategies and world sizes; sharded, atomic, verified, free of pickle.

Owns the folder `step-NNNNNNNN`: canonical boxes, the files, the manifest, the commit. Entered by strategies (which say
what shards a rank holds) and by the engine (which saves and loads them). Refuses to overwrite and to read what does not
fit its checksums.
"""

from __future__ import annotations

from disttrain.checkpoint.form.boxes import Box, flat_range_to_boxes, overlap, tiling_fault, whole
from disttrain.checkpoint.form.fingerprint import add_up, fingerprint
from disttrain.checkpoint.form.manifest import Manifest, StoredBox, TensorInfo
from disttrain.checkpoint.form.shards import KINDS, Ranks, Shard, SoleRank, whole_shard
from disttrain.checkpoint.keep.discovery import (
    holds_checkpoints,
    list_checkpoints,
    newest_whole,
    prune,
    refuse_unwritable,
    remove_stale_staging,
    set_aside,
)
from disttrain.checkpoint.keep.retention import Best, Retention
from disttrain.checkpoint.read.reader import Checkpoint, Differences, PlacedBox
from disttrain.checkpoint.storage.address import Address, Place, PlaceT, place_of, step_folder, step_of
from disttrain.checkpoint.storage.disk import Disk
from disttrain.checkpoint.storage.remote import address_fault
from disttrain.checkpoint.storage.storage import storage_of
from disttrain.checkpoint.write.save import PlanMemory, save_checkpoint
from disttrain.checkpoint.write.staging import StagingBuffer

__all__ = [
    "KINDS",
    "Address",
    "Best",
    "Box",
    "Checkpoint",
    "Differences",
    "Disk",
    "Manifest",
    "Place",
    "PlaceT",
    "PlacedBox",
    "PlanMemory",
    "Ranks",
    "Retention",
    "Shard",
    "SoleRank",
    "StagingBuffer",
    "StoredBox",
    "TensorInfo",
    "add_up",
    "address_fault",
    "fingerprint",
    "flat_range_to_boxes",
    "holds_checkpoints",
    "list_checkpoints",
    "newest_whole",
    "overlap",
    "place_of",
    "prune",
    "refuse_unwritable",
    "remove_stale_staging",
    "save_checkpoint",
    "set_aside",
    "step_folder",
    "step_of",
    "storage_of",
    "tiling_fault",
    "whole",
    "whole_shard",
]
