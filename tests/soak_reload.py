"""Switches the champion under readers at full speed: every answer must come entirely from one artifact, and none late.

    python tests/soak_reload.py --seconds 60 --reloads 500 --threads 8

Every tenth switch is to a corrupt artifact, which must have no effect. Prints the p99 of a lookup without and with
reloads; exits with 1 on a wrong answer or an exception in a reader.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from conftest import make_bank, queries_near

from rb_gpu import OptimizedParams, ReasoningBank, write_artifact
from rb_gpu.bank_data import BankData

TARGET = 3.0  # p99 during reloads, as a multiple of the p99 without
CORRUPT_EVERY = 10
SLICES = 10
FIGURES = ("confidence", "expected_quality", "expected_gain")


@dataclass
class Soak:
    """What the readers observed."""

    latencies: dict[str, list[list[float]]] = field(default_factory=lambda: {"quiet": [], "reloads": []})
    answers: dict[str, int] = field(default_factory=lambda: {"a": 0, "b": 0})
    wrong: list[str] = field(default_factory=list)
    reloaded: int = 0
    kept: int = 0
    served: str = "a"

    def ratios(self) -> list[float]:
        """p99 with reloads over p99 without, for each pair of adjacent time slices."""
        pairs = zip(self.latencies["reloads"], self.latencies["quiet"], strict=True)
        return [float(np.percentile(busy, 99) / np.percentile(quiet, 99)) for busy, quiet in pairs]


def two_banks(leaves: int, dim: int) -> dict[str, BankData]:
    """Two banks with the same leaf centroids whose answers differ in everything: config, tier, pattern id, quality."""
    made = {}
    for number, name in enumerate(("a", "b")):
        one = make_bank(leaves, 5, dim, seed=3)
        arrays = {key: array.copy() for key, array in one.arrays.items()}
        arrays["pattern_id"] += np.uint64(1_000_000 * (number + 1))
        arrays["config_context_tokens"] += np.uint32(100 * (number + 1))
        arrays["config_ef_search"] += np.uint32(number + 1)
        arrays["expected_quality"] = arrays["expected_quality"] / np.float32(4) + np.float32(number)
        tiers = tuple(f"{name}-{tier}" for tier in one.tiers)
        if number:  # makes another config the best one
            for key in ("score", "probability", "gain", "expected_quality"):
                arrays[key] = np.ascontiguousarray(np.roll(arrays[key], 1, axis=1))
            default = (one.default + 1) % 5
            arrays["verdict_config"] = (arrays["verdict_config"] + 1) % 5
            one = replace(one, default=default)
        made[name] = replace(one, arrays=arrays, tiers=tiers)
    return made


def publish(folder: Path, leaves: int, dim: int) -> None:
    """Writes the artifacts a and b, copies of both with a flipped bit, and the link "champion"."""
    for name, data in two_banks(leaves, dim).items():
        write_artifact(folder / name, data, {})
        shutil.copytree(folder / name, folder / f"{name}-corrupt")
        path = folder / f"{name}-corrupt" / "bank.safetensors"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    switch(folder, "a")


def switch(folder: Path, name: str) -> None:
    temporary = folder / ".next"
    temporary.symlink_to(name)
    temporary.replace(folder / "champion")


class Expected:
    """The two possible answers to each query, computed before anything is switched."""

    def __init__(self, folder: Path, queries: np.ndarray) -> None:
        banks = {name: ReasoningBank.load(folder / name) for name in ("a", "b")}
        self.answers = [{name: bank.optimized_params(query) for name, bank in banks.items()} for query in queries]
        for each in self.answers:
            a, b = each["a"], each["b"]
            if a.params.model_tier == b.params.model_tier or a.expected_quality == b.expected_quality:
                raise AssertionError("a and b cannot be told apart")

    def whose(self, query: int, answer: OptimizedParams) -> str | None:
        for name, right in self.answers[query].items():
            same = all(abs(getattr(answer, f) - getattr(right, f)) < 1e-5 for f in FIGURES)
            rest = (answer.params, answer.config_id, answer.source, answer.reason)
            if same and rest == (right.params, right.config_id, right.source, right.reason):
                return name
        return None


def run(seconds: float, reloads: int, threads: int, leaves: int = 200, dim: int = 64) -> Soak:
    """Runs readers without and with reloads, in alternating time slices, so that other load on the machine affects both
    alike.
    """
    soak, lock = Soak(), threading.Lock()
    level = logging.getLogger("rb_gpu").level
    logging.getLogger("rb_gpu").setLevel(logging.CRITICAL)  # refusals of corrupt artifacts are expected
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        publish(folder, leaves, dim)
        queries = queries_near(two_banks(leaves, dim)["a"], 64)
        expected = Expected(folder, queries)
        bank = ReasoningBank.load(folder / "champion")

        def read(phase: str, stop: threading.Event) -> None:
            taken: list[float] = []
            seen = {"a": 0, "b": 0}
            wrong: list[str] = []
            number = 0
            while not stop.is_set():
                number = (number + 1) % len(queries)
                try:
                    started = time.perf_counter()
                    answer = bank.optimized_params(queries[number])
                    taken.append(time.perf_counter() - started)
                    name = expected.whose(number, answer)
                    if name is None:
                        wrong.append(f"neither a's nor b's: {answer}")
                    else:
                        seen[name] += 1
                except Exception as error:
                    wrong.append(repr(error))
            with lock:
                soak.latencies[phase][-1] += taken
                soak.wrong += wrong
                for name, count in seen.items():
                    soak.answers[name] += count

        slices = max(1, min(SLICES, reloads // CORRUPT_EVERY))
        each, number = seconds / 2 / slices, 0
        for i in range(slices):
            upto = reloads * (i + 1) // slices
            switches = range(number + 1, upto + 1)
            _phase(soak, read, "quiet", threads, lambda: time.sleep(each))
            _phase(soak, read, "reloads", threads, lambda now=switches: _switching(bank, folder, soak, each, now))
            number = upto
    finally:
        logging.getLogger("rb_gpu").setLevel(level)
        shutil.rmtree(folder)
    return soak


def _phase(
    soak: Soak,
    read: Callable[[str, threading.Event], None],
    phase: str,
    threads: int,
    meanwhile: Callable[[], None],
) -> None:
    stop = threading.Event()
    soak.latencies[phase].append([])
    readers = [threading.Thread(target=read, args=(phase, stop), daemon=True) for _ in range(threads)]
    for reader in readers:
        reader.start()
    try:
        meanwhile()
    finally:
        stop.set()
        for reader in readers:
            reader.join()


def _switching(bank: ReasoningBank, folder: Path, soak: Soak, seconds: float, numbers: range) -> None:
    started = time.monotonic()
    for done, number in enumerate(numbers, 1):
        corrupt = number % CORRUPT_EVERY == 0
        other = "b" if soak.served == "a" else "a"
        switch(folder, f"{other}-corrupt" if corrupt else other)
        changed = bank.reload_if_changed()
        if changed == corrupt:
            soak.wrong.append(f"switch {number} to {other}, corrupt={corrupt}: reload_if_changed() is {changed}")
        if not corrupt:
            soak.served = other
        soak.reloaded += changed
        soak.kept += not changed
        time.sleep(max(0.0, started + seconds * done / len(numbers) - time.monotonic()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--reloads", type=int, default=500)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--leaves", type=int, default=200)
    parser.add_argument("--dim", type=int, default=64)
    options = parser.parse_args()
    started = time.monotonic()
    soak = run(options.seconds, options.reloads, options.threads, options.leaves, options.dim)
    lines = [
        f"{soak.reloaded} reloads, {soak.kept} corrupt ones kept out, in {time.monotonic() - started:.0f} s",
        f"answers {soak.answers}, wrong {len(soak.wrong)} {soak.wrong[:3]}",
    ]
    for phase, slices in soak.latencies.items():
        taken = np.concatenate([np.array(one) for one in slices])
        p50, p99, p999, worst = 1e3 * np.percentile(taken, [50, 99, 99.9, 100])
        figures = f"p50 {p50:.3f}, p99 {p99:.2f}, p99.9 {p999:.1f}, worst {worst:.1f}"
        lines.append(f"{phase:8} {len(taken)} lookups, ms: {figures}")
    ratios = soak.ratios()
    spread = f"{min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} pairs of slices"
    lines.append(f"p99 with reloads is {np.median(ratios):.2f} times the quiet one ({spread}; target {TARGET:g})")
    print("\n".join(lines))
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
