"""placeholder"""

from .store import store_tokens

__all__ = ["store_tokens"]
