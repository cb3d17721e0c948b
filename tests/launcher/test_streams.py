"""Standard streams that are closed, full, broken or in another encoding end no run, and no product is lost unsaid."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longctx.launcher import cli, streams

HERE = Path(__file__).parent
PATHS = f"{HERE / 'fake_build'}:{HERE.parents[1]}"
# Prints to both streams more than a buffer holds, twice with characters that ASCII lacks, and leaves some unflushed.
TELLER = """
import sys
from longctx.launcher import streams
streams.protect()
for stream in (sys.stdout, sys.stderr):
    stream.write("a" * 70_000 + "\\u2192\\udcff\\n")
    stream.flush()
    stream.write("\\u03bb")
print(sys.stdin.read(), end="")
open("ended", "w").write(str(sys.stdout.buffer.raw.failure is None))
"""


def run(words, redirection, folder, **extra):
    """Runs Python with its streams as a shell redirects them; returns the status and what other streams got."""
    environment = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", **extra}
    script = f'"$@" {redirection}\nexit "${{PIPESTATUS[0]}}"'
    command = ["bash", "-c", script, "bash", sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


BROKEN = {
    "closed": ">&-",
    "full": ">/dev/full",
    "read-only": "1</dev/null",
    "broken": "| true",
    "all-closed": "<&- >&- 2>&-",
    "all-full": ">/dev/full 2>/dev/full",
}


@pytest.mark.parametrize("redirection", BROKEN.values(), ids=BROKEN)
def test_nothing_that_is_printed_raises(redirection, tmp_path):
    done = run(["-c", TELLER], f"{redirection}", tmp_path)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert (tmp_path / "ended").read_text() == "False"


def test_what_an_encoding_lacks_is_written_as_its_escape(tmp_path):
    done = run(["-c", TELLER], "</dev/null", tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout == done.stderr == "a" * 70_000 + r"\u2192\udcff" + "\n" + r"\u03bb"
    assert (tmp_path / "ended").read_text() == "True"


def test_a_closed_stream_s_number_goes_to_no_other_file(tmp_path):
    program = (
        "import os\nfrom longctx.launcher import streams\nstreams.protect()\n"
        "f = open('file', 'w')\nassert f.fileno() > 2\nos.write(1, b'lost'); os.write(2, b'lost'); os.read(0, 1)\n"
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'print(1)'], check=True)"
    )
    assert run(["-c", program], "<&- >&- 2>&-", tmp_path).returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_a_pipe_that_a_parent_made_non_blocking_is_waited_for(tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    program = "from longctx.launcher import streams\nstreams.protect()\nprint('x' * 200_000, flush=True)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert len(pipe.read()) == 200_001
    assert (process.communicate()[1], process.returncode) == (b"", 0)


@pytest.mark.gloo
def test_ranks_end_as_they_would_if_somebody_listened(tmp_path):
    launch = ["-m", "longctx.launcher.cli", "launch", "--nproc", "2", "parallel.sp=2", "run.name=data-on-rank-1"]
    assert run([*launch, "run.dir=run"], "<&- >&- 2>/dev/full", tmp_path).returncode == 65
    assert (tmp_path / "run/started-0").exists()


PRODUCTS = (
    ["--help"],
    ["bench", "--help"],
    ["verify", "--help"],
    ["verify", "--seq", "16", "--world", "2", "--json"],
    ["submit", "--dry-run"],
)


@pytest.mark.parametrize("words", PRODUCTS, ids=" ".join)
def test_a_product_that_cannot_be_written_ends_with_74(words, monkeypatch, capsys):
    with Path("/dev/full").open("wb") as full, monkeypatch.context() as patched:
        raw = streams._Forgiving(full.fileno())
        patched.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8"))
        assert cli.main(words) == 74
    assert capsys.readouterr().err.endswith("longctx: standard output cannot be written: No space left on device\n")


def test_a_script_is_not_written_in_an_encoding_that_changes_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "\u03bb").mkdir()
    monkeypatch.chdir(tmp_path / "\u03bb")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", errors="backslashreplace"))
    assert cli.main(["submit", "--dry-run"]) == 74
    assert "written in ascii, which has no '\\u03bb'; set PYTHONIOENCODING=utf-8" in capsys.readouterr().err
    sys.stdout.flush()
    assert written.getvalue() == b""
