"""``report.html`` is one file that says what became of a run, whatever the run was called."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from longctx.checkpoint.checkpointer import Checkpointer
from longctx.config import Config
from longctx.errors import StorageError
from longctx.reporting.metrics import open_sink
from longctx.reporting.metrics_file import KEYS
from longctx.reporting.report.balance import balance_section
from longctx.reporting.report.chart import HEIGHT, WIDTH, line_chart
from longctx.reporting.report.page import render, write_report
from tests.checkpoint.checkpoint_run import make

EVIL = "<script>alert('x')</script> \"quoted\" & {braces} %s"
VOID = {"meta", "br", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what is there."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.seen, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


def run_of(directory, steps, name="a run", **changes):
    """A finished run as its files; ``changes``: key → function of the step."""
    config = Config.from_dict(
        {
            "run": {"dir": str(directory), "name": name},
            "train": {"steps": 50},
            "data": {"source": "text", "path": "corpus/x"},
            "logger": {"wandb": "disabled", "progress": False},
            "parallel": {"sp": 2, "dp_shard": 1},
        }
    )
    text = yaml.safe_dump(config.to_dict())
    # An earlier version took such a path.
    (directory / "config.yaml").write_text(text.replace("corpus/x", "https://me:canary@host/x"))
    verdict = {"passed": True, "worst": EVIL, "error": 1e-9, "tolerance": 1e-5}
    (directory / "environment.json").write_text(json.dumps({"git_commit": "abc123", "canary": verdict}))
    sink = open_sink(config, directory, 0, None)
    for step in range(1, steps + 1):
        values = dict.fromkeys(KEYS) | {"step": step, "loss": 5 - step / 20, "grad_norm": 1.0, "lr": 1e-3}
        values |= {"tokens": 4096, "tokens_per_second": 18_000.0, "step_seconds": 0.5, "balance": 1.25}
        values |= {"comm_bytes": 2048, "memory_peak_bytes": 3_000_000}
        sink.step(values | {key: change(step) for key, change in changes.items()})
    sink.close({"outcome": "finished", "steps": steps, "skipped_updates": 0, "seconds": 1.0})
    return directory / "report.html"


def test_the_report_tells_what_became_of_the_run(tmp_path):
    Checkpointer(tmp_path / "checkpoints").save(50, make(None))
    path = run_of(tmp_path, 50, loss=lambda step: math.nan if step == 9 else 5 - step / 20)
    page = Page(path.read_text())
    assert page.seen.count("svg") == 4 and page.seen.count("polyline") > 4
    for expected in (
        *("finished: 50 of 50 steps", "2.5000", "18.0k", "205k", "0:25", "sp 2", "1.250", "2.05kB", "3.00MB"),
        *("checkpoints/step-50", "abc123", "passed: worst error 1e-09", "not finite", "float32 over gloo"),
    ):
        assert expected in page.text, expected
    assert path.stat().st_mode & 0o777 == 0o600


def test_it_needs_nothing_but_itself(tmp_path):
    path = run_of(tmp_path, 20)
    page = Page(path.read_text())
    assert {"script", "link", "img", "iframe", "object", "base"}.isdisjoint(page.seen)
    assert not any(name.startswith("on") or name in ("src", "href") for name, _ in page.attributes)
    style = re.search(r"<style>(.*?)</style>", path.read_text(), re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]


def test_names_are_escaped_and_passwords_left_out(tmp_path):
    path = run_of(tmp_path, 3, name=EVIL)
    page = Page(path.read_text())
    assert "script" not in page.seen
    assert page.text.count(EVIL) >= 2  # the title and the canary's tensor
    assert "canary@" not in path.read_text() and "https://***@host/x" in page.text


def test_it_can_be_made_again_from_the_files(tmp_path):
    path = run_of(tmp_path, 20)
    first = path.read_text()
    path.unlink()
    assert write_report(tmp_path) == path
    assert path.read_text() == first


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_short_runs_have_a_report_too(tmp_path, steps):
    page = Page(run_of(tmp_path, steps).read_text())
    assert f"stopped early: {steps} of 50 steps" in page.text


def test_missing_and_damaged_files_leave_their_part_out(tmp_path):
    assert "0 steps" in Page(render(tmp_path)).text
    (tmp_path / "environment.json").write_text("[" * 100_000)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": "high", "tokens": [1]}\n{"step": 2}\nnonsense\n')
    page = Page(render(tmp_path))
    assert "2 steps" in page.text and "unknown" in page.text
    with pytest.raises(StorageError, match=r"cannot write .*report\.html"):
        write_report(tmp_path / "missing")


VALUES = st.none() | st.floats(-1e12, 1e12, allow_subnormal=False)


@given(st.lists(VALUES, min_size=1, max_size=40), st.booleans())
def test_a_chart_holds_every_point_inside_its_frame(values, smooth):
    steps = list(range(1, len(values) + 1))
    drawn = line_chart("<loss>", steps, values, lambda value: f"{value:.3g}<", smooth)
    if all(value is None for value in values):
        assert drawn == '<p class="empty">no values</p>'
        return
    picture = ElementTree.fromstring(drawn)
    points = [
        tuple(map(float, corner.split(",")))
        for line in picture.iter("polyline")
        for corner in line.attrib["points"].split()
    ]
    points += [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in picture.iter("circle")]
    assert len(points) >= sum(value is not None for value in values)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)


def test_long_runs_stay_small(tmp_path):
    steps = list(range(1, 100_001))
    drawn = line_chart("loss", steps, [math.log(step) for step in steps], str, True)
    assert len(drawn) < 60_000


@pytest.mark.parametrize(
    "told",
    [{}, {"work_by_rank": [1]}, {"work_by_rank": [1, "x"], "bytes_by_rank": [0, 0]}, {"work_by_rank": None}],
    ids=str,
)
def test_strange_balances_leave_their_part_out(told):
    assert balance_section([{"step": 1, **told}]) == ""


def test_the_worst_balanced_step_is_shown():
    even = {"step": 1, "work_by_rank": [4, 4], "bytes_by_rank": [0, 8], "bytes_between_nodes_by_rank": [0, 3]}
    even |= {"straggler_tokens": 7, "padding": 0.0}
    skewed = {**even, "step": 2, "work_by_rank": [6, 2], "padding": 0.125}
    page = balance_section([even, skewed, even])
    assert "in step 2, the worst balanced: 1.500 of the mean" in page
    assert "7.00 tokens" in page or "7 tokens" in page
    assert re.search(r"rank 1<.*>5[.0]* ?B sent within the node, 3[.0]* ?B to other nodes", page)
    assert "padding 12.5%" in page and page.count("<tr>") == 2


def with_mesh(directory, **parallel):
    config = Config.from_dict({"run": {"dir": str(directory)}, "parallel": parallel})
    text = yaml.safe_dump(config.to_dict())
    # An earlier version took such a path.
    (directory / "config.yaml").write_text(text.replace("corpus/x", "https://me:canary@host/x"))
    return Page(render(directory)).text


def test_the_mesh_is_told_in_words(tmp_path):
    one = with_mesh(tmp_path, dp_shard=1)
    assert "one rank" in one and "None" not in one and "pipeline" not in one
    several = with_mesh(tmp_path, dp_shard=2, sp=4, pp=2)
    assert "16 ranks" in several and "dp_shard 2 × sp 4 × pp 2" in several and "None" not in several
    assert "pipeline schedule 1f1b" in " ".join(several.split())


def test_what_differs_from_the_defaults_stands_apart(tmp_path):
    page = with_mesh(tmp_path, dp_shard=1, sp=3)
    apart, everything = page.split("all of config.yaml")
    assert re.search(r"parallel\.sp\s+3\s+1\s", apart) and "parallel.tp" not in apart
    assert "tp: 1" in everything


def test_a_configuration_of_an_earlier_version_is_compared_by_its_names_now(tmp_path):
    (tmp_path / "config.yaml").write_text("attention: {travel: narrow}\nparallel: 7\n")
    assert re.search(r"attention\.grad_dtype\s+compute\s+fp32", Page(render(tmp_path)).text)
    (tmp_path / "config.yaml").write_text("{")
    assert "0 steps" in Page(render(tmp_path)).text


def test_a_spike_of_a_long_run_is_kept():
    values = [1.0] * 100_000
    values[77_777] = 1e6
    points = re.search(r'class="raw" points="([^"]*)"', line_chart("norm", range(1, 100_001), values, str, True))[1]
    heights = [float(corner.split(",")[1]) for corner in points.split()]
    assert min(heights) < HEIGHT / 3 < 2 * HEIGHT / 3 < max(heights)


def test_many_ranks_are_bars_and_a_folded_table():
    work = [1.0] * 63 + [4.0]
    record = {"step": 9, "work_by_rank": work, "bytes_by_rank": work, "bytes_between_nodes_by_rank": [0.0] * 64}
    page = balance_section([record | {"straggler_tokens": 7, "padding": 0.0}])
    seen = Page(page)
    assert page.count("<tr>") == 64 and ("open", None) not in seen.attributes
    assert "rank 63: 3.821 of the mean" in seen.text and "busiest of" not in seen.text
