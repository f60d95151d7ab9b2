"""What is known of a layer's queries and keys before it serves anybody. Knows channels, no blocks.

Two things follow from what queries are like. Channels in which an error costs most are worth more
bits: by E[q^2] * Var(k). And while the channels of a key are rounded one after the other, the
error of one can be made up for by those that come after it, as GPTQ does for weights (Frantar et
al. 2022, arXiv:2210.17323): with U the upper Cholesky factor of the inverse of C = E[q q^T], an
error e in channel i adds e * U[i, j] / U[i, i] to what channel j should take away.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..validation import require_instance

DAMPING: Final = 0.1  # of the mean variance, so that what was never seen is not certain


def usual_channel_order(key_dim: int) -> NDArray[np.int16]:
    """[D] channels in the order of what to expect of them where nothing is known of a model.

    Rotary models turn channel d together with d + D / 2, and the slower the further behind: those
    that turn slowly carry what lasts over many tokens, and the offsets that stand out.
    """
    half = key_dim // 2
    pairs = np.arange(half - 1, -1, -1, dtype=np.int16)
    return np.stack([pairs, pairs + np.int16(half)], axis=1).reshape(-1)


@dataclass(frozen=True, eq=False, kw_only=True)
class KeyCalibration:
    """Of one layer with H kv heads of D channels; equal where the bytes of both arrays are.

    `channel_order` int16 [H, D]: channels of each kv head, those that matter most first.
    `feedback` float16 [H, D, D]: in row i, what an error in channel i adds to the channels behind.
    """

    channel_order: NDArray[np.int16]
    feedback: NDArray[np.float16]

    def __post_init__(self) -> None:
        for name, dtype in (("channel_order", np.int16), ("feedback", np.float16)):
            require_instance(name, getattr(self, name), np.ndarray)
            array = np.array(getattr(self, name), dtype=dtype)  # nobody else's
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        order, feedback = self.channel_order, self.feedback
        is_matrix = order.ndim == 2 and feedback.shape == (*order.shape, order.shape[1])
        if not is_matrix or not (np.sort(order, 1) == np.arange(order.shape[1])).all():
            raise ConfigError(
                "channel_order must be permutations [H, D] of D channels and feedback [H, D, D], "
                f"got shapes {order.shape} and {feedback.shape}"
            )
        if not np.isfinite(feedback).all() or np.tril(feedback).any():
            raise ConfigError("feedback must be finite, and 0 on the diagonal and below")

    @classmethod
    def from_moments(
        cls, query_covariance: NDArray[np.float64], key_variance: NDArray[np.float64]
    ) -> KeyCalibration:
        """From E[q q^T] [H, D, D], over all query heads of a kv head, and Var(k) [H, D]."""
        num_channels = key_variance.shape[1]
        weights = np.diagonal(query_covariance, axis1=1, axis2=2)
        order = np.argsort(-weights * key_variance, axis=1, kind="stable")
        damping = np.maximum(weights.mean(1), np.finfo(np.float32).tiny) * DAMPING
        damped = query_covariance + damping[:, None, None] * np.eye(num_channels)
        # The upper factor of the inverse: U^T U = C^-1.
        upper = np.linalg.cholesky(np.linalg.inv(damped)).transpose(0, 2, 1)
        rows = upper / np.diagonal(upper, axis1=1, axis2=2)[:, :, None]
        return cls(
            channel_order=order.astype(np.int16), feedback=np.triu(rows, 1).astype(np.float16)
        )

    @property
    def num_kv_heads(self) -> int:
        return len(self.channel_order)

    @property
    def key_dim(self) -> int:
        return len(self.channel_order[0])

    @cached_property
    def digest(self) -> str:
        """Hexadecimal, of both arrays."""
        content = sha256(repr(self.channel_order.shape).encode())
        content.update(self.channel_order.tobytes())
        content.update(self.feedback.tobytes())
        return content.hexdigest()

    def __repr__(self) -> str:
        return f"KeyCalibration({self.digest})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyCalibration) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)
