"""Evaluates an artifact on a table that it did not learn from.

python -m jobs.evaluate data.path=newer.parquet
python -m jobs.evaluate data.path=newer.parquet eval.baselines=all training.path=older.parquet
"""

from __future__ import annotations

from rb_gpu.learn.evaluation import evaluate_artifact
from rb_gpu.learn.job_config import EvaluateConfig

from .common import job, run_folder
from .tables import evaluation_tables, tradeoff_table


def run(config: EvaluateConfig) -> int:
    """Evaluates the artifact, and prints the policy table and, if costs are known, the quality-cost curve."""
    evaluation = evaluate_artifact(config, run_folder() / "quarantine.parquet")
    print(f"\n{config.artifact} on {evaluation.queries:,} queries ({evaluation.grade} values):\n")
    print(evaluation_tables(evaluation))
    if evaluation.tradeoffs is not None:
        print(f"\n{tradeoff_table(evaluation.tradeoffs)}")
    return 0


main = job("evaluate", __doc__, run)

if __name__ == "__main__":
    main()
