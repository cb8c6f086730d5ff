"""Encoders of every family as ONNX: the untouched model's answers under any mask, padding-free, with the
inputs their tokenizers give, in plain ONNX Runtime.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from batches import assert_same_outputs, token_batch

import fastattn

transformers = pytest.importorskip("transformers")
pytest.importorskip("optimum")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

sys.path[:0] = [str(Path(__file__).parents[1] / "models")]
from family_case import VOCABULARY  # noqa: E402
from family_cases import CASES as FAMILY_CASES  # noqa: E402
from family_models import build  # noqa: E402

from fastattn.onnx.fusions import FusionError  # noqa: E402
from fastattn.onnx.sources.tasks import infer_task  # noqa: E402

pytestmark = pytest.mark.model

BY_NAME = {case.name: case for case in FAMILY_CASES}
TEXT = ("input_ids", "attention_mask")
TYPED = (*TEXT, "token_type_ids")


@dataclass(frozen=True)
class Case:
    """What an export must be.

    Attributes:
        family, head: a case of the families' tests, and the class exported.
        inputs: the graph's, in order.
        fusions: attention (of those packed_attention), add_layer_norm, bias_gelu.
        longest: the longest sequence the manifest allows; None for none.
    """

    family: str
    head: str
    inputs: tuple[str, ...]
    fusions: tuple[int, int, int, int]
    longest: int | None


CASES = (
    Case("RoBERTa", "RobertaModel", TEXT, (3, 3, 6, 3), 64),
    Case("XLM-R", "XLMRobertaForSequenceClassification", TEXT, (3, 3, 6, 3), 64),
    Case("DistilBERT", "DistilBertForQuestionAnswering", TEXT, (3, 3, 6, 3), 66),
    Case("ELECTRA", "ElectraForPreTraining", TYPED, (3, 3, 6, 4), 66),
    Case("ALBERT", "AlbertForSequenceClassification", TYPED, (3, 3, 6, 3), 66),
    # Distances are relative from here on.
    Case("MPNet", "MPNetForSequenceClassification", TEXT, (3, 3, 6, 3), 64),
    Case("ModernBERT", "ModernBertForMaskedLM", TEXT, (2, 2, 7, 1), None),
    Case("T5", "T5EncoderModel", TEXT, (2, 2, 0, 0), None),
    # Its scores are no operation of ours, and it runs padded.
    Case("DeBERTa-v3", "DebertaV2ForSequenceClassification", TEXT, (0, 0, 6, 4), 66),
    Case("DeBERTa-v2 xlarge", "DebertaV2Model", TEXT, (0, 0, 6, 3), 66),
    # Causal, which keeps it from the fused operator.
    Case("CLIP", "CLIPTextModelWithProjection", TEXT, (0, 0, 3, 0), 64),
)

SHAPES = {
    "right padding": ([17, 9, 4, 1], 17, False),
    "left padding": ([17, 9, 4, 1], 17, True),
    "no padding": ([12, 12], 12, False),
    "batch == length": ([3, 1, 2], 3, False),
    "one token": ([1], 1, False),
    "one padded row": ([5], 12, True),
    "long": ([60, 2], 60, False),
    "many short": ([1, 2, 1, 2, 1, 2, 1, 2, 1], 2, True),
}


class Exported:
    """An export in a session of plain ONNX Runtime, and the model it was made of."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.model = build(BY_NAME[case.family], case.head)
        self.result = fastattn.export(self.model, folder, verify=False, layouts=())
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        entry = fastattn.onnx.runtime.manifest.read_manifest(folder)["graphs"]["model"]
        self.bounds = entry["inputs"][0]["bounds"]

    def batch(self, lengths, width, left=False, seed=0):
        batch = token_batch(lengths, width, left, vocabulary=VOCABULARY, seed=seed)
        return {name: batch[name] for name in self.inputs}

    def run(self, batch):
        found = self.session.run(self.outputs, {name: x.numpy() for name, x in batch.items()})
        return {name: torch.from_numpy(x) for name, x in zip(self.outputs, found, strict=True)}

    def expect(self, batch):
        with torch.no_grad():
            return self.model(**batch)

    def check(self, batch, context):
        assert_same_outputs(self.run(batch), self.expect(batch), batch["attention_mask"], context)


# Their layers are those of RoBERTa, BERT and DeBERTa-v3, in transformers too.
ONCE = ("XLM-R", "ELECTRA", "DeBERTa-v2 xlarge")


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=[pytest.mark.once] if case.family in ONCE else []) for case in CASES],
    ids=lambda case: case.family.replace(" ", "-"),
)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def exported(case, tmp_path_factory):
    return Exported(case, tmp_path_factory.mktemp("families"))


