"""Configures the machines of a run, and what a Slurm job asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from longctx.errors import ConfigError
from longctx.rules import above, at_least, one_of

_TIME = re.compile(r"(?:(\d+)-)?(\d{1,3}):([0-5]\d):([0-5]\d)")
_LONG_OPTION = re.compile(r"[a-z][a-z0-9]+(-[a-z0-9]+)*")
GPU_FORMS = ("gpus-per-node", "gres", "none")
GPU_OPTIONS = ("gpus-per-node", "gpus", "gres")
# Slurm keeps the seconds of --signal in 16 bits.
_LONGEST_SIGNAL = 65_535

SbatchValue = str | int | float | bool | tuple[str | int, ...] | None

# Options of sbatch that the job's script sets itself -> what sets them.
_SET_BY = {
    "job-name": "run.name",
    "nodes": "cluster.nodes",
    "ntasks": "cluster.nodes and cluster.devices_per_node",
    "ntasks-per-node": "cluster.devices_per_node",
    "tasks-per-node": "cluster.devices_per_node",
    "cpus-per-task": "--cpus-per-task",
    "time": "cluster.time_limit",
    "partition": "cluster.partition",
    "account": "cluster.account",
    "signal": "cluster.signal_seconds",
    "requeue": "cluster.requeue",
    "no-requeue": "cluster.requeue",
}
# Those that would break a run -> why.
_BY_NUMBER = "a rank takes the device of its number among all of its node; see cluster.gpus"
_LOGS = "each attempt has a log of its own below run.dir"
_OF_SBATCH = "it is for sbatch's command line, not for a script"
_IN_ORDER = "ranks follow one another node by node"
_UNFIT = {
    "gpus-per-task": _BY_NUMBER,
    "gpu-bind": _BY_NUMBER,
    "ntasks-per-gpu": _BY_NUMBER,
    "ntasks-per-core": _IN_ORDER,
    "ntasks-per-socket": _IN_ORDER,
    "distribution": _IN_ORDER,
    "output": _LOGS,
    "open-mode": _LOGS,
    "chdir": "a job runs in the folder where it was submitted",
    "array": "one directory holds one run; submit each run by itself",
    **dict.fromkeys(("wrap", "parsable", "test-only", "wait", "quiet", "verbose", "help", "version"), _OF_SBATCH),
}


@dataclass(frozen=True)
class ClusterConfig:
    """Says where the run happens: what launch and submit need to know of the machines."""

    name: str = "local"
    nodes: int = 1
    devices_per_node: int | None = None  # null: as many as the launcher started; of simulated ranks, all
    device_memory: float | None = None  # GiB of one device; null: asked of CUDA here, 80 for a job on comm=nccl
    nics: int = 1  # of a node; above 1, served attention is routed over them as docs/planner.md says
    nic_bandwidth: float = 50e9  # bytes/s of one of them
    link_bandwidth: float = 450e9  # bytes/s from one device of a node to the others
    partition: str | None = None
    account: str | None = None
    time_limit: str = "24:00:00"
    gpus: str = "gpus-per-node"  # how a job on comm=nccl asks Slurm for devices_per_node GPUs; gres, none
    sbatch: dict[str, SbatchValue] = field(default_factory=dict)  # cluster.sbatch.mem=0: any further option of sbatch
    prologue: tuple[str, ...] = ()  # lines of shell before the ranks start: module load, source …/activate
    signal_seconds: int | None = None  # before time_limit; null: from the run's steps and saves, or 600
    requeue: bool = True  # a job that was told to stop goes back into the queue

    @property
    def devices(self) -> int:
        """Counts the ranks that ``submit`` asks for on each node."""
        return self.devices_per_node or 1

    @property
    def seconds(self) -> int:
        """Counts the seconds of ``time_limit``."""
        found = _TIME.fullmatch(self.time_limit)
        assert found, "checked"
        days, hours, minutes, seconds = (int(number or 0) for number in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def sbatch_options(self) -> dict[str, str | None]:
        """Returns the options of ``cluster.sbatch`` as sbatch writes them; None: a flag without a value."""
        options: dict[str, str | None] = {}
        for key, value in self.sbatch.items():
            if value is None or value is False or value == ():
                continue
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            options[key.replace("_", "-")] = None if value is True else text
        return options

    def check(self) -> None:
        """Refuses an empty cluster, and what Slurm would not read or what would break the job."""
        at_least("cluster.nodes", self.nodes, 1)
        at_least("cluster.devices_per_node", self.devices_per_node, 1)
        above("cluster.device_memory", self.device_memory, 0.0)
        at_least("cluster.nics", self.nics, 1)
        for name in ("nic_bandwidth", "link_bandwidth"):
            value, default = getattr(self, name), getattr(ClusterConfig, name)
            above(f"cluster.{name}", value, 0.0)
            if value != default and self.nics == 1:
                raise ConfigError(
                    f"cluster.{name}={value} says when messages are routed over several NICs, and cluster.nics=1; "
                    f"set cluster.nics=8, or leave cluster.{name} at {default}"
                )
        if not _TIME.fullmatch(self.time_limit):
            raise ConfigError(
                f"cluster.time_limit={self.time_limit} must read [days-]hours:minutes:seconds, "
                "for example 24:00:00 or 2-12:00:00"
            )
        one_of("cluster.gpus", self.gpus, GPU_FORMS)
        self._check_signal()
        self._check_sbatch()

    def _check_signal(self) -> None:
        at_least("cluster.signal_seconds", self.signal_seconds, 1)
        longest = min(self.seconds - 1, _LONGEST_SIGNAL)
        if self.signal_seconds is not None and self.signal_seconds > longest:
            raise ConfigError(
                f"cluster.signal_seconds={self.signal_seconds} must be below cluster.time_limit={self.time_limit} and "
                f"fit 16 bits; nearest valid value: {longest}"
            )

    def _check_sbatch(self) -> None:
        seen: set[str] = set()
        for key in self.sbatch:
            name, option = f"cluster.sbatch.{key}", key.replace("_", "-")
            if not _LONG_OPTION.fullmatch(option):
                raise ConfigError(f"{name}: write a long option of sbatch without dashes before it, as {_EXAMPLE}")
            if option in _SET_BY:
                raise ConfigError(f"{name} is set by {_SET_BY[option]}; leave it out")
            if option in _UNFIT:
                raise ConfigError(f"{name} cannot be set: {_UNFIT[option]}; leave it out")
            if option in seen:
                raise ConfigError(f"{name} stands twice, with - and with _; leave one out")
            seen.add(option)
        for option, text in self.sbatch_options.items():
            if text is not None and "\\" in text:
                raise ConfigError(f"cluster.sbatch.{option}={text} holds a backslash, which Slurm reads as its own")


_EXAMPLE = "cluster.sbatch.mem-per-gpu=64G"
