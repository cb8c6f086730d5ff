"""`fastattn.load`: what it takes, what it gives back, what it says of a folder or input it cannot use."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from batches import token_batch

import fastattn

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.model


def test_torch_and_numpy_in_the_same_kind_out(exported_model):
    batch = token_batch([6, 3], 6)
    as_torch = exported_model(**batch)
    as_numpy = exported_model(**{name: x.numpy() for name, x in batch.items()})
    for name in ("last_hidden_state", "pooler_output"):
        assert isinstance(as_torch[name], torch.Tensor)
        assert isinstance(as_numpy[name], np.ndarray)
        np.testing.assert_array_equal(as_torch[name].numpy(), as_numpy[name])


def test_output_is_read_as_the_original_is(exported_model):
    output = exported_model(**token_batch([6, 3], 6))
    assert output.pooler_output is output["pooler_output"] is output[1] is output.to_tuple()[1]
    assert list(output) == list(output.keys()) == ["last_hidden_state", "pooler_output"]
    assert len(output[:1]) == 1
    assert "logits" not in output
    with pytest.raises(AttributeError, match="no output 'logits'"):
        _ = output.logits
    assert repr(output) == "OnnxOutput(last_hidden_state=[2, 6, 60], pooler_output=[2, 60])"


def test_inputs_left_out_are_filled_as_the_original_does(exported, exported_model):
    model, _ = exported
    ids = token_batch([6, 3], 6)["input_ids"]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    with torch.no_grad():
        for given in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
            expected = model(**given).pooler_output
            torch.testing.assert_close(exported_model(**given).pooler_output, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(exported_model(ids, mask).pooler_output, expected, atol=1e-5, rtol=0)
    same = exported_model(input_ids=ids, attention_mask=mask, token_type_ids=None)
    torch.testing.assert_close(same.pooler_output, expected, atol=1e-5, rtol=0)


def test_other_integer_dtypes_and_strides(exported_model):
    batch = token_batch([6, 3], 6)
    expected = exported_model(**batch).pooler_output
    found = exported_model(
        input_ids=batch["input_ids"].int(),
        attention_mask=batch["attention_mask"].bool(),
        token_type_ids=batch["token_type_ids"].T.contiguous().T,
    )
    torch.testing.assert_close(found.pooler_output, expected)


IDS = torch.ones(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "input_ids is missing; the model takes input_ids, attention_mask, token_type_ids"),
        ({"input_ids": IDS, "labels": IDS}, TypeError, "unexpected input 'labels'"),
        (
            {"input_ids": [[1, 2]]},
            TypeError,
            "input_ids is a list; it must be a torch tensor or a numpy array",
        ),
        ({"input_ids": IDS.float()}, TypeError, "input_ids is float32; it must be integers"),
        ({"input_ids": IDS, "attention_mask": IDS.float()}, TypeError, "attention_mask is float32"),
        (
            {"input_ids": IDS[0]},
            ValueError,
            r"input_ids must be \[batch, sequence\] and not empty; got \[5\]",
        ),
        ({"input_ids": IDS[:0]}, ValueError, r"not empty; got \[0, 5\]"),
        (
            {"input_ids": IDS, "attention_mask": IDS[:, :3]},
            ValueError,
            r"attention_mask must have the shape of input_ids, \[2, 5\]; got \[2, 3\]",
        ),
        ({"input_ids": IDS.repeat(1, 20)}, ValueError, "100 tokens a sequence; the model takes at most 64"),
        ({"input_ids": IDS * 400}, ValueError, "input_ids must lie between 0 and 399; got 400 to 400"),
        ({"input_ids": -IDS}, ValueError, "input_ids must lie between 0 and 399"),
        (
            {"input_ids": IDS, "token_type_ids": IDS * 2},
            ValueError,
            "token_type_ids must lie between 0 and 1",
        ),
    ],
    ids=str,
)
def test_bad_inputs_are_named(exported_model, arguments, error, message):
    with pytest.raises(error, match=message):
        exported_model(**arguments)


def test_positional_inputs_are_checked(exported_model):
    with pytest.raises(TypeError, match="4 positional inputs given"):
        exported_model(IDS, IDS, IDS, IDS)
    with pytest.raises(TypeError, match="'input_ids' is given twice"):
        exported_model(IDS, input_ids=IDS)


def test_eight_threads_get_their_own_answers(exported_model):
    batches = [token_batch([seed + 1, 3], seed + 3, seed=seed) for seed in range(24)]
    expected = [exported_model(**batch).pooler_output for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda batch: exported_model(**batch).pooler_output, batches))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_session_options_are_used(exported):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = fastattn.load(str(exported[1]), session_options=options)
    assert model.session.get_session_options().intra_op_num_threads == 1


def test_saved_model_is_loaded_from_safetensors_only(new_bert, tmp_path):
    model = new_bert("BertForSequenceClassification").eval()
    model.save_pretrained(tmp_path / "saved")
    loaded = fastattn.load(tmp_path / "saved")
    assert type(loaded) is transformers.BertForSequenceClassification
    assert not loaded.training
    batch = token_batch([6, 3], 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    (tmp_path / "saved" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "saved" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights"):
        fastattn.load(tmp_path / "saved")


def test_folders_that_are_no_export(exported, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        fastattn.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"neither an export .* it holds nothing"):
        fastattn.load(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"neither an export .* it holds model\.onnx"):
        fastattn.load(tmp_path)
    shutil.copytree(exported[1], tmp_path / "copy")
    manifest = tmp_path / "copy" / "fastattn.json"
    content = manifest.read_text()
    for damaged in ("{", json.dumps({"inputs": []}), "[]"):
        manifest.write_text(damaged)
        with pytest.raises(ValueError, match=r"fastattn\.json is damaged .* export the model again"):
            fastattn.load(tmp_path / "copy")
    manifest.write_text(content)
    model_file = tmp_path / "copy" / "model.onnx"
    model_file.write_bytes(model_file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.onnx cannot be loaded .* export the model again"):
        fastattn.load(tmp_path / "copy")
    model_file.unlink()
    with pytest.raises(ValueError, match=r"has no model\.onnx"):
        fastattn.load(tmp_path / "copy")
