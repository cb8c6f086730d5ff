"""`fastattn.load`: what it takes, what it gives back, what it says of a folder or input it cannot use."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from batches import token_batch

import fastattn

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def test_torch_and_numpy_in_the_same_kind_out(exported_model):
    batch = token_batch([6, 3], 6)
    as_torch = exported_model(**batch)
    as_numpy = exported_model(**{name: x.numpy() for name, x in batch.items()})
    for name in ("last_hidden_state", "pooler_output"):
        assert isinstance(as_torch[name], torch.Tensor)
        assert isinstance(as_numpy[name], np.ndarray)
        np.testing.assert_array_equal(as_torch[name].numpy(), as_numpy[name])


def test_output_is_read_as_the_original_is(exported, exported_model):
    output = exported_model(**token_batch([6, 3], 6))
    assert output.pooler_output is output["pooler_output"] is output[1] is output.to_tuple()[1]
    assert list(output) == list(output.keys()) == ["last_hidden_state", "pooler_output"]
    assert len(output[:1]) == 1
    assert "logits" not in output
    with pytest.raises(AttributeError, match="no attribute 'logits'"):
        _ = output.logits
    with torch.no_grad():
        expected = exported[0](**token_batch([6, 3], 6))
    assert type(output) is type(expected)
    assert list(output) == list(expected.keys())
    as_tuple = exported_model(**token_batch([6, 3], 6), return_dict=False)
    assert torch.equal(as_tuple[1], output.pooler_output)


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
            r"attention_mask must be \[batch, sequence\] with sequence = 5, as in input_ids; got \[2, 3\]",
        ),
        (
            {"input_ids": IDS.repeat(1, 20)},
            ValueError,
            r"input_ids is \[2, 100\], \[batch, sequence\]: sequence may be at most 64",
        ),
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
    with pytest.raises(
        TypeError, match="20 positional inputs given; the model takes input_ids, attention_mask"
    ):
        exported_model(*[IDS] * 20)
    with pytest.raises(TypeError, match="unexpected input 'position_ids'; the model takes input_ids, att"):
        exported_model(IDS, IDS, IDS, IDS)
    with pytest.raises(TypeError, match="'input_ids' is given twice"):
        exported_model(IDS, input_ids=IDS)


def test_arguments_that_change_nothing_are_taken_and_others_refused(exported_model):
    expected = exported_model(input_ids=IDS).pooler_output
    for harmless in (
        {"output_attentions": False, "output_hidden_states": None, "return_dict": True},
        {"position_ids": None, "inputs_embeds": None},
    ):
        assert torch.equal(exported_model(input_ids=IDS, **harmless).pooler_output, expected)
    for asked in ("output_attentions", "output_hidden_states"):
        with pytest.raises(ValueError, match=f"{asked}=True, but the export has no .* original BertModel"):
            exported_model(input_ids=IDS, **{asked: True})
    with pytest.raises(TypeError, match="unexpected input 'inputs'"):
        exported_model(input_ids=IDS, inputs=None)


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
