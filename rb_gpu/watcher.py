"""A daemon thread that calls a method periodically; ReasoningBank.watch uses it to look for a new artifact."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable

from rb_gpu.types import is_real

log = logging.getLogger(__name__)

# a hanging file system must not keep a service from ending
STOP_S = 5.0

_watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()


class Watcher:
    """Calls a method every interval_s seconds, until `stop` or until the method's object is freed. Continues in a
    forked child. Raises ValueError if interval_s is not positive.
    """

    def __init__(self, method: Callable[[], object], interval_s: float) -> None:
        if not (is_real(interval_s) and 0 < interval_s <= threading.TIMEOUT_MAX):  # false for NaN too
            raise ValueError(f"interval_s={interval_s!r} is not a positive number of seconds; try 1.0")
        # weak, so that the watcher does not keep an unused object alive
        self._method = weakref.WeakMethod(method)
        self._interval_s = float(interval_s)  # a wait takes none of NumPy's numbers
        self._start()
        _watchers.add(self)

    def _start(self) -> None:
        self._stopped = threading.Event()
        arguments = (self._method, self._interval_s, self._stopped)
        self._thread = threading.Thread(target=_run, args=arguments, name="rb_gpu watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread. A call of the method that is in progress is waited for, at most STOP_S seconds."""
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
            # whatever the error: if the watcher died, the old artifact would be served for ever
            log.exception("looking for a new artifact failed; will try again")
        del method


def _after_fork_in_child() -> None:
    for watcher in list(_watchers):
        watcher._start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
