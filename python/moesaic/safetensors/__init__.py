"""Hugging Face checkpoints: safetensors files with experts in whatever form.

======================  ===============================================================
``folder``              which files of a folder are the checkpoint
``header``              the tensors of one file
``reader``              the container: shards, one tensor or slice at a time
``sets``                the tensors of one layer, of one part of a model
``names``               which tensors are the experts of a layer, and of one matrix
``quantization``        what the configuration says of a matrix, by ``targets``
``encoded``             a matrix on its way to rows of a GGUF type; its forms are in
                        ``dense``, ``fp8`` (by ``scale_grid``), ``fp4``, ``bnb`` and
                        ``int_blocks``
``int4``                GPTQ, AWQ and compressed-tensors kept as INT4; ``ints`` reads them
``experts``             all experts of a layer, one by one into builders
``layer``               router, experts and shared experts together
``cache``               repacked experts, kept from one start to the next
``stored``              the experts of a whole model where they lie, for stores
======================  ===============================================================
"""

from moesaic.safetensors.cache import cache_folder
from moesaic.safetensors.experts import gather_experts
from moesaic.safetensors.layer import gather_layer
from moesaic.safetensors.quantization import Quantization
from moesaic.safetensors.reader import Checkpoint, TensorEntry, read_header
from moesaic.safetensors.stored import CheckpointExperts

__all__ = [
    "Checkpoint",
    "CheckpointExperts",
    "Quantization",
    "TensorEntry",
    "cache_folder",
    "gather_experts",
    "gather_layer",
    "read_header",
]
