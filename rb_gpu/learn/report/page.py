"""The templates of pages that need no network, and the digest by which a page lets its own script run and no other."""

from __future__ import annotations

import base64
import hashlib

from jinja2 import Environment, PackageLoader, StrictUndefined

from rb_gpu.learn.report.formats import sentence


def templates() -> Environment:
    """Every text that comes from data is escaped where it enters one."""
    environment = Environment(
        loader=PackageLoader("rb_gpu.learn", "report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["sentence"] = sentence
    return environment


def script_digest(environment: Environment) -> str:
    """sha256 of the script of the pages, base64, as a content security policy names it."""
    script = environment.get_template("page.js").render()
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
