"""The drawings of README and site, as SVG: ``python -m docs.generate.drawings`` writes them into ``docs/drawings``.

Every drawing lies on a card of its own, which is light or dark as the reader's system is, so that it can be read on
any page. ``r0`` to ``r3`` are the colours of four ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from docs.generate.canvas import Canvas

FOLDER = Path(__file__).parents[1] / "drawings"
RANKS = range(4)
TOKENS = 16
LAYOUTS: dict[str, list[int]] = {
    "contiguous": [token // 4 for token in range(TOKENS)],
    "zigzag": [min(token // 2, 7 - token // 2) for token in range(TOKENS)],
    "striped": [token % 4 for token in range(TOKENS)],
}


def tokens(canvas: Canvas, x: float, y: float, owners: list[int], size: float) -> None:
    """One cell for each token of a sequence, in the colour of the rank that holds it."""
    for token, owner in enumerate(owners):
        canvas.rect(x + token * size, y, size - 3, size - 3, f"r{owner}", str(token))


def sequence() -> str:
    """One sequence over four ranks, zigzag, with keys and values going round."""
    canvas = Canvas(760, 372, "One sequence of tokens shared by four ranks")
    owners = LAYOUTS["zigzag"]
    canvas.text(28, 36, "One sequence of 16 tokens, cut by a layout (here zigzag)", "head")
    tokens(canvas, 60, 52, owners, 40)
    for rank in RANKS:
        x, middle = 28 + rank * 180, 28 + rank * 180 + 82
        canvas.arrow((60 + 40 * (2 * rank + 1), 94), (middle, 124))
        canvas.rect(x, 128, 164, 142, "box", radius=8)
        canvas.text(x + 12, 150, f"rank {rank}", "head")
        for place, token in enumerate(token for token, owner in enumerate(owners) if owner == rank):
            canvas.rect(x + 12 + place * 36, 160, 32, 28, f"r{rank}", str(token))
        canvas.text(x + 12, 210, "queries stay", "small")
        canvas.rect(x + 12, 220, 140, 36, f"r{rank}", "local attention")
    for rank in RANKS[:-1]:
        canvas.arrow((28 + rank * 180 + 152, 238), (28 + (rank + 1) * 180 + 8, 238))
    canvas.arrow((650, 270), (650, 296), (110, 296), (110, 272))
    canvas.text(
        380, 316, "keys and values go round the ring, one hop while the last one is computed", "small", "middle"
    )
    canvas.text(
        380, 348, "Result: exact attention over all 16 tokens; each rank keeps a quarter of them.", "", "middle"
    )
    return canvas.svg()


def layouts() -> str:
    """Three layouts, and how much causal attention each rank computes under them."""
    canvas = Canvas(760, 290, "Three layouts of a sequence over four ranks, and the work of each rank")
    canvas.text(28, 34, "Which rank holds which token", "head")
    canvas.text(560, 34, "causal work by rank", "head")
    for row, (name, owners) in enumerate(LAYOUTS.items()):
        y = 66 + row * 80
        canvas.text(28, y + 20, name)
        tokens(canvas, 112, y, owners, 27)
        work = [sum(token + 1 for token, owner in enumerate(owners) if owner == rank) for rank in RANKS]
        for rank in RANKS:
            canvas.rect(560, y - 18 + rank * 15, work[rank] * 2.4, 12, f"r{rank}", radius=2)
            canvas.text(566 + work[rank] * 2.4, y - 7.5 + rank * 15, str(work[rank]), "small")
    return canvas.svg()


def tiles() -> str:
    """The tiles of one rank: its queries against the keys of every rank, under a causal mask of two documents."""
    canvas = Canvas(760, 446, "Tiles of rank 1: slices of its queries against slices of keys")
    owners, cut, size, left, top = LAYOUTS["zigzag"], 7, 22, 84, 66
    canvas.text(28, 34, "Tiles of rank 1 under zigzag, two documents", "head")
    for token, owner in enumerate(owners):
        canvas.rect(left + token * size, top - 16, size - 2, 11, f"r{owner}", radius=2)
        canvas.rect(left - 16, top + token * size, 11, size - 2, f"r{owner}", radius=2)
        for key in range(TOKENS):
            seen = key <= token and (key < cut) == (token < cut)
            kind = f"r{owners[key]}" if seen and owner == 1 else "faint" if seen else ""
            if kind:
                canvas.rect(left + key * size, top + token * size, size - 2, size - 2, kind, radius=2)
    for first, edges in ((2, (0, 2, 4)), (12, (7, 10, 12, 14))):  # the first of two queries; where keys change hands
        for start, stop in pairwise(edges):
            width = (stop - start) * size
            canvas.rect(left + start * size - 1, top + first * size - 1, width, 2 * size, "edge", radius=0)
    canvas.text(left, top + TOKENS * size + 18, "keys, coloured by the rank that holds them", "small")
    words = (
        ("Rows are queries, columns are keys.", ""),
        ("Grey: seen by a query of another rank.", "small"),
        ("Coloured: rank 1 computes it.", "small"),
        ("Outlined: one tile, a slice of queries", "small"),
        ("against a slice of one rank's keys.", "small"),
        ("", ""),
        ("Blank cells are never computed:", ""),
        ("they are later in time, or in the", "small"),
        ("other document.", "small"),
    )
    for number, (word, kind) in enumerate(words):
        canvas.text(474, 106 + number * 22, word, kind)
    return canvas.svg()


def ring() -> str:
    """Hop by hop, whose keys and values each rank computes on."""
    canvas = Canvas(760, 348, "A ring of four ranks, hop by hop")
    canvas.text(28, 34, "Whose keys and values a rank holds at each hop", "head")
    for rank in RANKS:
        canvas.text(192 + rank * 150, 66, f"rank {rank}", "", "middle")
    for hop in RANKS:
        y = 80 + hop * 62
        canvas.text(28, y + 22, f"hop {hop}")
        for rank in RANKS:
            owner = (rank - hop) % 4
            canvas.rect(142 + rank * 150, y, 100, 34, f"r{owner}", f"k, v of {owner}")
        if hop < 3:
            for rank in RANKS[:-1]:
                canvas.arrow((192 + rank * 150 + 30, y + 36), (192 + (rank + 1) * 150 - 30, y + 60))
            canvas.arrow((692, y + 17), (722, y + 17), (722, y + 48), (110, y + 48), (110, y + 79), (138, y + 79))
    canvas.text(28, 332, "While a rank computes on one block, the next one is on its way.", "small")
    return canvas.svg()


def all_to_all() -> str:
    """Ulysses: tokens for heads, and back."""
    canvas = Canvas(760, 300, "An all-to-all swaps tokens for heads")
    canvas.text(28, 34, "Ulysses: one all-to-all swaps a share of tokens for a share of heads", "head")
    sides = ((90, "before: all heads of some tokens"), (490, "then: some heads of all tokens"))
    for side, (left, title) in enumerate(sides):
        canvas.text(left, 66, title, "small")
        for token in RANKS:
            for head in RANKS:
                rank = head if side else token
                canvas.rect(left + head * 46, 78 + token * 40, 42, 36, f"r{rank}", str(rank))
        canvas.text(left + 92, 258, "heads", "small", "middle")
        canvas.text(left - 12, 162, "tokens", "small", "end")
    canvas.arrow((296, 140), (426, 140))
    canvas.arrow((426, 176), (296, 176))
    canvas.text(361, 130, "q, k, v", "small", "middle")
    canvas.text(361, 196, "out", "small", "middle")
    canvas.text(
        28,
        284,
        "Numbers are ranks. Between the two swaps each rank computes ordinary attention over whole sequences.",
        "small",
    )
    return canvas.svg()


def grid() -> str:
    """USP and double rings: ranks as rows of neighbours."""
    canvas = Canvas(760, 236, "Ranks as a grid: rows of neighbours inside a node, a ring across rows")
    canvas.text(28, 34, "Ranks as a grid (usp, burst)", "head")
    for row in range(2):
        y = 58 + row * 96
        canvas.rect(28, y, 400, 64, "box", radius=8)
        canvas.text(40, y + 37, f"node {row}", "small")
        for place in range(2):
            rank = row * 2 + place
            canvas.rect(118 + place * 170, y + 14, 110, 36, f"r{rank}", f"rank {rank}")
        canvas.arrow((232, y + 32), (284, y + 32))
        canvas.arrow((284, y + 32), (232, y + 32))
    for place in range(2):
        x = 173 + place * 170
        canvas.arrow((x - 8, 110), (x - 8, 166))
        canvas.arrow((x + 8, 166), (x + 8, 110))
    canvas.lines(452, 84, ("inside a row, over fast links:", "usp swaps tokens for heads,"), "small")
    canvas.lines(452, 120, ("burst passes blocks round",), "small")
    canvas.lines(452, 160, ("across rows, over slow links:", "a ring with fewer crossings"), "small")
    return canvas.svg()


def plan() -> str:
    """What a plan is made of, and what asks it."""
    canvas = Canvas(760, 270, "One plan for each batch, asked by every layer through its handle")
    canvas.text(28, 34, "One plan for each batch", "head")
    for row, word in enumerate(("documents: lengths", "mask: causal, window", "layout: zigzag, 4 ranks")):
        canvas.rect(28, 54 + row * 62, 190, 44, "box", word, radius=8)
        canvas.arrow((220, 76 + row * 62), (276, 138))
    canvas.rect(280, 84, 170, 108, "box", radius=8)
    canvas.text(365, 112, "SequencePlan", "head", "middle")
    canvas.lines(365, 136, ("made once, knows", "no rank, answers", "for any pair"), "small", "middle")
    canvas.arrow((452, 138), (508, 138))
    canvas.rect(512, 112, 96, 52, "box", radius=8)
    canvas.lines(560, 134, ("handle", "one int64"), "small", "middle")
    for row, word in enumerate(("layer 0", "layer 1", "layer 2")):
        canvas.arrow((610, 138), (650, 76 + row * 62))
        canvas.rect(654, 54 + row * 62, 80, 44, f"r{row}", word, radius=8)
    canvas.lines(28, 250, (
        "A layer asks: which tiles do I owe? which rows does rank 2 read of me? in which order do blocks go round?",
    ), "small")  # fmt: skip
    return canvas.svg()


def mesh() -> str:
    """Sixteen ranks as pp 2 × dp_shard 2 × sp 2 × tp 2."""
    canvas = Canvas(
        760, 330, "Sixteen ranks: two each of pipeline stages, data groups, sequence ranks and tensor ranks"
    )
    canvas.text(28, 34, "16 ranks: pp 2 × dp_shard 2 × sp 2 × tp 2", "head")
    for stage in range(2):
        x = 28 + stage * 358
        canvas.rect(x, 50, 346, 216, "box", radius=8)
        canvas.text(x + 12, 72, f"pipeline stage {stage} (pp): some of the layers", "small")
        for group in range(2):
            y = 84 + group * 90
            canvas.rect(x + 12, y, 322, 80, "card", radius=6)
            canvas.text(x + 20, y + 18, f"dp_shard {group}: its own sequences", "small")
            for place in range(2):
                for part in range(2):
                    rank = stage * 8 + group * 4 + place * 2 + part
                    left = x + 22 + place * 156 + part * 72
                    canvas.rect(left, y + 26, 68, 28, f"r{place}", f"rank {rank}")
                canvas.text(x + 22 + place * 156, y + 71, f"sp {place}: half the tokens", "small")
    canvas.lines(28, 290, (
        "Neighbours of one colour (tp) hold the same tokens and split heads, channels and vocabulary.",
        "Parameters and optimizer states are sharded by FSDP2 over dp_shard × sp.",
    ), "small")  # fmt: skip
    return canvas.svg()


def cluster() -> str:
    """The simulated cluster: one rank at a time."""
    canvas = Canvas(760, 284, "The simulated cluster: ranks are threads, and the one that has the baton runs")
    canvas.text(28, 34, "comm=sim: four ranks, one process, one baton", "head")
    spans = (
        (0, 0, 80),
        (1, 80, 90),
        (2, 170, 60),
        (3, 230, 90),
        (0, 320, 70),
        (1, 390, 50),
        (2, 440, 70),
        (3, 510, 60),
    )
    for rank in RANKS:
        y = 66 + rank * 40
        canvas.text(28, y + 17, f"rank {rank}")
        canvas.rect(96, y + 10, 570, 4, "faint", radius=2)
    for rank, start, length in spans:
        canvas.rect(96 + start, 66 + rank * 40, length, 24, f"r{rank}", "runs")
    for (rank, start, length), (other, *_) in pairwise(spans):
        x = 96 + start + length
        canvas.arrow((x, 66 + rank * 40 + 12), (x, 66 + other * 40 + (26 if other < rank else -2)))
    canvas.lines(28, 248, (
        "A rank hands the baton over when it waits for a message: runs repeat exactly, and a deadlock is a report.",
        "The ledger counts every byte by sender, receiver and operation; the trace orders every operation.",
    ), "small")  # fmt: skip
    return canvas.svg()


def canary() -> str:
    """The canary: a tiny step on the run's own mesh beside the same step on one device."""
    canvas = Canvas(760, 232, "The canary compares a tiny step on your mesh with a dense step on one device")
    canvas.text(28, 34, "Before step 1 of every run", "head")
    canvas.rect(28, 56, 210, 62, "r0", radius=8)
    canvas.lines(133, 82, ("tiny step, your mesh", "your strategy and layout"), "on", "middle")
    canvas.rect(28, 140, 210, 62, "r2", radius=8)
    canvas.lines(133, 166, ("the same step, one device", "dense attention"), "on", "middle")
    canvas.arrow((240, 87), (306, 122))
    canvas.arrow((240, 171), (306, 136))
    canvas.rect(310, 100, 170, 58, "box", radius=8)
    canvas.lines(395, 124, ("loss, gradient norm,", "gradients agree?"), "", "middle")
    canvas.arrow((482, 116), (546, 86))
    canvas.arrow((482, 142), (546, 172))
    canvas.rect(550, 62, 180, 44, "r2", "yes: the run begins", radius=8)
    canvas.rect(550, 152, 180, 44, "r1", "no: it ends with exit 70", radius=8)
    return canvas.svg()


