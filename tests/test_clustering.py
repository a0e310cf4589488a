"""What clustering works out when it is not told."""

from __future__ import annotations

import logging

import numpy as np

from rb_gpu.learn.clustering import clusters_asked
from rb_gpu.learn.config import TrainConfig


def test_the_log_says_what_auto_made_k_of(learned, caplog):
    # of 48 queries under 4 configs it said k=1 and no more
    caplog.set_level(logging.INFO)
    few = learned.trajectories.select_queries(np.arange(4000) < 200)
    assert clusters_asked(learned.trajectories, TrainConfig()) == 63
    assert caplog.messages == ["cluster.k=auto: k=63, the square root of 4,000 queries"]
    caplog.clear()
    assert clusters_asked(few, TrainConfig()) == 4
    assert caplog.messages == [
        "cluster.k=auto: k=4, the square root of 200 queries, lowered so that the 200 rows give each config 10 per "
        "cluster on average"
    ]
