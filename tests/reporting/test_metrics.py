"""Each step is told once, whatever happened to the run, and nobody who listens can end it."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.config import Config
from longctx.errors import NotAvailableError, StorageError
from longctx.reporting import metrics, tracker
from longctx.reporting.metrics import KEYS, Fanout, open_sink
from longctx.reporting.metrics_file import JsonLines, read_records
from longctx.reporting.progress import Progress, duration, quantity
from longctx.reporting.tracker import redacted

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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


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


def test_a_full_disk_is_an_error_of_storage(tmp_path):
    with pytest.raises(StorageError, match=r"cannot write .*missing/metrics\.jsonl: No such file"):
        open_sink(config_of(tmp_path), tmp_path / "missing", 0, None)
    sink = JsonLines(tmp_path / "metrics.jsonl", 0)
    os.dup2(os.open("/dev/full", os.O_WRONLY), sink._file.fileno())
    for call in (lambda: sink.step(record(1)), lambda: sink.close(SUMMARY)):
        with pytest.raises(StorageError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
            call()


class Failing:
    def step(self, record):
        raise RuntimeError("no network")

    def close(self, summary):
        raise AssertionError("closed after it was left out")


def test_a_listener_that_fails_is_reported_and_left_out(tmp_path, caplog):
    sink = Fanout(JsonLines(tmp_path / "metrics.jsonl", 0), [Failing()], lambda: 1 / 0)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            sink.step(record(step))
        sink.close(SUMMARY)
    assert caplog.text.count("no network") == 1
    assert "report.html failed and is left out: division by zero" in caplog.text
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


def wandb_records(path: Path):
    """The records of a wandb offline file: a LevelDB log of protobufs."""
    from wandb.proto import wandb_internal_pb2 as pb

    data, position, whole, block = path.read_bytes(), 7, b"", 32768
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = block - position % block
        if left < 7:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):
            message = pb.Record()
            message.ParseFromString(whole)
            whole = b""
            yield message


CANARIES = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdefcanary01",
    "HF_TOKEN": "hf_canarycanarycanary",
    "AWS_SECRET_ACCESS_KEY": "aws/canary/secret",
    "MY_PASSWORD": "canary-password",
}


def test_an_offline_wandb_run_holds_every_row_and_no_secret(tmp_path, monkeypatch):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train", "--token", "canary-argument"])
    config = config_of(
        tmp_path, "offline", data={"source": "text", "path": "https://me:canary-url@host.example/corpus"}
    )
    sink = open_sink(config, tmp_path, 0, None)
    for step in range(1, 51):
        sink.step(record(step, loss=None if step == 7 else 1.0 / step))
    sink.close(SUMMARY)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = [
        {item.nested_key[0]: json.loads(item.value_json) for item in message.history.item}
        for message in wandb_records(file)
        if message.WhichOneof("record_type") == "history"
    ]
    assert [row["_step"] for row in rows] == list(range(1, 51))
    assert [row.get("loss") for row in rows] == [None if s == 7 else 1.0 / s for s in range(1, 51)]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"host.example" in written
    for secret in (*CANARIES.values(), "canary-argument", "canary-url"):
        assert secret.encode() not in written


def test_wandb_that_is_missing_is_refused_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: None)
    for rank in (0, 1):
        with pytest.raises(NotAvailableError, match=r"longctx\[track\].*logger.wandb=disabled"):
            open_sink(config_of(tmp_path, "offline"), tmp_path, rank, None)
    open_sink(config_of(tmp_path, "disabled"), tmp_path, 0, None).close(SUMMARY)


def test_wandb_that_does_not_start_ends_nothing(tmp_path, monkeypatch, caplog):
    def broken(config, run_dir):
        raise OSError("no service")

    monkeypatch.setattr(metrics, "open_tracker", broken)
    with caplog.at_level(logging.WARNING):
        sink = open_sink(config_of(tmp_path, "offline"), tmp_path, 0, None)
        sink.step(record(1))
        sink.close(SUMMARY)
    assert "wandb failed and is left out: no service" in caplog.text
    assert len(lines(tmp_path)) == 1


def test_passwords_leave_no_url():
    value = {"a": {"b": "s3://key:secret@bucket/x and http://u@h", "c": 1}, "d": "mail@example.org"}
    assert redacted(value) == {"a": {"b": "s3://bucket/x and http://h", "c": 1}, "d": "mail@example.org"}
