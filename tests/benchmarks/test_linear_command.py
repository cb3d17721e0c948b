"""``python -m benchmarks linear``: refusals, late links, and both halves on small sizes; times mean nothing here."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.commands import late_link as bench_late_link
from benchmarks.commands import linear as bench_linear
from benchmarks.commands.late_link import ROUTES, LateTimes, measured_latency
from benchmarks.hosts.namespaces import Namespaces
from benchmarks.late_link import Exposed
from benchmarks.linear import LinearCell
from longctx.bench.timing import Timing
from longctx.errors import NotAvailableError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--mixers", "moba"], "--mixers 'moba' is unknown; valid: basic, retnet"),
        (["--mixers", "retnet,retnet"], "name each once"),
        (["--strategies", "ring"], "--strategies 'ring' is unknown; valid: lasp2, lasp, headwise"),
        (["--seq", "64,x"], "--seq '64,x' must be whole numbers"),
        (["--seq", "1"], "--seq 1 must be at least 2"),
        (["--repeats", "0"], "--repeats 0 must be at least 1; 5 is the default"),
        (["--latency-ms", "0"], "--latency-ms 0.0 must be above 0"),
        (["--latency-ms", "20"], "below 12.5"),
        (["--latency-tokens", "3"], "--latency-tokens 3 must be at least 4"),
    ],
)
def test_refusals(words, said, capsys):
    assert main(["linear", *words]) == 78
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["linear", "--heads", "4"], "unrecognized arguments: --heads 4"),
        (["linear", "train.seed=1"], "unrecognized arguments: train.seed=1"),
        (["link", "--repeats", "3"], "unrecognized arguments: --repeats 3"),
        (["planning", "--seq", "64"], "unrecognized arguments: --seq 64"),
        (["attention", "--mixers", "retnet"], "unrecognized arguments: --mixers retnet"),
        (["attention", "--no-link"], "unrecognized arguments: --no-link"),
    ],
)
def test_options_of_one_benchmark_are_refused_by_others(words, said, capsys):
    assert main([*words]) == 2
    assert said in capsys.readouterr().err


def late_links_are_here() -> bool:
    try:
        with Namespaces(1, None, 1.0):
            return True
    except NotAvailableError:
        return False


needs_late_links = pytest.mark.skipif(not late_links_are_here(), reason="needs root, iproute2 and TAP devices")


def namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.startswith(f"longctx-{os.getpid()}-")]


def switches() -> list[str]:
    """Switch processes that this one has started."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [child for child in children if b"late_switch" in Path(f"/proc/{child}/cmdline").read_bytes()]


@needs_late_links
@pytest.mark.parametrize("latency", [3.0, 12.0])
@pytest.mark.parametrize("rate", [None, 100])
def test_nothing_comes_sooner_than_the_latency(latency, rate, monkeypatch):
    monkeypatch.setattr(bench_late_link, "PASSED_ROUND", 10)
    with Namespaces(bench_late_link.RANKS, rate, latency) as nodes:
        assert len(switches()) == 1
        assert measured_latency(nodes).low >= latency
    assert not namespaces() and not switches()


@needs_late_links
def test_the_switch_ends_with_whoever_started_it():
    with Namespaces(2, None, 1.0) as nodes:
        switch = nodes._late_switch
        assert switch is not None and switch.poll() is None
        switch.stdin.close()
        assert switch.wait(timeout=10) == 0


def test_without_tap_devices_late_links_are_not_available(monkeypatch):
    refusing = [sys.executable, "-c", "import sys; sys.exit('no such device: /dev/net/tun')"]
    started = subprocess.Popen
    monkeypatch.setattr("benchmarks.hosts.namespaces.subprocess.Popen", lambda words, **how: started(refusing, **how))
    nodes = Namespaces(1, None, 1.0)
    with pytest.raises(NotAvailableError, match=r"TAP devices .* no such device"):
        nodes._start_late_switch(["late0"])
    nodes._remove()


SMALL = ("--seq", "16,32", "--repeats", "1", "--latency-tokens", "64", "--latency-ms", "2", "--mixers", "simple_gla")
CELLS: list[LinearCell] = []  # of the first half, which both tests below need


