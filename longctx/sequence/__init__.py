"""Documents, masks, layouts, tiles and the batch border; see ``plan`` for how they meet."""

from longctx.sequence.batch import IGNORE, Batch, LocalBatch, cut, shard, unshard
from longctx.sequence.documents import Documents
from longctx.sequence.halo import Halo
from longctx.sequence.layout import Contiguous, Explicit, Layout, Striped, Zigzag, make_layout
from longctx.sequence.mask import Mask
from longctx.sequence.plan import Places, SequencePlan, make_plan, plan_of
from longctx.sequence.ring_schedule import RingSchedule
from longctx.sequence.rows import Rows
from longctx.sequence.tiles import Tile, TileSet
from longctx.sequence.token_ownership import TokenOwnership

__all__ = [
    "IGNORE",
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
    "TokenOwnership",
    "Zigzag",
    "cut",
    "make_layout",
    "make_plan",
    "plan_of",
    "shard",
    "unshard",
]
