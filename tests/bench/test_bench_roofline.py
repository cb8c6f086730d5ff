"""What an operation costs against hand computation, and where it stands below the machine's roof."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import count as counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

import fastattn
from fastattn.bench import ceilings as ceilings_module
from fastattn.bench import op_costs
from fastattn.bench import roofline as roofline_module
from fastattn.bench.ceilings import Ceilings, measure_ceilings
from fastattn.bench.op_costs import OpCost, count
from fastattn.bench.roofline import roofline

Run = Callable[[], Any]
CEILINGS = Ceilings("cpu", 1, 10e9, 8e9, {"fp32": 100e9, "bf16": 400e9})


@pytest.fixture(params=[torch.inference_mode, torch.no_grad, torch.enable_grad])
def grad_mode(request: pytest.FixtureRequest) -> Iterator[None]:
    """Inference mode hides what an operation is made of; it must cost the same."""
    with request.param():
        yield


@pytest.fixture
def registered_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU fastattn's operations run as PyTorch's, except below a mode that may be tracing."""
    monkeypatch.setattr(op_costs._Counter, "fastattn_only_watches", False)


def flop(run: Run) -> float:
    return sum(cost.flop for cost in count(run))


@pytest.mark.usefixtures("grad_mode")
@pytest.mark.parametrize(("dtype", "name", "size"), [(torch.float32, "fp32", 4), (torch.bfloat16, "bf16", 2)])
def test_a_linear_layer(dtype: torch.dtype, name: str, size: int) -> None:
    layer, x = nn.Linear(48, 96).to(dtype), torch.ones(2, 5, 48, dtype=dtype)
    [cost] = count(lambda: layer(x))
    assert cost.op == "aten.addmm" and cost.dtype == name and cost.calls == 1
    assert cost.flop == 2 * 10 * 48 * 96
    assert cost.bytes == size * (10 * 48 + 48 * 96 + 96 + 10 * 96)


@pytest.mark.usefixtures("grad_mode")
def test_attention() -> None:
    query, key = torch.ones(2, 3, 4, 16), torch.ones(2, 3, 6, 16)
    [cost] = count(lambda: scaled_dot_product_attention(query, key, key))
    assert cost.flop == 2 * 2 * 2 * 3 * 4 * 6 * 16
    # The keys are the values: read once. The result, and the logarithm of each row's sum.
    assert cost.bytes == 4 * (2 * 3 * 4 * 16 + 2 * 3 * 6 * 16 + 2 * 3 * 4 * 16 + 2 * 3 * 4)
    [causal] = count(lambda: scaled_dot_product_attention(query, query, query, is_causal=True))
    assert causal.flop == 2 * 2 * 2 * 3 * (1 + 2 + 3 + 4) * 16


def test_an_expanded_mask_is_read_once() -> None:
    query, mask = torch.ones(2, 3, 4, 16), torch.zeros(2, 1, 1, 4)
    expanded = mask.expand(2, 1, 4, 4)
    [plain] = count(lambda: scaled_dot_product_attention(query, query, query))
    [masked] = count(lambda: scaled_dot_product_attention(query, query, query, attn_mask=expanded))
    assert masked.bytes - plain.bytes == 4 * mask.numel()


def test_attention_backward_is_five_products_to_the_two_forward() -> None:
    query = torch.ones(2, 3, 8, 16, requires_grad=True)
    forward = flop(lambda: scaled_dot_product_attention(query, query, query))
    both = flop(lambda: scaled_dot_product_attention(query, query, query).sum().backward())
    assert both == forward * 3.5


def visible_flop(query: Tensor, key: Tensor, visible: Tensor) -> int:
    """Two FLOP a multiplication, for scores and for values, of every pair that may be seen."""
    return 4 * int(visible.sum()) * query.shape[1] * query.shape[3]


