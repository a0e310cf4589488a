"""Builds a job's --help page from its docstring and the comments of conf/, and suggests settings for mistyped ones."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from rb_gpu.errors import ConfigError
from rb_gpu.learn.job_config import JOBS
from rb_gpu.params import PARAMETERS

CONF = Path(__file__).resolve().parent.parent / "conf"
DEFAULT = "params.default"
# width of a page in characters, and the column at which the description of a setting begins
WIDTH, INDENT = 118, 38
GROUP = re.compile(r"- /?(\w+)(?:@(\w+))?: *\"?(\w+)\"?(?: *# *(.*))?")
ENDING = """
Exit codes: 0 done, 1 an error that a line of the log explains, 2 a setting that Hydra rejects, 3 the gate refused.
--quiet: warnings and errors only.  --cfg job: the settings as they would run.  -m: one run for each combination of
comma-separated values.  --hydra-help: Hydra's own flags.  Everything else: rb_gpu's README.
"""


def page(name: str, doc: str) -> str:
    """The manual page of the job whose settings are in conf/NAME.yaml. doc: the docstring of the job's module."""
    main = CONF / f"{name}.yaml"
    own = dict(_settings(main, "")).values()
    parts = [doc.strip(), "\n".join(["Settings, as KEY=VALUE, with their defaults:", "", *own])]
    for group, place, option, said in _groups(main):
        if place is not None:
            parts.append(f"{place} ({option}): {said}; its settings are those of {group}, as {place}.KEY=VALUE")
            continue
        others = options_of(name, group)
        choice = f", {group}={' | '.join(others)}" if len(others) > 1 else ""
        # list a setting that only some options have once; leave out options that set other sections too
        entries: dict[str, str] = {}
        for one in dict.fromkeys([option, *others]):
            path = CONF / group / f"{one}.yaml"
            if "_global_" not in path.read_text():
                entries = dict(_settings(path, f"{group}.")) | entries
        parts.append("\n".join([f"{group} ({option}{choice})", *entries.values()]))
    return "\n\n".join(parts) + "\n" + ENDING


def options_of(name: str, group: str) -> list[str]:
    """The options of a group that the job can use: one that also sets other sections needs a job that has them."""
    has = {field.name for field in fields(JOBS[name])} | {"defaults"}
    texts = {path.stem: path.read_text() for path in sorted((CONF / group).glob("*.yaml"))}
    return [
        option for option, text in texts.items()
        if "_global_" not in text or has.issuperset(re.findall(r"^(\w+):", text, re.MULTILINE))
    ]  # fmt: skip


def _groups(main: Path) -> Iterator[tuple[str, str | None, str, str | None]]:
    """The groups in a job's defaults list: (group, the key it is placed under if not its own name, the default option,
    the comment after it).
    """
    listed = main.read_text().split("\ndefaults:", 1)[1]
    for line in listed.splitlines()[1:]:
        if not line.startswith("  -"):
            break
        found = GROUP.match(line.strip())
        if found and (CONF / found[1] / f"{found[3]}.yaml").is_file():
            yield found[1], found[2], found[3], found[4]


def _settings(path: Path, prefix: str) -> Iterator[tuple[str, str]]:
    """Yields each setting of a file: its full key and its lines on the page. The description joins the comments above
    the setting, after it, and on the indented lines below it.
    """
    key, value, said, ahead, section = "", "", "", "", ""
    for line in [*path.read_text().split("  - _self_\n", 1)[1].splitlines(), "hydra:"]:
        text = line.strip()
        if line.startswith("#"):  # describes the setting that follows
            ahead += f" {text[1:].strip()}"
        elif text.startswith("#"):
            said += f" {text[1:].strip()}"
        elif text:
            if value:
                yield key, _entry(f"{key}={value}", said)
            if line.startswith("hydra:"):
                return
            stated, _, said = text.partition("#")
            name, _, value = (part.strip() for part in stated.partition(":"))
            section = f"{section}." if line.startswith(" ") else ""
            key, said, ahead = f"{prefix}{section}{name}", f"{ahead} {said}", ""
            section = name if not value else section.rstrip(".")


def _entry(setting: str, said: str) -> str:
    lines = textwrap.wrap(said.strip(), WIDTH - INDENT) or [""]
    out = [f"  {setting}"] if len(setting) >= INDENT - 3 else []
    starts = [""] * len(lines) if out else [setting, *[""] * (len(lines) - 1)]
    return "\n".join(
        [*out, *(f"  {start:<{INDENT - 2}}{line}".rstrip() for start, line in zip(starts, lines, strict=True))]
    )


