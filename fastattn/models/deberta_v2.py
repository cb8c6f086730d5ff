"""DeBERTa v2 and v3: BERT's layers around disentangled attention, in some a convolution beside the first.

No kernel computes disentangled attention: its scores stay PyTorch's, as the original's formula has them, but
of sequences without their padding and of the distances that occur in them.
"""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.deberta_v2 import modeling_deberta_v2

from fastattn.layers import FusedActivation, FusedLayer, FusedResidualNorm, project
from fastattn.models.family import Family, Site
from fastattn.models.packed import PackedRegion
from fastattn.ops.validation import is_traced
from fastattn.packing import Dense, Packing

__all__ = ["FAMILY"]


class DisentangledSelfAttention(FusedLayer, modeling_deberta_v2.DisentangledSelfAttention):
    fastattn_original = modeling_deberta_v2.DisentangledSelfAttention

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Packing,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(attention_mask, Packing):
            original: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
            )
            return original
        packing = attention_mask
        projected = project(hidden_states, [self.query_proj, self.key_proj, self.value_proj])
        tables = self._position_tables(rel_embeddings)
        if packing.bounds is None:
            query, key, value = (self._heads(packing.unpack(x)) for x in projected)
            real = packing.unpack(hidden_states.new_ones(1, packing.rows.shape[0], 1))[..., 0].bool()
            out = self._attend(query, key, value, relative_pos, tables, real[:, None, None])
            return packing.pack(out), None
        outs: list[Tensor] = []
        for length, sequences in groupby(end - start for start, end in pairwise(packing.bounds[0])):
            count, done = len(list(sequences)), sum(out.shape[1] for out in outs)
            query, key, value = (
                self._heads(x[0, done : done + count * length].view(count, length, -1)) for x in projected
            )
            out = self._attend(query, key, value, relative_pos, tables)
            outs.append(out.flatten(0, 1).unsqueeze(0))
        return torch.cat(outs, dim=1), None

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, heads * D] -> [B, heads, S, D]."""
        return x.view(*x.shape[:2], self.num_attention_heads, -1).transpose(1, 2)

    def _position_tables(self, rel_embeddings: Tensor | None) -> dict[str, Tensor]:
        """The projected embeddings of distances, [1, heads, 2 * span, D], by the term they belong to."""
        if not self.relative_attention:
            return {}
        embeddings = self.pos_dropout(rel_embeddings)[: 2 * self.pos_ebd_size].unsqueeze(0)
        names = {"c2p": ("key_proj", "pos_key_proj"), "p2c": ("query_proj", "pos_query_proj")}
        return {
            term: self._heads(getattr(self, shared if self.share_att_key else own)(embeddings))
            for term, (shared, own) in names.items()
            if term in self.pos_att_type
        }

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        relative_pos: Tensor | None,
        tables: dict[str, Tensor],
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of [B, heads, S, D] as the original computes it: [B, S, heads * D].

        `relative_pos`: [1, S or more, S or more], the distance of each query and key, or its bucket.
        `mask`: bool, True = attend, broadcastable to the scores.
        """
        length, head_dim = query.shape[2:]
        terms = sum(term in self.pos_att_type for term in ("c2p", "p2c"))
        scale = (head_dim * (1 + terms)) ** 0.5
        scores = query @ (key / scale).transpose(2, 3)
        if tables:
            assert relative_pos is not None
            distance = relative_pos[0, :length, :length]
            span = self.pos_ebd_size
            if "c2p" in tables:
                scores = scores + _of_distances(query, tables["c2p"], distance, span) / scale
            if "p2c" in tables:
                backward = _of_distances(key, tables["p2c"], -distance, span)
                scores = scores + backward.transpose(2, 3) / scale
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        out = self.dropout(scores.softmax(-1)) @ value
        return out.transpose(1, 2).flatten(2)


def _of_distances(x: Tensor, table: Tensor, distance: Tensor, span: int) -> Tensor:
    """Each row of `x`, [B, heads, S, D], times the embeddings of its distances: [B, heads, S, S].

    Only distances that occur are multiplied: the furthest are those between the first row and the last.
    """
    index = (distance + span).clamp(0, 2 * span - 1)
    if index.device.type == "cpu":
        ends = index[0, -1].item(), index[-1, 0].item()
        low, high = int(min(ends)), int(max(ends)) + 1
        table, index = table[:, :, low:high], index - low
    products = x @ table.transpose(2, 3)
    return products.gather(3, index.expand(*products.shape[:2], -1, -1))


