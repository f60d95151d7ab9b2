"""FlashInfer's call in bench/peers, by a stand-in that reads pages as its documentation says."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from peers.gpu_attention import CONTIGUOUS, Contents, prepare_flashinfer, relative_error
from torch import Tensor
from torch.nn import functional


class StandIn:
    """Pages [pages, tokens, kv heads, D]; sequence i has indices[starts[i]:starts[i + 1]]."""

    def __init__(self, workspace: Tensor, layout: str, use_tensor_cores: bool) -> None:
        assert workspace.dtype == torch.uint8
        assert layout == "NHD"

    def plan(
        self, starts: Tensor, indices: Tensor, last: Tensor, *sizes: int, **named: Any
    ) -> None:
        assert starts.dtype == indices.dtype == last.dtype == torch.int32
        assert named == {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
        self.starts, self.indices, self.last, self.sizes = starts.tolist(), indices, last, sizes

    def run(self, query: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
        num_query_heads, num_heads, head_dim, page_tokens = self.sizes
        assert query.shape[1:] == (num_query_heads, head_dim)
        outputs = []
        for i, row in enumerate(query):
            own = self.indices[self.starts[i] : self.starts[i + 1]]
            length = (len(own) - 1) * page_tokens + int(self.last[i])
            keys, values = (
                part[own].flatten(0, 1)[:length].transpose(0, 1).float() for part in pages
            )
            assert keys.shape == (num_heads, length, head_dim)
            rows = row.view(num_heads, -1, head_dim).float()
            output = functional.scaled_dot_product_attention(rows, keys, values)
            outputs.append(output.flatten(0, 1))
        return torch.stack(outputs)


@pytest.mark.parametrize("context", [100, 256, 300])
def test_flashinfer_is_given_the_pages_of_each_sequence(context, monkeypatch):
    module = ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = StandIn
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    contents = Contents.random((3, 2, context, 32), 4, torch.device("cpu"))
    output = prepare_flashinfer(contents)()
    assert relative_error(output, CONTIGUOUS.prepare(contents)()) < 0.01
