"""Adapters of peft in a model: which it has, which are active, and one for each token of a step.

Knows peft's layers, and needs no peft where nobody has imported it; never requests. What a layer
computes with an adapter is peft's own affair, which takes one name for each row of a batch: a step
of T tokens in one row is shown to it as T rows of one token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, Final, cast

import numpy as np
from torch import Tensor, nn

from ..blocks.geometry import IntArray
from ..errors import InvalidRequestError, PagedKVError, UnsupportedModelError

BASE_MODEL: Final = "__base__"  # peft's name for a model without its adapters
AdapterNames = tuple[str, ...]  # what is active at once; nothing is the model without adapters


# -- peft's objects -------------------------------------------------------------------------------


def unwrapped(model: object) -> object:
    """The model that peft has wrapped, with the layers that it has put there; others as they are.

    Raises `UnsupportedModelError` for methods that do more than change layers.
    """
    peft: Any = sys.modules.get("peft")
    if peft is None or not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        return model
    wrapper: Any = model
    usual = sys.modules["peft.tuners.tuners_utils"].BaseTuner.forward
    for name, config in wrapper.peft_config.items():
        kind = config.peft_type.value
        if getattr(type(wrapper.base_model), "forward", None) is not usual and kind != "ADALORA":
            raise UnsupportedModelError(
                f"adapter {name!r} is one of {kind}, which does more than change a model's layers"
            )
    return wrapper.base_model.model


def configs_of(model: object) -> Mapping[str, Any]:
    """peft's configuration of each adapter, by its name."""
    return cast("Mapping[str, Any]", getattr(model, "peft_config", None) or {})


def adapted_layers(model: nn.Module) -> Iterator[Any]:
    """Layers that adapters change, as peft has wrapped them."""
    if configs_of(model):
        kind = sys.modules["peft.tuners.tuners_utils"].BaseTunerLayer
        yield from (module for module in model.modules() if isinstance(module, kind))


