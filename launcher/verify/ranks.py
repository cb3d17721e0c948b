"""Runs one case of ``longctx verify`` on all its ranks: on ``sim`` in this process, or on Gloo processes."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from longctx.errors import NumericsError
from longctx.launcher.processes import as_rank, gloo_rank, run_gloo
from longctx.sim import Cluster
from longctx.verify import RankResult, Verdict, VerifyCase, judge, run_rank


def check(case: VerifyCase) -> tuple[Verdict, dict[str, Tensor]]:
    """Runs the case on its backend and judges it."""
    return judge(case, run_on_sim(case) if case.backend == "sim" else run_on_gloo(case))


def run_on_sim(case: VerifyCase) -> list[RankResult]:
    """Runs all ranks in this process; the strategies' own byte counts are checked against the cluster's ledger."""
    cluster = Cluster(case.world, trace=False)
    results = cluster.run(lambda: run_rank(case, dist.group.WORLD))
    for rank, result in enumerate(results):
        counted, carried = result.bytes_forward + result.bytes_backward, cluster.ledger.sent(rank)
        if counted != carried:
            raise NumericsError(f"rank {rank} counted {counted} bytes sent, the ledger of sim carried {carried}")
    return results


def run_on_gloo(case: VerifyCase) -> list[RankResult]:
    """Runs one process per rank, which meet by a file; what they computed comes back as safetensors."""
    with tempfile.TemporaryDirectory(prefix="longctx-verify-") as name:
        folder = Path(name)
        run_gloo("longctx.launcher.verify.ranks", json.dumps(asdict(case)), case.world, folder)
        return [load_result(folder / f"rank-{rank}.safetensors") for rank in range(case.world)]


def save_result(result: RankResult, path: Path) -> None:
    """Writes what one rank computed as safetensors."""
    numbers = {name: str(getattr(result, name)) for name in ("bytes_forward", "bytes_backward", "peak_extra_bytes")}
    save_file({name: local.contiguous() for name, local in result.tensors.items()}, path, numbers)


def load_result(path: Path) -> RankResult:
    """Reads what ``save_result`` wrote."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        numbers = {name: int(value) for name, value in file.metadata().items()}
    return RankResult(tensors, **numbers)


def worker(words: list[str]) -> None:
    """Runs one rank of ``run_on_gloo``; its job is the case."""
    with gloo_rank(words) as (case, folder, rank):
        save_result(run_rank(VerifyCase.of(case), dist.group.WORLD), folder / f"rank-{rank}.safetensors")


if __name__ == "__main__":
    sys.exit(as_rank(worker))
