"""Fuzzes exports: a mutated export must be refused with ArtifactError, or be imported correctly.

    python -m tests.fuzz_exports --mutants 5000 --seed 0

What is imported must fit the published JSON schema, answer every lookup, and be exported again unchanged. Exits with 1
if anything else happens, including any other exception.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from conftest import make_bank
from fuzz_answers import ask
from fuzz_values import VALUES, Rng, flip, pick, resize

import rb_gpu
from rb_gpu import ArtifactError, ReasoningBank

SCHEMA = json.loads((Path(rb_gpu.__file__).parent / "export.schema.json").read_text())
MORE = ["inf", "-inf", "nan", "Infinity", "0.5", [None], [[]], [[1]], {"id": 1}, 10**25, 2**62, 2**63]


def place(rng: Rng, document: Any) -> tuple[Any, Any]:
    """A random container inside the document and one of its keys; places near the top are more likely than under a
    uniform draw.
    """
    inner = document
    while True:
        key = pick(rng, inner if isinstance(inner, dict) else range(len(inner)))
        below = inner[key]
        if not isinstance(below, (dict, list)) or not below or rng.integers(5) == 0:
            return inner, key
        inner = below


def mutate(rng: Rng, text: str) -> tuple[str | bytes, str]:
    """A mutated content of the file, and a description of the mutation."""
    action = pick(
        rng, ["value", "value", "value", "value", "remove", "add", "swap", "shuffle", "repeat", "text", "cut"]
    )
    if action == "text":
        return flip(rng, text.encode()), action
    if action == "cut":
        return resize(rng, text.encode()), action
    document = json.loads(text)
    told = [action]
    for _ in range(int(pick(rng, [1, 1, 1, 2, 3]))):
        inner, key = place(rng, document)
        if action == "remove":
            inner.pop(key)
        elif action == "add":
            name, value = pick(rng, ["extra", "", "level", "field_base", "é"]), deepcopy(pick(rng, VALUES))
            inner.update({name: value}) if isinstance(inner, dict) else inner.append(value)
        elif action == "swap":
            other, place_ = place(rng, document)
            inner[key], other[place_] = deepcopy(other[place_]), deepcopy(inner[key])
        elif action in ("shuffle", "repeat"):
            lists = [one for one in (document["patterns"], document["verdicts"], document["configs"]) if one]
            one = pick(rng, lists)
            if action == "shuffle":
                rng.shuffle(one)
            else:
                one.append(deepcopy(pick(rng, one)))
        else:
            old = inner[key]
            near = (
                [-old, float(old), old + 1, str(old), [old]] if type(old) in (int, float) and abs(old) < 1e300 else []
            )
            inner[key] = deepcopy(pick(rng, [*VALUES, *MORE, *near]))
        told.append(f"{key}: {str(inner[key] if action == 'value' else '')[:40]}")
        if not document or not all(document.get(name) for name in ("patterns", "verdicts", "configs")):
            break
    return json.dumps(document), " ".join(told)


def judge(path: Path, validator: Any, tradeoff: bool) -> tuple[str, str]:
    """Whether the export was "refused" or "imported", and what is wrong ('' if nothing is)."""
    try:
        bank = ReasoningBank.from_export(path)
    except ArtifactError:
        return "refused", ""
    try:
        document = json.loads(path.read_text())
        if error := next(validator.iter_errors(document), None):
            return "imported", f"the schema forbids it: {error.message[:100]}"
        ask(bank, tradeoff)
        again = path.with_name("again.json")
        bank.export(again)
        ReasoningBank.from_export(again).export(path)
        if again.read_bytes() != path.read_bytes():
            return "imported", "it comes out otherwise"
        if bank.next_pattern_id <= max(bank.patterns):
            return "imported", "an id would be given again"
    except Exception as error:  # any exception here is a bug
        return "imported", repr(error)
    return "imported", ""


def run(mutants: int, seed: int, folder: Path, more: tuple[ReasoningBank, ...] = ()) -> tuple[Counter[str], list[str]]:
    """Numbers of refused and imported mutants, and descriptions of all bugs. more: banks to mutate besides the two made
    here.
    """
    texts = []
    for bank in (*(ReasoningBank(make_bank(leaves, 3, 4, seed)) for leaves in (1, 5)), *more):
        bank.export(folder / "base.json")
        texts.append((folder / "base.json").read_text())
    validator, counts, wrong = jsonschema.Draft202012Validator(SCHEMA), Counter[str](), []
    for index in range(mutants):
        rng = np.random.default_rng([seed, index])
        content, told = mutate(rng, pick(rng, texts))
        path = folder / "mutant.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
        try:
            verdict, what = judge(path, validator, index % 10 == 0)
        except Exception as error:
            verdict, what = "import", repr(error)
        counts[verdict] += 1
        if what:
            wrong.append(f"{index} ({told}): {what}")
    return counts, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts, wrong = run(options.mutants, options.seed, Path(folder))
    told = ", ".join(f"{count:,} {verdict}" for verdict, count in sorted(counts.items()))
    print("\n".join([*wrong[:20], f"{options.mutants:,} mutants: {told}, {len(wrong)} wrong"]))  # noqa: T201
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
