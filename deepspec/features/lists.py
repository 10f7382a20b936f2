"""A column of lists as two arrays: the values of all of them, and where each begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Lists:
    """A column of lists: where each begins in `values`."""

    offsets: npt.NDArray[np.int64]
    values: npt.NDArray[Any]

    @classmethod
    def of(cls, column: Any) -> Lists:
        offsets = column.offsets.to_numpy().astype(np.int64)
        values = column.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
        return cls(offsets - offsets[0], values)

    def cut(self, length: int) -> Lists:
        """Return the first `length` values of each list."""
        lengths = np.diff(self.offsets)
        if lengths.max(initial=0) <= length:
            return self
        kept = np.concatenate(([0], np.cumsum(np.minimum(lengths, length))))
        return Lists(kept, self.values[self.places() < length])

    def places(self) -> npt.NDArray[np.int64]:
        """Return of each value its place in its list."""
        return np.arange(self.offsets[-1]) - np.repeat(self.offsets[:-1], np.diff(self.offsets))

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]
