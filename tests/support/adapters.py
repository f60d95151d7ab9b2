"""Models with two random adapters of peft, whose effects are large enough to change tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.support import zoo

# Architecture of the zoo -> layers with adapters: linear ones, Conv1D, embeddings, the last layer.
TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj", "down_proj", "lm_head"],
    "gpt2": ["c_attn", "c_proj", "wte"],
    "gemma3": ["k_proj", "gate_proj"],
}
NAMES = ("cat", "dog")


def adapted(name: str, **options: Any) -> PeftModel:
    """A model with adapters "cat", which is active, and "dog", of other ranks and other layers."""
    model: Any = copy.deepcopy(zoo.model(name))
    targets, options["fan_in_fan_out"] = TARGETS[name], name == "gpt2"
    model = get_peft_model(model, lora(targets, r=4, **options), "cat")
    model.add_adapter("dog", lora(targets[1:], r=3, **options))
    scatter(model)
    return model.eval()


def lora(targets: list[str], **options: Any) -> LoraConfig:
    settings = {"lora_alpha": 8, "lora_dropout": 0.5, "task_type": "CAUSAL_LM", **options}
    return LoraConfig(target_modules=targets, **settings)


def scatter(model: nn.Module, adapter: str = "") -> None:
    """Random weights for an adapter, or for all: new ones change nothing."""
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and adapter in name:
                parameter.copy_(torch.randn(parameter.shape, generator=numbers) * 0.3)


@contextmanager
def applied(model: PeftModel, name: str) -> Iterator[PeftModel]:
    """The model with one adapter active, or with "__base__" without any."""
    before = model.active_adapter
    try:
        if name == "__base__":
            with model.disable_adapter():
                yield model
        else:
            model.set_adapter(name)
            yield model
    finally:
        model.set_adapter(before)


def expected_tokens(
    model: PeftModel, choices: list[str], prompts: list[list[int]], count: int = 24
) -> list[list[int]]:
    """What `generate()` of the peft model says with each prompt's adapter."""
    found = []
    for choice, prompt in zip(choices, prompts, strict=True):
        with applied(model, choice):
            found += zoo.generate_alone(model, [prompt], count)
    return found