def adapters_own(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that adapters are made of, whose precision peft gives to what comes in."""
    for layer in adapted_layers(model):
        for name in layer.adapter_layer_names:
            part = getattr(layer, name, None)
            if isinstance(part, nn.Module):
                yield from part.modules()


def refuse_invoked(model: object) -> None:
    """Raise `UnsupportedModelError` for adapters that begin somewhere within a prompt."""
    for name, config in configs_of(model).items():
        if getattr(config, "alora_invocation_tokens", None):
            raise UnsupportedModelError(
                f"adapter {name!r} is invoked by tokens of a prompt (aLoRA), which is not done here"
            )


def state_of(model: nn.Module) -> Iterator[bytes]:
    """What layers make of their weights: which adapters are active, merged, and how strong."""
    for layer in adapted_layers(model):
        scaling = getattr(layer, "scaling", None)
        state = (layer.disable_adapters, layer.active_adapters, layer.merged_adapters, scaling)
        yield repr(state).encode()


# -- one for each token ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TokenAdapters:
    """The adapter of each token of a step, and of the tokens whose logits are wanted."""

    of_tokens: list[str]  # [T]
    of_logits: list[str]  # [M]

    @classmethod
    def of_one(cls, name: str | None, num_tokens: int, num_logits: int) -> TokenAdapters | None:
        """The same for all; None for what is active."""
        return None if name is None else cls([name] * num_tokens, [name] * num_logits)


_applied: ContextVar[TokenAdapters | None] = ContextVar("paged_kv_adapters", default=None)


@contextmanager
def applying(model: nn.Module, step: TokenAdapters | None, *, keeps_logits: bool) -> Iterator[None]:
    """Let the forward pass in this context give each token its adapter; None: what is active.

    Whether the model's last layer `keeps_logits` only of tokens whose logits are wanted.
    """
    if step is None:
        yield
        return
    head: Any = cast(Any, model).get_output_embeddings() if keeps_logits else None

    def show_rows(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if _applied.get() is not step:  # another thread's pass through the same layers
            return None
        rows, names = arguments[0], step.of_logits if module is head else step.of_tokens
        if rows.shape[:2] != (1, len(names)):
            kind = type(module.get_base_layer()).__name__  # type: ignore[operator]
            raise UnsupportedModelError(f"{kind} is given tokens in another order than the step's")
        return (rows.transpose(0, 1), *arguments[1:]), {**options, "adapter_names": names}

    def show_row(module: nn.Module, arguments: object, output: Tensor) -> Tensor | None:
        return output.transpose(0, 1) if _applied.get() is step else None

    with ExitStack() as undone:
        for layer in adapted_layers(model):
            require_switchable(layer)
            before = layer.register_forward_pre_hook(show_rows, with_kwargs=True)
            undone.callback(before.remove)
            undone.callback(layer.register_forward_hook(show_row).remove)
        undone.callback(_applied.reset, _applied.set(step))
        yield


def require_switchable(layer: Any) -> None:
    """Raise `UnsupportedModelError` where peft would not, or not fully, switch adapters."""
    reason = None
    if not hasattr(layer, "_mixed_batch_forward"):
        reason = f"peft switches no adapters of {type(layer).__module__.split('.')[-2]} by rows"
    elif layer.training:
        reason = "an adapter is in training mode: call the model's eval()"
    elif layer.disable_adapters:
        reason = "the model's adapters are disabled"
    elif layer.merged:
        reason = "an adapter is merged into the model's weights"
    if reason is not None:
        raise UnsupportedModelError(reason)


class Adapters:
    """The adapters of one model: as they are now, whatever was loaded, activated or deleted."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tried: dict[str, object] = {}  # configurations of those that peft has switched

    @property
    def names(self) -> AdapterNames:
        """Those that can be named."""
        return tuple(configs_of(self._model))

    @property
    def active(self) -> AdapterNames:
        """Those that all tokens get for whom nothing else is said."""
        layer = next(adapted_layers(self._model), None)
        if layer is None or layer.disable_adapters:
            return ()
        return tuple(layer.active_adapters)

    def find(self, name: str | None, try_out: Callable[[TokenAdapters], object]) -> AdapterNames:
        """What a request is computed with that names an adapter, or none: what is active now.

        Raises `InvalidRequestError` for one that there is not, and with peft's reasons for one that
        cannot be computed beside what is active: `try_out` runs two tokens and says so.
        """
        active = self.active
        if name is None:
            return active
        if name != BASE_MODEL and name not in self.names:
            known = ", ".join(map(repr, self.names)) or "no others"
            raise InvalidRequestError(f"no adapter {name!r}; there are {known}, and {BASE_MODEL!r}")
        wanted = () if name == BASE_MODEL else (name,)
        if wanted == active:
            return wanted
        try:
            if len(active) > 1:
                raise UnsupportedModelError(f"several are active at once: {', '.join(active)}")
            self._try({*wanted, *active}, try_out)
        except Exception as error:  # whatever a layer of peft raises
            raise InvalidRequestError(
                f"adapter {name!r} cannot be chosen by a request: {shorten(str(error), 300)}"
            ) from error
        return wanted

    def _try(self, names: set[str], try_out: Callable[[TokenAdapters], object]) -> None:
        configs = configs_of(self._model)
        for name in sorted(names):
            config = configs[name]
            if self._tried.get(name) is config:
                continue
            for option in ("modules_to_save", "trainable_token_indices"):
                if getattr(config, option, None):
                    raise UnsupportedModelError(f"{name!r} replaces whole modules ({option})")
            if getattr(config, "bias", "none") != "none":
                raise UnsupportedModelError(f"{name!r} has changed the model's biases")
            try_out(TokenAdapters([BASE_MODEL, name], [name]))
            self._tried[name] = config

    def of_step(
        self, of_seqs: Sequence[AdapterNames], token_rows: IntArray, logit_tokens: IntArray
    ) -> TokenAdapters | None:
        """For sequences [N] with tokens [T] of which `logit_tokens` [M] have logits.

        None where all have what is active. Raises `PagedKVError` where the model has changed so
        that it cannot be.
        """
        if self.are_active(of_seqs):
            return None
        unfit = [names for names in of_seqs if len(names) > 1]
        if unfit:
            raise PagedKVError(
                f"requests began with {', '.join(unfit[0])} active at once, and others are now"
            )
        named = np.array([names[0] if names else BASE_MODEL for names in of_seqs], dtype=object)
        of_tokens = named[token_rows]
        return TokenAdapters(of_tokens.tolist(), of_tokens[logit_tokens].tolist())

    def are_active(self, of_seqs: Sequence[AdapterNames]) -> bool:
        """Whether the model as it is computes what all of these ask for."""
        active = self.active
        return all(names == active for names in of_seqs)
