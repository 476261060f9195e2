"""Passing a stream of ``mpirun`` on to one of ours, whose reader may be slow or gone."""

import os
import select
import time
from collections.abc import Iterable
from typing import TextIO

from hpcpipe.cluster.banner import BannerFilter

_HELD_TEXT_S = 0.2
_MOST_WAITING_BYTES = 1 << 16
_TAIL_BYTES = 1 << 16


class Relay:
    """A stream that passes bytes on as they come, and never waits for their reader.

    Parameters
    ----------
    source : int
        Descriptor to read; it is made non-blocking.
    sink : TextIO or None
        Stream to write to, below its own buffer; None: the text is dropped.
    banners : BannerFilter, optional
        Takes out ``mpirun``'s blocks about failed ranks.

    Attributes
    ----------
    error : OSError or None
        Why the sink took no more; the text is dropped from then on.
    tail : bytes
        The newest text.
    """

    def __init__(self, source: int, sink: TextIO | None, banners: BannerFilter | None = None) -> None:
        os.set_blocking(source, False)
        self.error: OSError | None = None
        self.tail = b""
        self._source: int | None = source
        self._sink = _descriptor(sink)
        self._banners = banners
        self._waiting = b""
        self._read_at = 0.0

    @property
    def is_waiting(self) -> bool:
        """Whether there is text that the sink has not taken yet."""
        return bool(self._waiting)

    def register(self, poller: "select.poll") -> None:
        """Tell a poller what can be done next."""
        # A reader that does not keep up slows the run down, as it would without us.
        if self._source is not None and len(self._waiting) < _MOST_WAITING_BYTES:
            poller.register(self._source, select.POLLIN)
        if self._sink is not None and self._waiting:
            poller.register(self._sink, select.POLLOUT)

    def pass_on(self, ready: set[int]) -> None:
        """Read and write what can be done without waiting.

        Parameters
        ----------
        ready : set of int
            Descriptors that a poller found ready.
        """
        if self._source in ready:
            self._read()
        elif self._banners and self._banners.is_holding and time.monotonic() - self._read_at > _HELD_TEXT_S:
            self.add(self._banners.release())
        if self._sink in ready:
            self._write()

    def read_rest(self) -> None:
        """Read what is left when nobody writes into the source any more."""
        while self._source is not None and self._read():
            pass
        if self._banners:
            self.add(self._banners.release())

    def _read(self) -> bool:
        """Read a part; False where there was none."""
        assert self._source is not None
        try:
            chunk = os.read(self._source, _MOST_WAITING_BYTES)
        except BlockingIOError:
            return False
        self._read_at = time.monotonic()
        if not chunk:
            self._source = None
        self.add(self._banners.feed(chunk) if self._banners else chunk)
        return bool(chunk)

    def add(self, text: bytes) -> None:
        """Append text of our own.

        Parameters
        ----------
        text : bytes
            Dropped where the sink is gone.
        """
        self.tail = (self.tail + text)[-_TAIL_BYTES:]
        if self._sink is not None:
            self._waiting += text

    def _write(self) -> None:
        """Write a part that is small enough not to block where the sink is ready."""
        assert self._sink is not None
        try:
            num_written = os.write(self._sink, self._waiting[: select.PIPE_BUF])
        except BlockingIOError:
            return
        except OSError as error:
            self.error, self._sink, self._waiting = error, None, b""
            return
        self._waiting = self._waiting[num_written:]


def wait(relays: Iterable[Relay], reader: int, timeout_s: float) -> set[int]:
    """Wait until something can be done.

    Parameters
    ----------
    relays : iterable of Relay
        What may be read or written.
    reader : int
        One more descriptor to read.
    timeout_s : float
        Longest time to wait.

    Returns
    -------
    set of int
        The descriptors that are ready.
    """
    # Not epoll: it refuses files and /dev/null.
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    for relay in relays:
        relay.register(poller)
    return {descriptor for descriptor, _ in poller.poll(timeout_s * 1000)}


def _descriptor(stream: TextIO | None) -> int | None:
    """Empty a stream's own buffer and return its descriptor, or None where it has none."""
    try:
        assert stream is not None
        stream.flush()
        return stream.fileno()
    except (AssertionError, OSError, ValueError):
        return None
