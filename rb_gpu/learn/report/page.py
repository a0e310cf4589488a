"""The templates of the self-contained pages, and the digest with which a page allows its own script and no other."""

from __future__ import annotations

import base64
import hashlib

from jinja2 import Environment, PackageLoader, StrictUndefined

from rb_gpu.learn.report.formats import sentence


def templates() -> Environment:
    """The Jinja environment of the pages. It escapes every text that enters a template."""
    environment = Environment(
        loader=PackageLoader("rb_gpu.learn", "report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["sentence"] = sentence
    return environment


def script_digest(environment: Environment) -> str:
    """Base64 of the sha256 of the pages' script, as a content security policy expects it."""
    script = environment.get_template("page.js").render()
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
