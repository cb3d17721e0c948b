"""Simulates a cluster in one process: ranks are threads behind the ``torch.distributed`` backend ``sim``.

Exactly one rank runs at a time. So runs are deterministic, deadlocks are reported at once, and every byte and
operation is counted. Nothing else in the package knows of it: code runs here as it runs on Gloo or NCCL.

    cluster = Cluster(world_size=4)
    losses = cluster.run(train, config)     # train(config) on every rank
    cluster.ledger.by_operation()           # bytes
"""

from longctx.sim.cluster import Cluster
from longctx.sim.errors import DeadlockError, MismatchError, RankFailed, RankKilled
from longctx.sim.faults import Fault, FaultPlan
from longctx.sim.ledger import Ledger
from longctx.sim.runtime import mark_step
from longctx.sim.trace import Event

__all__ = [
    "Cluster",
    "DeadlockError",
    "Event",
    "Fault",
    "FaultPlan",
    "Ledger",
    "MismatchError",
    "RankFailed",
    "RankKilled",
    "mark_step",
]
