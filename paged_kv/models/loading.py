"""Find and load models and tokenizers, and what their configurations say. Knows no requests."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from reprlib import repr as short_repr
from textwrap import shorten
from threading import RLock
from types import MappingProxyType
from typing import Any, Final, NamedTuple, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as transformers_logging

from ..cache.device_memory import require_device
from ..cache.layer_spec import FULL_PRECISION_DTYPES
from ..errors import ConfigError, MissingDependencyError, ModelNotFoundError
from ..validation import is_flag, require
from .adapters import configs_of, unwrapped

# A small model to try everything with, which comes with the package.
DEMO_MODEL: Final[Path] = Path(__file__).parents[1] / "demo_model"
# As the hub has them: "name" or "owner/name".
HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
FILE_ENDINGS: Final = (".bin", ".ggml", ".gguf", ".json", ".pt", ".pth", ".safetensors")
EXPECTED_DTYPES: Final = "float32, bfloat16 or float16"
GGUF_ENDING: Final = ".gguf"
GGUF_MAGIC: Final = b"GGUF"
GGUF_PACKAGES: Final = ("gguf", "accelerate")  # which transformers asks for
ADAPTER_CONFIG: Final = "adapter_config.json"
MAX_NAMES: Final = 5  # of tensors in a message
READING: Final = RLock()  # of weights


class Source(NamedTuple):
    """What of a hub name or folder is meant, beside its name."""

    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def load(
        self,
        model: str | Path | PreTrainedModel | torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        dtype: torch.dtype | None,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        """A model and its tokenizer, if they are not loaded yet; a loaded model may have none.

        One that peft has wrapped is the model inside, with its adapters.
        """
        self.check()
        model = cast("str | Path | PreTrainedModel", unwrapped(model))
        if not isinstance(model, PreTrainedModel):
            found = load_model(model, dtype, self.gguf_file, self)
            return found, tokenizer or self._tokenizer_of(found, model)
        for name in ("gguf_file", "revision"):
            value = getattr(self, name)
            if value is not None:
                raise ConfigError(f"{name} {value!r} is for a folder; a loaded model was given")
        if dtype is not None and model.dtype != dtype:
            raise ConfigError(f"the loaded model is {model.dtype}, but dtype={dtype} was asked for")
        return model, tokenizer

    def _tokenizer_of(self, model: PreTrainedModel, name: str | Path) -> PreTrainedTokenizerBase:
        """The tokenizer at a name, or where there is only an adapter, that of its model."""
        try:
            return load_tokenizer(name, self.gguf_file, self)
        except ModelNotFoundError:
            base = model.name_or_path
            if not configs_of(model) or not base or base == str(name):
                raise
            return load_tokenizer(base, None, self._replace(revision=None))

    def check(self) -> None:
        is_name = self.revision is None or (isinstance(self.revision, str) and bool(self.revision))
        require("revision", self.revision, is_name, "None or a branch, tag or commit")
        trusts = self.trust_remote_code
        require("trust_remote_code", trusts, is_flag(trusts), "True or False")


NEWEST: Final = Source()


def parse_dtype(dtype: torch.dtype | str | None, name: str = "dtype") -> torch.dtype | None:
    """A dtype, also by its name; None and "auto" are None."""
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    require(name, dtype, found in FULL_PRECISION_DTYPES, f'{EXPECTED_DTYPES} or "auto"')
    return cast(torch.dtype, found)


def parse_device(device: torch.device | str | None) -> torch.device | str | None:
    """A device as it was given, but "auto" is a GPU where there is one, else the CPU."""
    if isinstance(device, str) and device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def load_model(
    name: str | Path,
    dtype: torch.dtype | None,
    gguf_file: str | None = None,
    source: Source = NEWEST,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> PreTrainedModel:
    """Load a causal language model whose checkpoint has all of its tensors.

    A GGUF file is given by its path, or as the `gguf_file` of a folder or hub name; what it has
    quantized is unpacked. `dtype` None is the checkpoint's own, of a GGUF file float32. `options`
    are further ones of transformers' `from_pretrained`. Raises `ModelNotFoundError` where there is
    no such model, naming tensors that lack, differ in size or have no place;
    `MissingDependencyError` where a package that it needs does.
    """
    found, gguf_file = find_checkpoint(name, gguf_file)
    if os.path.exists(os.path.join(found, ADAPTER_CONFIG)) and find_spec("peft") is None:
        raise MissingDependencyError(
            f"there is an adapter in {found!r}, which needs peft: pip install 'paged-kv[adapters]'"
        )
    require("dtype", dtype, dtype is None or dtype in FULL_PRECISION_DTYPES, EXPECTED_DTYPES)
    try:
        with without_bars():
            model, report = cast(Any, AutoModelForCausalLM).from_pretrained(
                found,
                gguf_file=gguf_file,
                dtype=dtype or "auto",
                revision=source.revision or "main",
                trust_remote_code=source.trust_remote_code,  # None would ask at a terminal
                ignore_mismatched_sizes=True,  # `require_complete` names them
                output_loading_info=True,
                **options,
            )
    except ImportError as error:
        raise MissingDependencyError(f"the model at {name!s}: {error}") from error
    except Exception as error:  # what reading a broken checkpoint raises has no end
        raise ModelNotFoundError(
            f"no causal language model at {str(name)!r}: {first_lines(error)}"
        ) from error
    require_complete(str(name), cast(PreTrainedModel, model), report)
    return cast(PreTrainedModel, model)


def load_tokenizer(
    name: str | Path, gguf_file: str | None = None, source: Source = NEWEST
) -> PreTrainedTokenizerBase:
    """Load a tokenizer; `ModelNotFoundError` where there is none that can be read."""
    found, gguf_file = find_checkpoint(name, gguf_file)
    try:
        loaded = cast(Any, AutoTokenizer).from_pretrained(
            found,
            gguf_file=gguf_file,
            revision=source.revision or "main",
            trust_remote_code=source.trust_remote_code,
        )
    except ImportError as error:
        raise MissingDependencyError(f"the tokenizer at {name!s}: {error}") from error
    except Exception as error:  # tokenizers raises Exception itself for a broken file
        raise ModelNotFoundError(f"no tokenizer at {str(name)!r}: {first_lines(error)}") from error
    return cast(PreTrainedTokenizerBase, loaded)


def first_lines(error: Exception) -> str:
    """What an error says, without the lists of all models that may follow."""
    return shorten(str(error) or type(error).__name__, 400)


def require_complete(name: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Raise `ModelNotFoundError` unless every tensor of a model came from its checkpoint.

    A tensor of the checkpoint that the model has no place for is refused where the model would
    then compute something else: beside a layer's own, as a bias or a scale, or in a further layer.
    """
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    parts = {
        "lacks": report["missing_keys"],
        "has in other sizes than its configuration says": mismatched,
        "has, and the model has no place for": misplaced(model, report["unexpected_keys"]),
    }
    for what, keys in parts.items():
        if keys:
            names = ", ".join(sorted(keys)[:MAX_NAMES])
            rest = f" and {len(keys) - MAX_NAMES} more" if len(keys) > MAX_NAMES else ""
            raise ModelNotFoundError(
                f"the checkpoint at {name!r} is not one of {type(model).__name__}: it {what} "
                f"{names}{rest}"
            )


