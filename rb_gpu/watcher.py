"""A daemon thread that looks for a new artifact now and then."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable

log = logging.getLogger(__name__)

# a file system that hangs must not keep a service from ending
STOP_S = 5.0

_watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()


class Watcher:
    """Calls a method every interval_s seconds, for as long as its object lives and until `stop`. Goes on in a forked
    child. Raises ValueError where interval_s is not positive.
    """

    def __init__(self, method: Callable[[], object], interval_s: float) -> None:
        if not 0 < interval_s <= threading.TIMEOUT_MAX:  # false for NaN too
            raise ValueError(f"interval_s={interval_s!r} is not a positive number of seconds; try 1.0")
        # weak, so that an object that nobody uses is freed
        self._method, self._interval_s = weakref.WeakMethod(method), interval_s
        self._start()
        _watchers.add(self)

    def _start(self) -> None:
        self._stopped = threading.Event()
        arguments = (self._method, self._interval_s, self._stopped)
        self._thread = threading.Thread(target=_run, args=arguments, name="rb_gpu watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; one call of the method may be under way and is waited for, at most STOP_S seconds."""
        _watchers.discard(self)
        self._stopped.set()
        self._thread.join(STOP_S)


def _run(method_of: weakref.WeakMethod[Callable[[], object]], interval_s: float, stopped: threading.Event) -> None:
    while not stopped.wait(interval_s):
        method = method_of()
        if method is None:
            return
        try:
            method()
        except Exception:
            # whatever it is, a dead watcher would serve the old artifact for ever
            log.exception("a look for a new artifact failed; trying again")
        del method


def _after_fork_in_child() -> None:
    for watcher in list(_watchers):
        watcher._start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
