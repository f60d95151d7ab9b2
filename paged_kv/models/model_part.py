"""One process's part of a model that several processes compute together: some of its heads.

Knows transformers' plan of how a model is split and the process group, never requests. transformers
reads from the checkpoint what a process needs and leaves tensors that only its own code computes
with. Here they become plain ones again, so that all that is made for linear layers serves them, and
what has to be summed or gathered is done by modules of ours.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from ..cache.key_calibration import KeyCalibration
from ..cache.layer_formats import KVFormats
from ..cache.layer_spec import LayerSpec
from ..errors import ConfigError, MissingDependencyError, PagedKVError, UnsupportedModelError
from .adapters import configs_of
from .attached_model import fingerprint_of
from .calibration import Calibration
from .huggingface import PagedModel, rotations_of
from .loading import ADAPTER_CONFIG, Source, find_model, first_lines, load_model
from .rotary import Rotation
from .split_modules import GatheredLinear, Place, SummedEmbedding, SummedLinear, summing
from .widening import computes_wide

COLLECTIVE_SECONDS: Final = 300.0  # that a process waits for the others, loading or in a step
PLAIN_STYLES: Final = ("colwise", "packed_colwise", "packed_rowwise")  # nothing to sum or gather
NORM_STYLE: Final = "replicated_with_grad_allreduce"  # of gradients, which nobody asks for here
EXPERTS_STYLE: Final = "moe_tp_experts"
KNOWN_STYLES: Final = (*PLAIN_STYLES, NORM_STYLE, EXPERTS_STYLE, "rowwise", "embedding_rowwise")
GATHERED_STYLES: Final = ("colwise_gather_output", "colwise_rep")  # of the output layer alone


@dataclass(frozen=True, kw_only=True)
class PartSource:
    """What a process needs to know to load its part."""

    name: str
    source: Source
    dtype: torch.dtype | None
    place: Place
    store_file: str  # where the processes find each other
    num_threads: int

    def at(self, rank: int) -> PartSource:
        return replace(self, place=self.place._replace(rank=rank))


# -- refusals before anything is loaded -----------------------------------------------------------


def refuse_unsplittable(name: object, source: Source, size: int) -> str:
    """Where the model lies; raises for what cannot be computed by `size` processes."""
    if not isinstance(name, (str, Path)):
        raise ConfigError(
            "tensor_parallel_size above 1 is for a folder or a hub name, of which each process "
            f"reads its own part; a loaded {type(name).__name__} was given"
        )
    if source.gguf_file is not None or str(name).lower().endswith(".gguf"):
        raise ConfigError("tensor_parallel_size above 1 is not for GGUF files: they load whole")
    require_parallel_transformers()
    found = find_model(name)
    if os.path.exists(os.path.join(found, ADAPTER_CONFIG)):
        raise UnsupportedModelError(f"{found!r} is an adapter, which is not split")
    try:
        config = cast(Any, AutoConfig).from_pretrained(
            found,
            revision=source.revision or "main",
            trust_remote_code=source.trust_remote_code,
        )
    except Exception as error:  # what reading a broken configuration raises has no end
        raise ConfigError(f"no configuration at {found!r}: {first_lines(error)}") from error
    refuse_config(config, size)
    return found


def refuse_config(config: Any, size: int) -> None:
    """Raise for a configuration whose heads are not equally many in each process, or not split."""
    text = config.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None)
    if not plan:
        raise UnsupportedModelError(
            f"transformers has no plan to split a {config.model_type} model (base_model_tp_plan)"
        )
    unknown = [style for style in dict.fromkeys(plan.values()) if style not in KNOWN_STYLES]
    if unknown:
        raise UnsupportedModelError(
            f"transformers splits parts of a {config.model_type} model as "
            f"{', '.join(map(repr, unknown))}, which does not leave each process heads of its own"
        )
    for what, count in (
        ("heads", getattr(text, "num_attention_heads", None)),
        ("kv heads", getattr(text, "num_key_value_heads", None)),
    ):
        if isinstance(count, int) and count % size:
            raise ConfigError(
                f"tensor_parallel_size must divide the model's {count} {what}, got {size}"
            )


def require_parallel_transformers() -> None:
    try:
        from transformers.distributed import tensor_parallel  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "tensor_parallel_size above 1 needs transformers 5.17 or later, and torch.distributed"
        ) from error
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        raise MissingDependencyError("this torch has no gloo, by which processes talk on a CPU")


# -- the process group ----------------------------------------------------------------------------


def join(part: PartSource) -> None:
    """Become one of the processes, over the loopback device alone; returns when all are there."""
    loopback = next((n for _, n in socket.if_nameindex() if n.startswith("lo")), "lo")
    with environment("GLOO_SOCKET_IFNAME", loopback):
        torch.distributed.init_process_group(
            "gloo",
            store=cast(Any, torch.distributed).FileStore(part.store_file, part.place.size),
            rank=part.place.rank,
            world_size=part.place.size,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        )


def leave() -> None:
    """Be none of them any more; those who wait for this one see it at once."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# -- the model ------------------------------------------------------------------------------------


