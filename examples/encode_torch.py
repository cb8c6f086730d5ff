"""Texts of different lengths through nn.TransformerEncoder. Swapped, it computes no padding; reported on
stderr.
"""

import sys

import torch
from torch import nn

import fastattn

torch.manual_seed(0)  # Random weights, the same on every run.
layer = nn.TransformerEncoderLayer(d_model=128, nhead=4, dim_feedforward=512, batch_first=True)
encoder = nn.TransformerEncoder(layer, num_layers=4).eval()
print(fastattn.optimize(encoder).table(), file=sys.stderr)  # the one line

lengths = torch.tensor([40, 7, 19, 3])
padding = torch.arange(40) >= lengths[:, None]  # True = ignore, as torch.nn has it
with torch.no_grad():
    hidden = encoder(torch.randn(4, 40, 128), src_key_padding_mask=padding)
real = (~padding).unsqueeze(-1)
for length, mean in zip(lengths.tolist(), (hidden * real).sum(dim=1) / real.sum(dim=1), strict=True):
    print(f"{length:2} tokens, mean of their states begins", " ".join(f"{value:+.4f}" for value in mean[:4]))
