"""How rank 0 tells the others what to do: small messages, broadcast over the job's CPU group.

A message is an operation and some int32 words. Up to INLINE words travel with the header in one
broadcast; longer ones follow in a second.

Ranks talk in conversations: `begin` on all of them, messages from rank 0, `end`. Within one the others only
listen; while rank 0 has nothing to say (a slow on_text of the user's) a thread sends IDLE messages, so that a
deadline means a dead or hung peer. That thread cannot tell a rank 0 that is stuck in the user's code from one
that is busy there. Between conversations nothing is sent, ranks do as they please with the group, and a rank
may come to the next one late by up to patience_s.
"""

from __future__ import annotations

import contextlib
import enum
import threading
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from ..collectives import all_reduce, broadcast_, set_timeout
from ..errors import CollectiveError

INLINE = 1022


class Operation(enum.IntEnum):
    """What a message asks for."""

    IDLE = 0
    STEP = 1
    RESULT = 2
    CLOSE = 3
    DRAFT = 4
    BURST = 5
    BEGIN = 6


class Channel:
    """Messages from group rank 0 to the other ranks of one process group (CPU tensors).

    limit_s: how long a rank may keep the others waiting within a conversation. patience_s: between two.
    """

    def __init__(self, group: dist.ProcessGroup, *, limit_s: float, patience_s: float) -> None:
        self.group = group
        self._limit_s, self._patience_s = limit_s, patience_s
        set_timeout(group, limit_s)
        self.is_source = group.rank() == 0
        self._buffer = torch.zeros(INLINE + 2, dtype=torch.int32)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._open = False
        if self.is_source and group.size() > 1:
            self._sent = threading.Event()
            threading.Thread(target=self._keep_alive, name="tp-idle", daemon=True).start()

    def begin(self) -> None:
        """All ranks: start a conversation when all have come. Raises CollectiveError if rank 0 has left."""
        if self.group.size() == 1:
            return
        with self._patience():
            if self.is_source:
                self.send(Operation.BEGIN)
            elif self.receive()[0] is Operation.CLOSE:
                raise CollectiveError("rank 0 left while this rank waited for a result; see its own message")
            all_reduce(torch.zeros(1, dtype=torch.int32), self.group)
        with self._lock:
            self._open = True

    def end(self, operation: Operation | None = None, words: np.ndarray | None = None) -> None:
        """Rank 0: the last message of a conversation; None: it breaks off, and the others will miss it."""
        with self._lock:
            self._open = False
        if operation is not None:
            self.send(operation, words)

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        set_timeout(self.group, self._patience_s)
        try:
            yield
        finally:
            set_timeout(self.group, self._limit_s)

    def send(self, operation: Operation, words: np.ndarray | None = None) -> None:
        """Rank 0: one message to all others."""
        with self.announced(operation, words):
            pass

    @contextlib.contextmanager
    def announced(self, operation: Operation, words: np.ndarray | None = None) -> Iterator[None]:
        """Rank 0: send a message, and keep IDLE ones back while the block runs the work it announced
        (whose own collectives share the group)."""
        if self.group.size() == 1:
            yield
            return
        self._sent.set()
        with self._lock:
            self._send(operation, np.empty(0, np.int32) if words is None else words)
            yield

    def _send(self, operation: Operation, words: np.ndarray) -> None:
        assert words.dtype == np.int32, words.dtype
        self._buffer[0], self._buffer[1] = int(operation), len(words)
        body = torch.from_numpy(words)
        if len(words) <= INLINE:
            self._buffer[2 : 2 + len(words)] = body
        broadcast_(self._buffer, self.group)
        if len(words) > INLINE:
            broadcast_(body, self.group)

    def receive(self) -> tuple[Operation, np.ndarray]:
        """Other ranks: the next message that is not IDLE."""
        while True:
            broadcast_(self._buffer, self.group)
            operation, size = Operation(int(self._buffer[0])), int(self._buffer[1])
            if size <= INLINE:
                words = self._buffer[2 : 2 + size].clone()
            else:
                words = broadcast_(torch.empty(size, dtype=torch.int32), self.group)
            if operation is not Operation.IDLE:
                return operation, words.numpy()

    def _keep_alive(self) -> None:
        """While a conversation is open, rank 0 says something every third of limit_s."""
        while not self._stop.is_set():
            if not self._sent.wait(self._limit_s / 3):
                try:
                    with self._lock:
                        if self._open:
                            self._send(Operation.IDLE, np.empty(0, np.int32))
                except CollectiveError:
                    return  # the others have left; the next step says so where it matters
            self._sent.clear()

    def close(self, *, silently: bool = False) -> None:
        """End the conversation, on every rank: rank 0 says so, the others wait to hear it. Idempotent.

        silently: nothing is said or awaited, because ranks may be at different places.
        """
        if self._stop.is_set() or self.group.size() == 1:
            return
        self._stop.set()
        if silently:
            return
        with self._patience():
            if self.is_source:
                self.end(Operation.CLOSE)
            else:
                while self.receive()[0] is not Operation.CLOSE:
                    pass


def to_words(text: str) -> np.ndarray:
    """UTF-8 text as int32 words, its byte length first."""
    data = text.encode()
    padded = data + b"\0" * (-len(data) % 4)
    return np.concatenate([np.asarray([len(data)], np.int32), np.frombuffer(padded, np.int32)])


def from_words(words: np.ndarray) -> str:
    """The inverse of to_words."""
    return words[1:].tobytes()[: int(words[0])].decode()
