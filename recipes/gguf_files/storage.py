"""The types in which a GGUF file holds tensors, and how these are written, one after the other."""

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize

from hf_oto import OTOError

TYPES = {  # --dtype -> the type of matrices, and what the file says of itself
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
OWN = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}  # without --dtype nothing is rounded


def type_of(name: str, tensor: torch.Tensor, matrix_type: Type) -> Type:
    """The type that one tensor gets.

    llama.cpp adds vectors to float32, so they have to be that. The rows of Q8_0 are blocks of 32; a matrix whose rows
    are no such blocks stays float16.

    Raises:
        OTOError: the tensor has values that float16 doesn't reach.
    """
    block, _ = gguf.GGML_QUANT_SIZES[matrix_type]
    if tensor.dim() == 1:
        return Type.F32
    if tensor.shape[-1] % block:
        matrix_type = Type.F16
    if matrix_type == Type.F16 and tensor.abs().max() > torch.finfo(torch.float16).max:
        raise OTOError(f"{name} has values that float16 doesn't reach: take --dtype bf16 or f32")
    return matrix_type


def write_tensors(writer: gguf.GGUFWriter, tensors: dict[str, torch.Tensor], types: dict[str, Type]) -> None:
    """Writes the file, with all that was added to it. One tensor at a time is converted, so memory holds no copy."""
    for name, tensor in tensors.items():
        block, bytes_of_block = gguf.GGML_QUANT_SIZES[types[name]]
        size = tensor.numel() // block * bytes_of_block
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, raw_dtype=types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        writer.write_tensor_data(quantize(tensor.float().contiguous().numpy(), types[name]))
    writer.close()
