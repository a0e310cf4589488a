"""Makes real trajectories by searching a corpus, by cosine similarity, under a grid of configs.

python -m jobs.collect base=base.npy queries=queries.npy out=collected
python -m jobs.collect base=base.npy queries=queries.parquet hnsw_ef_search=[16,32,64] ivf_n_probes=[]
"""

from __future__ import annotations

from rb_gpu.learn.collect import collect
from rb_gpu.learn.job_config import CollectConfig

from .common import job


def run(config: CollectConfig) -> int:
    """Runs the searches and prints each config's mean precision, recall and cost, and its median latency."""
    summary = collect(config)
    print(
        f"{summary.out}: {summary.queries} queries x {len(summary.configs)} configs = {summary.rows} rows, "
        f"from {summary.base_rows} vectors of {summary.dim} dims"
    )
    print("ef_search n_probes precision  recall     p50_us      cost")
    for c in summary.configs:
        parameters = f"{c.ef_search:>9} {c.n_probes:>8}"
        print(f"{parameters} {c.precision:>9.4f} {c.recall:>7.4f} {c.latency_p50_us:>10.0f} {c.cost:>9.0f}")
    tables = f"data.queries={summary.out}/queries.parquet data.path={summary.out}/outcomes.parquet"
    print(
        f"learn from it: data=files {tables}; set params.default to what runs today, else gains are over the cheapest"
    )
    return 0


main = job("collect", __doc__, run)

if __name__ == "__main__":
    main()
