"""Puts the service under load while its artifact changes: no 5xx, no lost trajectory, a clean shutdown.

    python tests/soak_serve.py --seconds 60
    python tests/soak_serve.py --seconds 5 --schemathesis /tmp/venv/bin/st

wrk (Debian's package) sends requests at full speed. Meanwhile the champion is switched, sometimes to a corrupt version;
clients send malformed bodies, disconnect in the middle of one, or ask for new trade-offs; and trajectories are posted,
the last of them during SIGTERM. Exits with 1 if there is a status of 500 or more or a traceback, an accepted trajectory
is not in the log exactly once, a request of wrk got no answer, or SIGTERM does not end the service with code 0.
--schemathesis checks the service against its own OpenAPI document instead of running wrk; its check
positive_data_acceptance is left out, because a JSON schema cannot say that a vector must not have norm 0.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from conftest import make_bank, queries_near

from rb_gpu import Registry
from rb_gpu.publish import write_artifact
from rb_gpu.trajectory_file import read_batches

A, B, CORRUPT = "20260101T000000-00000a", "20260102T000000-00000b", "20260103T000000-00000c"
LUA = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "{kind}"
local file = io.open("{path}", "rb")
wrk.body = file:read("*a")
file:close()
"""
MALFORMED = [b"", b"{", b"[" * 9999, b'{"query":[NaN]}', b"\xff", b'{"query":[' + b"1," * 99 + b"1]}", b"null"]


class Drive:
    """The disturbances that run next to wrk until `stop` is set, each in a thread."""

    def __init__(self, registry: Registry, port: int, query: list[float]) -> None:
        self.registry, self.port, self.query = registry, port, query
        self.statuses: Counter[int] = Counter()
        self.accepted: list[int] = []
        self.switches = self.hung_up = 0
        self.stop, self.ending = threading.Event(), threading.Event()
        self.failures: list[str] = []

    def switch(self) -> None:
        """Switches the champion every 50 ms by replacing the link, every tenth time to a corrupt version."""
        while not self.stop.wait(0.05):
            self.switches += 1
            version = CORRUPT if self.switches % 10 == 0 else (A, B)[self.switches % 2]
            link = self.registry.path / ".tmp-soak"
            link.symlink_to(version)
            link.replace(self.registry.path / "champion")

    def malform(self) -> None:
        """Posts malformed bodies with random content types."""
        rng = random.Random(0)
        while not self.stop.wait(0.005):
            path = rng.choice(["optimized_params", "optimized_params/batch", "similar", "trajectories", "feedback"])
            kind = rng.choice(["application/json", "application/octet-stream", "text/plain"])
            self._post(f"/v1/{path}", rng.choice(MALFORMED), kind)

    def hang_up(self) -> None:
        """Connects as a client that disconnects in the middle of its body."""
        head = b"POST /v1/similar HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{"
        while not self.stop.wait(0.05):
            with socket.create_connection(("127.0.0.1", self.port)) as sock:
                sock.sendall(head)
                time.sleep(0.01)
            self.hung_up += 1

    def weigh(self) -> None:
        """Asks for new trade-offs, for each of which the service has to judge the bank again."""
        rng = random.Random(1)
        while not self.stop.wait(0.5):
            body = json.dumps({"query": self.query, "tradeoff": rng.random()}).encode()
            self._post("/v1/optimized_params", body, "application/json")

    def record(self) -> None:
        """Posts ten trajectories at a time until the service is gone; those answered with 202 must be in the log."""
        start = status = 0
        while status or not self.ending.is_set():
            time.sleep(0.002)
            ids = list(range(start, start + 10))
            rows = [
                {
                    "id": i,
                    "query_embedding": self.query,
                    "precision": 0.5,
                    "recall": 0.5,
                    "latency_us": 9,
                    "timestamp": 9,
                }
                for i in ids
            ]
            body = json.dumps({"trajectories": rows}).encode()
            status = self._post("/v1/trajectories", body, "application/json")
            if status == 202:
                self.accepted += ids
            start += 10

    def _post(self, path: str, body: bytes, kind: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("POST", path, body, {"Content-Type": kind})
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            if not self.ending.is_set():
                self.failures.append(f"{path}: {error!r}")
            return 0
        finally:
            connection.close()
        self.statuses[status] += 1
        return status


def wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    """Waits until the service listens. Raises RuntimeError if it exits before."""
    while process.poll() is None:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"the service ended with {process.returncode}")


