"""Write a GGUF file anew with its weights in float16, rounded to bfloat16 as `real_model.py` has them.

    python bench/peers/engines/write_gguf.py MODEL.gguf TARGET.gguf

Knows files, no engine. Needs paged-kv[gguf].
"""  # noqa: E501

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import torch

FLOAT16_FILE = 1  # as `general.file_type` says it


def write(source: Path, target: Path) -> None:
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = FLOAT16_FILE if name == "general.file_type" else field.contents()
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, field.types[0])
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        numbers = numbers.reshape([int(size) for size in tensor.shape[::-1]])
        if numbers.ndim == 2:
            rounded = torch.from_numpy(numbers.copy()).to(torch.bfloat16).to(torch.float16)
            writer.add_tensor(tensor.name, rounded.numpy())
        else:
            writer.add_tensor(tensor.name, numbers.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
