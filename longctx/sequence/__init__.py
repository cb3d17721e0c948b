"""Documents, masks, layouts, tiles and the batch border; see ``plan`` for how they meet."""

from longctx.sequence.batch import IGNORE, Batch, LocalBatch, cut, shard, unshard
from longctx.sequence.documents import Documents
from longctx.sequence.halo import Halo
from longctx.sequence.homes import Homes
from longctx.sequence.layout import LAYOUTS, Contiguous, Explicit, Layout, Striped, Zigzag, make_layout
from longctx.sequence.mask import Mask
from longctx.sequence.plan import Places, SequencePlan, make_plan, plan_of
from longctx.sequence.rotation import Rotation
from longctx.sequence.rows import Rows
from longctx.sequence.tiles import Tile, TileSet

__all__ = [
    "IGNORE",
    "LAYOUTS",
    "Batch",
    "Contiguous",
    "Documents",
    "Explicit",
    "Halo",
    "Homes",
    "Layout",
    "LocalBatch",
    "Mask",
    "Places",
    "Rotation",
    "Rows",
    "SequencePlan",
    "Striped",
    "Tile",
    "TileSet",
    "Zigzag",
    "cut",
    "make_layout",
    "make_plan",
    "plan_of",
    "shard",
    "unshard",
]
