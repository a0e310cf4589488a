"""The command `rb-serve`: loads an artifact, follows its registry, and answers until it is told to stop."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from rb_gpu.artifact import read_key
from rb_gpu.bank import ReasoningBank
from rb_gpu.errors import RbGpuError
from rb_gpu.serve.app import make_app

log = logging.getLogger("rb_gpu.serve")

SHUTDOWN_S = 10


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "rb-serve", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("artifact", type=Path, help="an artifact's folder, or a link to one such as artifacts/champion")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=_port, default=8080, help="port to listen on")
    parser.add_argument("--log", type=Path, help="SQLite file for trajectories and feedback; none are kept without it")
    parser.add_argument("--search", choices=("auto", "exact", "index"), default="auto", help="how patterns are found")
    parser.add_argument("--reload-every", type=float, default=1.0, help="seconds between checks for a new artifact")
    parser.add_argument("--api-key-file", type=Path, help="file with the API key for /v1; no key is asked without it")
    parser.add_argument("--hmac-key-file", type=Path, help="file with the key that artifacts must be signed with")
    parser.add_argument("--max-body-bytes", type=_count, default=2**24, help="largest request body")
    parser.add_argument("--max-batch", type=_count, default=4096, help="most queries or trajectories per request")
    parser.add_argument("--max-concurrency", type=_count, default=1000, help="most requests in progress at once")
    parser.add_argument("--root-path", type=_root_path, default="", help="path prefix that a proxy strips")
    return parser.parse_args(given)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not an integer >= 1")
    return number


def _port(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port in [1, 65535]")
    return number


def _root_path(text: str) -> str:
    path = text.rstrip("/")
    if path and not path.startswith("/"):
        raise argparse.ArgumentTypeError(f"{text} does not start with /")
    return path


def _api_key(path: Path) -> bytes:
    """The key that requests must send. Raises ArtifactError if it cannot be read, ValueError if a header cannot hold
    it.
    """
    key = read_key(path, "--api-key-file")
    if not all(0x21 <= byte <= 0x7E for byte in key):
        raise ValueError(f"--api-key-file={path}: the key is not printable ASCII without spaces; make it of hex digits")
    return key


def main(given: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM, SIGINT or, unless it is ignored, SIGHUP; then finishes the requests in progress and flushes
    the log. Returns an exit code.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    options = _arguments(given)
    try:
        hmac_key = None if options.hmac_key_file is None else read_key(options.hmac_key_file, "--hmac-key-file")
        api_key = None if options.api_key_file is None else _api_key(options.api_key_file)
        bank = ReasoningBank.load(options.artifact, options.search, options.log, hmac_key)
        bank.watch(options.reload_every)
    except (RbGpuError, ValueError) as error:
        log.error("%s", error)
        return 1
    log.info("serving %s, %d patterns, search %s", bank.version, len(bank.patterns), bank.search_name)
    app = make_app(
        bank, options.log is not None, api_key, options.max_body_bytes, options.max_batch, options.max_concurrency
    )
    config = uvicorn.Config(
        app, options.host, options.port, access_log=False, timeout_graceful_shutdown=SHUTDOWN_S, log_config=None,
        root_path=options.root_path,
    )  # fmt: skip
    server = uvicorn.Server(config)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # after its shutdown uvicorn raises again the signal that it caught, by which the process would die. SIGHUP,
        # sent when a terminal closes, is handled alike, as its default action would lose what the log has queued
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, server.handle_exit)
    try:
        server.run()
    except SystemExit:  # the address is not available; uvicorn exits with 3, which here means that a gate refused
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
