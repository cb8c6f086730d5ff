"""torch.nn's own Transformer layers, wherever a model holds them: nn.Transformer, nn.TransformerEncoder, or
nn.MultiheadAttention in layers written by hand.

What takes their place are the public layers of the same names: a module built from those is already swapped.
"""

from __future__ import annotations

from fastattn.layers import (
    MultiheadAttention,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from fastattn.models.family import Family, Site

__all__ = ["FAMILY"]

FAMILY = Family(
    name="torch_nn",
    attention="one product for query, key and value; bool and added masks; appended keys; other key sizes",
    sites=(
        Site("attention", MultiheadAttention),
        Site("residual_norm", TransformerEncoderLayer),
        Site("residual_norm", TransformerDecoderLayer),
        Site("residual_norm", TransformerDecoder),
        Site("encoder", TransformerEncoder),
    ),
)