def load(seconds: int, port: int, folder: Path, query: np.ndarray) -> str:
    """wrk's report; requests have raw bodies in the first half of the time and JSON bodies in the second."""
    bodies = {"application/octet-stream": query.tobytes(), "application/json": json.dumps({"query": query.tolist()})}
    report = ""
    for kind, body in bodies.items():
        path, script = folder / "body", folder / "wrk.lua"
        path.write_bytes(body if isinstance(body, bytes) else body.encode())
        script.write_text(LUA.format(kind=kind, path=path))
        url = f"http://127.0.0.1:{port}/v1/optimized_params"
        command = ["wrk", "-t1", "-c16", f"-d{max(1, seconds // 2)}s", "--latency", "-s", str(script), url]
        report += f"{kind}\n" + subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return report


def check(port: int, folder: Path, schemathesis: str) -> str:
    """The end of schemathesis's report."""
    command = [
        schemathesis, "run", f"http://127.0.0.1:{port}/openapi.json", "--max-examples", "200",
        "--exclude-checks", "positive_data_acceptance",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout[-1500:] + ("" if done.returncode == 0 else f"\nschemathesis ended with {done.returncode}")


def main() -> int:
    """Runs the soak and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--schemathesis")
    options = parser.parse_args()
    if options.schemathesis is None and shutil.which("wrk") is None:
        parser.error("wrk is not installed; apt-get install wrk, or give --schemathesis")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        registry = Registry(folder / "artifacts")
        for version, seed in ((A, 0), (B, 5)):
            write_artifact(registry.path / version, make_bank(256, 11, 384, seed), {})
        shutil.copytree(registry.path / A, registry.path / CORRUPT)
        bank_file = registry.path / CORRUPT / "bank.safetensors"
        bank_file.chmod(0o644)
        with bank_file.open("r+b") as file:
            file.seek(5000)
            file.write(b"corrupt")
        registry.promote(A, "")
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        command = [
            sys.executable, "-m", "rb_gpu.serve.main", str(registry.path / "champion"), "--port", str(port),
            "--log", str(folder / "log.sqlite"), "--reload-every", "0.02",
        ]  # fmt: skip
        with (folder / "service.log").open("wb") as log:
            process = subprocess.Popen(command, stderr=log)
        wait_until_ready(port, process)
        query = queries_near(make_bank(256, 11, 384, 0), 2)[1]
        drive = Drive(registry, port, query.tolist())
        recorder = threading.Thread(target=drive.record)
        beside = (drive.switch, drive.malform, drive.hang_up, drive.weigh)
        threads = [threading.Thread(target=target) for target in beside]
        for thread in (*threads, recorder):
            thread.start()
        try:
            if options.schemathesis:
                report = check(port, folder, str(Path(options.schemathesis).absolute()))
            else:
                report = load(options.seconds, port, folder, query)
        finally:
            drive.stop.set()
            for thread in threads:
                thread.join()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/metrics")
        metrics = connection.getresponse().read().decode()
        connection.close()
        before_end = len(drive.accepted)
        drive.ending.set()
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        recorder.join()
        logged = Counter(i for batch in read_batches(folder / "log.sqlite") for i in batch["id"].tolist())
        traces = (folder / "service.log").read_text().count("Traceback")
    lost = [i for i in drive.accepted if logged[i] != 1]
    bad = [line for line in metrics.splitlines() if re.search(r'status="5', line)]
    bad += [f"{status} at the end" for status in drive.statuses if status >= 500]
    bad += re.findall(r"Non-2xx.*|Socket errors.*", report)
    lines = [
        report,
        f"{drive.switches} switches, {drive.hung_up} hung up, "
        + ", ".join(re.findall(r"rb_gpu_reloads_total \d+", metrics)),
        f"beside wrk: {dict(drive.statuses)}",
        f"{len(drive.accepted)} trajectories accepted, {len(drive.accepted) - before_end} of them after SIGTERM; "
        f"{len(lost)} not once in the log",
        f"5xx: {bad or 'none'}; connections refused or cut: {drive.failures or 'none'}; tracebacks: {traces}",
        f"ended with {code}",
    ]
    print("\n".join(lines))
    wrong = bool(lost or bad or drive.failures or code or traces or "schemathesis ended" in report)
    return int(wrong or not drive.accepted)


if __name__ == "__main__":
    sys.exit(main())
