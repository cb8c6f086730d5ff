"""Swapped BERT against itself untouched: every head, every kind of padding, recorded outputs, generation,
gradients.
"""

from __future__ import annotations

import copy

import pytest
import torch

import fastattn
from fastattn.packing import PackingError
from fastattn.verification import CASES, adversarial_batches

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.model

HEADS = [
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertLMHeadModel",
]
TOLERANCE = 1e-4
# A graph for each head would take most of the suite's time: compiling has tests of its own.
UNCOMPILED = [case for case in CASES if case not in ("given inputs", "compile")]


def swapped_pair(config, head="BertModel", **options):
    """The untouched model and its swapped copy, in eval mode."""
    torch.manual_seed(0)
    reference = getattr(transformers, head)(copy.deepcopy(config)).eval()
    model = copy.deepcopy(reference)
    report = fastattn.optimize(model, **options)
    assert report.swapped == len(report.sites)
    return reference, model


def assert_same(found, expected, context=""):
    scale = expected.abs().max()
    error = (found - expected).abs().max()
    assert error <= TOLERANCE * scale, (
        f"error {error:.2e} of scale {scale:.2e}; {tuple(found.shape)}; {context}"
    )


@pytest.mark.parametrize("head", HEADS)
def test_every_head_verifies(bert_config, head):
    _, model = swapped_pair(bert_config, head)
    report = fastattn.verify(model, cases=UNCOMPILED)
    assert report.passed and len({result.case for result in report.results}) == 11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_verifies(bert_config, dtype):
    _, model = swapped_pair(bert_config)
    cases = ["right padding", "left padding", "no padding", "a row of padding"]
    fastattn.verify(model.to(dtype), cases=cases)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations(bert_config, activation):
    bert_config.hidden_act = activation
    model = transformers.BertModel(bert_config).eval()
    report = fastattn.optimize(model)
    skipped = [site for site in report.sites if site.status == "skipped"]
    if activation == "relu":
        assert [site.kind for site in skipped] == ["activation"] * 3
        assert "ReLU" in skipped[0].reason
    else:
        assert not skipped
    fastattn.verify(model, cases=UNCOMPILED)


@torch.no_grad()
def test_padding_is_not_computed_and_comes_back_as_zero(bert_config):
    _, model = swapped_pair(bert_config)
    seen = []
    original = model.encoder.layer[0].intermediate.dense.weight
    batch = adversarial_batches(model)["right padding"]
    from fastattn.layers import fused

    linear = fused.linear

    def counting(x, weight, *rest):
        if weight is original:
            seen.append(x.shape[:2].numel())
        return linear(x, weight, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "linear", counting)
        out = model(**batch).last_hidden_state
    mask = batch["attention_mask"].bool()
    assert seen == [mask.sum().item()]
    assert (out[~mask] == 0).all()


@torch.no_grad()
def test_left_padding_computes_the_first_token_that_the_pooler_reads(bert_config):
    reference, model = swapped_pair(bert_config)
    batch = adversarial_batches(model)["left padding"]
    assert_same(model(**batch).pooler_output, reference(**batch).pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("case", ["right padding", "left padding", "no padding"])
@pytest.mark.parametrize("head", ["BertModel", "BertForSequenceClassification"])
def test_recorded_hidden_states_and_attentions_are_the_originals(bert_config, case, head):
    reference, model = swapped_pair(bert_config, head)
    reference.set_attn_implementation("eager")
    batch = adversarial_batches(model)[case]
    expected = reference(**batch, output_hidden_states=True, output_attentions=True)
    found = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == 4 and len(found.attentions) == 3
    for name in ("hidden_states", "attentions"):
        for got, wanted in zip(getattr(found, name), getattr(expected, name), strict=True):
            assert got.shape == wanted.shape
            assert_same(got, wanted, name)
    # Once recorded, transformers' hooks stay on the layers: they must not end packing.
    again = model(**batch)
    hidden = again.last_hidden_state if head == "BertModel" else None
    if hidden is not None and case == "right padding":
        assert (hidden[~batch["attention_mask"].bool()] == 0).all()


@torch.no_grad()
def test_a_users_hook_sees_padded_tensors(bert_config):
    _, model = swapped_pair(bert_config)
    batch = adversarial_batches(model)["right padding"]
    shapes = []
    handle = model.encoder.layer[1].register_forward_hook(lambda m, a, out: shapes.append(out.shape))
    model(**batch)
    handle.remove()
    assert shapes == [torch.Size([4, 48, 60])]
    linear_shapes = []
    model.encoder.layer[0].intermediate.dense.register_forward_pre_hook(
        lambda m, args: linear_shapes.append(args[0].shape)
    )
    model(**batch)
    assert linear_shapes == [torch.Size([4, 48, 60])]


@torch.no_grad()
def test_masks_of_every_form(bert_config):
    reference, model = swapped_pair(bert_config)
    ids = torch.randint(0, 400, (3, 8))
    two = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1] * 8, [1, 1, 1, 1, 1, 1, 0, 0]])
    real = two.bool()
    four = real[:, None, None, :].expand(3, 1, 8, 8)
    additive = torch.zeros(3, 1, 8, 8).masked_fill(~four, torch.finfo(torch.float32).min)
    for mask in (two, two.bool(), two.float(), four, additive):
        found = model(input_ids=ids, attention_mask=mask).last_hidden_state
        expected = reference(input_ids=ids, attention_mask=mask).last_hidden_state
        assert_same(found[real], expected[real], f"{mask.dtype} {tuple(mask.shape)}")
    assert_same(model(input_ids=ids).last_hidden_state, reference(input_ids=ids).last_hidden_state)


