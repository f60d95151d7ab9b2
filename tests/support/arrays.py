"""Arrays of ids, written short."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def ids(*values: int) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)
