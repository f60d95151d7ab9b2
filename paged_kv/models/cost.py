"""What a model's tokens cost in every KV format.

Knows a configuration and bytes, never weights: the model is made without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..blocks.retention import Retention
from ..cache.formats import FORMATS
from ..cache.layer_formats import LayerFormats, formats_name, resolve_formats
from ..cache.layer_groups import find_groups, sequence_bytes, token_bytes
from ..cache.layer_spec import LayerSpec, cache_geometry
from ..errors import ModelNotFoundError
from .loading import find_model, first_lines
from .routes import choose_route


@dataclass(frozen=True, kw_only=True)
class FormatCost:
    """Bytes over all layers. `effective` maps a sequence's length to its bytes a token, with head
    and tail in full precision counted in."""

    name: str
    bytes_per_token: float
    effective: dict[int, float]

    keeps_all: bool  # in all layers

    def tokens_in(self, memory_bytes: int) -> int:
        """Sealed tokens that fit; where layers let go of some, those of the longest sequences."""
        longest = max(self.effective)
        return int(
            memory_bytes / (self.bytes_per_token if self.keeps_all else self.effective[longest])
        )


@dataclass(frozen=True, kw_only=True)
class KindCost:
    """Of all layers that need the same tokens. `held` maps a sequence's length to its bytes."""

    retention: Retention
    num_layers: int
    bytes_per_token: float  # of a sealed one
    held: dict[int, int]


def probe_layers(name: str | Path) -> tuple[list[LayerSpec], torch.dtype]:
    """The attention layers of a model and its dtype, without loading its weights."""
    found = find_model(name)
    try:
        config = AutoConfig.from_pretrained(found, trust_remote_code=False)
        with torch.device("meta"):
            model = cast(Any, AutoModelForCausalLM).from_config(config, trust_remote_code=False)
    except Exception as error:  # what a broken configuration raises has no end
        raise ModelNotFoundError(
            f"no causal language model at {str(name)!r}: {first_lines(error)}"
        ) from error
    dtype = config.get_text_config().dtype or torch.float32
    # Without weights experts know products of bfloat16 alone; layers are the same in any precision.
    paged = choose_route(model.to(torch.bfloat16))
    return paged.layers(FORMATS["native"]), dtype


def format_costs(
    layers: Sequence[LayerSpec],
    dtype: torch.dtype,
    lengths: Sequence[int],
    others: Sequence[LayerFormats] = (),
) -> list[FormatCost]:
    """The cost of every format, and of others by layer, for layers of these shapes."""
    costs = []
    for choice in (*map(resolve_formats, FORMATS), *others):
        formats = choice.of(len(layers))
        specs = [replace(layer, kv_format=f) for layer, f in zip(layers, formats, strict=True)]
        costs.append(
            FormatCost(
                name=formats_name(formats),
                bytes_per_token=token_bytes(specs, dtype),
                effective={n: sequence_bytes(specs, dtype, n) / n for n in lengths},
                keeps_all=all(layer.retention.keeps_all for layer in layers),
            )
        )
    return costs


def kind_costs(
    layers: Sequence[LayerSpec],
    dtype: torch.dtype,
    lengths: Sequence[int],
    kv_format: LayerFormats,
) -> list[KindCost]:
    """What each kind of layers costs in a format, the kind that reaches farthest first."""
    formats = kv_format.of(len(layers))
    specs = [replace(layer, kv_format=f) for layer, f in zip(layers, formats, strict=True)]
    geometry, groups = cache_geometry(specs, dtype), find_groups(specs, dtype)
    costs = []
    for retention in dict.fromkeys(groups.retentions):
        num_groups, num_bytes = groups.retentions.count(retention), groups.block_bytes
        held = {n: num_groups * retention.blocks_held(geometry, n) * num_bytes for n in lengths}
        costs.append(
            KindCost(
                retention=retention,
                num_layers=sum(layer.retention == retention for layer in layers),
                bytes_per_token=num_groups * num_bytes / geometry.block_size,
                held=held,
            )
        )
    return costs
