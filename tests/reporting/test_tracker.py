"""A wandb run holds every step of a run, however often it was killed; it holds no secret, and nothing waits for it."""

from __future__ import annotations

import json
import logging
import struct
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from longctx.config import Config
from longctx.errors import ConfigError, NotAvailableError
from longctx.reporting import metrics, tracker
from longctx.reporting.metrics import KEYS, open_sink
from longctx.reporting.tracker import Identity, Tracker
from longctx.reporting.wandb_run import stop_service, without_logins

SUMMARY = {"outcome": "finished", "steps": 3, "loss": 1.5, "skipped_updates": 0, "seconds": 2.0}


def record(step, **changes):
    values = dict.fromkeys(KEYS)
    values |= {"step": step, "loss": 5.0 / step, "grad_norm": 1.0, "lr": 1e-3, "tokens": 100, "flops": 7.0}
    return values | {"work_by_rank": [1.0, 2.0]} | changes


def config_of(run_dir, wandb="offline", steps=60, **logger):
    sections = {
        "run": {"dir": str(run_dir)},
        "train": {"steps": steps},
        "data": {"source": "text", "path": "corpus"},
        "logger": {"wandb": wandb, "report": False, "progress": False},
    }
    config = Config.from_dict(sections)
    # Not as a configuration is read, which refuses such a path: whatever comes this way is looked at again.
    path = "https://me:canary-url@host.example/corpus"
    return replace(config, data=replace(config.data, path=path), logger=replace(config.logger, **logger))


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


def rows_of(records):
    return [
        {item.nested_key[0]: json.loads(item.value_json) for item in message.history.item}
        for message in records
        if message.WhichOneof("record_type") == "history"
    ]


CANARIES = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdefcanary01",
    "HF_TOKEN": "hf_canarycanarycanary",
    "AWS_SECRET_ACCESS_KEY": "aws/canary/secret",
    "MY_PASSWORD": "canary-password",
}


def test_the_newest_folder_of_a_killed_run_is_the_whole_run_without_secrets(tmp_path, monkeypatch):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train", "--token", "canary-argument"])
    run_dir = tmp_path / "warm-up"
    run_dir.mkdir()
    names = {"group": "rates", "tags": ("first", "s3://a:canary-url@b"), "notes": "a note", "entity": "team"}
    first = open_sink(config_of(run_dir), run_dir, 0, None)
    for step in range(1, 31):
        first.step(record(step, loss=None if step == 7 else 1.0 / step))
    stop_service()  # as a kill does
    second = open_sink(config_of(run_dir, **names), run_dir, 0, 20, facts={"parameters": 1234})
    for step in range(21, 61):
        second.step(record(step, loss=1.0 / step) | ({"validation_loss": 2.5} if step == 60 else {}))
    second.close(SUMMARY)
    records = list(wandb_records(run_dir / "wandb/latest-run" / f"run-{Identity.read(run_dir).id}.wandb"))
    rows = rows_of(records)
    assert [row["_step"] for row in rows] == list(range(1, 61))
    assert [row.get("loss") for row in rows] == [None if s == 7 else 1.0 / s for s in range(1, 61)]
    assert rows[-1]["tokens_total"] == 6000 and rows[-1]["flops_total"] == 420 and rows[-1]["validation_loss"] == 2.5
    assert "work_by_rank" not in rows[0]
    (run,) = [message.run for message in records if message.WhichOneof("record_type") == "run"][:1]
    assert (run.display_name, run.run_group, run.entity, run.notes) == ("warm-up", "rates", "team", "a note")
    assert list(run.tags) == ["first", "s3://***@b"]
    summary = {}
    for message in records:
        if message.WhichOneof("record_type") == "summary":
            summary |= {item.key or item.nested_key[0]: item.value_json for item in message.summary.update}
    assert summary["best_loss"] == str(1 / 60) and summary["best_loss_step"] == "60" and summary["parameters"] == "1234"
    # offline-run-DATE_TIME-ID, and -1 behind it where two began within one second
    folders = [path.name.split("-") for path in run_dir.glob("wandb/offline-run-*")]
    assert len(folders) == 2 and {parts[3] for parts in folders} == {Identity.read(run_dir).id}
    written = b"".join(path.read_bytes() for path in run_dir.rglob("*") if path.is_file())
    assert b"host.example" in written
    for secret in (*CANARIES.values(), "canary-argument", "canary-url"):
        assert secret.encode() not in written


