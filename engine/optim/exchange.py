"""Matrix exchange for ZeRO: whole matrices are brought together from shards, and their updates taken back.

ZeRO cuts the flattened weights where a rank's share ends, in the middle of a matrix. A `Round` moves the
pieces of some matrices to the ranks that own them and the results back, in two collectives of flat tensors:

    rank 0  [a a a a b b]        owners a:0 b:1        [a a a a a a]  ──f──▶  back as they came
    rank 1  [a a b b c c]   ──all_to_all──▶            [b b b b] [c c c]
    rank 2  [c]

Where every process holds everything (stage 0) nothing needs to be brought together, and the results of all
owners are gathered by all. A process alone moves nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Matrix:
    """A range of whole rows of a parameter."""

    parameter: int
    """Place of the parameter among those of the step."""
    start: int
    """First element in the flattened parameter."""
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Elements."""
        return self.rows * self.columns

    @property
    def flops(self) -> int:
        """Of one Newton-Schulz iteration: X X^T, the square of that, and their polynomial times X."""
        small, large = sorted((self.rows, self.columns))
        return 4 * small * small * large + 2 * small**3


@dataclass(frozen=True)
class Part:
    """Elements of a matrix that this rank holds."""

    matrix: Matrix
    start: int
    """First element, counted from the first that this rank holds of the parameter."""
    count: int


Ranges = list[list[tuple[int, int]]]
"""For each rank and parameter: the first element held and how many."""


def balanced_owners(matrices: list[Matrix], ranks: int) -> list[int]:
    """The rank that orthogonalises each matrix: the most expensive first, each to the least busy rank."""
    load = [0] * ranks
    owners = [0] * len(matrices)
    for i in sorted(range(len(matrices)), key=lambda i: (-matrices[i].flops, i)):
        owners[i] = min(range(ranks), key=lambda rank: load[rank])
        load[owners[i]] += matrices[i].flops
    return owners


class Round:
    """The exchange of some matrices, in the same order on every rank.

    Args:
        matrices: of all owners; equal shapes of an owner next to each other are one stack.
        owners: rank of each.
        ranges: what every rank holds of the parameters.
        rank: of this process.
        replicated: every rank holds everything.
    """

    def __init__(
        self, matrices: list[Matrix], owners: list[int], ranges: Ranges, rank: int, replicated: bool
    ) -> None:
        world = len(ranges)
        owned = [[m for m, owner in zip(matrices, owners, strict=True) if owner == r] for r in range(world)]
        self.mine = owned[rank]
        """Matrices that this rank orthogonalises."""
        self.gathers = replicated and world > 1
        self.exchanges = not replicated and world > 1
        if self.gathers:
            lengths = [sum(m.size for m in group) for group in owned]
            self.longest = max(lengths)
            places = [r * self.longest for r in range(world)]
            self.sent = _parts(self.mine, ranges[rank])
            self.returned = [part for group in owned for part in _parts(group, ranges[rank])]
            self.slices = [
                (places[r] + begin, m.size)
                for r, group in enumerate(owned)
                for m, begin in zip(group, _offsets([m.size for m in group]), strict=True)
            ]
            return
        per_owner = [_parts(group, ranges[rank]) for group in owned]
        self.sent = self.returned = [part for parts in per_owner for part in parts]
        self.slices = list(
            zip(_offsets([p.count for p in self.sent]), (p.count for p in self.sent), strict=True)
        )
        self.send_counts = [sum(part.count for part in parts) for parts in per_owner]

        received = [_parts(self.mine, held) for held in ranges]
        self.receive_counts = [sum(part.count for part in parts) for parts in received]
        # What arrives is ordered by rank; the stack by matrix and element.
        arrivals = [(part, ranges[r][part.matrix.parameter][0]) for r in range(world) for part in received[r]]
        place = {id(m): i for i, m in enumerate(self.mine)}
        keys = [(place[id(part.matrix)], held + part.start) for part, held in arrivals]
        counts = [part.count for part, _ in arrivals]
        order = sorted(range(len(arrivals)), key=lambda i: keys[i])
        here = _offsets(counts)
        self.into_stack = [(here[i], counts[i]) for i in order]
        there = dict(zip(order, _offsets([counts[i] for i in order]), strict=True))
        self.out_of_stack = [(there[i], counts[i]) for i in range(len(arrivals))]

    def bring(self, updates: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The owned matrices one after another, flat, from each parameter's local elements. Collective."""
        device = updates[0].device
        sent = _joined(
            [updates[p.matrix.parameter][p.start : p.start + p.count] for p in self.sent], dtype, device
        )
        if not self.exchanges:
            return sent
        received = torch.empty(sum(self.receive_counts), dtype=dtype, device=device)
        dist.all_to_all_single(received, sent, self.receive_counts, self.send_counts)
        return _joined([received[at : at + count] for at, count in self.into_stack], dtype, device)

    def take_back(self, flat: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """This rank's parts with their results (count,), given the owned matrices' results. Collective."""
        if self.gathers:
            padded = torch.nn.functional.pad(flat, (0, self.longest - len(flat)))
            back = flat.new_empty(self.longest * dist.get_world_size())
            dist.all_gather_into_tensor(back, padded)
        elif self.exchanges:
            reply = _joined(
                [flat[at : at + count] for at, count in self.out_of_stack], flat.dtype, flat.device
            )
            back = flat.new_empty(sum(self.send_counts))
            dist.all_to_all_single(back, reply, self.send_counts, self.receive_counts)
        else:
            back = flat
        for part, (at, count) in zip(self.returned, self.slices, strict=True):
            yield part, back[at : at + count]


def rounds(matrices: list[Matrix], ranges: Ranges, rank: int, replicated: bool, elements: int) -> list[Round]:
    """All exchanges of a step; in each a rank owns up to `elements`, or one matrix if that is larger."""
    owners = balanced_owners(matrices, len(ranges))
    shapes = sorted({(m.rows, m.columns) for m in matrices})
    numbered: list[tuple[int, Matrix, int]] = []
    for owner in range(len(ranges)):
        number = filled = 0
        for shape in shapes:
            for m, whose in zip(matrices, owners, strict=True):
                if whose == owner and (m.rows, m.columns) == shape:
                    if filled and filled + m.size > elements:
                        number, filled = number + 1, 0
                    filled += m.size
                    numbered.append((number, m, owner))
    found = []
    for number in sorted({number for number, *_ in numbered}):
        chosen = [(m, owner) for other, m, owner in numbered if other == number]
        found.append(Round([m for m, _ in chosen], [o for _, o in chosen], ranges, rank, replicated))
    return found


def _parts(matrices: list[Matrix], held: list[tuple[int, int]]) -> list[Part]:
    """What of the matrices lies in the held ranges."""
    found = []
    for matrix in matrices:
        first, count = held[matrix.parameter]
        start, stop = max(matrix.start, first), min(matrix.start + matrix.size, first + count)
        if start < stop:
            found.append(Part(matrix, start - first, stop - start))
    return found


def _offsets(counts: list[int]) -> list[int]:
    offsets, total = [], 0
    for count in counts:
        offsets.append(total)
        total += count
    return offsets


def _joined(pieces: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The pieces (n_i,) end to end, rounded to `dtype`."""
    whole = torch.empty(sum(len(piece) for piece in pieces), dtype=dtype, device=device)
    return torch.cat(pieces, out=whole) if pieces else whole
