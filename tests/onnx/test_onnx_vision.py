"""ViT and CLIP as ONNX: the untouched model's answers for any number of images, and of texts beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

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

pytestmark = pytest.mark.model

BY_NAME = {case.name: case for case in FAMILY_CASES}
SIDE = 24
LAYERS = 2

# Class -> task, outputs, and how many GELUs are fused (CLIP's is none that an operator computes).
HEADS = {
    "ViTModel": ("feature-extraction", ("last_hidden_state", "pooler_output"), LAYERS),
    "ViTForImageClassification": ("image-classification", ("logits",), LAYERS),
    "ViTForMaskedImageModeling": ("masked-im", ("reconstruction",), LAYERS),
    "CLIPVisionModel": ("feature-extraction", ("last_hidden_state", "pooler_output"), 0),
    "CLIPVisionModelWithProjection": ("feature-extraction", ("image_embeds", "last_hidden_state"), 0),
}


def model_of(name):
    return build(BY_NAME["ViT" if name.startswith("ViT") else "CLIP"], name)


def images(count, seed=0):
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def texts(lengths, width, left=False):
    generator = torch.Generator().manual_seed(1)
    position, real = torch.arange(width), torch.tensor(lengths)[:, None]
    mask = (position >= width - real if left else position < real).long()
    ids = torch.randint(3, VOCABULARY, mask.shape, generator=generator)
    # The text's embedding is that of its last token, which is found by its id.
    ids[torch.arange(len(lengths)), width - 1 if left else torch.tensor(lengths) - 1] = 2
    return {"input_ids": ids, "attention_mask": mask}


def run(session, batch):
    names = [value.name for value in session.get_outputs()]
    found = session.run(names, {name: x.numpy() for name, x in batch.items()})
    return {name: torch.from_numpy(x) for name, x in zip(names, found, strict=True)}


def assert_same(found, expected, names, context):
    for name in names:
        wanted = expected[name]
        assert found[name].shape == wanted.shape, (name, context)
        error, scale = (found[name] - wanted).abs().max(), wanted.abs().max()
        assert error <= 1e-4 * scale, f"{name}: error {error:.2e} of {scale:.2e}; {context}"


def session_of(folder):
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", HEADS)
def test_every_head(name, tmp_path):
    task, outputs, activations = HEADS[name]
    model = model_of(name)
    result = fastattn.export(model, tmp_path / "out", layouts=())
    assert (result.task, result.outputs) == (task, outputs)
    assert result.verification.passed
    fusions = {name: result.fusions.get(name, 0) for name in ("attention", "add_layer_norm", "bias_gelu")}
    assert fusions == {"attention": LAYERS, "add_layer_norm": 2 * LAYERS - 1, "bias_gelu": activations}
    session = session_of(tmp_path / "out")
    (entry,) = session.get_inputs()
    assert (entry.name, entry.shape) == ("pixel_values", ["batch", 3, SIDE, SIDE])
    for count in (1, 2, 3, 5, SIDE):
        batch = {"pixel_values": images(count, count)}
        with torch.no_grad():
            assert_same(run(session, batch), model(**batch), outputs, f"{count} images")


OUTPUTS = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "out"
    model = model_of("CLIPModel")
    result = fastattn.export(model, folder, layouts=())
    return model, result, session_of(folder)


def test_clip_has_optimums_names(clip):
    _, result, session = clip
    assert (result.task, result.outputs) == ("zero-shot-image-classification", OUTPUTS)
    assert {value.name: value.shape for value in session.get_inputs()} == {
        "input_ids": ["text_batch_size", "sequence"],
        "pixel_values": ["image_batch_size", 3, SIDE, SIDE],
        "attention_mask": ["text_batch_size", "sequence"],
    }
    assert [value.name for value in session.get_outputs()] == list(OUTPUTS)
    assert session.get_outputs()[0].shape == ["image_batch_size", "text_batch_size"]


@pytest.mark.parametrize(
    ("lengths", "width", "left", "count"),
    [
        ([9, 4, 2], 9, False, 3),
        ([9, 4, 2], 9, True, 1),
        ([5], 5, False, 4),
        ([1, 1], 1, False, 2),
        ([64, 3], 64, False, 2),
        ([6, 2, 3, 4, 5, 6], 6, False, 6),
    ],
)
def test_clip_texts_and_images(clip, lengths, width, left, count):
    model, _, session = clip
    batch = {**texts(lengths, width, left), "pixel_values": images(count)}
    with torch.no_grad():
        expected = model(**batch)
    assert_same(run(session, batch), expected, OUTPUTS, f"{lengths} of {width}, {count} images")


def test_wrong_images_are_named(tmp_path):
    model = model_of("ViTModel")
    for example, message in (
        ({"images": images(2)}, r"has \['images'\]; it must have pixel_values"),
        ({"pixel_values": images(2).double()}, r"must be float32 \[batch, 3, 24, 24\]"),
        ({"pixel_values": images(2)[..., :8]}, r"got \[2, 3, 24, 8\]"),
        ({"pixel_values": images(1)}, "none of them 1"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            fastattn.export(model, tmp_path / "out", example_inputs=example)
    with pytest.raises(
        ValueError, match="ViTModel has the head of 'feature-extraction'; load the model with"
    ):
        fastattn.export(model, tmp_path / "out", task="image-classification")
    assert not list(tmp_path.iterdir())