@torch.no_grad()
def test_token_types_positions_and_embeddings_as_input(bert_config):
    reference, model = swapped_pair(bert_config)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    arguments = dict(
        attention_mask=mask,
        inputs_embeds=torch.randn(2, 6, 60),
        token_type_ids=torch.randint(0, 2, (2, 6)),
        position_ids=torch.arange(5, 11)[None],
    )
    found, expected = model(**arguments), reference(**arguments)
    assert_same(found.last_hidden_state[mask.bool()], expected.last_hidden_state[mask.bool()])
    assert isinstance(model(**arguments, return_dict=False), tuple)


@torch.no_grad()
def test_padding_options(bert_config):
    reference, model = swapped_pair(bert_config, padding="padded")
    batch = adversarial_batches(model)["right padding"]
    mask = batch["attention_mask"].bool()
    padded = model(**batch).last_hidden_state
    assert (padded[~mask] != 0).any()
    assert_same(padded[mask], reference(**batch).last_hidden_state[mask])
    fastattn.optimize(model, padding="packed")
    assert (model(**batch).last_hidden_state[~mask] == 0).all()
    with pytest.raises(PackingError, match="recorded"):
        model(**batch, output_hidden_states=True)
    with pytest.raises(PackingError, match="not \\[batch, length\\]"):
        model(input_ids=batch["input_ids"], attention_mask=mask[:, None, None, :].expand(-1, 1, 48, 48))


