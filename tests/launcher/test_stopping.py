"""Requests to stop: in which phase of a command they end it, how soon, and with which exit code."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

PROGRAM = """
import ctypes, signal, sys, time
from longctx.launcher import cli, stopping
from longctx.errors import RequeueError

def blocked():
    # As in a collective: no return to Python, whatever signals come.
    lock = ctypes.create_string_buffer(64)
    wait = ctypes.CDLL(None).pthread_mutex_lock
    wait(lock), print("ready", flush=True), wait(lock)

def ready():
    print("ready", flush=True)
    while True:
        time.sleep(0.01)

def swallowed():
    try:
        ready()
    except Exception:
        time.sleep(60)

def work(then):
    with stopping.listening(cli.tell) as requests, requests.working(lambda: "stopping: saving step 7"):
        print("ready", flush=True)
        then(requests)

def saves(requests):
    while not requests.asked():
        time.sleep(0.01)
    raise RequeueError("saved step 7")

def waits(requests):
    blocked()

def ends_from_a_thread(requests):
    import threading
    def end():
        while not requests.asked():
            time.sleep(0.01)
        requests.end_with(RequeueError("saved step 6"))
    threading.Thread(target=end).start()
    blocked()

def run():
    with stopping.listening(cli.tell, for_good=True):
        {body}

sys.exit(cli.exit_code_of(run))
"""


def outcome(case):
    """Exit status, what was told, and seconds from the last signal to the end."""
    body, signals, pause, ignored = case
    program = textwrap.dedent(PROGRAM).replace("{body}", body)
    command = subprocess.Popen(
        [sys.executable, "-c", f"import signal; signal.signal({int(ignored)}, signal.SIG_IGN)\n{program}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert command.stdout.readline() == "ready\n"
    for number, one in enumerate(signals):
        time.sleep(pause if number else 0)
        command.send_signal(one)
    started = time.monotonic()
    _, told = command.communicate(timeout=60)
    return command.returncode, told.replace("longctx: ", ""), time.monotonic() - started


TERM, INT, HUP, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1
NOTHING = "asked to stop before the first step: nothing is lost and nothing was saved; start it as before\n"
SAVING, AGAIN = "stopping: saving step 7", "; Ctrl-C again ends at once without saving"
AT_ONCE = "ended at once, without saving\n"
SAVED = f"{SAVING}\nsaved step 7\n"
NONE = signal.SIGUSR2  # a signal whose being ignored says nothing

CASES = {
    "before it works": (("ready()", [INT], 0, NONE), (75, NOTHING)),
    "before it works, in a call that never returns": (("blocked()", [TERM], 0, NONE), (75, NOTHING)),
    "before it works, where somebody swallows it": (("swallowed()", [HUP], 0, NONE), (75, NOTHING)),
    "Ctrl-C": (("work(saves)", [INT], 0, NONE), (75, f"{SAVING}{AGAIN}\nsaved step 7\n")),
    "Slurm": (("work(saves)", [USR1], 0, NONE), (75, SAVED)),
    "from a thread": (("work(ends_from_a_thread)", [HUP], 0, NONE), (75, f"{SAVING}\nsaved step 6\n")),
    "Ctrl-C twice": (("work(waits)", [INT, INT], 1.2, NONE), (130, f"{SAVING}{AGAIN}\n{AT_ONCE}")),
    "Ctrl-C after others": (("work(waits)", [TERM, TERM, INT], 1.2, NONE), (130, f"{SAVING}\n{AT_ONCE}")),
    "Ctrl-C, passed on by a launcher": (("work(saves)", [INT, INT], 0, NONE), (75, f"{SAVING}{AGAIN}\nsaved step 7\n")),
    "a closed terminal under nohup": (("work(saves)", [HUP, TERM], 0.3, HUP), (75, SAVED)),
    # Shells start such jobs with SIGINT ignored, so that Ctrl-C reaches only what is in front.
    "a script's background job": (("work(saves)", [INT], 0, INT), (75, f"{SAVING}{AGAIN}\nsaved step 7\n")),
}


@pytest.fixture(scope="module")
def outcomes():
    """All of them wait more than they compute, so they do it together."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(CASES, pool.map(outcome, [case for case, _ in CASES.values()])))


@pytest.mark.parametrize("name", CASES)
def test_a_request_ends_a_command_by_its_phase(outcomes, name):
    status, told, seconds = outcomes[name]
    assert (status, told) == CASES[name][1]
    assert seconds < 10


def test_handlers_are_put_back():
    from longctx.launcher.stopping import STOP_SIGNALS, listening

    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with listening(print) as outer, listening(print) as inner, inner.working():
        assert outer is inner and not inner.asked()
        os.kill(os.getpid(), signal.SIGUSR1)
        until = time.monotonic() + 5
        while not inner.asked() and time.monotonic() < until:
            time.sleep(0.001)
        assert inner.asked()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
