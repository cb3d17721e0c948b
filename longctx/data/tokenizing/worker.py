"""Encodes documents for another process, which sends them on standard input and reads ids from standard output.

A process of its own and no fork: a tokenizer holds locks and threads that a forked child would wait for without end. It
ends when the other side does, however that ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from typing import BinaryIO

import numpy as np

from longctx.data.tokenizer import Policy, Tokenizer, open_tokenizer
from longctx.data.tokenizing.frames import read_texts, write_ids, write_refusal
from longctx.errors import LongctxError

PLACE = "\0{}\0"  # stands for a document's name in messages: only the other side knows it


def main() -> None:
    """Answers until there is nothing more to read."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the other side ends this one
    path, policy = json.loads(sys.argv[-1])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    with contextlib.suppress(BrokenPipeError, EOFError):
        serve(open_tokenizer(path, Policy(**policy)), sys.stdin.buffer, answers)
    with contextlib.suppress(BrokenPipeError):
        answers.close()


def serve(tokenizer: Tokenizer, texts: BinaryIO, answers: BinaryIO) -> None:
    """Encodes what comes in, one batch after another."""
    while (batch := read_texts(texts)) is not None:
        try:
            documents = tokenizer.encode_documents(batch, PLACE.format)
        except LongctxError as error:
            write_refusal(answers, type(error).__name__, str(error))
            continue
        unknown = 0
        if tokenizer.unknown is not None:
            unknown = sum(int(np.count_nonzero(ids == tokenizer.unknown)) for ids in documents)
        write_ids(answers, documents, unknown)
