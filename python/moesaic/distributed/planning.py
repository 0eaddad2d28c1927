"""Which experts each rank should keep: a pure function of how often they are used."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moesaic import _core
from moesaic._errors import error_of
from moesaic.distributed.placement import Floats, Placement, placement_of_lists


def plan_experts(
    counts: npt.ArrayLike,
    ranks: int,
    slots: int | None = None,
    *,
    nodes: int = 1,
    groups: int = 1,
    previous: Placement | None = None,
    layers: Sequence[int] | None = None,
) -> Placement:
    """Give every rank its experts, so that loads are even.

    A pure function: every rank that calls it gets the same. Slots that are left over become copies,
    one after another for the expert with most load per copy. Then the heaviest copy goes to the
    lightest rank that has a slot and lacks the expert; of equal ones the lower id comes first.

    Parameters
    ----------
    counts : array [E] or [L, E]
        How often each expert was used, as ``ExpertProfile.counts`` or ``ExpertUsage.counts`` say;
        numbers that are not negative. All equal where nothing is known.
    ranks : int
        R.
    slots : int, optional
        Experts that a rank keeps at most. None: as few as hold them all.
    nodes : int
        Machines of the ranks, which are numbered node by node. With more than one, groups of
        experts stay on one node, so that a token that is limited to some groups goes to few nodes.
    groups : int
        Groups of experts of the router (``RouterConfig.num_groups``), a multiple of ``nodes``.
    previous : Placement, optional
        What ranks keep now: of equally good placements one is taken that moves fewer experts.
    layers : sequence of int, optional
        Block numbers of the rows of [L, E]; None: 0, 1 and so on. A plan of counts [E] is one for
        every block.

    Returns
    -------
    Placement

    Raises
    ------
    ConfigError
        Slots for fewer experts than there are, or sizes that do not divide each other.
    ShapeError, DTypeError
        Counts of another shape, or negative ones; a ``previous`` of other sizes.

    Examples
    --------
    >>> from moesaic.distributed import plan_experts
    >>> placement = plan_experts([90, 10, 10, 10], ranks=2, slots=3)
    >>> placement.experts(0), placement.experts(1)
    ([0, 1, 2], [0, 1, 3])
    """
    table = _counts(counts)
    rows = np.atleast_2d(table)
    experts = rows.shape[1]
    slots = -(-experts // max(ranks, 1)) if slots is None else slots
    _check_sizes(experts, ranks, slots, nodes, groups)
    if previous is not None:
        expected = (len(rows), ranks, experts)
        got = (*previous.slots.shape[:2], previous.num_experts)
        if got != expected:
            raise _bad(_core.ShapeError, "previous [L, R, E]", str(list(expected)), list(got))
    if table.ndim == 1:
        blocks: tuple[int, ...] = ()
        if layers is not None:
            raise _bad(_core.ShapeError, "layers", "none beside counts [E]", list(layers))
    else:
        blocks = tuple(range(len(rows))) if layers is None else tuple(layers)
    planned = []
    for i, row in enumerate(rows):
        placed = _plan_layer(row, ranks, slots, nodes, groups)
        if previous is not None:
            now = [set(map(int, ids[ids >= 0])) for ids in previous.slots[i]]
            placed = _keep_places(placed, now, nodes)
        planned.append(placed)
    return placement_of_lists(planned, experts, blocks)


def _bad(kind: type[_core.Error], what: str, expected: str, got: object) -> _core.Error:
    return error_of(kind, "plan_experts", what, expected, str(got))


def _counts(counts: npt.ArrayLike) -> Floats:
    try:
        array = np.asarray(counts, np.float64)
    except (TypeError, ValueError) as error:
        raise _bad(_core.DTypeError, "counts", "numbers", error) from error
    if array.ndim not in (1, 2) or array.size == 0:
        raise _bad(_core.ShapeError, "counts", "[E] or [L, E], none of them 0", list(array.shape))
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise _bad(_core.ShapeError, "counts", "finite numbers, none negative", "others")
    return array


def _check_sizes(experts: int, ranks: int, slots: int, nodes: int, groups: int) -> None:
    for name, value in (("ranks", ranks), ("slots", slots), ("nodes", nodes), ("groups", groups)):
        if value < 1:
            raise _bad(_core.ConfigError, name, "at least 1", value)
    if ranks % nodes:
        raise _bad(_core.ConfigError, "nodes", f"a divisor of {ranks} ranks", nodes)
    if experts % groups:
        raise _bad(_core.ConfigError, "groups", f"a divisor of {experts} experts", groups)
    if groups % nodes:
        raise _bad(_core.ConfigError, "groups", f"a multiple of {nodes} nodes", groups)
    if min(slots, experts // nodes) * ranks < experts:
        got = f"{ranks} ranks of {slots}"
        raise _bad(_core.ConfigError, "slots", f"some for {experts} experts", got)


def _plan_layer(load: Floats, ranks: int, slots: int, nodes: int, groups: int) -> list[list[int]]:
    """Experts of each rank: groups to nodes first, then each node's experts to its ranks."""
    width = len(load) // groups
    of_groups = load.reshape(groups, width).sum(axis=1)
    room = [groups // nodes] * nodes
    placed: list[list[int]] = []
    for members in _pack([(of_groups[g], g) for g in range(groups)], room):
        ids = [g * width + i for g in sorted(members) for i in range(width)]
        here = _plan_node(load[ids], ranks // nodes, slots)
        placed += [[ids[e] for e in rank] for rank in here]
    return placed


def _plan_node(load: Floats, ranks: int, slots: int) -> list[list[int]]:
    copies = _copies(load, min(ranks * slots, ranks * len(load)), ranks)
    items = [(load[e] / n, e) for e, n in enumerate(copies) for _ in range(n)]
    return _pack(items, [slots] * ranks)


def _copies(load: Floats, total: int, most: int) -> list[int]:
    """How many copies each expert gets: always one more where the load per copy is largest."""
    copies = [1] * len(load)
    heap = [(-value, 1, e) for e, value in enumerate(load)]
    heapq.heapify(heap)
    for _ in range(total - len(load)):
        while heap[0][1] >= most:
            heapq.heappop(heap)
        _, n, e = heap[0]
        copies[e] = n + 1
        heapq.heapreplace(heap, (-load[e] / (n + 1), n + 1, e))
    return copies


def _pack(items: list[tuple[float, int]], room: list[int]) -> list[list[int]]:
    """Each item, heaviest first, to the lightest bin that has room and lacks its id.

    A copy for which there is no such bin is left out; one of an id has always a place, since there
    is room for as many items.
    """
    bins: list[set[int]] = [set() for _ in room]
    heap = [(0.0, r) for r in range(len(room)) if room[r] > 0]
    for weight, e in sorted(items, key=lambda item: (-item[0], item[1])):
        passed = []
        while heap and e in bins[heap[0][1]]:
            passed.append(heapq.heappop(heap))
        if heap:
            total, r = heapq.heappop(heap)
            bins[r].add(e)
            if len(bins[r]) < room[r]:
                heapq.heappush(heap, (total + weight, r))
        for one in passed:
            heapq.heappush(heap, one)
    return [sorted(ids) for ids in bins]


def _keep_places(placed: list[list[int]], now: list[set[int]], nodes: int) -> list[list[int]]:
    """The same lists, given to those ranks of their node that keep most of them already."""
    width = len(placed) // nodes
    result: list[list[int]] = []
    for first in range(0, len(placed), width):
        mine, there = placed[first : first + width], now[first : first + width]
        common = [[len(there[r].intersection(ids)) for r in range(width)] for ids in mine]
        pairs = sorted(
            ((i, r) for i in range(width) for r in range(width)),
            key=lambda pair: (-common[pair[0]][pair[1]], pair),
        )
        at: dict[int, int] = {}  # which list a rank gets
        given: set[int] = set()
        for i, r in pairs:
            if i not in given and r not in at:
                at[r] = i
                given.add(i)
        if sum(common[i][r] for r, i in at.items()) < sum(common[r][r] for r in range(width)):
            at = {r: r for r in range(width)}
        result += [mine[at[r]] for r in range(width)]
    return result
