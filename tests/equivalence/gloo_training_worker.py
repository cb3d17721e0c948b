"""One of two real processes: trains over sequence groups, parameter shards, split tensors and pipeline stages."""

import datetime
import sys
from pathlib import Path

import torch.distributed as dist

from longctx.comm import leave_world
from longctx.launcher import build
from tests.train.small_run import CPU, corpus, small_config


def main(rank: int, directory: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    meshes = {"sequence": {"sp": 2}, "shards": {"dp_shard": 2}, "tensors": {"tp": 2}, "stages": {"pp": 2}}
    for name, parallel in meshes.items():
        run = directory / name
        config = small_config(run, parallel=parallel, train={"steps": 10, "dtype": "float32", "canary": True})
        with build.requests() as asked:
            stop = build.stopping_by(asked, dist.PrefixStore(name, build.default_store()))
            build.rank_main(config, None, corpus(), CPU, lambda: 1, stop)
    leave_world()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