@pytest.fixture
def linear(bench, monkeypatch):
    """``benchmarks linear`` on small sizes, whose first half is measured once, by one process."""
    monkeypatch.setattr(bench_linear, "WORLD", 1)
    measured = bench_linear.measured

    def once(cases, repeats, show):
        CELLS[:] = CELLS or measured(cases, repeats, show)
        return list(CELLS)

    monkeypatch.setattr(bench_linear, "measured", once)
    return lambda *words: bench("linear", *SMALL, *words)


def require_cells(told):
    rows = {(cell["mixer"], cell["strategy"], cell["seq"]): cell for cell in told["cells"]}
    assert set(rows) == {
        ("simple_gla", strategy, seq) for strategy in ("lasp2", "lasp", "headwise") for seq in (16, 32)
    }
    for cell in rows.values():
        assert cell["time"]["repeats"] == cell["floor"]["repeats"] == cell["share"]["repeats"] == 4
        assert cell["per_token"] == cell["time"]["median"] / cell["seq"]
    assert set(told["unevenness"]) == {f"simple_gla {strategy}" for strategy in ("lasp2", "lasp", "headwise")}


@pytest.mark.gloo
@pytest.mark.matrix
def test_the_first_half_is_told_of_its_two_processes(bench):
    done = bench("linear", *SMALL, "--no-link", "--json")
    assert done.code == 0, done.stderr
    require_cells(json.loads(done.stdout))


@needs_late_links
@pytest.mark.gloo
@pytest.mark.parametrize("nodes", [2, pytest.param(bench_late_link.RANKS, marks=pytest.mark.matrix)])
def test_both_halves_are_told(linear, nodes, monkeypatch):
    monkeypatch.setattr(bench_late_link, "RANKS", nodes)
    done = linear("--json")
    assert done.code == 0, done.stderr
    told = json.loads(done.stdout)
    require_cells(told)
    link = told["link"]
    assert set(link["exposed"]) == set(ROUTES) and link["one_way_ms"]["low"] >= 2
    assert all(error < 1e-10 for errors in link["errors"].values() for error in errors.values())
    # Whatever the machine does, by their posts and computing LASP waits for more latencies than a message has.
    assert all(one > 0 for name in ("forward", "backward") for one in link["exposed"]["LASP"][name]["measured"])
    assert not namespaces()


@pytest.mark.gloo
def test_without_namespaces_the_first_half_is_told_and_the_second_skipped_loudly(linear, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = linear()
    assert done.code == 69
    assert "| simple_gla | lasp2 | 32 |" in done.stdout and "exposed" not in done.stdout
    assert "the part over late links was skipped: network namespaces need iproute2" in done.stderr
    quiet = linear("--no-link")
    assert quiet.code == 0 and not quiet.stderr


def test_what_is_not_kept_is_told():
    def spread(*at):
        return Timing.of(at)

    cells = [
        LinearCell("lasp2", "retnet", 64, spread(0.01), spread(0.009), spread(0.9)),
        LinearCell("lasp2", "retnet", 128, spread(0.03), spread(0.03), spread(1.0)),
    ]
    text = bench_linear.report({"repeats": 1, "load": "0", "seconds": 1.0}, cells)
    assert "| retnet | lasp2 | 64 | 10 (once) | 156.2 | 9 (once) | 0.900 (once) |" in text
    assert "within 20.0% of its mean (**not kept**: 10%)" in text
    assert "least share of the floor 0.900 at 64 tokens (**not kept**: 0.95)" in text


def test_ratios_beside_their_prediction_are_told():
    def passes(measured, predicted):
        return dict.fromkeys(("forward", "backward"), Exposed((measured,), (predicted,)))

    exposed = dict(zip(ROUTES, (passes(0.01, 0.01), passes(0.02, 0.02), passes(0.05, 0.03)), strict=True))
    late = LateTimes(Timing.of([5.0]), exposed, {})
    text = bench_late_link.report(late, argparse.Namespace(latency_ms=5.0, latency_tokens=64, repeats=1))
    assert "| LASP | both | 40.0 (40.0-40.0) | 40.0 (40.0-40.0) | +0% |" in text
    assert "LASP exposes 2.00 times as much as LASP-2; the traces predict 2.00: +0% (kept: 20%)" in text
    assert "5.00 times as much as LASP-2; the traces predict 3.00: +67% (**not kept**: 20%)" in text
    assert "LASP-2 exposes the least: yes" in text
