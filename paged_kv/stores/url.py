"""How urls of stores are told in messages, which go to logs."""

from __future__ import annotations

import re
from typing import Final

USER: Final = re.compile(r"(?<=://)[^/@]*@")


def without_password(url: str) -> str:
    return USER.sub("", url)
