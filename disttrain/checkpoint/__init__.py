"""Saves and loads checkpoints in one form for all strategies and world sizes: sharded, atomic, verified, and no pickle.

A checkpoint is a folder `step-NNNNNNNN`. The sub-packages are `form` (boxes, files, manifest), `storage` (disks and
object stores), `write`, `read`, `keep` (listing, retention, comparison) and `formats` (other libraries). Strategies
state which shards a rank holds. The engine saves and loads them. Existing checkpoints are never overwritten, and bytes
that differ from their checksums are rejected.
"""

from __future__ import annotations

from disttrain.checkpoint.form.boxes import Box, flat_range_to_boxes, full_box, overlap, tiling_fault
from disttrain.checkpoint.form.fingerprint import combine_fingerprints, fingerprint
from disttrain.checkpoint.form.manifest import Manifest, StoredBox, TensorInfo
from disttrain.checkpoint.form.shards import KINDS, Shard, full_shard
from disttrain.checkpoint.keep.discovery import (
    holds_checkpoints,
    list_checkpoints,
    newest_intact,
    prune,
    reject_unwritable,
    remove_stale_staging,
    set_aside,
)
from disttrain.checkpoint.keep.retention import Best, Retention
from disttrain.checkpoint.ranks import Ranks, SoleRank
from disttrain.checkpoint.read.reader import Checkpoint, Differences, LocatedBox
from disttrain.checkpoint.storage.durable_files import Disk
from disttrain.checkpoint.storage.interface import storage_of
from disttrain.checkpoint.storage.location import Address, Location, LocationT, parse_location, step_folder, step_of
from disttrain.checkpoint.storage.remote_storage import address_fault
from disttrain.checkpoint.write.save import PlanCache, save_checkpoint
from disttrain.checkpoint.write.shard_copies import ShardCopies

__all__ = [
    "KINDS",
    "Address",
    "Best",
    "Box",
    "Checkpoint",
    "Differences",
    "Disk",
    "LocatedBox",
    "Location",
    "LocationT",
    "Manifest",
    "PlanCache",
    "Ranks",
    "Retention",
    "Shard",
    "ShardCopies",
    "SoleRank",
    "StoredBox",
    "TensorInfo",
    "address_fault",
    "combine_fingerprints",
    "fingerprint",
    "flat_range_to_boxes",
    "full_box",
    "full_shard",
    "holds_checkpoints",
    "list_checkpoints",
    "newest_intact",
    "overlap",
    "parse_location",
    "prune",
    "reject_unwritable",
    "remove_stale_staging",
    "save_checkpoint",
    "set_aside",
    "step_folder",
    "step_of",
    "storage_of",
    "tiling_fault",
]
