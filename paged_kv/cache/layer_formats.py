"""Which layer stores its tokens in which format. Knows names and numbers of layers, never shapes.

"int2"                                       all layers alike
"int2,0=int8,-1=native"                      but for the first layer and the last
{"default": "int2", 0: "int8", -1: "native"} the same
["int8", "int2", "int2", "native"]           of each of four layers
"int8@128,0=native"                          with blocks of 128 tokens
"int8/0"                                     whose first tokens are quantized too
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as short_repr
from typing import Final

from ..errors import ConfigError
from ..validation import is_integer
from .formats import FORMATS, KVFormat, resolve_format

Format = str | KVFormat
DEFAULT: Final = "default"
LAYER: Final = re.compile(r"-?[0-9]{1,6}")
CANDIDATES: Final = ("int2-long", "int3", "k4v2", "int4", "int8")  # to choose among by layer
SHARED_SIZES: Final = ("block_size", "num_sink_tokens", "min_tail_tokens")


@dataclass(frozen=True)
class LayerFormats:
    """A format for each layer of a model that may have any number of them."""

    default: KVFormat | None  # None where each layer is named
    others: tuple[tuple[int, KVFormat], ...] = ()  # negative layers count from the last

    @property
    def name(self) -> str:
        """As a string that means the same, where all formats have the names of known ones."""
        names = [] if self.default is None else [sized_name(self.default, [self.default])]
        others = (f"{layer}={sized_name(each, [each])}" for layer, each in self.others)
        return ",".join([*names, *others])

    def of(self, num_layers: int, *, num_sink_tokens: int = 0) -> list[KVFormat]:
        """The format of each of so many layers, with sizes that one block table can serve.

        These are the largest that any quantized layer asks for; quantized layers keep at least
        `num_sink_tokens` first tokens. Raises `ConfigError` where the model has other layers.
        """
        named: dict[int, KVFormat] = {}
        for layer, kv_format in self.others:
            if not -num_layers <= layer < num_layers:
                raise ConfigError(
                    f"kv_format names layer {layer} of a model that stores {num_layers} layers"
                )
            if layer % num_layers in named:
                raise ConfigError(f"kv_format names layer {layer % num_layers} twice")
            named[layer % num_layers] = kv_format
        formats = [named.get(layer, self.default) for layer in range(num_layers)]
        known = [each for each in formats if each is not None]
        if len(known) < num_layers:
            raise ConfigError(
                f"kv_format names {len(named)} layers of a model that stores {num_layers}"
            )
        return with_shared_sizes(known, num_sink_tokens)


KVFormats = Format | Mapping[str | int, Format] | Sequence[Format] | LayerFormats


def with_shared_sizes(formats: Sequence[KVFormat], num_sink_tokens: int) -> list[KVFormat]:
    quantized = [each for each in formats if not each.is_native]
    if not quantized and len(set(formats)) == 1:
        return list(formats)
    asked = quantized or formats
    sizes = {name: max(getattr(each, name) for each in asked) for name in SHARED_SIZES}
    sizes["num_sink_tokens"] = max(sizes["num_sink_tokens"], num_sink_tokens if quantized else 0)
    return [each.with_options(**sizes) for each in formats]


def resolve_formats(kv_format: KVFormats) -> LayerFormats:
    """What a user means; raises `ConfigError`, naming the value, for anything else."""
    if isinstance(kv_format, LayerFormats):
        return kv_format
    if isinstance(kv_format, str):
        return read_formats(kv_format)
    if isinstance(kv_format, Mapping):
        return of_mapping(kv_format)
    if isinstance(kv_format, Sequence) and not isinstance(kv_format, (bytes, bytearray)):
        formats = tuple(enumerate(resolve_format(each) for each in kv_format))
        if not formats:
            raise ConfigError("kv_format names no layer")
        return LayerFormats(None, formats)
    return LayerFormats(resolve_format(kv_format))


def read_formats(text: str) -> LayerFormats:
    """Of a string: a default, then `layer=format` for those that are others."""
    first, *others = (part.strip() for part in text.split(","))
    if "=" in first:
        raise ConfigError(
            f"kv_format {text!r} must begin with the format of all layers that it does not name, "
            f"as in 'int2,{first}'"
        )
    named: dict[str | int, Format] = {DEFAULT: first}
    for part in others:
        layer, separator, name = (piece.strip() for piece in part.partition("="))
        is_number = LAYER.fullmatch(layer) is not None
        if not separator or not is_number or int(layer) in named:
            raise ConfigError(
                f"kv_format {text!r} must be a format, then layer=format for other layers, each "
                f"once; got {part!r}"
            )
        named[int(layer)] = name
    return of_mapping(named)


def of_mapping(named: Mapping[str | int, Format]) -> LayerFormats:
    if DEFAULT not in named:
        raise ConfigError(f"kv_format {short_repr(dict(named))} has no {DEFAULT!r}")
    others: list[tuple[int, KVFormat]] = []
    for layer, kv_format in named.items():
        if layer == DEFAULT:
            continue
        if not is_integer(layer):
            raise ConfigError(f"kv_format names layer {layer!r}, which is no number")
        others.append((int(layer), resolve_format(kv_format)))
    return LayerFormats(resolve_format(named[DEFAULT]), tuple(sorted(others, key=lambda o: o[0])))


def formats_name(formats: Sequence[KVFormat]) -> str:
    """What is stored in all of these layers, as `resolve_formats` reads it, blocks as large and as
    many first tokens kept."""
    quantized = [each for each in formats if not each.is_native]
    names = [sized_name(each, quantized) for each in formats]
    most = Counter(names).most_common(1)[0][0]
    return ",".join([most, *(f"{n}={name}" for n, name in enumerate(names) if name != most)])


def sized_name(kv_format: KVFormat, beside: Sequence[KVFormat]) -> str:
    """A format's name, with its sizes where they are not the largest that the formats beside it,
    itself included, have by their names."""
    known = [FORMATS[each.name] for each in beside if each.name in FORMATS]
    if kv_format.is_native or not known:
        return kv_format.name
    block_size = max(each.block_size for each in known)
    num_sinks = max(each.num_sink_tokens for each in known)
    block = f"@{kv_format.block_size}" if kv_format.block_size != block_size else ""
    sinks = f"/{kv_format.num_sink_tokens}" if kv_format.num_sink_tokens != num_sinks else ""
    return f"{kv_format.name}{block}{sinks}"