@pytest.mark.usefixtures("registered_operations")
@pytest.mark.parametrize(
    ("causal", "window", "start", "lengths"),
    [
        (False, None, None, None),
        (True, None, None, None),
        (True, None, 0, None),
        (False, (2, 1), None, None),
        (True, (3, -1), None, [4, 7]),
        (False, None, None, [1, 5]),
        (True, None, [0, 3], [6, 0]),
    ],
)
def test_fastattn_attention_counts_the_pairs_it_may_see(
    causal: bool,
    window: tuple[int, int] | None,
    start: int | list[int] | None,
    lengths: list[int] | None,
) -> None:
    query, key = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 7, 16)
    starts = torch.tensor(start if isinstance(start, list) else [7 - 5 if start is None else start] * 2)
    keys = torch.arange(7)
    position = torch.arange(5)[:, None] + starts[:, None, None]
    visible = torch.ones(2, 5, 7, dtype=torch.bool)
    if causal:
        visible &= keys <= position
    if window is not None:
        visible &= (keys >= position - window[0]) & ((window[1] < 0) | (keys <= position + window[1]))
    if lengths is not None:
        visible &= keys < torch.tensor(lengths)[:, None, None]
    [cost] = count(
        lambda: fastattn.ops.attention(
            query,
            key,
            key,
            causal=causal,
            window=window,
            query_start=torch.tensor(start) if isinstance(start, list) else start,
            key_lengths=None if lengths is None else torch.tensor(lengths),
        )
    )
    assert cost.op == "fastattn.attention"
    assert cost.flop == visible_flop(query, key, visible)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention_counts_real_lengths(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    lengths = [3, 5, 1]
    cu_seqlens = torch.tensor([0, 3, 8, 9], dtype=torch.int32)
    packed = torch.randn(9, 2, 16)

    def run() -> Any:
        return fastattn.ops.varlen_attention(
            packed, packed, packed, cu_seqlens, cu_seqlens, 5, 5, causal=causal
        )

    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    assert flop(run) == 4 * pairs * 2 * 16
    monkeypatch.setattr(op_costs._Counter, "fastattn_only_watches", False)
    [cost] = count(run)
    assert cost.op == "fastattn.varlen_attention" and cost.flop == 4 * pairs * 2 * 16


@pytest.mark.usefixtures("registered_operations")
@pytest.mark.parametrize("paged", [False, True])
def test_decode_attention_reads_the_keys_a_sequence_has(paged: bool) -> None:
    query, cache = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 64, 16)
    lengths = torch.tensor([7, 20], dtype=torch.int32)
    pages = torch.randn(8, 16, 2, 16)
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    keys, rest = (pages, (lengths, table)) if paged else (cache, (lengths,))
    [cost] = count(lambda: fastattn.ops.decode_attention(query, keys, keys.clone(), *rest, window=10))[-1:]
    seen = 7 + 11
    assert cost.op == "fastattn.decode_attention"
    assert cost.flop == 4 * seen * 4 * 16
    # The query, what comes out, and two kv heads' keys and values.
    assert cost.bytes == pytest.approx(4 * (2 * query.numel() + 2 * seen * 2 * 16), rel=0.01)


@pytest.mark.usefixtures("registered_operations")
def test_fastattn_packed_linear_and_pointwise_operations() -> None:
    x, weights = torch.randn(10, 32), [torch.randn(n, 32) for n in (32, 16, 16)]
    costs = count(lambda: fastattn.ops.packed_linear(x, weights, [None] * 3))
    assert costs[0].op == "fastattn.packed_linear" and costs[0].flop == 2 * 10 * 32 * 64
    assert costs[0].bytes == 4 * (10 * 32 + 64 * 32 + 10 * 64)
    packed = fastattn.ops.quantize_absmax(weights[0], "int8")
    [product] = count(lambda: fastattn.ops.quantized_linear(x, packed))[-1:]
    assert product.op == "fastattn.quantized_linear" and product.flop == 2 * 10 * 32 * 32
    # A byte an element of the weight.
    assert product.bytes == 4 * (10 * 32 + 32 + 10 * 32) + 32 * 32
    weight = torch.ones(32)
    [norm] = count(lambda: fastattn.ops.add_layer_norm(x, x + 1, weight, weight, 1e-5))[-1:]
    # Two read, their sum and its norm written; the weight is the bias too.
    assert norm.flop == 0 and norm.bytes == 4 * (4 * 10 * 32 + 32)