def load_part(part: PartSource) -> ModelPart:
    """Load this process's part and attach it; all processes of the group do so together."""
    from transformers.distributed.configuration_utils import DistributedConfig

    torch.set_num_threads(part.num_threads)
    join(part)
    options = {"distributed_config": DistributedConfig(tp_size=part.place.size)}
    with quiet_warnings():
        model = load_model(part.name, part.dtype, None, part.source, options)
    if configs_of(model):
        raise UnsupportedModelError("adapters are not split: merge them into the model first")
    fingerprint = fingerprint_of(model, whole)
    take_over(model, part.place)
    widens = part.dtype is None and computes_wide(model, None)
    return ModelPart(model, fingerprint, part.place, widens=widens)


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """transformers lists all layers that its plan leaves whole."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)


def is_split(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "DTensor" or hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process has a part."""
    return cast(Any, tensor).full_tensor() if is_split(tensor) else tensor


def take_over(model: PreTrainedModel, place: Place) -> None:
    """Make plain tensors of what transformers has split, and sum and gather by modules of ours."""
    module, plan = cast(nn.Module, model), cast(Any, model).tp_plan
    output = cast(Any, model).get_output_embeddings()
    for name, part in list(module.named_modules()):
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is not None:
            part.__dict__.pop("forward", None)  # the one that transformers has put there
        for key, parameter in list(part.named_parameters(recurse=False)):
            if is_split(parameter):
                local = cast(Any, parameter).to_local().detach().contiguous()
                setattr(part, key, nn.Parameter(local, requires_grad=False))
        if style is None or style in PLAIN_STYLES:
            continue
        if style == NORM_STYLE:
            part._backward_hooks.clear()
        elif style == EXPERTS_STYLE:
            part.__dict__["forward"] = summing(part.forward)
        elif style == "rowwise" and type(part) is nn.Linear:
            replace_module(module, name, SummedLinear(part))
        elif style == "embedding_rowwise" and isinstance(part, nn.Embedding):
            replace_module(module, name, SummedEmbedding(part, place))
        elif style in GATHERED_STYLES and part is output:
            replace_module(module, name, GatheredLinear(part, place))
        else:
            raise UnsupportedModelError(
                f"{type(model).__name__}: transformers' plan splits {name} as {style!r}, which "
                "does not leave each process heads of its own"
            )


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


class ModelPart(PagedModel):
    """A model's part on paged blocks. Whatever runs the model does so in all processes at once."""

    def __init__(
        self, model: PreTrainedModel, fingerprint: bytes, place: Place, *, widens: bool = False
    ) -> None:
        self.place = place
        self._fingerprint_of_whole = fingerprint
        super().__init__(model, widens=widens)

    def fingerprint(self) -> bytes:
        """Of the whole model: who calibrates it in one process may serve it by several."""
        return self._fingerprint_of_whole

    def _make_ready(self) -> None:
        self._require_split()
        super()._make_ready()
        self._rotations: dict[int, Rotation] | PagedKVError
        try:  # now, when all processes run the model
            self._rotations = rotations_of(self.model)
        except PagedKVError as error:
            self._rotations = error

    def _require_split(self) -> None:
        """Raise `UnsupportedModelError` where a layer's kv heads are not shared out."""
        text, name = self.model.config.get_text_config(), type(self.model).__name__
        names = ("num_attention_heads", "num_key_value_heads", "num_global_key_value_heads")
        known = {getattr(text, each, None) for each in names}
        for layer, (heads, _, _) in self.layer_shapes.items():
            if heads * self.place.size not in known:
                raise UnsupportedModelError(
                    f"{name}: layer {layer} stores {heads} kv heads in each of {self.place.size} "
                    "processes: transformers' plan does not share them out"
                )

    @property
    def rotations(self) -> dict[int, Rotation]:
        if isinstance(self._rotations, PagedKVError):
            raise self._rotations
        return self._rotations

    def layers(
        self, kv_format: KVFormats, calibration: Sequence[KeyCalibration] | None = None
    ) -> list[LayerSpec]:
        """Of this process's kv heads; the calibration is of all."""
        if calibration is not None:
            calibration = [own_heads(each, self.place) for each in calibration]
        return super().layers(kv_format, calibration)


def own_heads(calibration: KeyCalibration, place: Place) -> KeyCalibration:
    if calibration.num_kv_heads % place.size:
        raise ConfigError(
            f"a calibration of {calibration.num_kv_heads} kv heads is not one of this model's"
        )
    own = place.of(calibration.num_kv_heads)
    return KeyCalibration(
        channel_order=calibration.channel_order[own], feedback=calibration.feedback[own]
    )


def joined_heads(parts: Sequence[Calibration]) -> Calibration:
    """A calibration of all kv heads, from those of each process, by rank."""
    import numpy as np

    layers = tuple(
        KeyCalibration(
            channel_order=np.concatenate([each.channel_order for each in its]),
            feedback=np.concatenate([each.feedback for each in its]),
        )
        for its in zip(*(part.layers for part in parts), strict=True)
    )
    return Calibration(layers, parts[0].model_fingerprint)
