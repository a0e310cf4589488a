"""The command line: manual pages, mistyped settings, progress, and dry runs."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typed import run

pytest.importorskip("torch")

from hydra._internal.utils import get_args_parser

from jobs.columns import render
from jobs.common import lazy_help
from jobs.display import Bars, shown
from jobs.manual import check_keys, is_dry, known_keys, page
from rb_gpu.errors import ConfigError
from rb_gpu.learn import progress
from rb_gpu.learn.job_config import JOBS, SynthesizeConfig
from rb_gpu.learn.synthesize import synthesize

ROOT = Path(__file__).resolve().parent.parent


def manual(name: str) -> str:
    return page(name, importlib.import_module(f"jobs.{name}").__doc__)


@pytest.mark.parametrize("name", JOBS)
def test_a_page_has_every_setting_with_its_meaning_and_two_examples(name):
    text = manual(name)
    sections = {key.split(".")[0] for key in known_keys(JOBS[name]) if "." in key}
    missing = [
        key
        for key in known_keys(JOBS[name])
        if key not in sections and f"  {key}=" not in text and key != "data.s3" and not key.startswith("training")
    ]
    assert missing == []
    assert text.split("Settings, as", 1)[0].count(f"python -m jobs.{name}") >= 2
    assert max(map(len, text.splitlines())) <= 120


def test_a_comment_above_a_setting_and_one_that_goes_on_below_are_of_that_setting():
    text = manual("train")
    assert "params.default=auto                 what runs when nothing is known" in text
    assert "gives equal" not in text.split("params (auto)", 1)[1].split("\n\n", 1)[0]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("clster.k=3", "cluster.k"),
        ("cluster.kk=3", "cluster.k"),
        ("min_gain=1", "gate.min_gain"),
        ("judge.latency=1", "judge.latency_weight"),
        ("dryrun=true", "dry_run"),
    ],
)
def test_the_nearest_setting_is_named(given, meant):
    with pytest.raises(ConfigError, match=rf"is not a setting of jobs\.train; did you mean {meant}\?"):
        check_keys("train", [given])


def test_a_setting_of_another_job_is_said_to_be_one():
    # regression: it asked "did you mean data.path?", which is another table
    with pytest.raises(ConfigError, match=r"it is one of jobs\.train, jobs\.registry; python -m jobs\.evaluate --help"):
        check_keys("evaluate", ["registry.path=elsewhere"])


def test_a_closed_pipe_ends_a_help_page_in_silence():
    # regression: `--help | head -1` ended in a traceback of BrokenPipeError
    shown = subprocess.Popen(
        [sys.executable, "-m", "jobs.registry", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    shown.stdout.close()
    assert shown.stderr.read() == b""
    assert shown.wait() == 0


def test_what_hydra_understands_is_left_to_it():
    check_keys("train", ["-m", "+x=1", "~judge", "hydra.run.dir=a", "params.default=auto", "data=files", "judge=eb"])
    check_keys("train", ["cluster.k=1,2", "params.default={ef_search: 64}", "data.path=[a=b,c]", "--config-dir=x"])
    with pytest.raises(ConfigError, match="--help lists all"):
        check_keys("train", ["qqqq=1"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("params.default={ef_serach: 64}", "ef_serach is not a search parameter; did you mean ef_search?"),
        ("params.default={1: 64}", "give some of ef_search, n_probes, model_tier, context_tokens, temperature"),
        ("params.default.ef_search=64", r"is set as a whole; write params.default='\{ef_search: ...\}'"),
    ],
)
def test_a_mistyped_default_is_told_what_was_meant(given, said):
    with pytest.raises(ConfigError, match=said):
        check_keys("train", [given])


@pytest.mark.parametrize(
    ("job", "given", "said"),
    [
        ("train", "judge=ebb", r"judge=ebb: ebb is not one of eb, reference, welch; did you mean eb\?"),
        ("train", "data=csv", r"csv is not one of delta, files, huggingface, lance, s3, sample, sqlite$"),
        ("evaluate", "data=sample", r"sample is not one of delta, files, huggingface, lance, s3, sqlite"),
    ],
)
def test_a_mistyped_option_is_told_what_there_is(job, given, said):
    with pytest.raises(ConfigError, match=said):
        check_keys(job, [given])
    check_keys(job, ["--config-dir=mine", given])  # that folder may define the option
    assert "sample" in manual("train") and "sample |" not in manual("evaluate")


def test_the_same_settings_are_not_listed_twice():
    text = manual("evaluate")
    assert text.count("  data.path=") == 1
    assert "training (files): what eval.baselines learn from; its settings are those of data" in text


def test_dry_is_what_hydra_takes_for_true():
    assert [is_dry([one]) for one in ("dry_run=true", "dry_run=True", "dry_run=false", "dryrun=true", "seed=1")] == [
        True, True, False, False, False,
    ]  # fmt: skip


def events_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_events_have_stages_and_the_last_step_of_each_task(tmp_path):
    watch = progress.Watch()
    with shown(tmp_path, quiet=True):
        with watch.stage("cluster"):
            for done in range(1, 2001):
                progress.step("Lloyd", done, 2000, "updates")
        with pytest.raises(RuntimeError), watch.stage("judge"):
            raise RuntimeError
    progress.step("Lloyd", 1, 1, "updates")
    found = events_of(tmp_path)
    assert [one["event"] for one in found if one["event"] != "step"] == ["stage_start", "stage_end", "stage_start"]
    steps = [one["done"] for one in found if one["event"] == "step"]
    assert steps[0] == 1 and steps[-1] == 2000 and len(steps) < 50, "one in half a second, and the last"
    assert found[-2]["seconds"] == watch.seconds["cluster"] and found[-2]["memory_mb"] > 10


def test_bars_show_the_tasks_of_the_stage_that_runs():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    bars = Bars(console)

    def tell(**event):
        record = logging.LogRecord("", logging.INFO, "", 0, "", None, None)
        record.event = event
        bars.emit(record)

    tell(event="stage_start", stage="cluster")
    tell(event="step", task="Lloyd", done=3, total=100, unit="updates")
    console.print(bars.progress)
    drawn = console.file.getvalue()
    assert "Lloyd" in drawn and "3/100" in drawn and "updates" in drawn
    tell(event="stage_end", stage="cluster")
    assert bars.progress.tasks == []


@pytest.mark.parametrize("width", [56, 64, 80, 200])
def test_bars_fit_the_terminal_without_cutting_a_number(width):
    # regression: on 64 columns times were cut to "0:0" and an ellipsis
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    bars = Bars(console)
    for task in (1, 120_000):
        record = logging.LogRecord("", logging.INFO, "", 0, "", None, None)
        record.event = {"event": "step", "task": "k-means++", "done": task, "total": 120_000, "unit": "seeds"}
        bars.emit(record)
    console.print(bars.progress.get_renderable())
    drawn = console.file.getvalue()
    assert "120,000/120,000 seeds" in drawn and "…" not in drawn and "0:00:00" in drawn


def test_lines_elsewhere_are_few(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="rb_gpu")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    clock = iter(range(0, 100_000, 3))
    monkeypatch.setattr(logging.LogRecord, "__init__", _at(clock, logging.LogRecord.__init__))
    with shown(tmp_path, quiet=False):
        for done in range(1, 21):
            progress.step("Lloyd", done, 20, "updates")
    said = [one.message for one in caplog.records if one.name == "rb_gpu"]
    assert len(said) in range(3, 8), "one in ten seconds of a minute"
    assert said[0] == "Lloyd: 5 of 20 updates"


def _at(clock, plain):
    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        self.created = float(next(clock))

    return init


def test_a_dry_run_tells_what_would_be_and_writes_nothing(tmp_path):
    synthesize(
        SynthesizeConfig(out=str(tmp_path / "planted"), n=1200, dim=16, patterns=8, configs=3, bad_fraction=0.005)
    )
    before = sorted(tmp_path.rglob("*"))
    table = f"data.path={tmp_path}/planted/trajectories.parquet"
    done = run("train", "data=files", table, "dry_run=true", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    for said in ("1,200 rows, 6 of them bad", "3 configs", "stage    seconds", "would publish bank.safetensors",
                 "nothing is served yet", "dry_run=true: nothing was written"):  # fmt: skip
        assert said in done.stdout
    assert "[INFO]" not in done.stdout, "--quiet shows warnings only"


def dry_sweep(folder: Path, table: str, swept: str) -> subprocess.CompletedProcess[str]:
    table = f"data.path={folder}/{table}"
    return run("train", "-m", "data=files", table, swept, "dry_run=true", "--quiet", cwd=folder)


def test_a_dry_sweep_rehearses_every_run_and_writes_nothing(tmp_path):
    # regression: the members of a dry sweep were trained
    synthesize(SynthesizeConfig(out=str(tmp_path / "planted"), n=1200, dim=16, patterns=8, configs=3))
    before = sorted(tmp_path.rglob("*"))
    done = dry_sweep(tmp_path, "planted/trajectories.parquet", "cluster.k=8,5000,16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert [f"with {k} clusters" in done.stdout for k in (8, 16)] == [True, True], done.stdout
    assert "cluster.k=5000 exceeds" in done.stdout + done.stderr


def test_a_dry_sweep_none_of_whose_runs_could_be_trained_is_an_error(tmp_path):
    # regression: it ended with 0, so that a schedule that rehearses first went on to train
    done = dry_sweep(tmp_path, "nowhere.parquet", "cluster.k=8,16")
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in said, said
    assert said.count("nowhere.parquet does not exist") == 2, said


def test_a_sweep_under_torchrun_is_refused_before_anything_is_made(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.train", "-m", "cluster.k=8,16"], cwd=tmp_path, capture_output=True, text=True,
        timeout=300, check=False, env=os.environ | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "RANK": "0"},
    )  # fmt: skip
    assert done.returncode == 1 and "without -m" in done.stderr, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_jobs_read_their_settings_where_argparse_looks_at_every_help_text(monkeypatch):
    # simulates Python 3.14's argparse, with which every job ended in a traceback before it began
    add_argument = argparse.ArgumentParser.add_argument

    def check(self, action):
        return action.help is None or "%" in action.help

    def add_and_check(self, *names, **settings):
        action = add_argument(self, *names, **settings)
        self._check_help(action)
        return action

    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", check, raising=False)
    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", add_and_check)
    with pytest.raises(TypeError, match="LazyCompletionHelp"):
        get_args_parser()
    with lazy_help():
        assert get_args_parser().parse_args(["a=1"]).overrides == ["a=1"]
    assert argparse.ArgumentParser._check_help is check


def test_a_table_wider_than_the_terminal_goes_on_below(monkeypatch):
    head, rows = ("policy", "utility", "quality", "cost"), [("bank", "0.8420", "0.9094", "5,561")]
    whole = render(head, rows)
    assert whole.splitlines() == ["policy  utility  quality   cost", "bank     0.8420   0.9094  5,561"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "31")
    assert render(head, rows) == whole
    monkeypatch.setenv("COLUMNS", "25")
    narrow = ["policy  utility  quality", "bank     0.8420   0.9094", "", "policy   cost", "bank    5,561"]
    assert render(head, rows).splitlines() == narrow
    monkeypatch.setenv("COLUMNS", "3")
    assert len(render(head, rows).splitlines()) == 3 * 3 - 1
