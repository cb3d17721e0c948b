"""Makes network namespaces that act as nodes of a cluster, each with a link of a given rate or latency.

Ranks of one node share its address, so what they tell each other goes over its loopback and is not shaped. Links are
full duplex: token buckets (TBF) hold each node's frames to the rate on their way to the switch and from it. The switch
is a bridge. Where links are late it is a process that keeps every frame for a while (``late_switch``), behind a bridge
for each node. Needs root and iproute2; nothing outside the namespaces is touched, and they have no way out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from longctx.errors import NotAvailableError
from longctx.launcher.env import GLOO_SOCKET_IFNAME

INTERFACE = "eth0"  # of every node
NETWORK = "10.77.0"  # seen inside the namespaces alone, so that two clusters never meet
MTU = 9000
# The same on every host. A namespace may always choose this one of all kernels' congestion controls; and streams do
# not start anew after a pause.
SETTINGS = {"tcp_congestion_control": "reno", "tcp_slow_start_after_idle": "0"}
STATISTICS = Path("/sys/class/net") / INTERFACE / "statistics"


class Namespaces:
    """Makes ``nodes`` nodes, each with a link of ``rate_mbit`` Mbit/s each way; ``with`` makes and removes them.

    ``rate_mbit`` None: as fast as the machine is. ``latency_ms``: what a frame takes from node to node, one way.
    Raises NotAvailableError where the machine does not let us: no root, no iproute2, no token buckets, no TAP devices.
    """

    def __init__(self, nodes: int, rate_mbit: int | None, latency_ms: float = 0.0) -> None:
        assert 1 <= nodes <= 254, "one address per node, in one network"
        prefix = f"longctx-{os.getpid()}-{os.urandom(3).hex()}"
        self._nodes = [f"{prefix}-{node}" for node in range(nodes)]
        self._switch = f"{prefix}-switch"
        self._rate_mbit = rate_mbit
        self._latency_ms = latency_ms
        self._made: list[str] = []
        self._late_switch: subprocess.Popen[str] | None = None

    def __enter__(self) -> Namespaces:
        for command in ("ip", "tc"):
            if shutil.which(command) is None:
                raise NotAvailableError(f"network namespaces need iproute2, and {command!r} is not installed")
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def prefix(self, node: int) -> list[str]:
        """Returns the words before a command that run it on ``node``, where Gloo then finds the node's link."""
        return ["ip", "netns", "exec", self._nodes[node], "env", f"{GLOO_SOCKET_IFNAME}={INTERFACE}"]

    def _build(self) -> None:
        for name in (self._switch, *self._nodes):
            self._made.append(name)  # first, so that no signal falls in between
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            for setting, value in SETTINGS.items():
                _run("ip", "netns", "exec", name, "tee", f"/proc/sys/net/ipv4/{setting}", given=value)
        bridges = self._bridges()
        for number, (node, bridge) in enumerate(zip(self._nodes, bridges, strict=True)):
            port = f"port{number}"
            near = ("name", INTERFACE, "netns", node, "mtu", str(MTU))
            far = ("name", port, "netns", self._switch, "mtu", str(MTU))
            _run("ip", "link", "add", *near, "type", "veth", "peer", *far)
            _run("ip", "-n", self._switch, "link", "set", port, "master", bridge)
            _run("ip", "-n", node, "addr", "add", f"{NETWORK}.{number + 1}/24", "dev", INTERFACE)
            for where, device in ((node, INTERFACE), (self._switch, port)):
                self._up(where, device)
                if self._rate_mbit is not None:
                    self._shape(where, device, self._rate_mbit)

    def _bridges(self) -> list[str]:
        """Lists by node what its link leads to: one bridge for all, or each a bridge with a port of the late switch."""
        if not self._latency_ms:
            self._bridge("br0")
            return ["br0"] * len(self._nodes)
        bridges = [f"br{number}" for number in range(len(self._nodes))]
        ports = [f"late{number}" for number in range(len(self._nodes))]
        self._start_late_switch(ports)
        for bridge, port in zip(bridges, ports, strict=True):
            self._bridge(bridge)
            _run("ip", "-n", self._switch, "link", "set", port, "mtu", str(MTU), "master", bridge)
            self._up(self._switch, port)
        return bridges

    def _bridge(self, name: str) -> None:
        _run("ip", "-n", self._switch, "link", "add", name, "mtu", str(MTU), "type", "bridge")
        self._up(self._switch, name)

    def _start_late_switch(self, ports: list[str]) -> None:
        words = [sys.executable, "-m", "benchmarks.hosts.late_switch", str(self._latency_ms / 1e3), *ports]
        process = self._late_switch = subprocess.Popen(
            ["ip", "netns", "exec", self._switch, *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        if process.stdout.readline() != "ready\n":
            said = process.stderr.read().strip().splitlines()[-1:]
            raise NotAvailableError(
                f"links with latency are not allowed here: they need TAP devices (/dev/net/tun): {' '.join(said)}"
            )

    def _up(self, where: str, device: str) -> None:
        # Without an IPv6 address of its own a device says nothing by itself, and counters stay at what ranks send.
        _run("ip", "-n", where, "link", "set", device, "addrgenmode", "none", "up")

    def _shape(self, where: str, device: str, rate_mbit: int) -> None:
        """Holds what leaves the device to the rate.

        A millisecond of it, or two frames, may go at once; 50 ms wait, as at a switch with deep buffers.
        """
        burst = max(rate_mbit * 125, 2 * MTU)
        queue = max(rate_mbit * 6250, 1 << 18)
        limits = ("rate", f"{rate_mbit}mbit", "burst", f"{burst}b", "limit", f"{queue}b")
        _run("tc", "-n", where, "qdisc", "add", "dev", device, "root", "tbf", *limits)

    def _remove(self) -> None:
        if self._late_switch is not None:
            with self._late_switch as process:
                process.kill()
            self._late_switch = None
        while self._made:
            # Its devices go with a namespace, and with each of them the other end.
            subprocess.run(["ip", "netns", "del", self._made.pop()], check=False, capture_output=True)


def link_counters() -> tuple[int, int]:
    """Reads what this process's node has sent through its link so far: bytes with Ethernet's headers, and packets."""
    sent, packets = (int((STATISTICS / name).read_text()) for name in ("tx_bytes", "tx_packets"))
    return sent, packets


def _run(*words: str, given: str = "") -> None:
    """Runs a command, with ``given`` to read."""
    done = subprocess.run(words, check=False, capture_output=True, text=True, input=given)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise NotAvailableError(
            f"network namespaces are not allowed here: `{' '.join(words)}` says: {said}; they need root and a kernel "
            "with veth, bridge and tbf"
        )
