"""Which way a model computes on blocks. Knows both ways and their refusals, never requests."""

from __future__ import annotations

import logging
from typing import Final

from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .attached_model import AttachedModel
from .gathered_model import GatheredModel
from .huggingface import PagedModel, refuse_encoder_decoder

logger: Final = logging.getLogger("paged_kv")


def choose_route(model: PreTrainedModel, *, widens: bool = False) -> AttachedModel:
    """A model whose attention reads blocks; or else one that is given what they hold, told of.

    Raises `UnsupportedModelError`, with the reasons against both, where neither computes what the
    model means.
    """
    refuse_encoder_decoder(model)
    try:
        return PagedModel(model, widens=widens)
    except UnsupportedModelError as refusal:
        fused_refusal = refusal
    try:
        gathered = GatheredModel(model, widens=widens)
    except UnsupportedModelError as refusal:
        reasons = f"{fused_refusal}; and by gathering what blocks hold: {refusal}"
        raise UnsupportedModelError(reasons) from (refusal.__cause__ or fused_refusal)
    logger.warning(
        "%s; so what its blocks hold is gathered and dequantized for it, for one sequence at a "
        "time: right, but slower", fused_refusal,
    )  # fmt: skip
    return gathered
