"""Agglomerative linkage of up to 65,536 leaves without a distance matrix.

A linkage is reducible if a merged cluster is no nearer to a third one than the nearer of its two parts was. Two
clusters that are each other's nearest may then join at once, whatever the others do (Bruynooghe 1978, Murtagh 1983), so
that many pairs join per round. Also, lower bounds on the distances to two clusters give one on the distance to their
union, so that old bounds can be updated rather than recomputed: each cluster keeps a short list of its nearest ones,
and all clusters are scanned again only when that list is exhausted.

Suffixes: P leaves, S slots (a cluster lives in the slot of its first leaf), G queried clusters, L entries of a list,
E entries of two lists, J joins.
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

# entries of a list: a longer list is exhausted less often but takes longer to make
LISTED = 32
# lists whose entries are compared pairwise in one step
MEETING = 1024


class Linkage(Protocol):
    """A reducible linkage. Costs are >= 0, and infinite where two clusters may not join.

    lists: for slots (G,), the slots (G, L) of the nearest clusters, a lower bound on the cost of joining each, and one
    bound (G,) for all other clusters; infinite where there is none. The queried slot itself may be among them. exact:
    the bounds fall short of the costs by float64 rounding at most.
    cost: the costs of pairs of slots; at_once: how many entries of a slot are evaluated per step. join: for pairs (J,),
    the first slot absorbs the second one's cluster. of_both: combines lower bounds for two clusters into one for their
    union.
    """

    at_once: int
    of_both: np.ufunc

    def lists(self, slots_G: Rows, exact: bool) -> tuple[Rows, Floats, Floats]: ...  # noqa: D102

    def cost(self, slots_G: Rows, others_G: Rows) -> Floats: ...  # noqa: D102

    def join(self, kept_J: Rows, gone_J: Rows) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class Merges:
    """A dendrogram: step i joins the clusters of leaves left[i] and right[i] at height[i], the cost of the join."""

    left: Rows
    right: Rows
    height: Floats


def join_nearest(linkage: Linkage, leaves: int) -> Merges:
    """Joins mutually nearest clusters until none may join; returns the steps in order of height.

    The sorted steps are those of the greedy algorithm. A cluster whose nearest one has joined another is queried again
    only once some third cluster depends on its answer, since its own nearest can only have moved farther away.
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
                # only costs that differ by rounding can form a cycle: join its cheapest pair
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
    """The nearest cluster of each slot's cluster.

    near_SL, low_SL: the entries of each list, and lower bounds on their costs; known_SL: which bounds are exact costs.
    rest_S: a lower bound on all other clusters' costs, -inf where there is no list. now_S: the slot of the cluster that
    each slot's cluster is part of now. grown_S: the number of joins when a slot's cluster last grew; seen_S: that
    number when its list was last updated.
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
        """For slots (G,), the slot of the nearest cluster and the cost of joining it; -1 and inf if none may join."""
        for part in _parts(slots_G):
            self._update(part)
        near_G, cost_G, spent_G = self._read(slots_G)
        # a list that is exhausted although it is fresh holds entries that float32 cannot tell apart
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
        """Updates lists after joins: entries that belong to one cluster now become a single entry."""
        grown_GL = self._grown_S[self._now_S[self._near_SL[slots_G]]] > self._seen_S[slots_G, None]
        self._seen_S[slots_G] = self._joins
        slots_G = slots_G[grown_GL.any(1)]
        grown_GL = grown_GL[grown_GL.any(1)]
        near_GL, low_GL, rest_G = self._now_S[self._near_SL[slots_G]], self._low_SL[slots_G], self._rest_S[slots_G]
        same_GLL = _same(near_GL, low_GL, near_GL, low_GL)
        alone_GL = same_GLL.sum(2) == 1
        low_GL = self._linkage.of_both.reduce(np.where(same_GLL, low_GL[:, None, :], low_GL[:, :, None]), axis=2)
        low_GL[same_GLL.argmax(2) != np.arange(LISTED)] = np.inf
        # this entry's cluster has joined one outside the list, for which only the rest bound is known
        low_GL = np.where(grown_GL & alone_GL, self._linkage.of_both(low_GL, rest_G[:, None]), low_GL)
        low_GL[grown_GL & (low_GL >= rest_G[:, None])] = np.inf
        self._near_SL[slots_G], self._low_SL[slots_G] = near_GL, low_GL
        self._known_SL[slots_G] &= ~grown_GL

    def _read(self, slots_G: Rows, trusted: bool = False) -> tuple[Rows, Floats, Flags]:
        """The nearest cluster and its cost according to the lists, and which lists are exhausted. trusted: assume that
        no cluster outside a list is nearer than the nearest on it.
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
        """The first slot of each pair absorbs the second one's cluster."""
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
        """Combines the lists of two joined clusters."""
        of_both = self._linkage.of_both
        near_JL, low_JL, rest_J = self._near_SL[kept_J], self._low_SL[kept_J], self._rest_S[kept_J, None]
        other_JL, high_JL, over_J = self._near_SL[gone_J], self._low_SL[gone_J], self._rest_S[gone_J, None]
        same_JLL = _same(near_JL, low_JL, other_JL, high_JL)
        beside_JL = np.where(same_JLL.any(2), np.where(same_JLL, high_JL[:, None, :], -np.inf).max(2), over_J)
        # unused entries (infinite bounds) stay unused
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
    """Slots in parts small enough for pairwise comparisons of all their list entries."""
    return [slots_G[start : start + MEETING] for start in range(0, len(slots_G), MEETING)]


def _same(near_GL: Slots, low_GL: Floats, other_GL: Slots, high_GL: Floats) -> Flags:
    """(G, L, L) bool: which entries of one list equal which entries of the other."""
    both_GLL = np.isfinite(low_GL)[:, :, None] & np.isfinite(high_GL)[:, None, :]
    return np.asarray(both_GLL & (near_GL[:, :, None] == other_GL[:, None, :]))


def _first(low_GL: Floats, count: int) -> tuple[Rows, Rows]:
    """Row and column indices of the `count` least numbers of each row, without infinite ones."""
    column = low_GL.argpartition(count - 1, 1)[:, :count] if count > 1 else low_GL.argmin(1)[:, None]
    row, place = np.nonzero(np.isfinite(np.take_along_axis(low_GL, column, 1)))
    return row, column[row, place]