def test_views_cost_nothing_and_tables_are_read_where_they_are_looked_up() -> None:
    x, table = torch.randn(4, 6), nn.Embedding(1000, 8)
    assert count(lambda: x.view(2, 12).transpose(0, 1)[1:].expand(3, 11, 2).detach()) == ()
    assert count(lambda: torch.empty(100, 100)) == ()
    rows = torch.tensor([1, 2, 3])
    with torch.inference_mode():
        [cost] = count(lambda: table(rows))
        assert cost.bytes == 2 * 4 * 3 * 8 + 8 * 3
        [cost] = count(lambda: x.index_copy_(0, rows[:1], torch.ones(1, 6)))[-1:]
        assert cost.bytes == 2 * 4 * 6 + 8


def bert(layers: int = 1, hidden: int = 768, heads: int = 12) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
    )
    model: nn.Module = transformers.BertModel(config, add_pooling_layer=False)
    return model.eval()


def matrix_flop(model: nn.Module) -> int:
    """2 * parameters a token, of the matrices of the layers."""
    layers: Any = model.encoder
    return 2 * sum(weight.numel() for weight in layers.parameters() if weight.dim() == 2)


def forward(model: nn.Module, mask: Tensor) -> Run:
    ids = torch.ones_like(mask)

    def run() -> Any:
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=mask)

    return run


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padding", [0, 3])
def test_torch_nns_fused_encoder_layer(padding: int) -> None:
    layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    hidden = torch.arange(8).expand(2, 8) >= torch.tensor([[8], [8 - padding]])
    run = torch.inference_mode()(lambda: encoder(torch.ones(2, 8, 64), src_key_padding_mask=hidden))
    lengths = (8, 8 - padding)
    weights = 4 * 64 * 64 + 2 * 64 * 128
    assert flop(run) == 2 * weights * sum(lengths) + 4 * 64 * sum(n * n for n in lengths)


@pytest.mark.model
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_bert_base_layer_is_twice_its_parameters_a_token_and_attention(attention: str) -> None:
    model: Any = bert()
    model.set_attn_implementation(attention)
    mask = torch.ones(2, 16, dtype=torch.int64)
    # 7,077,888 weights in six matrices; two products of 16 x 16 pairs a sequence.
    assert flop(forward(model, mask)) == 2 * 7_077_888 * 32 + 2 * 2 * 2 * 16 * 16 * 768


@pytest.mark.model
def test_a_swapped_model_counts_as_it_runs_on_real_tokens_alone() -> None:
    model = bert(2, 64, 2)
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 4:] = 0
    fastattn.optimize(model)
    expected = matrix_flop(model) * (16 + 4) + 2 * 4 * 64 * (16 * 16 + 4 * 4)
    assert flop(forward(model, mask)) == expected
    shapes = " ".join(cost.shapes for cost in count(forward(model.bfloat16(), mask)))
    assert "20, 64]" in shapes and flop(forward(model, mask)) == expected


class FakeClock:
    """An operation takes 5 microseconds more than dispatch, the n-th matrix product n milliseconds."""

    def __init__(self) -> None:
        self.products = counter(1)

    def time(self, call: Run) -> tuple[Any, Callable[[], float]]:
        result = call()
        if isinstance(result, Tensor) and result.shape == (1,):
            return result, lambda: 2e-6
        seconds = next(self.products) * 1e-3 + 2e-6 if result.shape == (4, 4) else 7e-6
        return result, lambda: seconds


def test_times_are_added_up_without_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_costs, "_CpuClock", FakeClock)
    x, y = torch.ones(4, 4), torch.ones(3)
    product, total = count(lambda: (x @ x, y + y, x @ x, y + y))
    assert (product.op, product.calls, product.flop) == ("aten.mm", 2, 2 * 2 * 4**3)
    assert product.time_ms == pytest.approx(1 + 2)
    assert (total.op, total.calls) == ("aten.add", 2) and total.time_ms == pytest.approx(0.01)


def cost(op: str, time_ms: float, flop: float, size: float, dtype: str = "fp32") -> OpCost:
    return OpCost(op, "[1]", dtype, 1, flop, size, time_ms)


