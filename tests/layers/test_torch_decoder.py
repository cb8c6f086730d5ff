"""layers.TransformerDecoderLayer and TransformerDecoder, and nn.Transformer, against torch.nn's."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch_pairs import assert_close, assert_same_gradients, gradients, padding, pair, stacks, varied_sum

import fastattn
from fastattn.layers import TransformerDecoder, TransformerDecoderLayer

N, LENGTHS, WIDTH, KEYS = 24, [6, 3, 1], 6, 8
LAYERS = {
    "post-norm": {},
    "pre-norm": {"norm_first": True},
    "pre-norm gelu": {"activation": "gelu", "norm_first": True},
    "callable, no bias": {"activation": torch.tanh, "bias": False},
}


def batch(batch_first):
    torch.manual_seed(5)
    tensors = torch.randn(3, WIDTH, N), torch.randn(3, KEYS, N)
    return tuple((x if batch_first else x.transpose(0, 1)).clone().requires_grad_() for x in tensors)


def cases():
    causal = nn.Transformer.generate_square_subsequent_mask(WIDTH)
    memory_padding = padding([8, 2, 5], KEYS)
    memory_mask = torch.rand(WIDTH, KEYS, generator=torch.Generator().manual_seed(1)) < 0.3
    memory_mask[:, 0] = False
    return [
        {},
        {"tgt_mask": causal},
        {"tgt_mask": causal == float("-inf"), "tgt_key_padding_mask": padding(LENGTHS, WIDTH)},
        {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": memory_padding},
        {"memory_mask": memory_mask, "memory_key_padding_mask": memory_padding},
    ]


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("what", ["layer", "stack"])
def test_output_and_gradients_are_torchs(options, batch_first, what):
    if what == "layer":
        reference, ours = pair(
            "TransformerDecoderLayer", N, 4, 40, dropout=0.0, batch_first=batch_first, **options
        )
    else:
        layer = {"batch_first": batch_first, "dropout": 0.0, **options}
        reference, ours = stacks(layer, decoder=True, norm=True)
    tgt, memory = batch(batch_first)
    for case in cases():
        found, expected = ours(tgt, memory, **case), reference(tgt, memory, **case)
        assert_close(found, expected, str(list(case)))
        wanted = [tgt, memory]
        inputs = [torch.autograd.grad(varied_sum(x), wanted, retain_graph=True) for x in (found, expected)]
        for got, want in zip(*inputs, strict=True):
            assert_close(got, want, "input gradient")
        assert_same_gradients(gradients(ours, varied_sum(found)), gradients(reference, varied_sum(expected)))


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched_input(batch_first):
    reference, ours = stacks({"batch_first": batch_first}, decoder=True)
    reference.eval(), ours.eval()
    tgt, memory = torch.randn(WIDTH, N), torch.randn(KEYS, N)
    mask = nn.Transformer.generate_square_subsequent_mask(WIDTH)
    hidden = torch.tensor([0, 0, 0, 1, 1, 0, 0, 1]).bool()
    for case in ({}, {"tgt_mask": mask}, {"memory_key_padding_mask": hidden}):
        assert_close(ours(tgt, memory, **case), reference(tgt, memory, **case), str(list(case)))


@torch.no_grad()
@pytest.mark.parametrize("count, width, keys", [(0, 3, 4), (1, 1, 1), (5, 5, 5)])
def test_sizes_that_break_implementations(count, width, keys):
    reference, ours = stacks({"batch_first": True}, decoder=True)
    tgt, memory = torch.randn(count, width, N), torch.randn(count, keys, N)
    assert_close(ours.eval()(tgt, memory), reference.eval()(tgt, memory))


@torch.no_grad()
def test_hooks_are_heard():
    reference, ours = stacks({"batch_first": True, "norm_first": True}, decoder=True)
    tgt, memory = batch(True)
    for each in (reference.eval(), ours.eval()):
        each.layers[0].register_forward_hook(lambda module, args, out: out * 2)
        each.layers[1].multihead_attn.register_forward_hook(lambda module, args, out: (out[0] + 1, out[1]))
        each.layers[1].linear2.register_forward_hook(lambda module, args, out: out + 1)
    assert_close(ours(tgt, memory), reference(tgt, memory))


@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_compile_takes_it_as_one_graph(norm_first):
    _, ours = stacks({"batch_first": True, "norm_first": norm_first, "dropout": 0.0}, decoder=True)
    tgt, memory = batch(True)
    case = {**cases()[3], "tgt_key_padding_mask": padding(LENGTHS, WIDTH)}
    found = torch.compile(ours, fullgraph=True, backend="aot_eager")(tgt, memory, **case)
    expected = ours(tgt, memory, **case)
    assert_close(found, expected)
    assert_same_gradients(gradients(ours, varied_sum(found)), gradients(ours, varied_sum(expected)))


def test_copies_pickles_and_states():
    reference, ours = stacks({"batch_first": True}, decoder=True)
    assert isinstance(ours, nn.TransformerDecoder) and isinstance(ours.layers[0], nn.TransformerDecoderLayer)
    assert list(ours.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(ours.state_dict())
    tgt, memory = batch(True)
    expected = ours.eval()(tgt, memory)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(again) is TransformerDecoder and type(again.layers[1]) is TransformerDecoderLayer
        assert torch.equal(again(tgt, memory), expected)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_nn_transformer_is_swapped_inside(norm_first, batch_first):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = nn.Transformer(
            N, 4, 2, 2, 40, dropout=0.0, norm_first=norm_first, batch_first=batch_first
        )
    ours = copy.deepcopy(reference)
    report = fastattn.optimize(ours)
    assert report.swapped == len(report.sites) == 2 + 4 + 6
    src, tgt = torch.randn(3, KEYS, N), torch.randn(3, WIDTH, N)
    if not batch_first:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    hidden = padding([8, 2, 5], KEYS)
    case = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(WIDTH),
        "tgt_is_causal": True,
        "src_key_padding_mask": hidden,
        "memory_key_padding_mask": hidden,
    }
    for training in (True, False):
        ours.train(training), reference.train(training)
        found, expected = ours(src, tgt, **case), reference(src, tgt, **case)
        assert_close(found, expected)
        assert_same_gradients(gradients(ours, varied_sum(found)), gradients(reference, varied_sum(expected)))
