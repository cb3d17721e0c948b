"""Each step is told once, whatever happened to the run, and nobody who listens can end it."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.config import Config
from longctx.errors import StorageError
from longctx.reporting import metrics_file
from longctx.reporting.metrics import KEYS, Fanout, open_sink
from longctx.reporting.metrics_file import DAMAGED, REDONE, JsonLines, read_records
from longctx.reporting.progress import Progress, duration, quantity

SUMMARY = {"outcome": "finished", "steps": 3, "loss": 1.5, "skipped_updates": 0, "seconds": 2.0}


def record(step, **changes):
    values = dict.fromkeys(KEYS)
    values |= {"step": step, "loss": 5.0 / step, "grad_norm": 1.0, "lr": 1e-3, "tokens": 4096}
    values |= {"tokens_per_second": 18_000.0, "step_seconds": 0.25, "comm_bytes": 1024, "balance": 1.0}
    return values | changes


def config_of(run_dir, wandb="disabled", report=False, **more):
    sections = {
        "run": {"dir": str(run_dir), "name": "a run"},
        "train": {"steps": 4},
        "logger": {"wandb": wandb, "report": report, "progress": False},
    }
    return Config.from_dict(sections | more)


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_one_object_per_step_with_the_keys_of_the_contract(tmp_path):
    sink = open_sink(config_of(tmp_path), tmp_path, 0, None)
    for step in (1, 2):
        sink.step(record(step))
        assert lines(tmp_path)[-1]["step"] == step, "a line is there as soon as its step is done"
    sink.close(SUMMARY)
    assert [tuple(line) for line in lines(tmp_path)] == [KEYS, KEYS]
    assert lines(tmp_path)[1] == record(2)
    assert (tmp_path / "metrics.jsonl").stat().st_mode & 0o777 == 0o600


def test_only_rank_zero_writes(tmp_path):
    sink = open_sink(config_of(tmp_path, report=True), tmp_path, 1, None)
    sink.step(record(1))
    sink.close(SUMMARY)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path):
    sink = open_sink(config_of(tmp_path), tmp_path, 0, None)
    sink.step(record(1, loss=math.nan, grad_norm=math.inf))
    sink.step(record(2, loss=None, mfu_full=None))
    sink.close(SUMMARY)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert [line.get("nonfinite") for line in lines(tmp_path)] == [["loss", "grad_norm"], ["loss"]]


def test_a_record_with_other_keys_is_a_defect(tmp_path):
    sink = open_sink(config_of(tmp_path), tmp_path, 0, None)
    with pytest.raises(AssertionError, match="surprise"):
        sink.step(record(1, surprise=1))


@pytest.mark.parametrize(("resume_step", "left"), [(None, []), (0, []), (3, [1, 2, 3]), (9, [1, 2, 3, 4, 5])])
def test_resuming_drops_what_will_be_done_again(tmp_path, resume_step, left):
    sink = open_sink(config_of(tmp_path), tmp_path, 0, None)
    for step in range(1, 6):
        sink.step(record(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # torn by a crash
    sink = open_sink(config_of(tmp_path), tmp_path, 0, resume_step)
    assert [line["step"] for line in lines(tmp_path)] == left
    sink.step(record(len(left) + 1))
    sink.close(SUMMARY)
    assert [line["step"] for line in lines(tmp_path)] == [*left, len(left) + 1]
    assert (tmp_path / REDONE).exists() == (len(left) < 5)


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=6))
def test_steps_appear_once_and_in_order_however_often_a_run_resumes(tmp_path_factory, attempts):
    path = tmp_path_factory.mktemp("runs") / "metrics.jsonl"
    done = 0
    for count, back in attempts:
        start = max(0, done - back)
        sink = JsonLines(path, start)
        for step in range(start + 1, start + count + 1):
            sink.step(record(step))
        done = start + count
    assert [line["step"] for line in read_records(path)] == list(range(1, done + 1))


@given(st.lists(st.binary(max_size=40) | st.just(b'{"step": 1}') | st.just(b'{"step": true}'), max_size=8))
def test_any_file_can_be_read(tmp_path_factory, garbage):
    path = tmp_path_factory.mktemp("garbage") / "metrics.jsonl"
    path.write_bytes(b"\n".join(garbage) + b"\n")
    steps = [line["step"] for line in read_records(path)]
    assert steps == sorted(set(steps))


def test_a_disk_that_is_full_from_the_start_is_an_error_of_storage(tmp_path):
    with pytest.raises(StorageError, match=r"cannot write .*missing/metrics\.jsonl: No such file"):
        open_sink(config_of(tmp_path), tmp_path / "missing", 0, None)


def full_from(step, until, monkeypatch):
    """A disk that takes half a line in each of these steps, and then no more."""
    written = os.pwrite
    now = {"step": 0}

    def pwrite(file, line, place):
        if step <= now["step"] < until:
            if len(line) < 50:
                raise OSError(28, "No space left on device")
            return written(file, line[: len(line) - 40], place)
        return written(file, line, place)

    monkeypatch.setattr(metrics_file.os, "pwrite", pwrite)
    return now


def test_steps_wait_in_memory_while_the_disk_is_full(tmp_path, monkeypatch, caplog):
    now = full_from(3, 7, monkeypatch)
    sink = open_sink(config_of(tmp_path), tmp_path, 0, None)
    for step in range(1, 9):
        now["step"] = step
        sink.step(record(step))
        told = [line["step"] for line in read_records(tmp_path / "metrics.jsonl")]
        assert told == list(range(1, 3 if 3 <= step < 7 else step + 1))
    sink.close(SUMMARY)
    assert lines(tmp_path) == [record(step) for step in range(1, 9)]
    alarm, relief = caplog.messages
    assert "No space left on device; the run goes on, 1 steps wait in memory" in alarm
    assert "is written again, with 5 steps that had waited" in relief


def test_what_never_found_space_is_told_at_the_end(tmp_path, monkeypatch):
    now = full_from(3, 99, monkeypatch)
    monkeypatch.setattr(metrics_file, "_MOST_WAITING", 4 * len(json.dumps(record(1))))
    sink = open_sink(config_of(tmp_path), tmp_path, 0, None)
    for step in range(1, 20):
        now["step"] = step
        sink.step(record(step))
    with pytest.raises(StorageError, match=r"17 steps of this run could not be written into .*: No space left"):
        sink.close(SUMMARY)
    assert len(list(read_records(tmp_path / "metrics.jsonl"))) == 2


def test_a_resume_keeps_aside_what_it_does_not_go_on_from(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    good = [json.dumps(record(step)).encode() + b"\n" for step in range(1, 8)]
    file.write_bytes(b"".join([*good[:3], b'{"step": 4, "lo\n', good[4], b"\0\0\0\n", *good[5:], b'{"step": 8'[:7]]))
    JsonLines(file, 6).close(SUMMARY)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 5, 6]
    assert (tmp_path / DAMAGED).read_bytes() == b'{"step": 4, "lo\n' + b"\0\0\0\n"
    assert (tmp_path / REDONE).read_bytes() == good[6]
    told, lacking = caplog.messages
    assert "2 lines cannot be read, the first is line 4; they are kept in metrics.damaged.jsonl" in told
    assert "lacks 1 of the 6 steps that are done" in lacking


def test_a_line_that_lost_its_end_alone_is_kept(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(json.dumps(record(step)) for step in (1, 2)))
    JsonLines(file, 2).close(SUMMARY)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_lines_of_very_many_ranks_outlive_a_resume(tmp_path):
    sink = JsonLines(tmp_path / "metrics.jsonl", 0)
    wide = record(1, work_by_rank=[123456.75] * 20_000, bytes_by_rank=[10**9] * 20_000)
    sink.step(wide)
    sink.close(SUMMARY)
    JsonLines(tmp_path / "metrics.jsonl", 1).close(SUMMARY)
    assert lines(tmp_path) == [wide]


class Failing:
    def step(self, record):
        raise RuntimeError("no network")

    def close(self, summary):
        raise AssertionError("closed after it was left out")


def test_a_listener_that_fails_is_reported_and_left_out(tmp_path, caplog):
    sink = Fanout(JsonLines(tmp_path / "metrics.jsonl", 0), {"wandb": Failing()}, lambda summary, tracker: 1 / 0)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            sink.step(record(step))
        sink.close(SUMMARY)
    assert caplog.text.count("wandb: no network") == 1
    assert "the last words failed and is left out: division by zero" in caplog.text
    assert len(lines(tmp_path)) == 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_progress_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal, log = Terminal(), io.StringIO()
    for stream in (terminal, log):
        progress = Progress(400, stream)
        for step in range(1, 401):
            progress.step(record(step, loss=None if step == 400 else 2.5))
        progress.close(SUMMARY)
    written = log.getvalue().splitlines()
    assert written[0] == "step   1/400  loss 2.5000  grad 1.000  lr 1.00e-03  18.0k tokens/s  ETA 1:40"
    assert written[-1] == "step 400/400  loss nan  grad 1.000  lr 1.00e-03  18.0k tokens/s  ETA 0:00"
    assert len(written) == 41
    shown = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in terminal.getvalue().split("\r")]
    assert len([line for line in shown if line.strip()]) - 1 == 400 and terminal.getvalue().count("\n") == 1
    assert shown[-1].startswith("step 400/400  loss nan  ━") and shown[-1].endswith("18.0k tokens/s  0:00 left\n")


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_the_progress_line_never_wraps(monkeypatch, columns):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    progress = Progress(100_000, terminal)
    for step in (1, 99_999, 100_000):
        progress.step(record(step, loss=123456.789, tokens_per_second=999e9, step_seconds=86_400.0))
    progress.close(SUMMARY)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).strip().split("\r")
    assert max(map(len, shown)) < columns
    assert all("step" in line and f"/{100_000}" in line for line in shown if line)
    assert "\n" not in "".join(shown)


def test_a_terminal_that_cannot_rewrite_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    progress = Progress(2, terminal)
    for step in (1, 2):
        progress.step(record(step))
    progress.close(SUMMARY)
    assert [line.split("  ")[0] for line in terminal.getvalue().splitlines()] == ["step 1/2", "step 2/2"]


def test_progress_goes_to_the_console_when_asked(tmp_path, capsys):
    config = config_of(tmp_path)
    config = replace(config, logger=replace(config.logger, progress=True))
    for console in (True, False):
        sink = open_sink(config, tmp_path, 0, None, console=console)
        sink.step(record(1))
        sink.close(SUMMARY)
        assert ("step 1/4  loss 5.0000" in capsys.readouterr().out) == console


def test_quantities_and_durations():
    shown = [quantity(v) for v in (0, 7, 950, 999.4, 999.6, 18_234, 123_456, 3.41e6, 2e12, 5e15)]
    assert shown == ["0", "7", "950", "999", "1.00k", "18.2k", "123k", "3.41M", "2.00T", "5000T"]
    assert [duration(s) for s in (0, 59.6, 61, 3600, 90_061)] == ["0:00", "1:00", "1:01", "1:00:00", "25:01:01"]
