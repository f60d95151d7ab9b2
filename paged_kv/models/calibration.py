"""Learn from one short text what a model's queries and keys are like, and keep it in a file.

Knows models and their layers' moments; what follows from those is `cache.key_calibration`'s. The
text comes with the library, so that who calibrates the same model in the same way shares blocks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Final

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..cache.formats import NATIVE
from ..cache.key_calibration import KeyCalibration
from ..cache.kv_cache import PagedKVCache
from ..cache.layer_spec import keeping_all
from ..errors import ConfigError
from ..private_folder import owned_folder
from .attached_model import AttachedModel
from .length_limit import find_length_limit

TEXT: Final = Path(__file__).parent / "calibration.txt"
MAX_TOKENS: Final = 2048
MIN_TOKENS: Final = 64
CHUNK: Final = 512  # tokens computed at once
NUM_HEAD_TOKENS: Final = 16  # stay in full precision, and have keys unlike all others
FILE_FORMAT: Final = "paged_kv calibration 2"

logger: Final = logging.getLogger("paged_kv")


@dataclass(frozen=True, eq=False)
class Calibration:
    """What is known of each layer, in the order of layers, and of which model (a fingerprint)."""

    layers: tuple[KeyCalibration, ...]
    model_fingerprint: bytes

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all, with the same bytes every time."""
        from safetensors.numpy import save

        tensors = {}
        for index, layer in enumerate(self.layers):
            tensors[f"{index}.channel_order"] = np.ascontiguousarray(layer.channel_order)
            tensors[f"{index}.feedback"] = np.ascontiguousarray(layer.feedback)
        metadata = {FILE_FORMAT: self.model_fingerprint.hex()}  # one: several have no order
        try:
            write_whole(Path(path), save(tensors, metadata))
        except OSError as error:
            raise ConfigError(f"the calibration cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote; raises `ConfigError` for anything else."""
        from safetensors import SafetensorError, safe_open

        tensors = {}
        try:
            with safe_open(os.fspath(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                for name in file.keys():  # noqa: SIM118 - it is no dictionary
                    tensors[name] = file.get_tensor(name)
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            raise ConfigError(f"no calibration can be read from {str(path)!r}: {error}") from error
        if FILE_FORMAT not in metadata:
            raise ConfigError(
                f"{str(path)!r} is no calibration: it is of {sorted(metadata)}, not {FILE_FORMAT!r}"
            )
        try:
            layers = tuple(
                KeyCalibration(
                    channel_order=tensors[f"{index}.channel_order"],
                    feedback=tensors[f"{index}.feedback"],
                )
                for index in range(len(tensors) // 2)
            )
            return cls(layers, bytes.fromhex(metadata[FILE_FORMAT]))
        except (KeyError, ValueError) as error:
            raise ConfigError(f"the calibration {str(path)!r} is broken: {error}") from error

    def require_model(self, model: AttachedModel) -> None:
        """Raise `ConfigError` unless this was learned of that model."""
        self.require_fingerprint(model.fingerprint())

    def require_fingerprint(self, model_fingerprint: bytes) -> None:
        """Raise `ConfigError` unless this was learned of the model of that fingerprint."""
        if self.model_fingerprint != model_fingerprint:
            raise ConfigError(
                "the calibration was made for another model (or for other weights, or these in "
                "another precision, see --dtype): run `paged-kv calibrate` on this one"
            )


@dataclass(eq=False)
class Moments:
    """Sums over the tokens of one layer, float64 on the model's device."""

    query_products: Tensor  # [H, D, D]
    num_queries: int
    key_sums: Tensor  # [2, H, D] of keys and of their squares
    num_keys: int

    @classmethod
    def none(cls, num_kv_heads: int, key_dim: int, device: torch.device) -> Moments:
        zeros = torch.zeros(num_kv_heads, key_dim, key_dim, dtype=torch.float64, device=device)
        return cls(zeros, 0, zeros.new_zeros(2, num_kv_heads, key_dim), 0)

    def add(self, queries: Tensor, keys: Tensor, *, is_head: bool) -> None:
        """Queries [T, Hq, D] and keys [T, H, D]; those of the head count as queries alone."""
        num_kv_heads, key_dim = keys.shape[1:]
        rows = queries.double().reshape(len(queries), num_kv_heads, -1, key_dim)
        rows = rows.transpose(0, 1).flatten(1, 2)  # [H, T * group, D]
        self.query_products += rows.transpose(1, 2) @ rows
        self.num_queries += rows.shape[1]
        if not is_head:
            keys = keys.double()
            self.key_sums += torch.stack([keys.sum(0), (keys * keys).sum(0)])
            self.num_keys += len(keys)

    def key_calibration(self) -> KeyCalibration:
        mean, mean_square = (self.key_sums / self.num_keys).cpu().numpy()
        return KeyCalibration.from_moments(
            (self.query_products / self.num_queries).cpu().numpy(),
            np.maximum(mean_square - mean * mean, 0.0),
        )


def calibrate(model: AttachedModel, token_ids: Sequence[int]) -> Calibration:
    """Run a text through the model, without quantizing anything; at most 2048 tokens count."""
    if len(token_ids) < MIN_TOKENS:
        raise ConfigError(
            f"a calibration needs at least {MIN_TOKENS} tokens of text, got {len(token_ids)}"
        )
    longest = find_length_limit(model.model).num_tokens
    ids = np.array(token_ids[: min(MAX_TOKENS, longest or MAX_TOKENS)], dtype=np.int64)
    specs = keeping_all(model.layers(NATIVE))
    moments = [Moments.none(spec.num_kv_heads, spec.key_dim, model.device) for spec in specs]
    num_blocks = 2 + len(ids) // NATIVE.block_size
    cache = PagedKVCache(specs, num_blocks=num_blocks, dtype=model.dtype, device=model.device)
    manager = cache.new_manager(max_num_seqs=1, max_model_len=len(ids))
    seq_ids = np.array([manager.add_sequence()])
    edges = [0, NUM_HEAD_TOKENS, *range(CHUNK, len(ids), CHUNK), len(ids)]
    for start, end in pairwise(edges):
        plan = manager.reserve(seq_ids, [end - start])
        assert plan is not None
        step = cache.begin(plan, token_ids=ids[start:end], logit_tokens=np.array([end - start - 1]))

        def observe(layer: int, queries: Tensor, keys: Tensor, start: int = start) -> None:
            moments[layer].add(queries, keys, is_head=start < NUM_HEAD_TOKENS)

        model.forward(
            step.token_ids, step.positions, step.logit_tokens, cache, step, observe=observe
        )
        manager.commit(plan)
    layers = tuple(each.key_calibration() for each in moments)
    return Calibration(layers, model.fingerprint())


def calibrate_on_text(
    model: AttachedModel, tokenizer: PreTrainedTokenizerBase, text: str | None = None
) -> Calibration:
    """`calibrate` on a text, or on the one that comes with the library."""
    text = TEXT.read_text(encoding="utf-8") if text is None else text
    return calibrate(model, encode(tokenizer, text))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, without a warning where a model can only read its beginning."""
    token_ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return token_ids


Calibrate = Callable[[AttachedModel, Sequence[int]], Calibration]


def usual_calibration(
    model: AttachedModel, tokenizer: PreTrainedTokenizerBase, make: Calibrate = calibrate
) -> Calibration:
    """That on the library's own text: read where it was kept, or else made and kept."""
    fingerprint = model.fingerprint()
    token_ids = encode(tokenizer, TEXT.read_text(encoding="utf-8"))
    key = sha256(fingerprint + repr((FILE_FORMAT, token_ids, str(model.dtype))).encode())
    folder = owned_folder("calibrations", "the calibration")
    path = None if folder is None else folder / f"{key.hexdigest()}.safetensors"
    if path is not None and path.is_file():
        try:
            kept = Calibration.load(path)
        except ConfigError as error:  # damaged: it is made again
            logger.info("%s", error)
        else:
            return kept
    logger.info("calibrating %s on %d tokens", type(model.model).__name__, len(token_ids))
    made = make(model, token_ids)
    if path is not None:
        with suppress(ConfigError):
            made.save(path)
    return made


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file at once, or leave it as it is."""
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as partial:
        try:
            partial.write(content)
            partial.flush()
            os.chmod(partial.name, 0o644)
            os.replace(partial.name, path)
        except BaseException:
            os.unlink(partial.name)
            raise
