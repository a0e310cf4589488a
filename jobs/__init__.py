"""One thin Hydra entry point per job: `python -m jobs.NAME` in a checkout, `rb-NAME` once installed."""