def served() -> str:
    """Disaggregated attention: work moves from the rank with a long document to the others."""
    canvas = Canvas(760, 282, "Disaggregated attention: tasks of a long document are served by other ranks")
    canvas.text(28, 34, "Attention work of four ranks with equal tokens", "head")
    before, length = ((0, 300), (1, 60), (2, 40), (3, 80)), 120
    canvas.text(28, 62, "each for itself: the rank with the long document is late", "small")
    canvas.text(440, 62, "served: equal work, tasks travel", "small")
    moved = {1: 60, 2: 80, 3: 40}
    for rank, work in before:
        y = 76 + rank * 44
        canvas.text(28, y + 20, f"rank {rank}")
        canvas.rect(84, y, work, 30, f"r{rank}", "own")
        canvas.rect(440, y, min(work, length), 30, f"r{rank}", "own")
        if rank:
            canvas.rect(440 + work + 2, y, moved[rank], 30, "r0", "of 0")
    task = "A task is some rows of queries against a range of keys; its result goes home and is merged there."
    canvas.text(28, 268, task, "small")
    return canvas.svg()


DRAWINGS: dict[str, Callable[[], str]] = {
    "sequence": sequence,
    "layouts": layouts,
    "tiles": tiles,
    "ring": ring,
    "all-to-all": all_to_all,
    "grid": grid,
    "plan": plan,
    "mesh": mesh,
    "cluster": cluster,
    "canary": canary,
    "served": served,
}


def main() -> int:
    """Write every drawing."""
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
