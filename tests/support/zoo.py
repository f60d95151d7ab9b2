"""Tiny decoder-only models with random weights, by name, and what they generate by themselves.

Weights are drawn wide (`initializer_range` 0.2 at a hidden size of 64) and output embeddings are
not tied, so that attention is far from uniform and tokens vary: a wrong mask or a lost key then
changes what is generated. No token ends a sequence.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from .zoo_models import MODELS
from .zoo_others import OTHERS
from .zoo_pieces import (  # noqa: F401 -- tests build models of these, too
    ALTERNATING,
    CHUNKED,
    EXPERTS,
    LATENT_ATTENTION,
    MAX_MODEL_LEN,
    SIZES,
    VOCAB_SIZE,
    WINDOW,
)

# Shorter and longer than a block of 16 tokens, the window of 24 and a token budget of 40.
PROMPT_LENGTHS = (1, 5, 17, 40, 64, 97, 131, 150)
NUM_NEW_TOKENS = 16

CONFIGURATIONS = {**MODELS, **OTHERS}
ARCHITECTURES = [name for name, model in CONFIGURATIONS.items() if not model.outcome.refusal]
REFUSED = [name for name, model in CONFIGURATIONS.items() if model.outcome.refusal]


def build(class_name: str, **settings: Any) -> PreTrainedModel:
    """A float32 model of a transformers class: `SIZES`, overridden by `settings`.

    Vectors that start as zeros, biases above all, are drawn too: else nobody would miss them.
    """
    with warnings.catch_warnings():  # some modules warn of themselves when they are loaded
        warnings.simplefilter("ignore", DeprecationWarning)
        model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**SIZES, **settings})).eval()
    assert isinstance(model, PreTrainedModel)
    for weight in model.parameters():
        if weight.dim() == 1 and not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    return model


@cache
def model(name: str) -> PreTrainedModel:
    """A model of `ARCHITECTURES`, built once. Tests give it back as they found it.

    Eager attention is what an architecture means: sdpa leaves out Gemma2's softcap.
    """
    configuration = CONFIGURATIONS[name]
    return build(configuration.class_name, **configuration.settings, attn_implementation="eager")


def model_type(name: str) -> str:
    """The family of a configuration, as transformers names it, without loading its code."""
    class_name = CONFIGURATIONS[name].class_name
    names = {**MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return min((family for family, named in names.items() if named == class_name), key=len)


def group(name: str) -> pytest.MarkDecorator:
    """Tests of one model run in one process, which keeps what the model generated.

    Those with a `scope` run one after the other, too, so that few are parted.
    """
    return pytest.mark.xdist_group(f"zoo-{name}")


def each(names: Iterable[str]) -> list[Any]:
    """Parameters of a test: models by name."""
    return [pytest.param(name, marks=group(name)) for name in names]


@cache
def prompts(lengths: tuple[int, ...] = PROMPT_LENGTHS) -> list[list[int]]:
    """Prompts of random token ids, the same on every call."""
    numbers = random.Random(0)
    return [[numbers.randrange(1, VOCAB_SIZE) for _ in range(length)] for length in lengths]


@cache
def expected_tokens(name: str) -> list[list[int]]:
    """What a model of `ARCHITECTURES` itself continues each prompt with, one prompt at a time."""
    return generate_alone(model(name), prompts())


def generate_alone(
    model: PreTrainedModel, prompts: list[list[int]], num_new_tokens: int = NUM_NEW_TOKENS
) -> list[list[int]]:
    """Greedy tokens of transformers' own `generate`, for each prompt by itself."""
    continued = [
        model.generate(torch.tensor([prompt]), max_new_tokens=num_new_tokens, do_sample=False)
        for prompt in prompts
    ]
    return [ids[0, len(prompt) :].tolist() for ids, prompt in zip(continued, prompts, strict=True)]


@torch.inference_mode()
def logits_alone(model: PreTrainedModel, prompt: list[int], output: list[int]) -> Tensor:
    """Logits [len(output), vocab] that a full forward pass gives for each token of `output`."""
    logits: Tensor = model(torch.tensor([prompt + output]), use_cache=False).logits
    return logits[0, len(prompt) - 1 : -1]
