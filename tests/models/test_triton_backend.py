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
    vocab_size=100, hidden_size=60, num_attention_heads=3, num_hidden_layers=1, intermediate_size=72,
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


OTHERS = """
import sys
import torch, transformers, fastattn
import fastattn_kernels.activation, fastattn_kernels.attention, fastattn_kernels.norm

launched = set()
for module, names in (
    (fastattn_kernels.attention, ("attention_forward", "varlen_attention_forward")),
    (fastattn_kernels.norm, ("rms_norm_forward", "add_rms_norm_forward", "add_layer_norm_forward")),
    (fastattn_kernels.activation, ("bias_gelu_forward", "gated_activation_forward")),
):
    for name in names:
        def call(*arguments, name=name, original=getattr(module, name), **named):
            launched.add(name)
            return original(*arguments, **named)
        setattr(module, name, call)

torch.manual_seed(0)
torch.set_num_threads(1)
if sys.argv[1] == "llama":
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=60, hidden_size=36, intermediate_size=44, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=1, head_dim=12,
    ))
else:
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=60, d_model=36, d_kv=12, num_heads=3, d_ff=44, num_layers=1,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8, relative_attention_max_distance=16, decoder_start_token_id=0,
    ))
fastattn.optimize(model.eval())
with fastattn.set_backend("triton"):
    cases = ["right padding", "left padding", "one token", "static cache", "gradients"]
    print(fastattn.verify(model, cases=cases).table())
print(sorted(launched))
"""


@pytest.mark.parametrize(
    ("model", "kernels"),
    [
        (
            "llama",
            ["add_rms_norm_forward", "attention_forward", "gated_activation_forward", "rms_norm_forward"],
        ),
        (
            "t5",
            [
                "add_rms_norm_forward",
                "attention_forward",
                "gated_activation_forward",
                "rms_norm_forward",
                "varlen_attention_forward",
            ],
        ),
    ],
)
def test_residual_streams_caches_and_relative_bias_in_the_interpreter(model, kernels):
    result = subprocess.run(
        [sys.executable, "-c", OTHERS, model],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip().endswith(str(kernels)), result.stdout


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
