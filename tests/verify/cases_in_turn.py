"""Several cases of ``longctx verify`` on the same Gloo processes: starting them costs more than a case does."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from longctx.launcher.processes import as_rank, gloo_rank, run_gloo
from longctx.launcher.verify.ranks import load_result, save_result
from longctx.verify import RankResult, VerifyCase, run_rank


def on_gloo_in_turn(cases: list[VerifyCase], folder: Path) -> list[list[RankResult]]:
    """By case, what each rank found; all cases are of one world."""
    world = cases[0].world
    run_gloo("tests.verify.cases_in_turn", json.dumps({"cases": [asdict(case) for case in cases]}), world, folder)
    return [
        [load_result(folder / f"{number}-{rank}.safetensors") for rank in range(world)] for number in range(len(cases))
    ]


def worker(words: list[str]) -> None:
    """One rank, as ``longctx.launcher.verify.ranks`` runs it for each case."""
    with gloo_rank(words) as (job, folder, rank):
        for number, case in enumerate(job["cases"]):
            found = run_rank(VerifyCase.of(case), dist.group.WORLD)
            save_result(found, folder / f"{number}-{rank}.safetensors")


if __name__ == "__main__":
    sys.exit(as_rank(worker))
