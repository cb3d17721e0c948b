"""``longctx data`` tells what a run would be trained on, before it starts; it makes no process group and no model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from longctx.config import resolve, simulated_world_size
from longctx.data.mixing.audit import audit
from longctx.launcher.build import build_loader, check_data
from longctx.launcher.compose import compose
from longctx.launcher.progress import progress
from longctx.launcher.tables import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``longctx data``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Checks the data, counts, and prints what was found."""
    config = compose(arguments.overrides)
    config = resolve(config, simulated_world_size(config))
    corpus = check_data(config)
    groups = config.parallel.dp_replicate * config.parallel.dp_shard
    loader = build_loader(config, corpus, 0, groups)
    with progress("longctx: data") as report:
        found = audit(config, corpus, loader, report)
    if arguments.json:
        print(json.dumps(found))
    else:
        _show(found)
    return 0


def _show(found: Mapping[str, Any]) -> None:
    print_table(
        f"{found['sequences']:,} sequences of {found['seq_len']:,} tokens, {found['steps']:,} steps",
        ("source", "documents", "tokens", "share", "sequences", "epochs"),
        [
            (
                one["name"],
                f"{one['documents']:,}",
                f"{one['tokens']:,}",
                f"{one['share']:.2%}",
                f"{one['sequences']:,}",
                f"{one['epochs']:.3g}",
            )
            for one in found["sources"]
        ],
    )
    print_table(
        "\ndocuments by length",
        ("tokens from", "documents", "tokens"),
        [(f"{one['from']:,}", f"{one['documents']:,}", f"{one['tokens']:,}") for one in found["lengths"]],
    )
    work, long = found["work"], found["long_documents"]
    looked = f"{found['sequences_looked_at']:,} of {found['sequences']:,} sequences"
    print_table(
        "\nusable context",
        ("more than", "share of tokens"),
        [(f"{int(level):,}", f"{share:.2%}") for level, share in found["usable_context"].items()],
        (
            f"padding {found['padding']:.2%}; {found['cut_pieces']:,} of {found['pieces']:,} pieces of documents are "
            f"cut at the end of their sequence; {long['documents']:,} documents are longer than one "
            f"(data.long_documents={long['policy']}: {long['tokens_left_out']:,} tokens left out)",
            f"attention work per sequence, in (query, key) pairs: mean {work['mean']:,.0f}, p50 {work['p50']:,.0f}, "
            f"p99 {work['p99']:,.0f}, max over mean {work['max_over_mean']:.2f}; over data-parallel groups "
            f"{work['balance_over_dp']:.3f}",
            f"context, cuts and work: {'a sample, ' if found['sampled'] else ''}{looked}",
        ),
    )
