"""layers.TransformerEncoderLayer and TransformerEncoder against torch.nn's, packed and padded."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import silu
from torch_pairs import assert_close, assert_same_gradients, gradients, padding, pair, stacks, varied_sum

import fastattn
import fastattn.layers
from fastattn.layers import TransformerEncoder, TransformerEncoderLayer, encoder
from fastattn.packing import PackingError

N, LENGTHS, WIDTH = 24, [7, 3, 1, 5], 7
LAYERS = {
    "post-norm": {},
    "pre-norm": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "pre-norm gelu": {"activation": nn.GELU(), "norm_first": True},
    "callable": {"activation": silu},
    "module": {"activation": nn.ReLU()},
    "no bias": {"bias": False},
    "pre-norm, no bias": {"bias": False, "norm_first": True, "activation": "gelu"},
    "odd heads": {"nhead": 3},
    "eps": {"layer_norm_eps": 0.1},
}


def batch(batch_first, lengths=LENGTHS, width=WIDTH):
    torch.manual_seed(5)
    x = torch.randn(len(lengths), width, N)
    return (x if batch_first else x.transpose(0, 1)).clone().requires_grad_()


def by_sequence(out, batch_first):
    return out if batch_first else out.transpose(0, 1)


def causal(dtype=torch.bool, width=WIDTH):
    mask = nn.Transformer.generate_square_subsequent_mask(width)
    return mask == float("-inf") if dtype == torch.bool else mask


def count_packed_rows(monkeypatch):
    """The numbers of tokens that encoders pack from here on."""
    seen = []
    original = TransformerEncoder._packed

    def counting(self, x, packing, causal):
        seen.append(len(packing.rows))
        return original(self, x, packing, causal)

    monkeypatch.setattr(TransformerEncoder, "_packed", counting)
    return seen


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
def test_a_layer_gives_torchs_output_and_gradients(options, batch_first):
    reference, ours = pair(
        "TransformerEncoderLayer", N, options.get("nhead", 4), 40, dropout=0.0, batch_first=batch_first,
        **{name: value for name, value in options.items() if name != "nhead"},
    )  # fmt: skip
    x, hidden = batch(batch_first), padding(LENGTHS, WIDTH)
    three = torch.rand(len(LENGTHS) * options.get("nhead", 4), WIDTH, WIDTH) < 0.3
    three[:, :, 0] = False
    for case in (
        {},
        {"src_key_padding_mask": hidden},
        {"src_mask": causal(), "is_causal": True},
        {"src_mask": causal(torch.float), "src_key_padding_mask": torch.where(hidden, float("-inf"), 0.0)},
        {"src_mask": three},
    ):
        found, expected = ours(x, **case), reference(x, **case)
        assert_close(found, expected, str(list(case)))
        assert_same_gradients(gradients(ours, varied_sum(found)), gradients(reference, varied_sum(expected)))
    with torch.no_grad():
        reference.eval(), ours.eval()
        found = by_sequence(ours(x, src_key_padding_mask=hidden), batch_first)
        expected = by_sequence(reference(x, src_key_padding_mask=hidden), batch_first)
        assert_close(found[~hidden], expected[~hidden], "evaluation")


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_encoder_computes_real_tokens_only(options, batch_first, training, monkeypatch):
    layer = {"batch_first": batch_first, "dropout": 0.0, **options}
    reference, ours = stacks(layer, norm=bool(options))
    reference.train(training), ours.train(training)
    seen = count_packed_rows(monkeypatch)
    x, hidden = batch(batch_first), padding(LENGTHS, WIDTH)
    for case in (
        {},
        {"mask": causal()},
        {"mask": causal(torch.float), "is_causal": True},
        {"mask": causal(torch.float), "is_causal": None},
    ):
        seen.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = by_sequence(reference(x, src_key_padding_mask=hidden, **case), batch_first)
        found = by_sequence(ours(x, src_key_padding_mask=hidden, **case), batch_first)
        assert seen == [sum(LENGTHS)]
        assert found.is_contiguous() or not batch_first
        assert (found[hidden] == 0).all()
        assert_close(found[~hidden], expected[~hidden], str(case))
        assert_same_gradients(
            gradients(ours, varied_sum(found[~hidden])), gradients(reference, varied_sum(expected[~hidden]))
        )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = by_sequence(reference(x, src_key_padding_mask=hidden), batch_first)
        found = by_sequence(ours(x, src_key_padding_mask=hidden), batch_first)
        assert_close(found[~hidden], expected[~hidden], "without gradients")
        assert found.shape == expected.shape


@torch.no_grad()
def test_a_gelu_by_tanh_is_one_in_evaluation_too():
    # torch.nn's fast path in evaluation computes the other GELU; its slow path is the reference.
    reference, ours = stacks({"batch_first": True, "activation": nn.GELU("tanh"), "dropout": 0.0})
    x, hidden = batch(True), padding(LENGTHS, WIDTH)
    found = ours.eval()(x, src_key_padding_mask=hidden)
    assert_close(found[~hidden], reference.train()(x, src_key_padding_mask=hidden)[~hidden])


@torch.no_grad()
@pytest.mark.parametrize("norm_first", [False, True])
def test_left_padding_and_holes(norm_first, monkeypatch):
    reference, ours = stacks({"batch_first": True, "norm_first": norm_first})
    reference.eval(), ours.eval()
    seen = count_packed_rows(monkeypatch)
    x = batch(True)
    hidden = torch.tensor(
        [[1, 1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1, 1], [0] * 7, [1, 1, 1, 1, 1, 1, 0]]
    ).bool()
    found, expected = ours(x, src_key_padding_mask=hidden), reference(x, src_key_padding_mask=hidden)
    assert_close(found[~hidden], expected[~hidden])
    assert_close(found[:, 0], expected[:, 0], "the first position is computed even where it is padding")
    # Under a causal mask torch.nn's padding in front sees nothing, and its NaN spread: each sequence alone.
    found = ours(x, mask=causal(), src_key_padding_mask=hidden)
    for row in range(4):
        real = x[row][~hidden[row]]
        expected = reference(real[None], mask=causal(width=len(real)))[0]
        assert_close(found[row][~hidden[row]], expected, "causal")
    assert seen == [5 + 3 + 7 + 1 + 2] * 2


@torch.no_grad()
def test_a_row_of_padding_is_finite_and_leaves_the_others_alone():
    reference, ours = stacks({"batch_first": True})
    x, hidden = batch(True), padding([7, 0, 2, 5], WIDTH)
    found = ours.eval()(x, src_key_padding_mask=hidden)
    assert found.isfinite().all()
    kept = [0, 2, 3]
    expected = reference.eval()(x[kept], src_key_padding_mask=hidden[kept])
    assert_close(found[kept][~hidden[kept]], expected[~hidden[kept]])


@torch.no_grad()
@pytest.mark.parametrize("count, width", [(0, 5), (1, 1), (6, 6), (3, 1), (2, 300)])
def test_sizes_that_break_implementations(count, width):
    reference, ours = stacks({"batch_first": True})
    reference.eval(), ours.eval()
    x = torch.randn(count, width, N)
    assert_close(ours(x), reference(x))
    if count:
        hidden = padding([max(1, width - i) for i in range(count)], width)
        found, expected = ours(x, src_key_padding_mask=hidden), reference(x, src_key_padding_mask=hidden)
        assert_close(found[~hidden], expected[~hidden])
        assert_close(ours(x, src_key_padding_mask=hidden & False), reference(x), "nothing is padding")


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched_input(batch_first):
    reference, ours = stacks({"batch_first": batch_first}, norm=True)
    reference.eval(), ours.eval()
    x, hidden = torch.randn(6, N), torch.tensor([0, 0, 0, 0, 1, 1]).bool()
    assert_close(ours(x), reference(x))
    assert_close(ours(x, mask=causal(width=6)), reference(x, mask=causal(width=6)))
    found, expected = ours(x, src_key_padding_mask=hidden), reference(x, src_key_padding_mask=hidden)
    assert_close(found[~hidden], expected[~hidden])
    assert_close(ours.layers[0](x), reference.layers[0](x))


@torch.no_grad()
def test_a_float_padding_mask_packs_where_it_only_hides(monkeypatch):
    reference, ours = stacks({"batch_first": True})
    reference.train(), ours.train()
    for module in (*reference.modules(), *ours.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    seen = count_packed_rows(monkeypatch)
    x, hidden = batch(True), padding(LENGTHS, WIDTH)
    hiding = torch.where(hidden, float("-inf"), 0.0)
    for mask in (hiding, hiding + 0.5 * torch.randn(hiding.shape)):
        found, expected = ours(x, src_key_padding_mask=mask), reference(x, src_key_padding_mask=mask)
        assert_close(found[~hidden], expected[~hidden])
    assert seen == [sum(LENGTHS)]


@torch.no_grad()
def test_another_mask_runs_padded(monkeypatch):
    reference, ours = stacks({"batch_first": True})
    reference.eval(), ours.eval()
    seen = count_packed_rows(monkeypatch)
    x, hidden = batch(True), padding(LENGTHS, WIDTH)
    window = torch.ones(WIDTH, WIDTH).triu(2).bool() | torch.ones(WIDTH, WIDTH).tril(-2).bool()
    window[:, 0] = False
    real = ~hidden
    found, expected = (each(x, mask=window, src_key_padding_mask=hidden) for each in (ours, reference))
    assert_close(found[real], expected[real])
    # The hint that it is causal would be wrong, and is not believed.
    hinted = ours(x, mask=window, src_key_padding_mask=hidden, is_causal=True)
    assert_close(hinted[real], expected[real])
    assert not seen
    ours.fastattn_padding = "packed"
    with pytest.raises(PackingError, match="causal"):
        ours(x, mask=window, src_key_padding_mask=hidden)


@torch.no_grad()
def test_enable_nested_tensor_false_and_padding_padded_run_padded(monkeypatch):
    seen = count_packed_rows(monkeypatch)
    reference, ours = stacks({"batch_first": True}, enable_nested_tensor=False)
    reference.eval(), ours.eval()
    x, hidden = batch(True), padding(LENGTHS, WIDTH)
    assert_close(ours(x, src_key_padding_mask=hidden), reference(x, src_key_padding_mask=hidden))
    assert not seen
    ours.fastattn_padding = "packed"
    ours(x, src_key_padding_mask=hidden)
    assert seen
    ours.fastattn_padding = "padded"
    assert_close(ours(x, src_key_padding_mask=hidden), reference(x, src_key_padding_mask=hidden))
    assert len(seen) == 1


@torch.no_grad()
def test_a_hook_sees_padded_tensors_and_its_edits_count(monkeypatch):
    seen = count_packed_rows(monkeypatch)
    reference, ours = stacks({"batch_first": True, "norm_first": True})
    reference.eval(), ours.eval()
    x, hidden = batch(True), padding(LENGTHS, WIDTH)
    shapes = []
    for each in (reference, ours):
        each.layers[0].register_forward_hook(lambda module, args, out: shapes.append(out.shape) or out * 2)
        each.layers[1].norm2.register_forward_hook(lambda module, args, out: out + 1)
        each.layers[1].self_attn.register_forward_hook(lambda module, args, out: (out[0] + 1, out[1]))
    found, expected = (each(x, src_key_padding_mask=hidden) for each in (ours, reference))
    assert_close(found[~hidden], expected[~hidden])
    assert shapes == [x.shape] * 2 and not seen


class Scaled(nn.TransformerEncoderLayer):
    def forward(self, *args, **kwargs):
        return 0.5 * super().forward(*args, **kwargs)


class OwnBlock(TransformerEncoderLayer):
    def _ff_block(self, x):
        return 0.5 * super()._ff_block(x)


@torch.no_grad()
def test_layers_of_a_users_own_class_run_as_in_torch(monkeypatch):
    seen = count_packed_rows(monkeypatch)
    torch.manual_seed(0)
    reference = nn.TransformerEncoder(Scaled(N, 4, 40, batch_first=True), 2).eval()
    ours = copy.deepcopy(reference)
    ours.__class__ = TransformerEncoder
    x, hidden = batch(True), padding(LENGTHS, WIDTH)
    assert_close(ours(x, src_key_padding_mask=hidden), reference(x, src_key_padding_mask=hidden))
    assert not seen
    ours.fastattn_padding = "packed"
    with pytest.raises(PackingError, match="layers"):
        ours(x, src_key_padding_mask=hidden)


@torch.no_grad()
def test_a_subclass_that_overrides_a_block_is_heard():
    # In training, as in torch.nn, whose fast path in evaluation calls no block.
    layer = OwnBlock(N, 4, 40, dropout=0.0, batch_first=True)
    plain = TransformerEncoderLayer(N, 4, 40, dropout=0.0, batch_first=True)
    plain.load_state_dict(layer.state_dict())
    x = batch(True)
    halved = copy.deepcopy(plain)
    halved.linear2.weight.mul_(0.5), halved.linear2.bias.mul_(0.5)
    assert_close(layer(x), halved(x))
    fastattn.restore(layer)
    assert type(layer) is OwnBlock


def test_dropout_in_training_and_checkpointing():
    _, ours = stacks({"batch_first": True, "dropout": 0.3})
    x, hidden = batch(True), padding(LENGTHS, WIDTH)
    ours.train()

    def run(function):
        torch.manual_seed(7)
        return function(x, src_key_padding_mask=hidden)

    first = run(ours)
    assert torch.equal(first, run(ours)) and not torch.equal(first, ours(x, src_key_padding_mask=hidden))

    def checkpointed(*args, **kwargs):
        return torch.utils.checkpoint.checkpoint(ours, *args, use_reentrant=False, **kwargs)

    again = run(checkpointed)
    assert torch.equal(first, again)
    assert_same_gradients(gradients(ours, varied_sum(again)), gradients(ours, varied_sum(first)))


@torch.no_grad()
def test_autocast(monkeypatch):
    seen = count_packed_rows(monkeypatch)
    # In training: under autocast on a CPU torch.nn's fast path in evaluation raises.
    reference, ours = stacks({"batch_first": True, "activation": "gelu", "dropout": 0.0}, norm=True)
    x, hidden = batch(True), padding(LENGTHS, WIDTH)
    exact = reference(x, src_key_padding_mask=hidden)[~hidden]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(x, src_key_padding_mask=hidden)
        expected = reference(x, src_key_padding_mask=hidden)
    assert found.dtype == expected.dtype and seen
    error, allowed = ((each[~hidden] - exact).abs().max() for each in (found, expected))
    assert error <= 2 * allowed + 2 * 2**-8 * exact.abs().max()


@torch.no_grad()
def test_bfloat16():
    reference, ours = stacks({"batch_first": True, "activation": "gelu"})
    exact, x, hidden = reference.eval(), batch(True), padding(LENGTHS, WIDTH)
    truth = exact(x, src_key_padding_mask=hidden)[~hidden]
    half = copy.deepcopy(reference).to(torch.bfloat16)
    expected = half(x.bfloat16(), src_key_padding_mask=hidden)[~hidden]
    found = ours.eval().to(torch.bfloat16)(x.bfloat16(), src_key_padding_mask=hidden)[~hidden]
    error, allowed = ((each - truth).abs().max() for each in (found, expected))
    assert error <= 2 * allowed + 2 * 2**-8 * truth.abs().max()


@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_compile_takes_it_as_one_graph(norm_first):
    _, ours = stacks({"batch_first": True, "norm_first": norm_first, "dropout": 0.0}, norm=True)
    x, hidden = batch(True), padding(LENGTHS, WIDTH)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for case in (
        {"src_key_padding_mask": hidden},
        {"mask": causal(), "src_key_padding_mask": hidden},
        {"mask": causal(torch.float), "is_causal": True},
    ):
        found, expected = compiled(x, **case), ours(x, **case)
        real = ~hidden
        assert_close(found[real], expected[real], str(list(case)))
        loss = varied_sum(found[real])
        assert_same_gradients(gradients(ours, loss), gradients(ours, varied_sum(expected[real])))
    ours.fastattn_padding = "packed"
    with pytest.raises(Exception, match="traced graph"):
        torch.compile(ours, fullgraph=True, backend="aot_eager")(x, src_key_padding_mask=hidden)


@torch.no_grad()
def test_a_jit_trace_holds_for_other_masks():
    _, ours = stacks({"batch_first": True})
    ours.eval().requires_grad_(False)
    x, hidden = batch(True), padding(LENGTHS, WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(
            lambda x, hidden: ours(x, src_key_padding_mask=hidden), (x, hidden & False), check_trace=False
        )
    expected = ours(x, src_key_padding_mask=hidden)
    assert_close(traced(x, hidden)[~hidden], expected[~hidden])


def test_copies_pickles_and_states():
    reference, ours = stacks({"batch_first": True})
    assert isinstance(ours, nn.TransformerEncoder) and isinstance(ours.layers[0], nn.TransformerEncoderLayer)
    assert list(ours.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(ours.state_dict())
    x, hidden = batch(True), padding(LENGTHS, WIDTH)
    expected = ours.eval()(x, src_key_padding_mask=hidden)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(again) is TransformerEncoder and type(again.layers[1]) is TransformerEncoderLayer
        assert torch.equal(again(x, src_key_padding_mask=hidden), expected)
    assert encoder.TransformerEncoder is fastattn.layers.TransformerEncoder


@torch.no_grad()
def test_a_nested_tensor_runs_as_in_torch():
    reference, ours = stacks({"batch_first": True})
    nested = torch.nested.nested_tensor([torch.randn(3, N), torch.randn(5, N)])
    found = ours.eval()(nested).to_padded_tensor(0.0)
    assert_close(found, reference.eval()(nested).to_padded_tensor(0.0))


def test_no_warning_about_a_fast_path_of_torchs():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TransformerEncoder(TransformerEncoderLayer(N, 4, norm_first=True), 1)


def test_a_mask_of_another_size_is_named():
    _, ours = stacks({"batch_first": True})
    with pytest.raises(ValueError, match="src_key_padding_mask"):
        ours(torch.randn(2, 3, N), src_key_padding_mask=torch.zeros(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="is_causal"):
        ours(torch.randn(2, 3, N), is_causal=True)
