"""Feature statistics: sums of the features for FID, the features themselves for MMD, never the pictures.

Every process adds the features of its pictures; `together` brings the processes' statistics together, once.
The result is that of one process, up to the order in which float64 numbers are added.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from millrace.engine.config.evaluation import MetricName
from millrace.engine.distributed.process_group import gather_objects, rank, sum_over_ranks, world_size
from millrace.engine.evaluation.frechet import Moments, frechet_distance
from millrace.engine.evaluation.mmd import discrepancy, kernel_sum
from millrace.engine.util.errors import UserError


class Statistics(ABC):
    """Of the features of pictures, for one metric."""

    @abstractmethod
    def add(self, first: int, features: Tensor) -> None:
        """Add features (B, D) of pictures number `first` and following. Raises UserError unless finite."""

    @abstractmethod
    def together(self) -> None:
        """Add what the other processes have. Collective; once, after the last `add`."""

    @abstractmethod
    def distance(self, reference: "Statistics") -> float:
        """The metric, of statistics that are together. Collective: processes may share the work."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything, to be stored."""

    @classmethod
    @abstractmethod
    def restored(cls, tensors: dict[str, Tensor]) -> "Statistics":
        """From what `tensors` gave."""


class FeatureSums(Statistics):
    """Count, sum (D,) and sum of outer products (D, D) of features, in float64."""

    def __init__(self) -> None:
        self.count, self.total, self.products = 0, torch.zeros(()), torch.zeros(())

    def add(self, first: int, features: Tensor) -> None:
        features = _finite(first, features).double()
        self.total = self.total.to(features) + features.sum(0)
        self.products = self.products.to(features) + features.T @ features
        self.count += len(features)

    def together(self) -> None:
        count, total, products = self._counted()
        # A process without a picture does not know how many features there are.
        dim = max(gather_objects(total.numel() if self.count else 0))
        if not self.count:
            total, products = torch.zeros(dim).double(), torch.zeros(dim, dim).double()
        self.count, self.total, self.products = (
            int(sum_over_ranks(count)),
            sum_over_ranks(total),
            sum_over_ranks(products),
        )

    def moments(self) -> Moments:
        """Mean, and covariance over N - 1."""
        if self.count < 2:
            raise UserError(f"FID of {self.count} pictures; take at least 2")
        mean = self.total / self.count
        return Moments(mean, (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1))

    def distance(self, reference: Statistics) -> float:
        assert isinstance(reference, FeatureSums)
        return frechet_distance(self.moments(), reference.moments())

    def tensors(self) -> dict[str, Tensor]:
        count, total, products = self._counted()
        return {"count": count, "total": total, "products": products}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor]) -> "FeatureSums":
        found = cls()
        found.count = int(tensors["count"])
        found.total, found.products = tensors["total"], tensors["products"]
        return found

    def _counted(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.tensor(self.count), self.total.double().cpu(), self.products.double().cpu()


class FeatureRows(Statistics):
    """Features (N, D) FP32, in the order of the pictures, on the host."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, Tensor]] = []
        self._device = torch.device("cpu")
        self.rows = torch.zeros(0, 0)
        self.within: float | None = None
        """Sum of kernel values of all pairs, once it is known."""

    def add(self, first: int, features: Tensor) -> None:
        self._parts.append((first, _finite(first, features).float().cpu()))
        self._device = features.device

    def together(self) -> None:
        parts = sorted(
            (part for own in gather_objects(self._parts) for part in own), key=lambda part: part[0]
        )
        self.rows = torch.cat([rows for _, rows in parts]) if parts else self.rows
        self._parts = []
        self.within = self._kernel_sum(self.rows)

    def distance(self, reference: Statistics) -> float:
        assert isinstance(reference, FeatureRows)
        assert self.within is not None
        assert reference.within is not None
        between = self._kernel_sum(reference.rows)
        return discrepancy(len(self.rows), len(reference.rows), self.within, reference.within, between)

    def _kernel_sum(self, others: Tensor) -> float:
        """Over all pairs of these rows and others; every process takes its share of the rows."""
        share = self.rows.tensor_split(world_size())[rank()].to(self._device)
        found = kernel_sum(share, others.to(self._device))
        return sum_over_ranks(torch.tensor(found, dtype=torch.float64)).item()

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows, "within": torch.tensor(self.within, dtype=torch.float64)}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor]) -> "FeatureRows":
        found = cls()
        found.rows, found.within = tensors["rows"], float(tensors["within"])
        return found


KINDS: dict[MetricName, type[FeatureSums] | type[FeatureRows]] = {
    "fid": FeatureSums,
    "fid_prx": FeatureSums,
    "cmmd": FeatureRows,
    "dino_mmd": FeatureRows,
}


def _finite(first: int, features: Tensor) -> Tensor:
    bad = ~torch.isfinite(features).all(1)
    if bool(bad.any()):
        where = first + int(bad.nonzero()[0])
        raise UserError(
            f"features of {int(bad.sum())} of {len(features)} pictures are not finite, of number {where} for "
            "one; look at those pictures"
        )
    return features
