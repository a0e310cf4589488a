"""Agglomerative linkage of up to 65,536 leaves without a matrix of their distances.

Two clusters that are each other's nearest may join at once, whatever the others do, where the linkage is reducible: a
cluster that two others made is no nearer to a third than the nearer one of them was (Bruynooghe 1978, Murtagh 1983). So
many pairs join in one round. For the same reason what a cluster was once told of the others bounds from below what any
of them, or whatever they have become, costs now: each keeps a short list of the nearest, and all others are gone
through again only once it is exhausted.

Suffixes: P leaves, S slots (a cluster lives in the slot of its first leaf), G clusters asked about, L entries of a
list, E of two lists, J joins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Slots = npt.NDArray[np.signedinteger]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

# entries of a list: with more, a list is exhausted less often, and takes longer to be made
LISTED = 32
# lists of which every entry meets every other at a time
MEETING = 1024


class Linkage(Protocol):
    """A reducible linkage, whose costs are 0 or more, and infinite where two clusters may not join.

    lists: for slots (G,), the slots (G, L) of the nearest clusters, a lower bound on what joining each costs, and one
    (G,) on what any other does; infinite where there is none. The asked one itself may be among them. exact: with
    bounds that fall short of the costs by no more than float64's rounding.
    cost: of pairs of slots; at_once: how many of a slot's are asked for at a time. join: of pairs (J,), the first slot
    takes the second one's cluster in. of_both: a lower bound for the two of a pair together, of one for each.
    """

    at_once: int
    of_both: np.ufunc

    def lists(self, slots_G: Rows, exact: bool) -> tuple[Rows, Floats, Floats]: ...  # noqa: D102

    def cost(self, slots_G: Rows, others_G: Rows) -> Floats: ...  # noqa: D102

    def join(self, kept_J: Rows, gone_J: Rows) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class Merges:
    """A dendrogram: at step i the clusters of leaves left[i] and right[i] join at height[i], the cost of it."""

    left: Rows
    right: Rows
    height: Floats


def join_nearest(linkage: Linkage, leaves: int) -> Merges:
    """Joins mutual nearest clusters until none may join; steps in the order of their heights.

    The steps, sorted, are those of the greedy algorithm. A cluster whose nearest one has joined another is asked again
    only once a third one waits for its answer: its own partner can only have gone farther away.
    """
    nearest = _Nearest(linkage, leaves)
    near_S, cost_S = np.full(leaves, -1), np.full(leaves, np.inf)
    known_S, alive_S = np.zeros(leaves, dtype=bool), np.ones(leaves, dtype=bool)
    steps: list[tuple[Rows, Rows, Floats]] = []
    asked = np.arange(leaves)
    while len(asked):
        near_S[asked], cost_S[asked] = nearest.of(asked)
        known_S[asked] = True
        own = np.flatnonzero(known_S & (near_S >= 0))
        to = near_S[own]
        mutual = own[(own < to) & known_S[to] & (near_S[to] == own)]
        waited_for = np.unique(to[~known_S[to]])
        if not len(mutual) and not len(waited_for):
            waited_for = np.flatnonzero(alive_S & ~known_S)
            if not len(waited_for) and len(own):
                # a circle of costs that differ by rounding alone
                mutual = own[[cost_S[own].argmin()]]
        kept, gone = np.minimum(mutual, near_S[mutual]), np.maximum(mutual, near_S[mutual])
        steps.append((kept, gone, cost_S[mutual]))
        nearest.join(kept, gone)
        joined_S = np.zeros(leaves, dtype=bool)
        joined_S[kept] = joined_S[gone] = True
        known_S[own[joined_S[own] | joined_S[to]]] = False
        alive_S[gone], near_S[gone] = False, -1
        asked = np.concatenate([kept, waited_for])
    left, right, height = (np.concatenate(column) for column in zip(*steps, strict=True))
    order = np.argsort(height, kind="stable")
    return Merges(left[order], right[order], height[order])


class _Nearest:
    """The nearest cluster of each slot's.

    near_SL, low_SL: the entries of its list, and bounds from below on their costs; known_SL: which are the costs
    themselves. rest_S: a bound on all others' costs, -inf where there is no list. now_S: the slot of the cluster that
    each has become part of. grown_S: after how many joins the slot's cluster last grew; seen_S: after how many its list
    was last brought up to date.
    """

    def __init__(self, linkage: Linkage, leaves: int) -> None:
        self._linkage, self._joins = linkage, 0
        self._near_SL = np.zeros((leaves, LISTED), dtype=np.int32)
        self._low_SL = np.full((leaves, LISTED), np.inf)
        self._known_SL = np.zeros((leaves, LISTED), dtype=bool)
        self._rest_S = np.full(leaves, -np.inf)
        self._now_S = np.arange(leaves)
        self._grown_S, self._seen_S = (np.zeros(leaves, dtype=np.int32) for _ in range(2))

    def of(self, slots_G: Rows) -> tuple[Rows, Floats]:
        """For slots (G,), the slot of the nearest cluster and what joining it costs; -1 and inf where none may join."""
        for part in _parts(slots_G):
            self._update(part)
        near_G, cost_G, spent_G = self._read(slots_G)
        # what is exhausted as soon as it was made holds what float32 cannot tell apart
        for exact in (False, True):
            again = np.flatnonzero(spent_G)
            if len(again):
                self._list(slots_G[again], exact)
                near_G[again], cost_G[again], spent_G[again] = self._read(slots_G[again], exact)
        return near_G, cost_G

    def _list(self, slots_G: Rows, exact: bool) -> None:
        near_GL, low_GL, self._rest_S[slots_G] = self._linkage.lists(slots_G, exact)
        low_GL[near_GL == slots_G[:, None]] = np.inf
        entries = near_GL.shape[1]
        self._low_SL[slots_G] = np.inf
        self._near_SL[slots_G, :entries], self._low_SL[slots_G, :entries] = near_GL, low_GL
        self._known_SL[slots_G], self._seen_S[slots_G] = False, self._joins

    def _update(self, slots_G: Rows) -> None:
        """Brings lists up to what has joined since: entries that are one cluster now become one entry."""
        grown_GL = self._grown_S[self._now_S[self._near_SL[slots_G]]] > self._seen_S[slots_G, None]
        self._seen_S[slots_G] = self._joins
        slots_G = slots_G[grown_GL.any(1)]
        grown_GL = grown_GL[grown_GL.any(1)]
        near_GL, low_GL, rest_G = self._now_S[self._near_SL[slots_G]], self._low_SL[slots_G], self._rest_S[slots_G]
        same_GLL = _same(near_GL, low_GL, near_GL, low_GL)
        alone_GL = same_GLL.sum(2) == 1
        low_GL = self._linkage.of_both.reduce(np.where(same_GLL, low_GL[:, None, :], low_GL[:, :, None]), axis=2)
        low_GL[same_GLL.argmax(2) != np.arange(LISTED)] = np.inf
        # what an entry has joined is none of the list
        low_GL = np.where(grown_GL & alone_GL, self._linkage.of_both(low_GL, rest_G[:, None]), low_GL)
        low_GL[grown_GL & (low_GL >= rest_G[:, None])] = np.inf
        self._near_SL[slots_G], self._low_SL[slots_G] = near_GL, low_GL
        self._known_SL[slots_G] &= ~grown_GL

    def _read(self, slots_G: Rows, trusted: bool = False) -> tuple[Rows, Floats, Flags]:
        """The nearest and its cost, by the lists, and which of these are exhausted. trusted: nothing outside a list is
        nearer than its nearest.
        """
        near_G, cost_G, spent_G = np.full(len(slots_G), -1), np.full(len(slots_G), np.inf), np.zeros(len(slots_G), bool)
        left = np.arange(len(slots_G))
        while len(left):
            slots = slots_G[left]
            low_GL = self._low_SL[slots]
            entry = low_GL.argmin(1)
            low = low_GL[np.arange(len(left)), entry]
            spent = (low > self._rest_S[slots]) & (not trusted)
            spent_G[left] = spent
            told = (self._known_SL[slots, entry] | np.isinf(low)) & ~spent
            cost_G[left[told]] = low[told]
            near_G[left[told]] = np.where(np.isinf(low[told]), -1, self._near_SL[slots[told], entry[told]])
            more = ~(told | spent)
            left, slots, low_GL = left[more], slots[more], low_GL[more]
            low_GL[self._known_SL[slots]] = np.inf
            own, entry = _first(low_GL, self._linkage.at_once)
            self._low_SL[slots[own], entry] = self._linkage.cost(slots[own], self._near_SL[slots[own], entry])
            self._known_SL[slots[own], entry] = True
        return near_G, cost_G, spent_G

    def join(self, kept_J: Rows, gone_J: Rows) -> None:
        """The first slot of each pair takes the second one's cluster in."""
        self._linkage.join(kept_J, gone_J)
        self._joins += 1
        takes_S = np.arange(len(self._now_S))
        takes_S[gone_J] = kept_J
        self._now_S = takes_S[self._now_S]
        self._grown_S[kept_J] = self._joins
        for kept, gone in zip(_parts(kept_J), _parts(gone_J), strict=True):
            self._update(kept)
            self._update(gone)
            self._merge(kept, gone)

    def _merge(self, kept_J: Rows, gone_J: Rows) -> None:
        """The lists of two clusters become that of both."""
        of_both = self._linkage.of_both
        near_JL, low_JL, rest_J = self._near_SL[kept_J], self._low_SL[kept_J], self._rest_S[kept_J, None]
        other_JL, high_JL, over_J = self._near_SL[gone_J], self._low_SL[gone_J], self._rest_S[gone_J, None]
        same_JLL = _same(near_JL, low_JL, other_JL, high_JL)
        beside_JL = np.where(same_JLL.any(2), np.where(same_JLL, high_JL[:, None, :], -np.inf).max(2), over_J)
        # what is no entry does not become one
        low_JL = np.where(np.isinf(low_JL), np.inf, of_both(low_JL, beside_JL))
        high_JL = np.where(np.isinf(high_JL) | same_JLL.any(1), np.inf, of_both(high_JL, rest_J))
        near_JE, low_JE = np.concatenate([near_JL, other_JL], 1), np.concatenate([low_JL, high_JL], 1)
        low_JE[near_JE == kept_J[:, None]] = np.inf
        order = low_JE.argpartition(LISTED, 1)
        near_JE, low_JE = (np.take_along_axis(x_JE, order, 1) for x_JE in (near_JE, low_JE))
        self._near_SL[kept_J], self._low_SL[kept_J] = near_JE[:, :LISTED], low_JE[:, :LISTED]
        self._known_SL[kept_J] = False
        self._rest_S[kept_J] = np.minimum(of_both(rest_J, over_J)[:, 0], low_JE[:, LISTED])


def _parts(slots_G: Rows) -> list[Rows]:
    """So many slots at a time that every entry of a list may meet every other."""
    return [slots_G[start : start + MEETING] for start in range(0, len(slots_G), MEETING)]


def _same(near_GL: Slots, low_GL: Floats, other_GL: Slots, high_GL: Floats) -> Flags:
    """(G, L, L) which entries of one list are those of the other."""
    both_GLL = np.isfinite(low_GL)[:, :, None] & np.isfinite(high_GL)[:, None, :]
    return np.asarray(both_GLL & (near_GL[:, :, None] == other_GL[:, None, :]))


def _first(low_GL: Floats, count: int) -> tuple[Rows, Rows]:
    """Rows and columns of the `count` least numbers of each row, but for infinite ones."""
    column = low_GL.argpartition(count - 1, 1)[:, :count] if count > 1 else low_GL.argmin(1)[:, None]
    row, place = np.nonzero(np.isfinite(np.take_along_axis(low_GL, column, 1)))
    return row, column[row, place]
