"""How a job shows where it is: bars on a terminal, lines elsewhere, and events.jsonl in the run's folder."""

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
# seconds between two lines, and between two events, of one task
LINE_SECONDS, EVENT_SECONDS = 10.0, 0.5

# columns of a terminal from which on a line has a bar and a rate
WIDE = 72

log = logging.getLogger("rb_gpu")


class Events(logging.Handler):
    """Writes every event as a line of JSON with its time; of the steps of a task, one in EVENT_SECONDS and the last."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("a", buffering=1)
        self._due: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one."""
        event = _event(record)
        if event["event"] != "step" or _is_due(self._due, event, record.created, EVENT_SECONDS):
            self._file.write(json.dumps({"time": round(record.created, 3), **event}) + "\n")

    def close(self) -> None:
        """Ends the file."""
        self._file.close()
        super().close()


class Lines(logging.Handler):
    """Logs a line on a task that takes longer than LINE_SECONDS, and one after each such time."""

    def __init__(self) -> None:
        super().__init__()
        self._due: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Logs one, where it is due."""
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
    """A live bar for each task of the stage that runs, with rate and remaining time; between stages there is none, so
    that what a job prints is not written over.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        # where all does not fit the bar shrinks and the rate goes: a cut time would tell nothing
        wide = console.width >= WIDE
        columns = ("{task.fields[amount]:>22}", *(["{task.fields[rate]:>12}"] if wide else []))
        bar = BarColumn(max(4, min(32, console.width - (WIDE - 7 if wide else WIDE - 20))))
        self.progress = Progress(
            TextColumn("{task.description:<12}"), bar, *map(TextColumn, columns), TimeElapsedColumn(),
            TimeRemainingColumn(), console=console, transient=True, redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Moves, adds or clears bars."""
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
        """Ends the display, also of a stage that failed."""
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
    """Log lines above live bars: through the console that draws them."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def shown(folder: Path, quiet: bool) -> Iterator[None]:
    """Shows a job's progress meanwhile. quiet: warnings and errors only; events are written all the same."""
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
