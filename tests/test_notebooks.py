"""The notebooks run from top to bottom on a clean checkout, and still show what they claim."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install '.[test]'")
pytest.importorskip("ipykernel", reason="pip install '.[test]'")
from nbclient import NotebookClient  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
MOST_BYTES = 300_000

# the printed claims of each notebook, as regular expressions; numbers are caught and compared below
CLAIMS = {
    "01_first_bank": (
        r"SQL and pandas wrote the same table: True",
        r"gain over the default \+0\.\d+, 95 % interval \[\+0\.0[3-9]",
        r"^promoted",
        r"the planted best setting is recommended for 12 of 12 kinds",
        r"a query unlike all others: ef_search=64 \(the default stands",
    ),
    "02_what_is_it_worth": (
        r"exact values on 1,600 queries",
        r"bank over default: \+0\.\d+ \[\+0\.00",
        r"^0 verdicts: the default stands",
        r"6,400 rows in place of 96,000: 0 verdicts",
        r"no held-out row tried ef_search=\d+ n_probes=\d+",
    ),
    "03_explore_artifact": (
        r"^26 verdicts; on 54 of 80 leaves the default stands",
        r"gain \+0\.\d+ \[\+0\.0\d+, \+0\.\d+\] over the default",
        r"that chance alone may give: True",
        r"bank over default: \+0\.\d+ \[\+0\.00",
    ),
}


def printed(notebook: nbformat.NotebookNode) -> str:
    """Everything that the cells printed."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return "".join(out["text"] for out in outputs if out.get("name") == "stdout")


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return sum("image/png" in out.get("data", {}) for out in outputs)


def check_claims(name: str, notebook: nbformat.NotebookNode) -> None:
    said = printed(notebook)
    for claim in CLAIMS[name]:
        assert re.search(claim, said, re.MULTILINE), f"{name} does not print {claim}:\n{said}"
    if name == "02_what_is_it_worth":
        rows = re.findall(r"^(\S.{13})" + 2 * r" +([+-][\d.]+)" + 2 * r" +([\d.]+)" + "$", said, re.MULTILINE)
        errors = {row[0].strip(): [float(number) for number in row[1:]] for row in rows}
        # confounded logs: matching rows are biased, doubly robust values are not; uniform logs: IPS has a large
        # variance, DR not
        assert abs(errors["DR"][1]) < abs(errors["matching rows"][1]) / 3
        assert errors["DR"][2] < errors["IPS"][2] / 3
        held, of = map(int, re.search(r"(\d+) of (\d+) intervals hold the truth", said).groups())
        assert held >= 0.9 * of
        bank, mixes = map(float, re.search(r"\(AIQ\): bank ([\d.]+), mixes of single settings ([\d.]+)", said).groups())
        assert bank > mixes


def test_every_notebook_is_checked():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(CLAIMS)


@pytest.mark.parametrize("name", CLAIMS)
def test_notebook_runs_and_holds_what_it_claims(name, tmp_path):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    drawn = pictures(notebook)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=environment)
    check_claims(name, notebook)
    assert pictures(notebook) == drawn


@pytest.mark.parametrize("name", CLAIMS)
def test_what_is_committed_came_from_one_whole_run(name):
    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [out for cell in cells for out in cell.outputs]
    assert all(out.output_type != "error" and out.get("name") != "stderr" for out in outputs)
    check_claims(name, notebook)
    assert pictures(notebook) >= 3
    assert path.stat().st_size < MOST_BYTES


@pytest.mark.parametrize("name", ["02_what_is_it_worth", "03_explore_artifact"])
def test_what_is_committed_is_what_the_readme_says_of_the_sample(name):
    # regression: the committed outputs were of an older version than the README
    [gain] = re.findall(r"^default .*  (\+\S+ \[.*\])$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert f"bank over default: {gain}\n" in printed(nbformat.read(FOLDER / f"{name}.ipynb", as_version=4))