def misplaced(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Tensors of a module that has others of its own, or that look like another layer's."""
    module = cast(torch.nn.Module, model)
    owners = {name.rpartition(".")[0] for name, _ in module.named_parameters()}
    forms = {re.sub(r"\d+", "#", name) for name, _ in module.named_parameters()}
    return [
        name
        for name in unexpected
        if re.sub(r"\d+", "#", name) in forms
        or any(name.startswith(owner + ".") for owner in owners if owner)
    ]


def find_checkpoint(name: object, gguf_file: str | None = None) -> tuple[str, str | None]:
    """The folder or hub name that a user means, and the GGUF file in it, if it is one."""
    if isinstance(name, (str, Path)) and gguf_file is None:
        path = os.path.expanduser(str(name))
        if path.lower().endswith(GGUF_ENDING) and not os.path.isdir(path):
            if not os.path.lexists(path):
                raise ModelNotFoundError(f"no model folder at {str(name)!r}, and no GGUF file")
            require_gguf(Path(path))
            return os.path.split(path)[0] or ".", os.path.basename(path)
    found = find_model(name)
    if gguf_file is None:
        return found, None
    is_name = isinstance(gguf_file, str) and bool(gguf_file.strip()) and "\0" not in gguf_file
    require("gguf_file", gguf_file, is_name, "the name of a file")
    if os.path.isdir(found):
        require_gguf(Path(found) / gguf_file)
    require_gguf_packages()
    return found, gguf_file


def require_gguf(path: Path) -> None:
    """Raise `ModelNotFoundError` for what is no GGUF file, or an error for lack of packages."""
    try:
        with path.open("rb") as file:
            beginning = file.read(len(GGUF_MAGIC))
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"no GGUF file at {str(path)!r}: {first_lines(error)}") from error
    if beginning != GGUF_MAGIC:
        raise ModelNotFoundError(
            f"{str(path)!r} is no GGUF file: it begins with {beginning!r}, not {GGUF_MAGIC!r}"
        )
    require_gguf_packages()


