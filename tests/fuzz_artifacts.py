"""Fuzzes artifacts: a mutated artifact must be refused with ArtifactError, or load and give right answers.

    python -m tests.fuzz_artifacts --mutants 100000 --seed 0 --jobs 2
    python -m tests.fuzz_artifacts --seed 0 --only 1234 --keep /tmp/mutant

A mutant reveals a bug if an exception other than ArtifactError is raised, an answer is wrong, the process dies, it
takes more than MAX_SECONDS, or memory grows by more than twice the files' size plus SLACK. Exits with 1 on any bug.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from fuzz_answers import ask, ask_router, try_artifact
from fuzz_files import INDEX, ROUTER, Mutant, bases
from fuzz_mutations import MUTATIONS, kind_of, mutant

from rb_gpu import FastGRNNRouter, ReasoningBank

MAX_SECONDS = 2.0  # CPU time; a mutant that blocks instead is killed after WAIT_SECONDS of wall time
WAIT_SECONDS = 10.0
SLACK = 8 * 2**20  # bytes for the allocator, error texts and modules that an error path imports
GUARD = 2**30  # bytes of address space that a worker may add; an allocation beyond fails, which counts as a bug
CHUNK = 750
EVERY_TRADEOFF = 10  # trade-offs are tried on every tenth mutant: one costs more than all other lookups together


@dataclass
class Found:
    """The results: counts by (mutation kind, verdict), and by (kind, bug) the indices of the mutants that show it."""

    verdicts: Counter[tuple[str, str]] = field(default_factory=Counter)
    bugs: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def add(self, index: int, kind: str, verdict: str, wrong: Sequence[str]) -> None:
        self.verdicts[kind, "BUG" if wrong else verdict] += 1
        for what in wrong:
            self.bugs.setdefault((kind, what), []).append(index)


@dataclass
class Fuzzer:
    """Tries the mutants of one seed in forked workers."""

    bases: list[Mutant]
    folder: Path
    seed: int = 0

    def run(self, indices: Sequence[int], jobs: int = 1, kinds: frozenset[str] = frozenset()) -> Found:
        found = Found()
        chunks = [indices[i : i + CHUNK] for i in range(0, len(indices), CHUNK)]
        with ThreadPoolExecutor(jobs) as pool:
            for records in pool.map(lambda chunk: list(self._chunk(chunk, kinds)), chunks):
                for record in records:
                    found.add(*record)
        return found

    def _chunk(self, indices: Sequence[int], kinds: frozenset[str]) -> Iterator[tuple[int, str, str, list[str]]]:
        todo = [i for i in indices if not kinds or kind_of(self.seed, i)[0] in kinds]
        while todo:
            records, died = self._worker(todo)
            at = len(records)
            if not died:
                yield from records
                return
            culprit, died = self._culprit(todo, at, died)
            yield from (record for record in records if record[0] != culprit)
            yield culprit, kind_of(self.seed, culprit)[0], "BUG", [died]
            # if an earlier mutant corrupted the memory, the one that died of it still has to be tried
            todo = todo[at + (culprit == todo[at]) :]

    def _culprit(self, todo: Sequence[int], at: int, died: str) -> tuple[int, str]:
        """The mutant that killed a worker, and how.

        Prefers one that kills a fresh worker alone. Otherwise earlier mutants corrupted the memory, and the description
        says how many of them it takes, found by bisection.
        """
        for index in {todo[at], todo[max(0, at - 1)]}:
            alone = self._worker([index])[1]
            if alone:
                return index, alone
        fewest, too_few = at + 1, 1
        while fewest - too_few > 1:
            middle = (fewest + too_few) // 2
            if self._worker(todo[at + 1 - middle : at + 1])[1]:
                fewest = middle
            else:
                too_few = middle
        return todo[at], f"{died}, only after {fewest - 1} others"

    def _worker(self, indices: Sequence[int]) -> tuple[list[tuple[int, str, str, list[str]]], str]:
        """Records of the finished mutants, and how the worker died ('' if it did not)."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                self._work(place, indices)
                status = 0
            except BaseException:
                (place / "failure").write_text(traceback.format_exc())
            finally:
                os._exit(status)
        status = os.waitpid(child, 0)[1]
        lines = (place / "records").read_text().splitlines() if (place / "records").exists() else []
        failure = (place / "failure").read_text() if (place / "failure").exists() else ""
        stack = (place / "stack").read_text(errors="replace") if (place / "stack").exists() else ""
        shutil.rmtree(place, ignore_errors=True)
        if failure or not lines:
            raise RuntimeError(f"the fuzzer itself failed, wait status {status}\n{failure}{stack}")
        records = [tuple(json.loads(line)) for line in lines[1:]]
        return records, _death(status, stack)

    def _work(self, place: Path, indices: Sequence[int]) -> None:
        _prepare_worker(place, self.bases)
        records = os.open(place / "records", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(records, b"ready\n")
        for index in indices:
            made = mutant(self.bases, self.seed, index)
            folder = place / "m"
            made.write(folder)
            verdict, wrong = try_measured(folder, made, index % EVERY_TRADEOFF == 0)
            shutil.rmtree(folder)
            os.write(records, (json.dumps([index, made.kind, verdict, wrong]) + "\n").encode())


def try_measured(folder: Path, made: Mutant, tradeoff: bool) -> tuple[str, list[str]]:
    """Verdict and bugs of the mutant in `folder`, including excessive time and memory."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    before, started = _memory("VmRSS"), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, 2 * MAX_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS)
    with np.errstate(all="ignore"):
        loaded, wrong = try_artifact(folder, made, tradeoff)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.setitimer(signal.ITIMER_PROF, 0)
    seconds, grown = time.process_time() - started, _memory("VmHWM") - before
    if seconds > MAX_SECONDS:
        wrong.append(f"slow: more than {MAX_SECONDS:g} s")
    if grown > 2 * made.size + SLACK:
        wrong.append(f"memory: more than twice the files and {SLACK >> 20} MB")
    return "loaded" if loaded else "refused", wrong


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def _prepare_worker(place: Path, bases: list[Mutant]) -> None:
    import faiss

    faiss.omp_set_num_threads(1)  # a forked process does not inherit its parent's threads
    logging.disable()
    stack = os.open(place / "stack", os.O_WRONLY | os.O_CREAT)
    os.dup2(stack, 2)
    faulthandler.enable(stack, all_threads=False)
    for number in (signal.SIGPROF, signal.SIGALRM):
        faulthandler.register(number, stack, all_threads=False, chain=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # warm up, so that memory taken by the first load and first lookups is not counted against a mutant
    for base in bases:
        base.write(place / "warm")
        for search in ("auto", "index") if INDEX in base.files else ("auto",):
            ask(ReasoningBank.load(place / "warm", search=search), tradeoff=True)
        if ROUTER in base.files:
            ask_router(FastGRNNRouter.load(place / "warm" / ROUTER))
        shutil.rmtree(place / "warm")
    gc.collect()
    gc.freeze()
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + GUARD,) * 2)


def _death(status: int, stack: str) -> str:
    if status == 0:
        return ""
    if not os.WIFSIGNALED(status):
        return f"exit status {os.WEXITSTATUS(status)}"
    number = os.WTERMSIG(status)
    at = [line.strip() for line in stack.splitlines() if "/rb_gpu/" in line and " in " in line]
    where = at[0].replace('"', "").rsplit("/", 1)[-1] if at else "?"
    name = {signal.SIGPROF: f"hang: over {2 * MAX_SECONDS:g} s", signal.SIGALRM: f"blocked {WAIT_SECONDS:g} s"}
    return f"{name.get(number, f'killed by {signal.Signals(number).name}')} at {where}"


def show(found: Found, seed: int) -> None:
    kinds = sorted({kind for kind, _ in found.verdicts})
    lines = [f"{'mutation':16} {'refused':>8} {'loaded':>8} {'BUG':>8}"]
    for kind in kinds:
        counts = [found.verdicts[kind, verdict] for verdict in ("refused", "loaded", "BUG")]
        lines.append(f"{kind:16} {counts[0]:8} {counts[1]:8} {counts[2]:8}")
    for (kind, what), indices in sorted(found.bugs.items(), key=lambda item: -len(item[1])):
        lines.append(f"BUG {len(indices):6} x {kind}: {what}  (--seed {seed} --only {indices[0]})")
    print("\n".join(lines))  # noqa: T201


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", default=[], choices=list(MUTATIONS))
    parser.add_argument("--only", type=int, help="tries one mutant in this process, with the whole traceback")
    parser.add_argument("--keep", type=Path, help="with --only: where the mutant's files stay")
    options = parser.parse_args()
    memory = Path("/dev/shm")  # noqa: S108
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))
    try:
        made = bases(folder / "bases")
        fuzzer = Fuzzer(made, folder, options.seed)
        if options.only is not None:
            one = mutant(made, options.seed, options.only)
            place = options.keep or folder / "kept"
            one.write(place)
            print(f"{one.kind}, base {one.base}: {one.what}", flush=True)  # noqa: T201
        indices = [options.only] if options.only is not None else range(options.first, options.first + options.mutants)
        started = time.monotonic()
        found = fuzzer.run(indices, options.jobs, frozenset(options.kinds))
        show(found, options.seed)
        total = Counter[str]()
        for (_, verdict), count in found.verdicts.items():
            total[verdict] += count
        told = ", ".join(f"{total[verdict]:,} {verdict}" for verdict in ("refused", "loaded", "BUG"))
        print(f"{sum(total.values()):,} mutants in {time.monotonic() - started:.0f} s: {told}")  # noqa: T201
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if found.bugs else 0


if __name__ == "__main__":
    sys.exit(main())