@torch.no_grad()
def test_decoder_generates_the_same_tokens(bert_config):
    bert_config.is_decoder = True
    reference, model = swapped_pair(bert_config, "BertLMHeadModel")
    ids = torch.randint(5, 400, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        arguments = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
        assert torch.equal(model.generate(ids, **arguments), reference.generate(ids, **arguments)), options


@torch.no_grad()
def test_decoder_with_cross_attention(bert_config):
    bert_config.is_decoder = bert_config.add_cross_attention = True
    reference, model = swapped_pair(bert_config, "BertLMHeadModel")
    ids, encoder_mask = torch.randint(5, 400, (2, 7)), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    arguments = dict(
        input_ids=ids, encoder_hidden_states=torch.randn(2, 5, 60), encoder_attention_mask=encoder_mask
    )
    assert_same(model(**arguments).logits, reference(**arguments).logits)
    recorded = model(**arguments, output_attentions=True)
    assert [w.shape[-1] for w in recorded.attentions + recorded.cross_attentions] == [7, 7, 7, 5, 5, 5]


def test_training_gradients_and_checkpointing(bert_config):
    bert_config.hidden_dropout_prob = bert_config.attention_probs_dropout_prob = 0.0
    reference, model = swapped_pair(bert_config, "BertForSequenceClassification")
    batch = adversarial_batches(model)["right padding"] | {"labels": torch.tensor([0, 1, 1, 0])}
    reference.train()(**batch).loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()(**batch).loss.backward()
        for name, p in model.named_parameters():
            if expected[name] is None:
                assert p.grad is None
            else:
                torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_training_with_dropout_learns_and_repeats_with_the_seed(bert_config):
    _, model = swapped_pair(bert_config, "BertForSequenceClassification")
    batch = adversarial_batches(model)["right padding"] | {"labels": torch.tensor([0, 1, 1, 0])}
    model.train()
    losses = []
    for _ in range(2):
        torch.manual_seed(7)
        losses.append(model(**batch).loss.item())
    assert losses[0] == losses[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * losses[0]


@torch.no_grad()
def test_autocast(bert_config):
    reference, model = swapped_pair(bert_config)
    batch = adversarial_batches(model)["right padding"]
    mask = batch["attention_mask"].bool()
    exact = reference(**batch).last_hidden_state[mask]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**batch).last_hidden_state[mask]
        own = reference(**batch).last_hidden_state[mask]
    assert found.dtype == own.dtype
    eps = torch.finfo(torch.bfloat16).eps
    assert (found - exact).abs().max() <= 2 * (own - exact).abs().max() + 2 * eps * exact.abs().max()


@torch.no_grad()
def test_models_of_several_head_sizes_compile_in_one_process():
    """Dynamo makes a symbol of the scale once it has seen two: the second must still be one graph."""
    torch._dynamo.reset()
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    for heads in (1, 2, 4):
        config = transformers.BertConfig(
            vocab_size=20,
            hidden_size=16,
            num_attention_heads=heads,
            num_hidden_layers=1,
            intermediate_size=16,
        )
        model = transformers.BertModel(config).eval()
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
            fastattn.optimize(model)
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            found = compiled(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=1e-5), heads


def test_compiles_into_one_graph(bert_config):
    reference, model = swapped_pair(bert_config)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for case in ("right padding", "left padding"):
        batch = adversarial_batches(model)[case]
        mask = batch["attention_mask"].bool()
        assert_same(
            compiled(**batch).last_hidden_state[mask], reference(**batch).last_hidden_state[mask], case
        )


@pytest.mark.once
@torch.no_grad()
def test_minilm_real_weights(minilm):
    model, tokenizer = minilm
    reference = copy.deepcopy(model)
    fastattn.optimize(model)
    texts = [
        "A short one.",
        "A sentence that is a good deal longer than the first one was, by some words.",
        "",
    ]
    for side in ("right", "left"):
        batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
        mask = batch["attention_mask"].bool()
        found, expected = model(**batch), reference(**batch)
        assert_same(found.last_hidden_state[mask], expected.last_hidden_state[mask], side)
        assert_same(found.pooler_output, expected.pooler_output, side)
    fastattn.verify(model, cases=UNCOMPILED)


@pytest.mark.once
@torch.no_grad()
def test_minilm_spearman_on_stsb_is_unchanged(minilm, data_folder):
    import csv

    from scipy.stats import spearmanr

    model, tokenizer = minilm
    with open(data_folder / "stsb" / "dev.csv", encoding="utf-8", newline="") as file:
        # A quarter of the 1,500 pairs.
        rows = list(csv.reader(file))[::4]
    scores = [float(row[2]) for row in rows]

    def correlation(model) -> float:
        sides = []
        for column in (0, 1):
            vectors = []
            for start in range(0, len(rows), 64):
                texts = [row[column] for row in rows[start : start + 64]]
                batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
                hidden = model(**batch).last_hidden_state
                weights = batch["attention_mask"][..., None]
                vectors.append((hidden * weights).sum(1) / weights.sum(1))
            sides.append(torch.nn.functional.normalize(torch.cat(vectors), dim=-1))
        return spearmanr((sides[0] * sides[1]).sum(-1).numpy(), scores).statistic

    before = correlation(model)
    fastattn.optimize(model)
    after = correlation(model)
    assert round(before, 4) == round(after, 4)
    assert 0.8 < after < 0.9


@pytest.mark.once
@torch.no_grad()
def test_bert_base_random_weights():
    from fastattn.cli.models import load_model

    reference, _ = load_model("bert-base-random")
    model = copy.deepcopy(reference)
    fastattn.optimize(model)
    for case in ("right padding", "left padding", "one token"):
        batch = adversarial_batches(model)[case]
        mask = batch["attention_mask"].bool()
        found, expected = model(**batch), reference(**batch)
        assert_same(found.last_hidden_state[mask], expected.last_hidden_state[mask], case)
        assert_same(found.pooler_output, expected.pooler_output, case)


@torch.no_grad()
def test_the_attention_function_returns_what_transformers_expects(bert_config):
    from fastattn.models.interface import attention_forward

    module = transformers.BertModel(bert_config).encoder.layer[0].attention.self
    query, key, value = (torch.randn(2, 5, 3, 20).transpose(1, 2) for _ in range(3))
    for mask in (None, torch.tensor([[1, 1, 1, 0, 0], [1] * 5]).bool()):
        out, weights = attention_forward(module, query, key, value, mask)
        assert out.shape == (2, 5, 3, 20) and out.is_contiguous() and weights is None
    with pytest.raises(ValueError, match="does not support indices"):
        attention_forward(module, query, key, value, None, indices=torch.zeros(2, 5, 3))
