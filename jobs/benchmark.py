"""Speed and memory beside peers, in one run. `python -m jobs.benchmark suite=lookup`"""

from __future__ import annotations

import json
from dataclasses import asdict

from rb_gpu.bench.lookup import measure
from rb_gpu.bench.plot import plot_lookup
from rb_gpu.learn.job_config import BenchmarkConfig

from .common import job, run_folder
from .tables import lookup_tables


def run(config: BenchmarkConfig) -> int:
    """Measures, prints the table, and keeps it as JSON and as a picture."""
    result = measure(asdict(config))
    path = run_folder() / "benchmark_lookup.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(lookup_tables(result))
    drawn = plot_lookup(result, path.with_suffix(".png"))
    print(f"\n{path}" + (f" and {path.with_suffix('.png').name}" if drawn else ""))
    return 0


main = job("benchmark", run)

if __name__ == "__main__":
    main()
