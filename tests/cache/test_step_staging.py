"""Arrays of a step reach their device whole, in one copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paged_kv.cache.step_staging import ALIGNMENT, to_device
from tests.support.transfers import TransferCounter

ARRAYS = {
    "lengths": np.arange(5),
    "table": np.arange(12).reshape(3, 4),
    "nothing": np.empty((0, 7), dtype=np.int64),
    "numbers": np.array([0.5, -2.0, np.inf]),
    "one": np.array([-1]),
}


def test_all_arrays_travel_in_one_copy() -> None:
    with TransferCounter() as counter:
        tensors = to_device(ARRAYS, torch.device("meta"))
    assert len(counter.to_device) == 1
    assert not counter.to_host
    for name, array in ARRAYS.items():
        assert tensors[name].shape == array.shape
        assert tensors[name].dtype == torch.from_numpy(array).dtype


def test_the_counter_sees_every_way_to_copy() -> None:
    target = torch.empty(3, device="meta")
    with TransferCounter() as counter:
        torch.zeros(3).to("meta")
        target.copy_(torch.zeros(3))
        torch.zeros(3).to("meta", non_blocking=True)
        assert len(counter.to_device) == 3
        target.cpu()
        target.to("cpu")
        target[0].item()
        assert len(counter.to_host) == 3


def test_arrays_on_a_cpu_are_not_copied() -> None:
    tensors = to_device(ARRAYS, torch.device("cpu"))
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(tensors[name].numpy(), array)
        assert not array.size or tensors[name].data_ptr() == array.ctypes.data


def test_a_field_of_records_arrives_without_gaps() -> None:
    """Kernels read the memory itself, one element behind the other."""
    records = np.zeros(3, dtype=[("first", np.int64), ("second", np.int64)])
    records["second"] = 1, 2, 3
    (tensor,) = to_device({"second": records["second"]}, torch.device("cpu")).values()
    assert tensor.is_contiguous()
    assert tensor.tolist() == [1, 2, 3]


def test_what_is_packed_is_what_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but the copy goes to another tensor on the host."""
    copies = []

    def copied(tensor: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
        copies.append(tensor.clone())
        return copies[-1]

    monkeypatch.setattr(torch.Tensor, "to", copied)
    tensors = to_device(ARRAYS, torch.device("meta"))
    assert len(copies) == 1
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(tensors[name].numpy(), array)
        assert tensors[name].storage_offset() % ALIGNMENT == 0