def require_gguf_packages() -> None:
    for package in GGUF_PACKAGES:
        if find_spec(package) is None:
            raise MissingDependencyError(
                f"reading GGUF files needs {package}: pip install 'paged-kv[gguf]'"
            )


def find_model(name: object) -> str:
    """The folder or hub name that a user means; what looks like a path is never looked up on a hub.

    A folder that is there is meant. Else it is a hub name only if hub names look like that, and no
    folder of this machine begins like it. Raises `ConfigError` for what is no name at all.
    """
    if not isinstance(name, (str, Path)):
        raise ConfigError(
            f"model must be a folder, a hub name or a loaded model, {described(name)}"
        )
    text = os.path.expanduser(str(name))
    require("model", str(name), bool(text.strip()) and "\0" not in text, "a folder or a hub name")
    if os.path.isdir(text):
        return text
    is_hub_name = HUB_NAME.fullmatch(text) and not text.lower().endswith(FILE_ENDINGS)
    if isinstance(name, Path) or not is_hub_name or os.path.lexists(text):
        raise ModelNotFoundError(f"no model folder at {str(name)!r}")
    parent = os.path.dirname(text)
    if parent and os.path.isdir(parent):
        raise ModelNotFoundError(
            f"no model folder at {str(name)!r}; it is not looked up on the hub, because there is a "
            f"folder {parent!r} here"
        )
    return text


def described(model: object) -> str:
    """What was given instead of a model."""
    kind = type(model).__name__
    if hasattr(model, "merge_and_unload"):
        return f"got the adapter {kind}: call its merge_and_unload() first and give what it returns"
    if isinstance(model, torch.nn.Module):
        return f"got {kind}, which is no transformers.PreTrainedModel"
    return f"got {short_repr(model)}"


def move_model(model: PreTrainedModel, device: torch.device | str) -> None:
    """Move a model, or leave it where it is and raise `ConfigError`."""
    found, before = require_device(device), model.device
    module = cast(torch.nn.Module, model)
    require("device", str(found), found.type != "meta", "one that holds numbers")
    try:
        module.to(found)
    except (AssertionError, RuntimeError) as error:
        module.to(before)
        raise ConfigError(
            f"cannot move the model to device {str(device)!r}: {first_lines(error)}"
        ) from error


def end_token_ids(model: PreTrainedModel) -> list[int]:
    """The end-of-sequence tokens of a model's generation configuration."""
    configuration = model.generation_config
    found = None if configuration is None else configuration.eos_token_id
    if found is None:
        return []
    return [found] if isinstance(found, int) else list(found)


@contextmanager
def without_bars() -> Iterator[None]:
    """Reading weights draws no progress bar of transformers; afterwards its settings are as before.

    One thread at a time, or the last to end would leave what another one has set. What the hub
    shows of a download stays.
    """
    with (
        READING,
        replaced(transformers_logging, "_tqdm_active", False),
        replaced(modeling_gguf_pytorch_utils, "tqdm", lambda tensors, **_: tensors),
    ):
        yield


@contextmanager
def replaced(module: object, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
