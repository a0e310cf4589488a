"""Trains on trajectories: loads, clusters, judges, evaluates on the newest queries, publishes an artifact and promotes
it if the gate allows.

python -m jobs.train data=files data.path='logs/*.parquet' judge.cost_weight=0.1
python -m jobs.train data=files data.path='logs/*.parquet' dry_run=true
python -m jobs.train -m cluster.k=64,256,1024 judge.method=eb,welch
"""

from __future__ import annotations

from rb_gpu.learn.config import TrainConfig
from rb_gpu.learn.rehearsal import rehearse
from rb_gpu.learn.report.formats import counted
from rb_gpu.learn.track import check_tracker, track
from rb_gpu.learn.training import train

from .common import EXIT_REFUSED, job, run_folder
from .rehearsal import told
from .sweeping import Sweep
from .tables import evaluation_tables
from .tracked import run_of


def run(config: TrainConfig) -> int:
    """Trains and prints the held-out value of the bank. Returns 3 if the gate refused to promote it, else 0."""
    if config.dry_run:
        print(told(rehearse(config), config))
        return 0
    check_tracker(config.track)
    published = train(config, run_folder() / "quarantine.parquet")
    if published is None:  # this rank only shared the work; rank 0 publishes
        return 0
    track(run_of(published, config), config.track)
    evaluation, counts = published.evaluation, published.manifest["counts"]
    print(f"\nOn {evaluation.queries:,} held-out queries ({evaluation.grade} values):\n")
    print(f"{evaluation_tables(evaluation)}\n")
    why = published.manifest["why_default_stands"]
    print(f"{counted(counts['patterns'], 'pattern')}: for {counts['verdicts']} a config other than the default is "
          f"recommended, for {counts['default_stands']} the default stands{f': {why}' if why else ''}")  # fmt: skip
    promoted = "promoted" if published.decision.promote else "NOT promoted"
    print(f"artifact: {published.folder} (report.html shows it)\n{promoted}: {published.decision.reason}")
    return 0 if published.decision.promote else EXIT_REFUSED


sweep = Sweep()
main = job("train", __doc__, run, sweep.member, sweep.finish)

if __name__ == "__main__":
    main()
