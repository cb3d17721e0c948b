"""Runs worker processes that encode documents, side by side and in any order."""

from __future__ import annotations

import json
import queue
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from types import TracebackType
from typing import BinaryIO, cast

from longctx import errors
from longctx.data.tokenizer import Policy
from longctx.data.tokenizing.frames import Encoded, read_answer, write_texts
from longctx.errors import LongctxError

# The module search path goes along, as a child of this very installation needs it.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from longctx.data.tokenizing.worker import main; main()"
)
_PLACE = re.compile("\0(\\d+)\0")


class EncodingWorkers:
    """Holds ``count`` processes that encode by the tokenizer at ``path``; to be used in a ``with`` statement."""

    def __init__(self, path: str | None, policy: Policy, count: int) -> None:
        self.count = count
        self._words = [sys.executable, "-c", _START, json.dumps(sys.path), json.dumps([path, asdict(policy)])]
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._started: list[subprocess.Popen[bytes]] = []
        # A thread for each process waits for its pipe; threads compute nothing.
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="tokenize")

    def __enter__(self) -> EncodingWorkers:
        for _ in range(self.count):
            process = subprocess.Popen(self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._started.append(process)
            self._idle.put(process)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self._started:
            process.kill()  # none holds anything that outlives it
        self._threads.shutdown(cancel_futures=True)
        for process in self._started:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def encode(self, texts: Sequence[bytes], name: Callable[[int], str]) -> Future[Encoded]:
        """Lets some process encode documents. ``name(i)``: of one, for messages."""
        return self._threads.submit(self._encode, texts, name)

    def _encode(self, texts: Sequence[bytes], name: Callable[[int], str]) -> Encoded:
        process = self._idle.get()
        try:
            write_texts(cast(BinaryIO, process.stdin), texts)
            answer = read_answer(cast(BinaryIO, process.stdout))
        except (EOFError, BrokenPipeError) as error:
            status = process.wait()
            how = f"was killed by signal {-status}" if status < 0 else f"ended with {status}"
            raise LongctxError(
                f"a process that tokenizes {name(0)} and what follows {how}; if memory was short, take fewer workers"
            ) from error
        self._idle.put(process)
        if isinstance(answer, Encoded):
            return answer
        kind, message = answer
        raise getattr(errors, kind)(_PLACE.sub(lambda found: name(int(found[1])), message))