def test_the_least_time_is_that_of_the_tighter_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = (
        cost("product", 4.0, flop=200e6, size=1e6),
        cost("norm", 1.0, flop=0, size=2e6),
        cost("cached", 0.1, flop=0, size=2e6),
        cost("nothing", 0.0, flop=0, size=4),
        cost("double", 8.0, flop=400e6, size=1e6, dtype="float64"),
    )
    monkeypatch.setattr(roofline_module, "count", lambda run, device: costs)
    monkeypatch.setattr(roofline_module, "_total_ms", lambda run, device: 20.0)
    found = roofline(lambda: None, "made up", ceilings=CEILINGS, repeats=1)
    assert [point.cost.op for point in found.points] == ["double", "product", "norm", "cached", "nothing"]
    double, product, norm, cached, nothing = found.points
    assert (product.bound, product.ceiling_ms, product.percent) == ("compute", 2.0, 50.0)
    assert (product.intensity, product.flop_per_s, product.bytes_per_s) == (200.0, 50e9, pytest.approx(250e6))
    # Reading is the faster of the two bandwidths.
    assert (norm.bound, norm.ceiling_ms, norm.percent) == ("memory", pytest.approx(0.2), pytest.approx(20.0))
    assert cached.percent == pytest.approx(200.0)
    assert (nothing.flop_per_s, nothing.bytes_per_s, nothing.percent) == (None, None, None)
    # No ceiling of its own: the highest is the safe one.
    assert double.ceiling_ms == 1.0
    assert found.ops_ms == pytest.approx(13.1) and found.other_ms == pytest.approx(6.9)
    assert found.percent == pytest.approx(100 * (2 + 0.2 + 0.2 + 1) / 20, abs=1e-4)
    json.dumps(found.to_dict(), allow_nan=False)


def test_times_are_medians_of_the_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    times, totals = iter([1.0, 9.0, 2.0]), iter([30.0, 10.0, 20.0])
    monkeypatch.setattr(roofline_module, "count", lambda run, device: (cost("norm", next(times), 0, 1e6),))
    monkeypatch.setattr(roofline_module, "_total_ms", lambda run, device: next(totals))
    found = roofline(lambda: None, "made up", ceilings=CEILINGS, repeats=3)
    assert found.points[0].cost.time_ms == 2.0 and found.total_ms == 20.0
    with pytest.raises(ValueError, match="repeats is 0"):
        roofline(lambda: None, "none", ceilings=CEILINGS, repeats=0)


@pytest.fixture
def small_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cache holds shows that it is measured, not how fast memory is."""
    monkeypatch.setattr(ceilings_module, "_SWEEP_BYTES", (2**20, 2**20))
    monkeypatch.setattr(ceilings_module, "_EDGES", {"cpu": (32, 64)})


@pytest.mark.usefixtures("small_arrays")
def test_ceilings_are_measured_here() -> None:
    found = measure_ceilings("cpu", ["fp32", "bf16", "int8"], budget_s=0.2)
    assert found.device == "cpu" and found.threads == torch.get_num_threads()
    assert list(found.flop_per_s) == ["fp32", "bf16", "int8"]
    # Between a slow core and a large machine.
    assert 1e8 < found.read_bytes_per_s < 1e13 and 1e7 < found.copy_bytes_per_s < 1e13
    assert all(1e7 < rate < 1e15 for rate in found.flop_per_s.values())
    x = torch.ones(256, 256)
    point = roofline(lambda: linear(x, x), "linear", ceilings=found, repeats=2).points[0]
    assert point.percent is not None and point.percent > 0


@pytest.mark.usefixtures("small_arrays")
def test_a_dtype_without_a_product_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(left: Tensor, right: Tensor) -> Tensor:
        raise RuntimeError("not implemented for 'Char'")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    assert list(measure_ceilings("cpu", ["int8", "fp32"], budget_s=0.01).flop_per_s) == ["fp32"]


def test_unknown_dtypes_and_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="dtype is 'fp8'; it must be one of fp32, bf16, fp16, int8"):
        measure_ceilings("cpu", ["fp8"])
    with pytest.raises(ValueError, match="device is 'mps'"):
        measure_ceilings("mps", ["fp32"])


@pytest.mark.gpu
def test_on_a_gpu_an_operation_is_timed_without_its_launch() -> None:
    found = measure_ceilings("cuda", ["fp32", "bf16"], budget_s=1.0)
    assert found.threads == 0 and found.flop_per_s["bf16"] > found.flop_per_s["fp32"]
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    product = roofline(lambda: x @ x, "product", device="cuda", ceilings=found).points[0]
    assert product.percent is not None and 20 < product.percent < 130
    small = torch.ones(1024, device="cuda")
    [cost] = count(lambda: small + small, "cuda")
    assert cost.time_ms < 0.02