def test_what_is_exported(case, exported):
    assert tuple(exported.inputs) == case.inputs
    attention, packed, norms, activations = case.fusions
    wanted = dict(attention=attention, packed_attention=packed, add_layer_norm=norms, bias_gelu=activations)
    assert {name: exported.result.fusions.get(name, 0) for name in wanted} == wanted
    assert exported.bounds == ({} if case.longest is None else {"sequence": case.longest})


def test_answers(exported):
    """One session, every shape and side of padding, tokens of any value where the mask hides them."""
    for name, (lengths, width, left) in SHAPES.items():
        exported.check(exported.batch(lengths, width, left), name)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        rows, width = (int(torch.randint(1, limit, (), generator=generator)) for limit in (7, 40))
        lengths = torch.randint(1, width + 1, (rows,), generator=generator).tolist()
        batch = exported.batch(lengths, width, left=bool(seed % 2), seed=seed)
        exported.check(batch, f"seed {seed}, lengths {lengths} of {width}")


def test_the_longest(case, exported):
    """Where positions are computed or relative any length will do: twice as many as others have."""
    longest = case.longest or 130
    exported.check(exported.batch([longest, 3], longest), "the longest")


def test_mask_with_holes(exported):
    generator = torch.Generator().manual_seed(3)
    batch = exported.batch([11, 11, 11], 11)
    batch["attention_mask"] = (torch.rand(3, 11, generator=generator) > 0.4).long()
    batch["attention_mask"][0, 0], batch["attention_mask"][1, 0] = 0, 1
    exported.check(batch, "holes")


def test_row_of_padding_is_finite_and_changes_nothing(exported):
    batch = exported.batch([9, 4, 6], 9)
    batch["attention_mask"][1] = 0
    beside = exported.run(batch)
    alone = exported.run({name: x[[0, 2]] for name, x in batch.items()})
    for name, value in beside.items():
        assert torch.isfinite(value).all(), name
        torch.testing.assert_close(value[[0, 2]], alone[name], rtol=1e-4, atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("lost", ["packing", "layer"])
def test_what_a_family_promises_and_the_trace_lost(lost, tmp_path, monkeypatch):
    """An export that would only be slower fails."""
    from fastattn.models import modernbert, packed

    if lost == "packing":
        monkeypatch.setattr(packed, "can_pack", lambda mask: False)
        message = "of the model's 4 varlen_attention operations 0 are in its trace"
    else:
        monkeypatch.setattr(
            modernbert.ModernBertMLP, "forward", modernbert.ModernBertMLP.fastattn_original.forward
        )
        message = "of the model's 4 gated_activation operations 0 are in its trace"
    with pytest.raises(FusionError, match=message):
        fastattn.export(build(BY_NAME["ModernBERT"], "ModernBertModel"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_verified(tmp_path):
    """A pooled mean over a row of padding is not finite in the original: no fault of the export's."""
    model = build(BY_NAME["ModernBERT"], "ModernBertForSequenceClassification")
    report = fastattn.export(model, tmp_path / "out").verification
    assert report.passed
    assert {"left padding", "holes", "batch == length"} <= {result.case for result in report.results}


def of_class(name: str):
    """A model of a class, as small as it can be, without memory for its weights."""
    cls = getattr(transformers, name)
    with torch.device("meta"):
        return cls(cls.config_class())


@pytest.mark.parametrize(
    ("name", "task", "synonyms"),
    [
        ("DistilBertModel", "feature-extraction", ("default", "sentence-similarity")),
        ("RobertaForMaskedLM", "fill-mask", ("masked-lm",)),
        ("AlbertForSequenceClassification", "text-classification", ("zero-shot-classification",)),
        ("ElectraForPreTraining", "pretraining", ()),
        ("BertForNextSentencePrediction", "next-sentence-prediction", ()),
        ("GPT2LMHeadModel", "text-generation", ("causal-lm", "text-generation-with-past")),
        # Its auto class for filling masks comes first in optimum's table.
        ("BartForConditionalGeneration", "text2text-generation", ("translation", "seq2seq-lm-with-past")),
        ("MBartForConditionalGeneration", "text2text-generation", ("summarization",)),
        ("MarianMTModel", "text2text-generation", ()),
        ("WhisperForConditionalGeneration", "automatic-speech-recognition", ("speech2seq-lm",)),
        ("T5EncoderModel", "feature-extraction", ()),
        ("CLIPModel", "zero-shot-image-classification", ()),
        ("CLIPVisionModelWithProjection", "feature-extraction", ("image-feature-extraction",)),
        ("ViTForImageClassification", "image-classification", ()),
        ("ViTForMaskedImageModeling", "masked-im", ()),
    ],
)
def test_tasks(name, task, synonyms):
    model = of_class(name)
    assert infer_task(model, None) == task
    for given in (task, *synonyms):
        assert infer_task(model, given) == task


def test_task_of_a_derived_class(new_bert):
    class Mine(transformers.BertForTokenClassification):
        pass

    model = new_bert("BertForTokenClassification")
    model.__class__ = Mine
    assert infer_task(model, None) == "token-classification"
