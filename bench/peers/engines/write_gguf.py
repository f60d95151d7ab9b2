"""Write a GGUF file anew with its weights in 16 or 32 bits, for engines that read such files.

    python bench/peers/engines/write_gguf.py MODEL.gguf TARGET.gguf float16|bfloat16|float32

They are rounded to bfloat16 first, as `real_model.py` has them, so that bfloat16 and float32 hold
exactly the weights of its folder, and float16 nearly all. Knows files, no engine. Needs
paged-kv[gguf].
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType

TYPES = {
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
}


def write(source: Path, target: Path, dtype: str) -> None:
    tensor_type, file_type = TYPES[dtype]
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = int(file_type) if name == "general.file_type" else field.contents()
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, field.types[0])
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        numbers = numbers.reshape([int(size) for size in tensor.shape[::-1]]).astype(np.float32)
        if numbers.ndim == 2:
            rounded = torch.from_numpy(numbers.copy()).to(torch.bfloat16).float().numpy()
            data = gguf.quants.quantize(rounded, tensor_type)
            writer.add_tensor(tensor.name, data, raw_dtype=tensor_type)
        else:
            writer.add_tensor(tensor.name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
