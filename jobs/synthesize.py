"""Generates trajectories at any scale whose true best configs are known.

python -m jobs.synthesize n=1000000 dim=384 out=synthetic
python -m jobs.synthesize effect=0 out=null_world
"""

from __future__ import annotations

from rb_gpu.learn.job_config import SynthesizeConfig
from rb_gpu.learn.synthesize import synthesize

from .common import job


def run(config: SynthesizeConfig) -> int:
    """Generates the table and prints what was written."""
    summary = synthesize(config)
    bad = "; ".join(f"{reason}: {n}" for reason, n in sorted(summary.bad_rows.items())) or "none"
    print(f"{summary.out}: {summary.rows} rows, {summary.n_bytes / 2**20:.0f} MiB, bad rows: {bad}")
    table = f"{summary.out}/trajectories.parquet"
    print(f"learn from it: data=files data.path={table}; the truth is in truth.npz and truth.parquet")
    return 0


main = job("synthesize", __doc__, run)

if __name__ == "__main__":
    main()