class Recorded:
    """Stands for a wandb run: notes what it was given; ``hold`` makes it wait, as a server that does not answer."""

    def __init__(self, hold=None):
        self.rows, self.summary, self.hold = [], None, hold

    def log(self, step, row):
        if self.hold is not None:
            self.hold.wait()
        self.rows.append((step, row))

    def finish(self, summary):
        self.summary = summary


def test_training_does_not_wait_for_wandb(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker, "_END_SECONDS", 0.1)
    monkeypatch.setattr(tracker, "_MOST_WAITING", 50)
    session = Recorded(hold=threading.Event())
    followed = Tracker(Identity("abc"), tmp_path, lambda: session, lambda: iter(()))
    for step in range(1, 50):
        followed.step(record(step))
    with pytest.raises(TimeoutError, match=r"last rows within 0\.1 s; the next --resume writes all"):
        followed.close(SUMMARY)
    followed.step(record(50))
    with pytest.raises(TimeoutError, match="has not taken 50 rows"):
        followed.step(record(51))
    session.hold.set()
    assert Identity.read(tmp_path).id != "abc", "what is not complete is not noted as such"


def test_what_wandb_raises_is_told_at_the_next_step(tmp_path):
    class Broken(Recorded):
        def log(self, step, row):
            sys.exit("no service")

    followed = Tracker(Identity("abc"), tmp_path, Broken, lambda: iter(()))
    followed.step(record(1))
    followed._worker.join()
    with pytest.raises(RuntimeError, match="SystemExit: no service"):
        followed.step(record(2))


@pytest.mark.parametrize(("complete", "steps", "opened"), [(5, 5, False), (4, 5, True), (0, 5, True), (5, 9, True)])
def test_a_run_that_is_done_gets_no_further_folder(tmp_path, monkeypatch, complete, steps, opened):
    monkeypatch.setattr(tracker, "WandbRun", lambda *given: Recorded())
    sink = open_sink(config_of(tmp_path, "disabled"), tmp_path, 0, None)
    for step in range(1, 6):
        sink.step(record(step))
    sink.close(SUMMARY)
    Identity("abc", complete).write(tmp_path)
    found = tracker.open_tracker(config_of(tmp_path, steps=steps), tmp_path, 5, {})
    assert (found is not None) == opened
    if found is not None:
        found.close(SUMMARY)
        assert Identity.read(tmp_path) == Identity("abc", 5)


@pytest.mark.parametrize("text", ["", "[]", '{"id": "../x", "complete": 1}', '{"id": "a"}', '{"id": 1, "complete": 2}'])
def test_an_identity_that_cannot_be_read_is_drawn_anew(tmp_path, text):
    (tmp_path / "wandb.json").write_text(text)
    assert Identity.read(tmp_path).id.isalnum() and Identity.read(tmp_path).complete == 0


def test_wandb_that_is_missing_is_refused_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: None)
    for rank in (0, 1):
        with pytest.raises(NotAvailableError, match=r"longctx\[track\].*logger.wandb=disabled"):
            open_sink(config_of(tmp_path), tmp_path, rank, None)
    open_sink(config_of(tmp_path, "disabled"), tmp_path, 0, None).close(SUMMARY)


def test_wandb_that_does_not_start_ends_nothing(tmp_path, monkeypatch, caplog):
    def broken(*given):
        raise OSError("no service")

    monkeypatch.setattr(metrics, "open_tracker", broken)
    with caplog.at_level(logging.WARNING):
        sink = open_sink(config_of(tmp_path), tmp_path, 0, None)
        sink.step(record(1))
        sink.close(SUMMARY)
    assert "wandb failed and is left out: no service" in caplog.text


def test_names_that_wandb_would_not_take_are_refused_before_the_run():
    for field, value, near in (
        ("project", "a/b:c", "abc"),
        ("project", "p" * 200, "p" * 128),
        ("tags", ["t" * 65], "t"),
    ):
        with pytest.raises(ConfigError, match=f"nearest valid value: {near}"):
            Config.from_dict({"logger": {field: value}})


def test_passwords_leave_no_url():
    value = {"a": {"b": "s3://key:secret@bucket/x and http://u@h", "c": 1}, "d": ["mail@example.org", "s3://k:s@x"]}
    told = without_logins(value)
    assert told == {"a": {"b": "s3://***@bucket/x and http://***@h", "c": 1}, "d": ["mail@example.org", "s3://***@x"]}
