"""Shows a job's progress: bars on a terminal, log lines elsewhere, and always events.jsonl in the run's folder."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rb_gpu.learn.progress import channel

EVENTS_FILE = "events.jsonl"
# minimum seconds between two log lines, and between two events, of the same task
LINE_SECONDS, EVENT_SECONDS = 10.0, 0.5

# terminal width in characters from which a line has room for a full bar and a rate
WIDE = 72

log = logging.getLogger("rb_gpu")


class Events(logging.Handler):
    """Writes each event as one line of JSON with its time. Of a task's steps it writes one per EVENT_SECONDS and the
    last.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("a", buffering=1)
        self._due: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one event."""
        event = _event(record)
        if event["event"] != "step" or _is_due(self._due, event, record.created, EVENT_SECONDS):
            self._file.write(json.dumps({"time": round(record.created, 3), **event}) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        super().close()


class Lines(logging.Handler):
    """Logs a progress line every LINE_SECONDS for a task that takes longer than that."""

    def __init__(self) -> None:
        super().__init__()
        self._due: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Logs a line if one is due."""
        event = _event(record)
        if event["event"] == "stage_start":
            self._due.clear()
        elif event["event"] == "step":
            first = event["task"] not in self._due
            if first:
                self._due[event["task"]] = record.created + LINE_SECONDS
            elif record.created >= self._due[event["task"]]:
                self._due[event["task"]] = record.created + LINE_SECONDS
                total = "" if event["total"] is None else f" of {event['total']:,}"
                log.info("%s: %s%s %s", event["task"], f"{event['done']:,}", total, event["unit"])


class Bars(logging.Handler):
    """Draws a live bar for each task of the running stage, with its rate and remaining time. Between stages there are
    no bars, so that they do not overwrite what the job prints.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        # on a narrow terminal the bar shrinks and the rate is dropped, so that the times are not cut off
        wide = console.width >= WIDE
        columns = ("{task.fields[amount]:>22}", *(["{task.fields[rate]:>12}"] if wide else []))
        bar = BarColumn(max(4, min(32, console.width - (WIDE - 7 if wide else WIDE - 20))))
        self.progress = Progress(
            TextColumn("{task.description:<12}"), bar, *map(TextColumn, columns), TimeElapsedColumn(),
            TimeRemainingColumn(), console=console, transient=True, redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Adds, advances or clears bars."""
        event = _event(record)
        if event["event"] == "stage_start":
            self._clear()
            self._tasks[event["stage"]] = self.progress.add_task(event["stage"], total=None, amount="", rate="")
            self.progress.start()
        elif event["event"] == "stage_end":
            self._clear()
        else:
            self._step(event)

    def close(self) -> None:
        """Removes the bars, also those of a stage that failed."""
        self._clear()
        super().close()

    def _clear(self) -> None:
        for task in self._tasks.values():
            self.progress.remove_task(task)
        self._tasks.clear()
        self.progress.stop()

    def _step(self, event: dict[str, Any]) -> None:
        name, done, total = event["task"], event["done"], event["total"]
        if name not in self._tasks:
            self._tasks[name] = self.progress.add_task(name, total=total, amount="", rate="")
        task = self._tasks[name]
        of = "" if total is None else f"/{total:,}"
        self.progress.update(task, completed=done, total=total, amount=f"{done:,}{of} {event['unit']}")
        speed = next((one.speed for one in self.progress.tasks if one.id == task), None)
        if speed:
            self.progress.update(task, rate=f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.2g}/s")


class _Beside(logging.StreamHandler[Any]):
    """Prints log lines above the live bars, through the console that draws the bars."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def shown(folder: Path, quiet: bool) -> Iterator[None]:
    """Shows a job's progress inside the block. quiet: show only warnings and errors; events are still written."""
    root = logging.getLogger()
    with ExitStack() as stack:
        handlers: list[logging.Handler] = [Events(folder / EVENTS_FILE)]
        streams = [
            h for h in root.handlers if type(h) is logging.StreamHandler and h.stream in (sys.stdout, sys.stderr)
        ]
        if quiet:
            for stream in streams:
                stack.callback(stream.setLevel, stream.level)
                stream.setLevel(logging.WARNING)
        elif sys.stderr.isatty():
            console = Console(stderr=True)
            bars = Bars(console)
            for stream in streams:
                beside = _Beside(console)
                beside.setFormatter(stream.formatter)
                root.removeHandler(stream)
                root.addHandler(beside)
                stack.callback(root.addHandler, stream)
                stack.callback(root.removeHandler, beside)
            handlers.append(bars)
        else:
            handlers.append(Lines())
        level = channel.level
        channel.setLevel(logging.INFO)
        stack.callback(channel.setLevel, level)
        for handler in handlers:
            channel.addHandler(handler)
            stack.callback(handler.close)
            stack.callback(channel.removeHandler, handler)
        yield


def _event(record: logging.LogRecord) -> dict[str, Any]:
    event: dict[str, Any] = record.__dict__["event"]
    return event


def _is_due(due: dict[str, float], event: dict[str, Any], now: float, every: float) -> bool:
    if event["done"] != event["total"] and now < due.get(event["task"], 0.0):
        return False
    due[event["task"]] = now + every
    return True
