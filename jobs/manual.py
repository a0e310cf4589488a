"""A job's manual page, made of its docstring and of conf/, and the nearest setting where one was mistyped."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from rb_gpu.errors import ConfigError
from rb_gpu.learn.job_config import JOBS

CONF = Path(__file__).resolve().parent.parent / "conf"
# columns of a page, and where what a setting means begins
WIDTH, INDENT = 118, 38
GROUP = re.compile(r"- (/?)(\w+)(?:@\w+)?: *\"?(\w+)\"?")
ENDING = """
Exit codes: 0 done, 1 an error that a line of the log explains, 2 a setting that Hydra refuses, 3 the gate refused.
--quiet: warnings and errors only.  --cfg job: the settings as they would run.  -m: a run for each combination of
settings given as lists with commas.  --hydra-help: Hydra's own flags.  Anything else: rb_gpu's README.
"""


def page(name: str, doc: str) -> str:
    """The manual page of the job whose settings are conf/NAME.yaml. doc: its module's docstring."""
    main = CONF / f"{name}.yaml"
    parts = [doc.strip(), "Settings, as KEY=VALUE, with their defaults:", *_settings(main, "")]
    for group, option in _groups(main):
        others = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        choice = f", {group}={' | '.join(others)}" if len(others) > 1 else ""
        # an option that sets other sections too is of its own; what the group has, its other options show
        shown = next(one for one in (option, *others) if "_global_" not in (CONF / group / f"{one}.yaml").read_text())
        listed = _settings(CONF / group / f"{shown}.yaml", f"{group}.")
        parts.append("\n".join([f"{group} ({option}{choice})", *listed]))
    return "\n\n".join(parts) + "\n" + ENDING


def _groups(main: Path) -> Iterator[tuple[str, str]]:
    """The groups of a job's defaults list, and the option of each that stands without being asked."""
    listed = main.read_text().split("\ndefaults:", 1)[1]
    for line in listed.splitlines()[1:]:
        if not line.startswith("  -"):
            break
        found = GROUP.match(line.strip())
        if found and (CONF / found[2] / f"{found[3]}.yaml").is_file():
            yield found[2], found[3]


def _settings(path: Path, prefix: str) -> Iterator[str]:
    """Each setting of a file with its whole key, and what the comments behind and under it say, unit included."""
    key, said, ahead = "", "", ""
    for line in [*path.read_text().split("  - _self_\n", 1)[1].splitlines(), "hydra:"]:
        text = line.strip()
        if line.startswith("#"):  # of the setting that follows
            ahead += f" {text[1:].strip()}"
        elif text.startswith("#"):
            said += f" {text[1:].strip()}"
        elif text:
            if key:
                yield from _entry(key, said)
            if line.startswith("hydra:"):
                return
            value, _, said = text.partition("#")
            name, _, value = value.partition(":")
            key, said, ahead = f"{prefix}{name}={value.strip()}", f"{ahead} {said}", ""


def _entry(key: str, said: str) -> Iterator[str]:
    lines = textwrap.wrap(said.strip(), WIDTH - INDENT) or [""]
    if len(key) >= INDENT - 3:
        yield f"  {key}"
        key = ""
    for line in lines:
        yield f"  {key:<{INDENT - 2}}{line}".rstrip()
        key = ""


def known_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every key of a schema, sections among them."""
    for field in fields(schema):
        yield f"{prefix}{field.name}"
        inner = field.default_factory
        if isinstance(inner, type) and is_dataclass(inner):
            yield from known_keys(inner, f"{prefix}{field.name}.")


def check_keys(name: str, arguments: Sequence[str]) -> None:
    """Raises ConfigError for a KEY=VALUE whose key the job does not have, with the nearest that it has.

    Hydra would refuse it too, without saying which was meant. What it alone understands is left to it.
    """
    known = set(known_keys(JOBS[name]))
    # Hydra's flags take values of their own
    given = [one for one in arguments if "=" in one and not one.startswith("-")]
    for argument in given:
        try:
            override = OverridesParser.create().parse_override(argument)
        except OverrideParseException:
            continue
        key = override.key_or_group.replace("/", ".")
        plain = not (override.is_add() or override.is_delete() or key.split(".")[0] == "hydra")
        # below a mapping, such as params.default, the setting's own check decides
        if not plain or any(key == one or (key.startswith(f"{one}.") and one not in _sections(known)) for one in known):
            continue
        near = _nearest(key, known)
        meant = f"did you mean {near}?" if near else f"python -m jobs.{name} --help lists all"
        raise ConfigError(f"{argument}: {key} is not a setting of jobs.{name}; {meant}")


def is_dry(arguments: Sequence[str]) -> bool:
    """Whether dry_run=true is among them."""
    given = [one for one in arguments if one.startswith("dry_run=")]
    return any(OverridesParser.create().parse_override(one).value() is True for one in given)


def _sections(known: set[str]) -> set[str]:
    return {key.rsplit(".", 1)[0] for key in known if "." in key}


def _nearest(key: str, known: set[str]) -> str | None:
    """The setting of the same last name elsewhere, else the one most like it, else one whose name begins with its."""
    last = key.rsplit(".", 1)[-1]
    ends = {one: one.rsplit(".", 1)[-1] for one in sorted(known)}
    same = [one for one, end in ends.items() if end == last]
    like = difflib.get_close_matches(key, ends, 1, 0.75)
    begun = [one for one, end in ends.items() if end.startswith(last)]
    return next(iter([*same, *like, *begun, *difflib.get_close_matches(key, ends, 1, 0.5)]), None)
