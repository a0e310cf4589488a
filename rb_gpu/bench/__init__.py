"""Speed and memory beside peers, in one run; `jobs.benchmark` starts it."""
