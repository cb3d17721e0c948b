"""``python -m benchmarks link``: namespaces that come and go, and a link that carries what the closed forms say."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.hosts.namespaces import Namespaces
from benchmarks.link import HEADERS
from longctx.errors import NotAvailableError

ROOT = Path(__file__).parents[2]


def test_link_without_namespaces_is_not_available(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["link"]) == 69
    said = capsys.readouterr().err
    assert "'ip' is not installed" in said and said.count("\n") == 1
    for name in ("ip", "tc"):
        refusing = tmp_path / name
        refusing.write_text("#!/bin/sh\necho 'Operation not permitted' >&2\nexit 1\n")
        refusing.chmod(0o755)
    assert main(["link"]) == 69
    said = capsys.readouterr().err
    assert "not allowed here" in said and "Operation not permitted" in said and said.count("\n") == 1


def namespaces(owner: int = os.getpid()) -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.startswith(f"longctx-{owner}-")}


def namespaces_are_here() -> bool:
    try:
        with Namespaces(1, 100):
            return True
    except NotAvailableError:
        return False


needs_namespaces = pytest.mark.skipif(not namespaces_are_here(), reason="needs root, iproute2 and tbf")

# One process listens, another sends it a megabyte; both tell what their node's link has carried.
TALK = """
import socket, sys, time
from benchmarks.hosts.namespaces import link_counters
if sys.argv[1] == "listen":
    with socket.create_server(("", 7001)) as server:
        print("ready", flush=True)
        with server.accept()[0] as peer:
            while peer.recv(1 << 16):
                pass
else:
    start = time.perf_counter()
    with socket.create_connection((sys.argv[1], 7001)) as peer:
        peer.sendall(bytes(10**6))
        peer.shutdown(socket.SHUT_WR)
        peer.recv(1)
    print(time.perf_counter() - start, *link_counters())
"""


def talk(nodes: Namespaces, sender: int) -> tuple[float, int]:
    """A megabyte from ``sender`` to node 1: seconds, and what the sender's link carried, less headers."""
    words = [sys.executable, "-c", TALK]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*nodes.prefix(1), *words, "listen"], stdout=subprocess.PIPE, env=environment) as listener:
        assert listener.stdout is not None and listener.stdout.readline() == b"ready\n"
        done = subprocess.run(
            [*nodes.prefix(sender), *words, "10.77.0.2"],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
    seconds, sent, packets = done.stdout.split()
    return float(seconds), int(sent) - HEADERS * int(packets)


@needs_namespaces
def test_a_link_is_shaped_and_counted_and_a_nodes_own_loopback_is_neither():
    with Namespaces(3, 40) as nodes:
        assert len(namespaces()) == 4
        inside, on_link = talk(nodes, 1)
        assert on_link == 0
        across, on_link = talk(nodes, 2)
        # The handshake's options are beside it, and address resolution, whose headers are shorter.
        assert abs(on_link - 10**6) < 100
        # 0.2 s at 40 Mbit/s; a machine with other work may look later, never sooner.
        assert 0.17 < across < 2 and inside < across
    assert not namespaces()


@needs_namespaces
def test_namespaces_do_not_outlive_a_failure():
    def fail(nodes: Namespaces) -> None:
        with nodes:
            assert len(namespaces()) == 3
            raise KeyError

    with pytest.raises(KeyError):
        fail(Namespaces(2, 100))
    with pytest.raises(NotAvailableError, match="tbf"):
        fail(Namespaces(2, 0))
    assert not namespaces()


@needs_namespaces
@pytest.mark.gloo
def test_a_request_to_stop_leaves_no_namespace_and_no_worker():
    # Two heads, so that the gate is quick, and so many tokens that the exchanges are not.
    words = ["--link-repeats", "100", "--link-heads", "2/2", "--link-tokens", "32768"]
    words = [sys.executable, "-m", "benchmarks", "link", *words]
    bench = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        deadline = time.monotonic() + 60
        while not (found := workers(bench.pid)):
            assert time.monotonic() < deadline and bench.poll() is None, "its workers never came"
            time.sleep(0.1)
        assert len(namespaces(bench.pid)) == 3
        bench.terminate()
        assert bench.wait(timeout=30) == 128 + 15
    finally:
        bench.kill()
    assert not namespaces(bench.pid)
    assert not any(Path(f"/proc/{worker}").exists() for worker in found)


def workers(parent: int) -> list[int]:
    """The processes of this machine that run a rank for ``parent``."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if b"benchmarks.commands.link" in command_of(child)]


def command_of(process: str) -> bytes:
    """Empty if it has ended: those that make namespaces come and go."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@needs_namespaces
@pytest.mark.gloo
def test_the_link_carries_what_the_closed_forms_say(bench):
    """Small, so that times mean little; bytes do not depend on them."""
    words = ["--link-tokens", "509", "--link-repeats", "3", "--link-causal", "--link-heads", "4/2", "--json"]
    done = bench("link", *words)
    assert done.code == 0, done.stderr
    told = json.loads(done.stdout)
    assert set(told["rows"]) == {"flat ring", "double ring", "USP"} and not told["wrong_bytes"]
    for passes in told["rows"].values():
        assert all(row["edges_equal"] and row["seconds"]["median"] > 0 for row in passes)
    assert all(error < 1e-10 for errors in told["errors"].values() for error in errors.values())
