"""fastattn.layers' own against torch.nn's, and one BERT-base layer, untouched against swapped. Padding is
part of every batch of sequences.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contenders import BATCH, FASTATTN, HEADS, PYTORCH, contenders
from torch import Tensor, nn
from torch.nn import functional

import fastattn
from fastattn import layers
from fastattn.bench import Workload

WIDTH, FFN, LAYERS = 384, 1536, 2


@pytest.mark.parametrize("fill", [1.0, 0.47])
@contenders("untouched", FASTATTN)
def test_bert_layer(versus: Any, device: str, fill: float) -> None:
    """An encoder of one layer: the packing that a whole model pays once is in its time."""
    transformers = pytest.importorskip("transformers")
    workload = Workload(batch=8, seq=128, fill=fill)
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=1)
    model = transformers.BertModel(config, add_pooling_layer=False).eval().to(device)
    mask = workload.tokens(1000, device=device)["attention_mask"]
    hidden = torch.randn(workload.batch, workload.seq, config.hidden_size).to(device)
    swapped = copy.deepcopy(model)
    fastattn.optimize(swapped)
    versus(
        f"BERT layer, {workload}",
        {
            "untouched": lambda: model(inputs_embeds=hidden, attention_mask=mask),
            FASTATTN: lambda: swapped(inputs_embeds=hidden, attention_mask=mask),
        },
        mask=mask,
    )


def _attention(namespace: Any) -> nn.Module:
    return namespace.MultiheadAttention(WIDTH, HEADS, batch_first=True)


def _encoder_layer(namespace: Any) -> nn.Module:
    options = dict(dropout=0.0, activation="gelu", batch_first=True)
    return namespace.TransformerEncoderLayer(WIDTH, HEADS, FFN, **options)


def _decoder_layer(namespace: Any) -> nn.Module:
    options = dict(dropout=0.0, activation="gelu", batch_first=True)
    return namespace.TransformerDecoderLayer(WIDTH, HEADS, FFN, **options)


def _encoder(namespace: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="enable_nested_tensor")
        return namespace.TransformerEncoder(_encoder_layer(namespace), LAYERS)


def _decoder(namespace: Any) -> nn.Module:
    return namespace.TransformerDecoder(_decoder_layer(namespace), LAYERS)


Call = Callable[[nn.Module, Tensor, Tensor, Tensor], Any]


def _attend(model: nn.Module, x: Tensor, memory: Tensor, hidden: Tensor) -> Any:
    return model(x, x, x, key_padding_mask=hidden, need_weights=False)[0]


def _encode(model: nn.Module, x: Tensor, memory: Tensor, hidden: Tensor) -> Any:
    return model(x, src_key_padding_mask=hidden)


def _decode(model: nn.Module, x: Tensor, memory: Tensor, hidden: Tensor) -> Any:
    causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
    return model(x, memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=hidden)


SEQUENCE_LAYERS: dict[str, tuple[Callable[[Any], nn.Module], Call]] = {
    "MultiheadAttention": (_attention, _attend),
    "TransformerEncoderLayer": (_encoder_layer, _encode),
    "TransformerEncoder": (_encoder, _encode),
    "TransformerDecoderLayer": (_decoder_layer, _decode),
    "TransformerDecoder": (_decoder, _decode),
}


@pytest.mark.parametrize("name", SEQUENCE_LAYERS)
@contenders(PYTORCH, FASTATTN)
def test_layer(versus: Any, device: str, name: str) -> None:
    """The same weights in torch.nn's layer, its fast path included where it has one, and in ours."""
    build, call = SEQUENCE_LAYERS[name]
    torch.manual_seed(0)
    theirs, ours = (build(namespace).eval().to(device) for namespace in (nn, layers))
    ours.load_state_dict(theirs.state_dict())
    mask = BATCH.tokens(10, device=device)["attention_mask"]
    x, memory = (torch.randn(BATCH.batch, BATCH.seq, WIDTH).to(device) for _ in range(2))
    rows = {
        PYTORCH: lambda: call(theirs, x, memory, mask == 0),
        FASTATTN: lambda: call(ours, x, memory, mask == 0),
    }
    # A decoder's own positions are all real: its memory is padded.
    versus(f"{name}, {BATCH}", rows, mask=None if "Decoder" in name else mask)


@contenders(PYTORCH, FASTATTN)
def test_AddLayerNorm(versus: Any, device: str) -> None:
    x, residual = (torch.randn(BATCH.batch, BATCH.seq, WIDTH).to(device) for _ in range(2))
    theirs, ours = (kind(WIDTH).to(device) for kind in (nn.LayerNorm, layers.AddLayerNorm))
    rows = {PYTORCH: lambda: (theirs(x + residual), x + residual), FASTATTN: lambda: ours(x, residual)}
    versus("AddLayerNorm", rows)


@contenders(PYTORCH, FASTATTN)
def test_AddRMSNorm(versus: Any, device: str) -> None:
    x, residual = (torch.randn(BATCH.batch, BATCH.seq, WIDTH).to(device) for _ in range(2))
    ours = layers.AddRMSNorm(WIDTH, eps=1e-6).to(device)
    rows = {
        PYTORCH: lambda: (functional.rms_norm(x + residual, (WIDTH,), ours.weight, 1e-6), x + residual),
        FASTATTN: lambda: ours(x, residual),
    }
    versus("AddRMSNorm", rows)
