"""Sequences cut over ranks: documents, masks, layouts, tiles and batches; ``plan`` says how they meet."""

from longctx.sequence.batch import IGNORE, Batch, LocalBatch, cut, shard, unshard
from longctx.sequence.documents import Documents
from longctx.sequence.halo import Halo, halo_of
from longctx.sequence.handles import NO_PLAN
from longctx.sequence.layout import Contiguous, Explicit, Layout, Striped, Zigzag, make_layout
from longctx.sequence.mask import Mask
from longctx.sequence.places import Places, gathered_keys, row_places
from longctx.sequence.plan import SequencePlan, make_plan, plan_of
from longctx.sequence.ring_schedule import RingSchedule, key_ring, query_ring
from longctx.sequence.rows import Rows
from longctx.sequence.tiles import Tile, TileSet
from longctx.sequence.views import view

__all__ = [
    "IGNORE",
    "NO_PLAN",
    "Batch",
    "Contiguous",
    "Documents",
    "Explicit",
    "Halo",
    "Layout",
    "LocalBatch",
    "Mask",
    "Places",
    "RingSchedule",
    "Rows",
    "SequencePlan",
    "Striped",
    "Tile",
    "TileSet",
    "Zigzag",
    "cut",
    "gathered_keys",
    "halo_of",
    "key_ring",
    "make_layout",
    "make_plan",
    "plan_of",
    "query_ring",
    "row_places",
    "shard",
    "unshard",
    "view",
]
