"""verify draws inputs for every kind of model, and says which cases do not apply."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastattn
from fastattn.verification import CASES

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.model

SMALL = dict(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40)
TOKENS = {"right padding", "left padding", "no padding", "no mask", "batch == length", "one token", "one row"}
ENCODER = TOKENS | {"a row of padding", "gradients", "autocast"}
DECODER = ENCODER | {"packed sequences", "dynamic cache", "static cache"}
SEQ2SEQ = ENCODER | {"dynamic cache", "static cache"}
DENSE = {"no padding", "one row", "gradients", "autocast"}


def _sides(**options):
    return dict(
        vocab_size=90,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        **options,
    )


VISION = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=40,
    image_size=16,
    patch_size=8,
)
TEXT = {**SMALL, "num_hidden_layers": 1, "max_position_embeddings": 20, "eos_token_id": 2, "pad_token_id": 1}

MODELS = [
    ("RobertaForMultipleChoice", dict(SMALL, max_position_embeddings=30, pad_token_id=1), ENCODER),
    ("AlbertForMaskedLM", dict(SMALL, embedding_size=16), ENCODER),
    (
        "DistilBertForQuestionAnswering",
        dict(vocab_size=90, dim=32, n_layers=1, n_heads=2, hidden_dim=40),
        ENCODER,
    ),
    (
        "ModernBertForTokenClassification",
        dict(
            SMALL,
            local_attention=8,
            **{f"{n}_token_id": i for i, n in enumerate(("pad", "eos", "bos", "cls", "sep"))},
        ),
        ENCODER | {"longer than the window"},
    ),
    ("LlamaForCausalLM", dict(SMALL, num_key_value_heads=1, max_position_embeddings=40), DECODER),
    ("LlamaForSequenceClassification", dict(SMALL, pad_token_id=0), ENCODER | {"packed sequences"}),
    (
        "MistralForCausalLM",
        dict(SMALL, num_key_value_heads=1, sliding_window=9),
        DECODER | {"longer than the window"},
    ),
    (
        "GptOssForCausalLM",
        dict(
            SMALL,
            num_key_value_heads=1,
            head_dim=16,
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=9,
        ),
        (DECODER | {"longer than the window"}) - {"autocast"},
    ),
    ("OPTForCausalLM", dict(SMALL, ffn_dim=40, word_embed_proj_dim=32), DECODER),
    (
        "GPT2ForSequenceClassification",
        dict(vocab_size=90, n_embd=32, n_layer=1, n_head=2),
        {"one row", "gradients", "autocast"},
    ),
    (
        "BloomForCausalLM",
        dict(vocab_size=90, hidden_size=32, n_layer=1, n_head=2),
        ENCODER | {"dynamic cache"},
    ),
    (
        "T5ForConditionalGeneration",
        dict(vocab_size=90, d_model=32, d_kv=16, d_ff=40, num_layers=1, num_heads=2),
        SEQ2SEQ,
    ),
    ("T5EncoderModel", dict(vocab_size=90, d_model=32, d_kv=16, d_ff=40, num_layers=1, num_heads=2), ENCODER),
    ("BartForConditionalGeneration", _sides(max_position_embeddings=30), SEQ2SEQ),
    ("BartForSequenceClassification", _sides(), ENCODER),
    ("MarianMTModel", _sides(pad_token_id=89, decoder_start_token_id=89), SEQ2SEQ),
    ("ViTForImageClassification", VISION, DENSE),
    ("CLIPModel", dict(text_config=TEXT, vision_config=VISION, projection_dim=16), ENCODER),
    (
        "WhisperForConditionalGeneration",
        _sides(
            max_source_positions=10,
            max_target_positions=20,
            num_mel_bins=8,
            **{f"{n}_token_id": i for i, n in enumerate(("pad", "bos", "eos", "decoder_start"))},
        ),
        SEQ2SEQ,
    ),
]


@pytest.mark.parametrize(("name", "options", "expected"), MODELS, ids=[name for name, *_ in MODELS])
def test_every_kind_of_model(name, options, expected):
    from fastattn.models.interface import NAME

    model_class = getattr(transformers, name)
    reference = model_class(model_class.config_class(**copy.deepcopy(options))).eval()
    reference.set_attn_implementation("eager")
    model = copy.deepcopy(reference)
    if name != "BloomForCausalLM":
        model.set_attn_implementation(NAME)
    # Compiling is tried on one model below; here it would be most of the time.
    cases = [case for case in CASES if case not in ("compile", "given inputs", "rows alone")]
    report = fastattn.verify(model, reference, cases=cases)
    ran = {result.case for result in report.results}
    assert ran == expected
    reasons = {each.case: each.reason for each in report.not_applicable}
    assert set(reasons) == set(cases) - ran and all(reasons.values())
    assert all(case in report.table() for case in reasons)


def test_a_model_loaded_with_our_attention_needs_no_reference(tiny_llama):
    _, model = tiny_llama
    report = fastattn.verify(model)
    assert {"compile", "static cache"} <= {result.case for result in report.results}
    assert model.config._attn_implementation == "fastattn"


class Classifier(nn.Module):
    """A hand-written model over a padding mask of torch.nn's meaning."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x, src_key_padding_mask=None, *, scale: float = 1.0):
        hidden = self.encoder(x, src_key_padding_mask=src_key_padding_mask)
        return self.head(self.norm((hidden * scale).mean(1))), hidden


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_any_module_on_given_inputs():
    model = Classifier()
    reference = copy.deepcopy(model)
    padding = torch.arange(6) >= torch.tensor([6, 3])[:, None]
    inputs = {"x": torch.randn(2, 6, 16), "src_key_padding_mask": padding, "scale": 0.0}
    report = fastattn.verify(model, reference, inputs)
    # torch's fast path does not run under autocast on a CPU.
    ran = {result.case for result in report.results} | {each.case for each in report.not_applicable}
    assert ran == {"given inputs", "gradients", "autocast", "compile"}
    assert {each.case for each in report.not_applicable} <= {"autocast"}
    assert {result.output for result in report.results if result.case == "given inputs"} == {"0", "1"}
    assert model.norm.num_batches_tracked == 0
    with torch.no_grad():
        model.encoder.layers[1].linear1.weight *= 1.5
    with pytest.raises(
        fastattn.VerificationError, match=r"given inputs: [01] .* first differs in encoder.layers.1"
    ):
        fastattn.verify(model, reference, {**inputs, "scale": 1.0}, cases=["given inputs"])
    with pytest.raises(ValueError, match=r"Classifier has no config to draw a batch from .*; give inputs"):
        fastattn.verify(model, reference)


def test_outputs_that_are_missing_or_of_another_shape():
    class Two(nn.Module):
        def __init__(self, width, both):
            super().__init__()
            self.width, self.both = width, both

        def forward(self, x):
            return {"a": x[..., : self.width]} | ({"b": x} if self.both else {})

    x = torch.randn(2, 3, 4)
    for model, message in ((Two(3, True), r"a has shape \[2, 3, 3\]"), (Two(4, False), "b is missing")):
        with pytest.raises(fastattn.VerificationError, match=message):
            fastattn.verify(model, Two(4, True), {"x": x}, cases=["given inputs"])
