"""Models of transformers whose experts run here.

Importing this subpackage imports torch and transformers; ``import moesaic`` does not.

======================  ===============================================================
``convert``             the experts of a model in memory, encoded and replaced in place
``implementation``      ``experts_implementation="moesaic"``: a model's own weights
``quantizer``           ``from_pretrained(..., quantization_config=MoesaicConfig(...))``
``pretrained``          the same for checkpoints that name a method of their own
``encoded_linears``     matrices outside of experts that a checkpoint has encoded
``gguf``                a whole model of one file; ``gguf_names``: where its tensors are there
``encode``              experts that came from files, in other types
``pooled``              experts of a file, as many in memory as fit
``usage``               how often each expert was used
``timed``               text that a model makes, and how long its tokens took
``layouts``             experts modules of transformers: where, and how they hold weights
``activations``         what they compute between the products, found by trying it
``special``             experts that get other arguments than most
======================  ===============================================================
"""

from moesaic.transformers.convert import convert
from moesaic.transformers.gguf import from_gguf
from moesaic.transformers.implementation import register
from moesaic.transformers.pretrained import from_pretrained
from moesaic.transformers.quantizer import MoesaicConfig
from moesaic.transformers.usage import usage

__all__ = ["MoesaicConfig", "convert", "from_gguf", "from_pretrained", "register", "usage"]
