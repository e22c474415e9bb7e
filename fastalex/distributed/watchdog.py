"""Tells which process of a run is stuck; a collective only waits for it.

Every process writes heartbeats, which say how far it is, to the store that all of them share, and
reads the others'. One whose heartbeats stop coming was stopped, or is cut off; one that is behind
the others and does not go on keeps them waiting. Either ends this process with a line that names
it, whatever its main thread waits for.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

STARTING = 1800.0  # seconds until the first step, in which processes start and kernels compile
_MOST_EVERY = 2.0  # seconds between two heartbeats
_COMPILED = 2  # pieces of work after which the first step, in which kernels compile, is done
_PATIENCE = 10  # how much longer may be waited for what a disk does


@dataclass(frozen=True)
class Heartbeat:
    """How far a process is."""

    host: str  # its machine's name
    beats: int = 0  # heartbeats written before
    done: int = 0  # pieces of work begun or done: batches trained or validated, files written
    loaded: int = 0  # batches whose images another process waits for
    step: int = 0  # of the training
    doing: str = ""  # what a disk may delay; empty for anything else
    state: str = "runs"  # or "lost a peer", or "ended"

    @property
    def work(self) -> tuple[int, int]:
        """What tells whether a process goes on, and which of two is behind."""
        return self.done, self.loaded


class Watchdog:
    """Watches the other processes, from entering it as a context to leaving it.

    Args:
        store: that all processes share, and no other thread uses.
        rank: of this process.
        size: number of processes.
        on_stuck: called with the line that names the process that is stuck, an empty one where it
            is for another process to say; this one ends then.
    """

    def __init__(self, store: Any, rank: int, size: int, on_stuck: Callable[[str], object]) -> None:
        self._store, self._rank, self._on_stuck = store, rank, on_stuck
        self._keys = [f"heartbeat of rank {number}" for number in range(size)]
        self._mine = Heartbeat(socket.gethostname())
        now = time.monotonic()
        self._heartbeats: list[Heartbeat] = [self._mine] * size
        self._heard, self._moved = [now] * size, [now] * size
        self._reached = now  # when the store last answered
        self._seconds = 0.0  # no limit yet
        self._end = threading.Event()
        # The store does not answer where the link is cut: another thread looks at the clock.
        threads = (self._exchange, self._look)
        self._threads = [threading.Thread(target=t, daemon=True) for t in threads]

    def __enter__(self) -> Watchdog:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Tell the others not to expect more of this process."""
        if self._mine.state == "runs":
            self._mine = replace(self._mine, state="ended")
        self._end.set()
        self._threads[0].join(_MOST_EVERY)

    def limit(self, seconds: float) -> None:
        """Let no process take longer than this over a piece of work, after its first step."""
        self._seconds = seconds

    def progress(self, step: int, doing: str = "") -> None:
        """Note that a piece of work begins or is done; ``doing`` is one that a disk may delay."""
        self._mine = replace(self._mine, done=self._mine.done + 1, step=step, doing=doing)
        if self._mine.done == _COMPILED:
            self._forgive(time.monotonic())  # the others may still be in their first step

    def loaded(self) -> None:
        """Note that the images are there which another process waits for."""
        self._mine = replace(self._mine, loaded=self._mine.loaded + 1)

    def who_left(self, waiting: Callable[[], bool]) -> str:
        """After an exchange failed, which process is gone; as long as ``waiting()`` is true.

        Empty where it is for another process to say.
        """
        self._mine = replace(self._mine, state="lost a peer")
        last = time.monotonic() + 5 * _MOST_EVERY
        while time.monotonic() < last and waiting():
            time.sleep(_MOST_EVERY / 20)
            heard = time.monotonic() - max(1.0, 3 * self._every)
            gone = [
                number
                for number, beat in enumerate(self._heartbeats)
                if beat.state == "ended" or (beat.state == "runs" and self._heard[number] < heard)
            ]
            gone = [number for number in gone if number != self._rank]
            if not gone:
                continue
            beat = self._heartbeats[gone[0]]
            # The first process that is left says it; one that ended by itself said why.
            first = all(number in gone for number in range(self._rank))
            if self._rank and (beat.state == "ended" or not first):
                return ""
            return f"lost the connection to {self._name(gone[0])}, at step {beat.step}"
        return "lost the connection to another process"

    @property
    def _every(self) -> float:
        return min(_MOST_EVERY, (self._seconds or STARTING) / 20)

    @property
    def _limit(self) -> float:
        if not self._seconds or self._mine.done < _COMPILED:
            return STARTING
        return self._seconds - 4 * self._every  # so that the line is there in time

    def _exchange(self) -> None:
        beats, ended = 0, False
        while not ended:
            ended = beats > 0 and self._end.wait(self._every)
            beats += 1
            with contextlib.suppress(RuntimeError):  # no answer: `_look` minds how long
                beat = json.dumps(asdict(replace(self._mine, beats=beats)))
                self._store.set(self._keys[self._rank], beat)
                if not ended:
                    self._take(self._store.multi_get(self._keys))

    def _take(self, texts: list[bytes]) -> None:
        self._reached = now = time.monotonic()
        for number, text in enumerate(texts):
            beat, before = Heartbeat(**json.loads(text)), self._heartbeats[number]
            self._heartbeats[number] = beat
            if beat != before:
                self._heard[number] = now
            if beat.work != before.work:
                self._moved[number] = now

    def _look(self) -> None:
        looked = time.monotonic()
        while not self._end.wait(self._every):
            now = time.monotonic()
            if now - looked > self._limit / 2:  # this process was stopped itself
                self._forgive(now)
            looked = now
            reason = self._stuck(now)
            if reason and not self._end.is_set():
                self._on_stuck(reason if self._speaks(now) else "")
                os._exit(1)

    def _forgive(self, now: float) -> None:
        """Wait for everything from now on, however long it has been waited for."""
        self._heard, self._moved = ([now] * len(self._keys) for _ in range(2))
        self._reached = now

    def _speaks(self, now: float) -> bool:
        """Whether it is for this process to say who is stuck: for the first that is heard."""
        heard = [self._reached - heard <= self._limit for heard in self._heard[: self._rank]]
        return now - self._reached > self._limit or not any(heard)

    def _stuck(self, now: float) -> str:
        """What keeps this process from going on; empty where nothing does."""
        limit, unreached = self._limit, now - self._reached
        if unreached > limit:
            return (
                f"the other side can't be reached: no answer from {os.environ.get('MASTER_ADDR')} "
                f"for {unreached:.0f} s, at step {self._mine.step}"
            )
        running = {i: beat for i, beat in enumerate(self._heartbeats) if beat.state != "ended"}
        for number, beat in running.items():
            # Until the last look: while nothing can be reached, nobody's silence grows.
            silence = self._reached - self._heard[number]
            if number != self._rank and silence > limit:
                who = self._name(number)
                return f"{who} has not answered for {silence:.0f} s, at step {beat.step}"
        if not running:
            return ""
        last, beat = min(running.items(), key=lambda item: item[1].work)
        still = self._reached - self._moved[last]
        if still <= limit * (_PATIENCE if beat.doing else 1):
            return ""
        alike = len({other.work for other in running.values()}) == 1
        who = "no process has" if alike else f"{self._name(last)} has not"
        doing = beat.doing and f", {beat.doing}"
        return f"{who} gone on for {still:.0f} s, at step {beat.step}{doing}"

    def _name(self, number: int) -> str:
        return f"rank {number} (host {self._heartbeats[number].host})"
