"""ModernBERT: pre-norm layers, rotary positions, one projection for query, key and value, windows in most.

Every layer is a packed region of its own: the stack and its loop are the model's, which is not swapped.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.modernbert import modeling_modernbert

from fastattn import ops
from fastattn.layers import FusedLayer, ResidualLayer, gated, project
from fastattn.layers.gated import gate_kind
from fastattn.models.family import Family, Site
from fastattn.models.interface import attention_forward
from fastattn.models.packed import PackedRegion
from fastattn.packing import Packing

__all__ = ["FAMILY"]


class ModernBertAttention(FusedLayer, modeling_modernbert.ModernBertAttention):
    fastattn_original = modeling_modernbert.ModernBertAttention

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | Packing | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        (projected,) = project(hidden_states, [self.Wqkv])
        heads = projected.view(*hidden_states.shape[:2], 3, -1, self.head_dim)
        query, key, value = (x.transpose(1, 2) for x in heads.unbind(2))
        assert position_embeddings is not None
        query, key = ops.rotary(query, key, *position_embeddings)
        out, weights = attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.head_dim**-0.5,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.out_drop(project(out.flatten(2), [self.Wo])[0]), weights


class ModernBertMLP(FusedLayer, modeling_modernbert.ModernBertMLP):
    fastattn_original = modeling_modernbert.ModernBertMLP

    @classmethod
    def cannot_replace(cls, module: Any) -> str | None:
        return None if gate_kind(module.act) else f"its activation is {type(module.act).__name__}"

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = project(hidden_states, [self.Wi])[0].chunk(2, dim=-1)
        return project(self.drop(gated(gate, up, self.act)), [self.Wo])[0]


class _PreNormLayer(ResidualLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)); the first layer's first norm is an identity."""

    entry_norm_name = "attn_norm"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Packing | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        stream = self.residual_stream(hidden_states)
        attended, _ = self.attn(
            stream.norm(self.attn_norm),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
        stream.add(attended)
        stream.add(self.mlp(stream.norm(self.mlp_norm)))
        return stream.leave()


class ModernBertEncoderLayer(  # type: ignore[misc]
    PackedRegion, _PreNormLayer, modeling_modernbert.ModernBertEncoderLayer
):
    fastattn_original = modeling_modernbert.ModernBertEncoderLayer
    # Rotary positions are gathered, but a window counts neighbours.
    relative_positions = True
    # Layers with a window and without are given masks of their own, made of one.
    one_padding = True

    def packed_arguments(
        self, packing: Packing, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cos, sin = kwargs["position_embeddings"]
        gathered = packing.pack_rows(cos), packing.pack_rows(sin)
        return args, {**kwargs, "position_embeddings": gathered}


FAMILY = Family(
    name="modernbert",
    attention="rotary positions, a window in two layers of three",
    sites=(
        Site("attention", ModernBertAttention),
        Site("activation", ModernBertMLP),
        Site("residual_norm", ModernBertEncoderLayer),
    ),
    limits=("padding that is not on the right alone is computed, as its windows count neighbours",),
)