class DebertaV2SelfOutput(FusedResidualNorm, modeling_deberta_v2.DebertaV2SelfOutput):
    fastattn_original = modeling_deberta_v2.DebertaV2SelfOutput


class DebertaV2Intermediate(FusedActivation, modeling_deberta_v2.DebertaV2Intermediate):
    fastattn_original = modeling_deberta_v2.DebertaV2Intermediate


class DebertaV2Output(FusedResidualNorm, modeling_deberta_v2.DebertaV2Output):
    fastattn_original = modeling_deberta_v2.DebertaV2Output


class DebertaV2Encoder(PackedRegion, modeling_deberta_v2.DebertaV2Encoder):
    fastattn_original = modeling_deberta_v2.DebertaV2Encoder

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_hidden_states: bool = True,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        options = dict(
            output_attentions=output_attentions, query_states=query_states, relative_pos=relative_pos
        )
        packing = self._packing(hidden_states, attention_mask, None, (), options)
        if packing is None:
            return modeling_deberta_v2.DebertaV2Encoder.forward(
                self,
                hidden_states,
                attention_mask,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
                **options,
            )
        all_hidden_states = [hidden_states]
        relative_pos = self.get_rel_pos(hidden_states)
        rel_embeddings = self.get_rel_embedding()
        packed = packing.pack(hidden_states)
        for index, layer in enumerate(self.layer):
            packed, _ = layer(packed, packing, relative_pos=relative_pos, rel_embeddings=rel_embeddings)
            padded = packing.unpack(packed)
            if index == 0 and self.conv is not None:
                # Its neighbours are the batch's, padding included.
                padded = self.conv(hidden_states, padded, attention_mask)
                packed = packing.pack(padded)
            all_hidden_states.append(padded)
        outputs = BaseModelOutput(
            last_hidden_state=padded,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
        )
        return outputs if return_dict else outputs.to_tuple()

    def _packing(self, hidden_states: Tensor, mask: Tensor | None, *rest: Any) -> Packing | None:
        # The model makes a mask of its own, of floats, where it is given none.
        if mask is not None and not is_traced(mask) and torch.equal(mask, mask.bool().to(mask.dtype)):
            mask = mask.bool()
        packing = super()._packing(hidden_states, mask, *rest)
        assert not isinstance(packing, Dense)
        return packing

    def _runs_dense(self, mask: Tensor) -> bool:
        # The threshold is of plain attention. Padded, this one's scores are the original's, of all positions.
        return False

    def cannot_pack(
        self, hidden_states: Tensor, mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        if kwargs["output_attentions"]:
            return "attentions are recorded"
        if kwargs["query_states"] is not None or kwargs["relative_pos"] is not None:
            return "it is given queries or relative positions of its own"
        reason = super().cannot_pack(hidden_states, mask, args, kwargs)
        if reason is not None:
            return reason
        if is_traced(mask):
            return "a graph cannot tell whether a first token is padding"
        if mask.dtype != torch.bool:
            return "its attention mask holds other values than 0 and 1"
        if not bool(mask[:, 0].all()):
            # Heads read it, and the original lets it attend to everything, padding included.
            return "the first token of a sequence is padding"
        return None


FAMILY = Family(
    name="deberta_v2",
    attention="disentangled: content to position and position to content, in logarithmic buckets",
    sites=(
        Site("attention", DisentangledSelfAttention),
        Site("residual_norm", DebertaV2SelfOutput),
        Site("activation", DebertaV2Intermediate),
        Site("residual_norm", DebertaV2Output),
        Site("encoder", DebertaV2Encoder),
    ),
    limits=(
        "no kernel computes disentangled attention: of a packed batch its scores are PyTorch's, on a CPU of "
        "sequences of one length at a time; without padding the original's forward computes them",
        "with padding on the left its padded rows are computed, as the original's attend to all of them",
    ),
)
