"""``longctx verify --mesh --all`` checks every kind of mesh and layout against one rank, as a table."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass

from longctx.bench.timing import Report, silent
from longctx.catalog import LAYOUTS
from longctx.errors import UsageError
from longctx.launcher.compose import compose
from longctx.launcher.progress import progress, with_progress
from longctx.launcher.verify import mesh as verify_mesh
from longctx.train.canary.parity import ParityReport

STEPS = 20
# Degrees above one; the parity tests of the trainer run the same.
MESHES: tuple[dict[str, int], ...] = (
    {},
    {"dp_shard": 2},
    {"dp_replicate": 2, "dp_shard": 2},
    {"tp": 2},
    {"pp": 2},
    {"sp": 2},
    {"dp_shard": 2, "tp": 2},
    {"tp": 2, "sp": 2},
    {"pp": 2, "sp": 2},
    {"dp_shard": 2, "pp": 2, "sp": 2},
    {"dp_shard": 2, "tp": 2, "pp": 2, "sp": 2},
)

PAGE = """# Training on a mesh against one rank, measured

Written by `make matrix`, that is by

    {command}

Each cell is one run of {steps} optimizer steps of a small decoder (two layers, shared key/value heads, norms of
queries and keys, packed documents, two micro-batches, clipping, AdamW, {dtype}) on the simulated cluster, and the
same run on one rank with attention by its definition in float64. It is the largest relative difference of any
step's loss or gradient norm between them. `longctx verify --mesh` makes the same comparison for your own
configuration, parameter by parameter.

{table}
"""


@dataclass(frozen=True)
class ParityCell:
    """Holds the parity check of one mesh under one layout."""

    mesh: dict[str, int]
    layout: str
    report: ParityReport

    @property
    def text(self) -> str:
        """Writes the largest difference of loss or gradient norm, in bold where the check failed."""
        largest = max(max(one.loss_difference, one.grad_norm_difference) for one in self.report.steps)
        return f"{largest:.1e}" if self.report.passed else f"**{largest:.1e}**"


def run(arguments: argparse.Namespace) -> int:
    """Checks every cell; fails when one of them does."""
    if arguments.overrides:
        raise UsageError(
            f"{arguments.overrides[0]}: --all has a configuration of its own; leave the override out, or leave out "
            "--all for a run's own mesh"
        )
    steps, dtype = verify_mesh.steps_of(arguments, STEPS), arguments.dtype or "float64"
    with progress("longctx verify --mesh --all") as report:
        cells = list(measure(steps, dtype, report))
    table = markdown(cells)
    print(json.dumps([_as_dict(cell) for cell in cells], allow_nan=False) if arguments.json else table)
    if arguments.table:
        command = f"longctx verify --mesh --all --steps {steps} --dtype {dtype}"
        arguments.table.write_text(
            PAGE.format(command=command, steps=steps, dtype=dtype, table=table), encoding="utf-8"
        )
    return verify_mesh.PASSED if all(cell.report.passed for cell in cells) else verify_mesh.FAILED


def measure(steps: int, dtype: str, report: Report = silent) -> Iterator[ParityCell]:
    """Yields the cells mesh by mesh, layout by layout."""
    cells = list(itertools.product(MESHES, LAYOUTS))
    for mesh, layout in with_progress(cells, report, lambda cell: f"{_name(cell[0])}, ring on {cell[1]}"):
        yield ParityCell(mesh, layout, _report(mesh, layout, steps, dtype))


def _report(mesh: dict[str, int], layout: str, steps: int, dtype: str) -> ParityReport:
    groups = mesh.get("dp_replicate", 1) * mesh.get("dp_shard", 1)
    config = compose(
        [
            "comm=sim",
            "model.qk_norm=true",
            f"attention.layout={layout}",
            f"train.dtype={dtype}",
            f"train.global_batch={2 * groups}",
            *(f"parallel.{name}={degree}" for name, degree in mesh.items()),
        ]
    )
    return verify_mesh.on_this_machine(config, steps)


def markdown(cells: list[ParityCell]) -> str:
    """Writes the table: one row for each mesh, one column for each layout."""
    layouts = list(dict.fromkeys(cell.layout for cell in cells))
    lines = [f"| mesh | {' | '.join(f'ring, {layout}' for layout in layouts)} |", "|---" * (len(layouts) + 1) + "|"]
    for start in range(0, len(cells), len(layouts)):
        row = cells[start : start + len(layouts)]
        lines.append(f"| {_name(row[0].mesh)} | {' | '.join(cell.text for cell in row)} |")
    return "\n".join(lines)


def _name(mesh: dict[str, int]) -> str:
    return " × ".join(f"{name} {degree}" for name, degree in mesh.items()) or "one rank"


def _as_dict(cell: ParityCell) -> dict[str, object]:
    return {"mesh": cell.mesh, "layout": cell.layout, "report": verify_mesh.as_json(cell.report)}