def known_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every key of a schema, including those of its sections."""
    for field in fields(schema):
        yield f"{prefix}{field.name}"
        inner = field.default_factory
        if isinstance(inner, type) and is_dataclass(inner):
            yield from known_keys(inner, f"{prefix}{field.name}.")


def check_keys(name: str, arguments: Sequence[str]) -> None:
    """Raises ConfigError for a KEY=VALUE whose key the job does not have, and suggests the nearest key that it has.

    Hydra would reject it too, but without a suggestion. Arguments in syntax that only Hydra understands are left to it.
    """
    known = set(known_keys(JOBS[name]))
    # Hydra's flags may contain "=" too
    given = [one for one in arguments if "=" in one and not one.startswith("-")]
    own_options = any(one.startswith(("--config-dir", "-cd")) for one in arguments)
    for argument in given:
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:
            continue
        key = override.key_or_group.replace("/", ".")
        _check_default(argument, key, override.value())
        plain = not (override.is_add() or override.is_delete() or key.split(".")[0] == "hydra")
        if plain and not own_options and (CONF / key).is_dir() and isinstance(override.value(), str):
            _check_option(argument, override.value(), options_of(name, key))
        # keys inside a mapping such as params.default are checked by the setting itself
        if not plain or any(key == one or (key.startswith(f"{one}.") and one not in _sections(known)) for one in known):
            continue
        others = [f"jobs.{job}" for job, schema in JOBS.items() if key in known_keys(schema)]
        if others:
            meant = f"it is one of {', '.join(others)}; python -m jobs.{name} --help lists those of jobs.{name}"
        elif near := _nearest(key, known):
            meant = f"did you mean {near}?"
        else:
            meant = f"python -m jobs.{name} --help lists all"
        raise ConfigError(f"{argument}: {key} is not a setting of jobs.{name}; {meant}")


def _check_option(argument: str, given: Any, options: list[str]) -> None:
    if given not in options:
        near = difflib.get_close_matches(given, options, 1, 0.5)
        raise ConfigError(
            f"{argument}: {given} is not one of {', '.join(options)}" + (f"; did you mean {near[0]}?" if near else "")
        )


def _check_default(argument: str, key: str, value: Any) -> None:
    """Raises ConfigError if params.default is set key by key, or has a mistyped parameter. Hydra's own messages for
    these two mistakes are misleading.
    """
    if key.startswith(f"{DEFAULT}."):
        raise ConfigError(f"{argument}: {DEFAULT} is set as a whole; write {DEFAULT}='{{{key.split('.')[2]}: ...}}'")
    for name in value if key == DEFAULT and isinstance(value, dict) else ():
        if name not in PARAMETERS:
            near = difflib.get_close_matches(str(name), PARAMETERS, 1, 0.5)
            meant = f"did you mean {near[0]}?" if near else f"give some of {', '.join(PARAMETERS)}"
            raise ConfigError(f"{argument}: {name} is not a search parameter; {meant}")


def is_dry(arguments: Sequence[str]) -> bool:
    """Whether the arguments contain dry_run=true, in any spelling that Hydra reads as true."""
    given = [one for one in arguments if one.startswith("dry_run=")]
    return any(OverridesParser.create().parse_override(one).value() is True for one in given)


def _sections(known: set[str]) -> set[str]:
    return {key.rsplit(".", 1)[0] for key in known if "." in key}


def _nearest(key: str, known: set[str]) -> str | None:
    """The setting that was probably meant, in this order of preference: one with the same last name in another section,
    one in the same section whose name contains the given one, the most similar key, one anywhere whose name contains
    the given one.
    """
    section, _, last = key.rpartition(".")
    names = {one: one.rpartition(".") for one in sorted(known)}
    same = [one for one, (_, _, end) in names.items() if end == last]
    near = [one for one, (place, _, end) in names.items() if place == section and section and last in end]
    like = difflib.get_close_matches(key, names, 1, 0.75)
    holding = [one for one, (_, _, end) in names.items() if last in end]
    ranked = [*same, *sorted(near, key=len), *like, *sorted(holding, key=len)]
    return next(iter([*ranked, *difflib.get_close_matches(key, names, 1, 0.5)]), None)
