"""A few simulated nights; `python -m tests.nights` runs thirty."""

from __future__ import annotations

import logging

import numpy as np
from nights import Schedule, simulate


def test_in_five_nights_identity_stays_and_nothing_worse_is_served(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    nights = list(simulate(5, 1500, tmp_path, 0, Schedule(population=2, bad_config=3, embedder=4)))
    same = [night.same for night in nights if np.isfinite(night.same)]
    assert same and min(same) >= 0.95
    assert any(night.promoted for night in nights[:4]) and nights[1].patterns >= 24
    # before the first champion the default runs, which need not be the best config
    first = next(night.number for night in nights if night.promoted)
    assert [night.number for night in nights if night.high < 0 and night.number > first] == []
    assert nights[2].gain > 0.03
    assert nights[2].lineage.get("born", 0) + nights[3].lineage.get("born", 0) > 0
    changed = nights[4]
    assert not changed.promoted and changed.champion == nights[3].champion is not None
    assert "the champion's embedder is first, not second as the candidate's" in changed.reason
    assert any("train.parent=champion does not fit: its embedder" in r.message for r in caplog.records)
    assert [night.next_id for night in nights] == sorted({night.next_id for night in nights})
