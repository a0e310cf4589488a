"""Benchmark suites that measure rb_gpu next to other libraries in one run; `jobs.benchmark` runs them."""
