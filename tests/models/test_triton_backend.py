"""A swapped model through the Triton kernels, in Triton's interpreter: the same answers as through
PyTorch.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytest.importorskip("transformers")

PROGRAM = """
import copy
import torch, transformers, fastattn
from fastattn.verification import adversarial_batches
import fastattn_kernels.activation, fastattn_kernels.attention, fastattn_kernels.norm

launched = set()
def counted(module, name):
    original = getattr(module, name)
    def call(*arguments, **named):
        launched.add(name)
        return original(*arguments, **named)
    setattr(module, name, call)

counted(fastattn_kernels.attention, "attention_forward")
counted(fastattn_kernels.attention, "varlen_attention_forward")
counted(fastattn_kernels.norm, "add_layer_norm_forward")
counted(fastattn_kernels.activation, "bias_gelu_forward")

torch.manual_seed(0)
config = transformers.BertConfig(
    vocab_size=100, hidden_size=60, num_attention_heads=3, num_hidden_layers=2, intermediate_size=72,
    max_position_embeddings=24,
)
model = transformers.BertForSequenceClassification(config).eval()
reference = copy.deepcopy(model)
fastattn.optimize(model)
with fastattn.set_backend("triton"):
    # Without autocast: products of bfloat16 are wrong in the interpreter.
    cases = ["right padding", "left padding", "no padding", "one token", "a row of padding", "gradients"]
    print(fastattn.verify(model, reference, cases=cases).table())
    model.train()
    batch = adversarial_batches(model)["right padding"]
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        loss = model(**batch, labels=torch.tensor([0, 1, 0, 1])).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
with fastattn.set_backend("torch"):
    torch.manual_seed(1)
    same_masks = model(**batch, labels=torch.tensor([0, 1, 0, 1])).loss.item()
assert abs(same_masks - losses[0]) < 1e-5, (same_masks, losses)
print(sorted(launched))
"""


def test_swapped_bert_in_the_interpreter():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    launched = (
        "['add_layer_norm_forward', 'attention_forward', 'bias_gelu_forward', 'varlen_attention_forward']"
    )
    assert result.stdout.strip().endswith(launched)
