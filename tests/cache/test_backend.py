"""Which kernels are chosen, and what is said where numba is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from paged_kv.cache.backend import BACKEND_VARIABLE, TORCH_BACKEND, choose_backend
from paged_kv.cache.formats import INT8
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.errors import ConfigError
from tests.support.attention_oracle import layer_of

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
NEEDS_NUMBA = pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)


@NEEDS_NUMBA
def test_a_cpu_has_its_own_kernels() -> None:
    assert choose_backend(CPU).name == "cpu"
    assert choose_backend(CPU, "cpu") is choose_backend(CPU)


@NEEDS_TRITON
def test_a_gpu_has_its_own_kernels() -> None:
    assert choose_backend(torch.device("cuda")).name == "triton"
    assert choose_backend(torch.device("cuda", 1), "triton") is choose_backend(torch.device("cuda"))


def test_another_device_runs_the_torch_reference() -> None:
    assert choose_backend(torch.device("meta")) is TORCH_BACKEND


@NEEDS_TRITON
def test_triton_is_refused_on_a_cpu_unless_it_interprets() -> None:
    script = """
import torch
from paged_kv.cache.backend import choose_backend
from paged_kv.errors import ConfigError
try:
    print(choose_backend(torch.device("cpu"), "triton").name)
except ConfigError as error:
    print(error)
"""
    expected = {"0": "backend 'triton' cannot run on device cpu", "1": "triton\n"}
    for interpret, start in expected.items():
        environment = os.environ | {"TRITON_INTERPRET": interpret}
        result = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
        assert result.stdout.startswith(start), result.stderr


def test_torch_can_be_asked_for_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in (CPU, torch.device("cuda")):
        assert choose_backend(device, "torch") is TORCH_BACKEND
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    assert choose_backend(CPU) is TORCH_BACKEND


@NEEDS_NUMBA
def test_variable_chooses_and_the_argument_overrides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "cpu")
    assert choose_backend(CPU).name == "cpu"
    assert choose_backend(CPU, "torch") is TORCH_BACKEND
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    assert choose_backend(CPU, "cpu").name == "cpu"
    monkeypatch.setenv(BACKEND_VARIABLE, "")
    assert choose_backend(CPU).name == "cpu"


def test_cache_takes_the_backend_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "nonsense")
    cache = PagedKVCache([layer_of(INT8)], num_blocks=1, dtype=torch.float32, backend="torch")
    assert cache.backend is TORCH_BACKEND
    with pytest.raises(ConfigError, match="nonsense"):
        PagedKVCache([layer_of(INT8)], num_blocks=1, dtype=torch.float32)


@pytest.mark.parametrize("is_variable", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_unknown_backend_is_refused_by_name(
    device: str, is_variable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_variable:
        monkeypatch.setenv(BACKEND_VARIABLE, "triton9")
    name = None if is_variable else "triton9"
    with pytest.raises(
        ConfigError, match=r"unknown backend 'triton9'; expected torch, cpu, triton or xformers"
    ):
        choose_backend(torch.device(device), name)


@pytest.mark.parametrize("is_variable", [True, False])
def test_cpu_kernels_are_refused_on_another_device(
    is_variable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_variable:
        monkeypatch.setenv(BACKEND_VARIABLE, "cpu")
    with pytest.raises(ConfigError, match="backend 'cpu' cannot run on device cuda:1"):
        choose_backend(torch.device("cuda:1"), None if is_variable else "cpu")


WITHOUT_A_PACKAGE = """
import json, os, sys, warnings
missing = sys.argv[1]
sys.modules[missing] = None  # importing it raises ModuleNotFoundError
import torch
from paged_kv import INT8, LayerSpec, PagedKVCache
from paged_kv.cache.backend import choose_backend
from paged_kv.errors import ConfigError
layer = LayerSpec(kv_format=INT8, num_kv_heads=1, key_dim=8, value_dim=8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    names = [
        PagedKVCache([layer], num_blocks=1, dtype=torch.float32).backend.name for _ in range(3)
    ]
    choose_backend(torch.device("cpu"), "torch")
refusals = []
for variable, name in (("", "cpu"), ("cpu", None)):
    os.environ["PAGED_KV_BACKEND"] = variable
    try:
        choose_backend(torch.device("cpu"), name)
    except ConfigError as error:
        refusals.append(str(error))
warned = [(w.category.__name__, str(w.message)) for w in caught]
print(json.dumps({"names": names, "warnings": warned, "refusals": refusals}))
"""


@pytest.mark.parametrize("missing", ["numba", "llvmlite"])
def test_without_numba_torch_runs_with_one_warning_unless_the_kernels_were_asked_for(
    missing: str,
) -> None:
    output = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_A_PACKAGE, missing],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    said = json.loads(output)
    assert said["names"] == ["torch"] * 3
    ((category, message),) = said["warnings"]
    assert category == "RuntimeWarning"
    assert "pip install numba" in message
    (refusal,) = set(said["refusals"])
    assert refusal.startswith("backend 'cpu' needs numba: ")
    assert missing in refusal
