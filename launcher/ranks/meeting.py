"""Lets ranks wait for one another before they exchange tensors, and refuses those that differ.

Here no collective and no timeout of one runs yet: a rank may check data for hours. Each gives a sign of life while it
works, so that one that has died or was stopped is noticed, and not waited for.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from longctx.errors import ConfigError, LongctxError, RankLostError

if TYPE_CHECKING:
    from torch.distributed import Store

Answer = TypeVar("Answer")
Record = Mapping[str, Any]  # of values that JSON knows

LEAST_PATIENCE = 30.0  # seconds without a sign; ranks of one start may come that far apart
BEAT = 1.0  # seconds between two signs of life
SETTLE = 0.3  # seconds in which other ranks that differ have their say too
FAREWELL = 3.0  # seconds that rank 0, which holds the store, waits for others to read why it ends
PAUSES = (0.01, 0.25)  # seconds between two looks at the store: at first, and at most
SHOWN = 8  # differences in one message

REFUSED = "refused"
CODES = {65, 69, 70, 74, 75, 78}


class RelayedError(LongctxError):
    """The error of another rank, which rank 0 reports: this one has nothing to add."""


class Meeting:
    """The ranks of one world at a store. All of them call ``agree`` with the same topics in the same order."""

    def __init__(self, store: Store, rank: int, world_size: int, patience: float) -> None:
        self.store = store
        self.rank, self.world_size = rank, world_size
        self._patience = max(patience, LEAST_PATIENCE)
        self._left = threading.Event()

    @contextmanager
    def attended(self) -> Iterator[Meeting]:
        """Gives signs of life while the body runs, and leaves word of an error that ends it."""
        if self.world_size == 1:
            yield self
            return
        if self._asked(lambda: self.store.add(f"arrived/{self.rank}", 1)) > 1:
            raise ConfigError(f"two processes say that they are rank {self.rank} of {self.world_size}")
        beats = threading.Thread(target=self._beat, name="sign of life", daemon=True)
        beats.start()
        try:
            yield self
        except Exception as error:
            if not self._left.is_set():
                self.leave_word(error)
            raise
        finally:
            self.leave()

    def leave(self) -> None:
        """Stops giving signs: from here on, timeouts of collectives tell who is missing."""
        self._left.set()

    def agree(self, topic: str, record: Record, refusal: type[LongctxError], rule: str, hint: Hint = None) -> None:
        """Returns once every rank has come with the same ``record``; raises ``refusal`` on all where one differs.

        ``rule``: what the message ends with. ``hint``: explains a difference in words, from its key and rank 0's value.
        """
        if self.world_size == 1:
            return
        text = json.dumps(record, sort_keys=True)
        if self.rank == 0:
            self._set(f"{topic}/0", text)
            self._await_all(topic, refusal, rule)
            self._set(f"{topic}/agreed", "")
            return
        first = self._parsed(self._await(f"{topic}/0"))
        found = differences(json.loads(text), first, hint)
        if found:
            self._set(f"{topic}/{self.rank}", found)
            raise refusal(f"rank {self.rank} differs from rank 0: {found}; {rule}")
        self._set(f"{topic}/{self.rank}", "")
        self._await(f"{topic}/agreed")

    def _await_all(self, topic: str, refusal: type[LongctxError], rule: str) -> None:
        missing = {rank: _Vigil() for rank in range(1, self.world_size)}
        words: dict[int, str] = {}
        pause, until = PAUSES[0], None
        while missing and (until is None or time.monotonic() < until):
            for rank in list(missing):
                failed = self._has(f"failed/{rank}")
                if self._has(f"{topic}/{rank}"):
                    words[rank] = self._get(f"{topic}/{rank}")
                    del missing[rank]
                elif failed:
                    self._end_for(rank)
                elif until is None:
                    self._require_life(rank, missing[rank])
            if until is None and any(words.values()):
                until = time.monotonic() + SETTLE
            time.sleep(pause)
            pause = min(PAUSES[1], 1.5 * pause)
        if any(words.values()):
            raise refusal(f"{_gathered(words)}; {rule}")

    def _await(self, key: str) -> str:
        """Waits for rank 0 to say ``key``, or why the run ends."""
        vigil, pause = _Vigil(), PAUSES[0]
        while not self._has(key):
            if self._has(REFUSED):
                told = self._parsed(self._get(REFUSED))
                self._asked(lambda: self.store.add("heard", 1))
                raise _relayed(told)
            self._require_life(0, vigil)
            time.sleep(pause)
            pause = min(PAUSES[1], 1.5 * pause)
        return self._get(key)

    def _require_life(self, rank: int, vigil: _Vigil) -> None:
        if vigil.silence(self._asked(lambda: self.store.add(f"beat/{rank}", 0))) > self._patience:
            come = "has given no sign of life" if vigil.beats else "has not come"
            raise RankLostError(
                f"rank {rank} {come} for {self._patience:g} s; {self.world_size} ranks belong to this run"
            )

    def _end_for(self, rank: int) -> None:
        told = self._parsed(self._get(f"failed/{rank}"))
        error = _relayed(told)
        error.args = (f"rank {rank}: {error}",)
        raise error

    def leave_word(self, error: Exception) -> None:
        """Tells the others why this rank does not go on."""
        if isinstance(error, LongctxError):
            told = json.dumps({"code": error.exit_code, "message": str(error)})
        else:
            told = json.dumps({"code": LongctxError.exit_code, "message": f"{type(error).__name__}: {error}"})
        try:
            if self.rank:
                self.store.set(f"failed/{self.rank}", told)
                return
            self.store.set(REFUSED, told)
            until = time.monotonic() + FAREWELL
            listeners = [rank for rank in range(1, self.world_size) if self._listens(rank)]
            while self.store.add("heard", 0) < len(listeners) and time.monotonic() < until:
                time.sleep(PAUSES[0])
        except RuntimeError:
            pass  # the store has gone, and with it those who would hear

    def _listens(self, rank: int) -> bool:
        return bool(self.store.add(f"beat/{rank}", 0)) and not self.store.check([f"failed/{rank}"])

    def _beat(self) -> None:
        try:
            while True:
                self.store.add(f"beat/{self.rank}", 1)
                if self._left.wait(BEAT):
                    return
        except RuntimeError:
            return  # whoever waits for something at the store notices, too

    def _has(self, key: str) -> bool:
        return self._asked(lambda: self.store.check([key]))

    def _get(self, key: str) -> str:
        return self._asked(lambda: self.store.get(key)).decode(errors="replace")

    def _set(self, key: str, value: str) -> None:
        self._asked(lambda: self.store.set(key, value))

    def _asked(self, question: Callable[[], Answer]) -> Answer:
        try:
            return question()
        except RuntimeError:
            whose = "its store" if self.rank == 0 else "rank 0, or whoever else held the store of this run,"
            raise RankLostError(f"{whose} has gone while rank {self.rank} waited") from None

    def _parsed(self, text: str) -> dict[str, Any]:
        try:
            parsed = json.loads(text)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise RankLostError(
                "what lies in the store of this run is not its ranks' own; does anybody else use its port?"
            )
        return parsed


class _Vigil:
    """Remembers when another rank gave its last sign of life."""

    def __init__(self) -> None:
        self.beats, self._since = 0, time.monotonic()

    def silence(self, beats: int) -> float:
        """Returns the seconds since the number of ``beats`` changed."""
        if beats != self.beats:
            self.beats, self._since = beats, time.monotonic()
        return time.monotonic() - self._since


Hint = Callable[[str, Any], str | None] | None


def differences(own: Record, first: Record, hint: Hint = None) -> str:
    """Returns in words in which keys ``own`` differs from the record of rank 0; nothing where they are equal."""
    keys = [key for key in sorted({*own, *first}) if own.get(key, _ABSENT) != first.get(key, _ABSENT)]
    found = []
    for key in keys[:SHOWN]:
        said = hint(key, first.get(key)) if hint else None
        found.append(said or f"{key}={_shown(own, key)} where rank 0 has {_shown(first, key)}")
    if len(keys) > SHOWN:
        found.append(f"and {len(keys) - SHOWN} more")
    return ", ".join(found)


_ABSENT = object()


def _shown(record: Record, key: str) -> str:
    return json.dumps(record[key]).strip('"') if key in record else "nothing"


def _gathered(words: Mapping[int, str]) -> str:
    """Returns what ranks said of themselves, those that said the same together."""
    by_word: dict[str, list[int]] = {}
    for rank, word in sorted(words.items()):
        if word:
            by_word.setdefault(_printable(word), []).append(rank)
    parts = []
    for word, ranks in by_word.items():
        named = ", ".join(map(str, ranks[:SHOWN])) + (" and others" if len(ranks) > SHOWN else "")
        parts.append(
            f"rank {named} differs from rank 0: {word}" if len(ranks) == 1 else f"ranks {named} differ: {word}"
        )
    return "; ".join(parts)


def _relayed(told: Mapping[str, Any]) -> LongctxError:
    error = RelayedError(_printable(str(told.get("message", ""))))
    code = told.get("code")
    error.exit_code = code if code in CODES else LongctxError.exit_code
    return error


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
