"""What verify promises beside its verdict: bad input refused before work starts, a model left as it was."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

import fastattn
from fastattn.verification import CASES, adversarial_batches

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.model

QUICK = [case for case in CASES if case != "compile"]


def test_everything_runs_and_nothing_of_the_model_changes(swapped_bert):
    _, model = swapped_bert()
    model.train()
    model.bert.embeddings.eval()
    model.bert.pooler.dense.weight.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    hook = model.bert.encoder.layer[0].register_forward_hook(lambda *_: None)

    def state():
        return (
            [(name, type(module), module.training) for name, module in model.named_modules()],
            [(name, id(p), p._version, p.requires_grad) for name, p in model.named_parameters()],
            [(name, id(b), b.tolist()) for name, b in model.named_buffers()],
            [sorted(module.__dict__) for module in model.modules()],
            [list(module._forward_hooks) for module in model.modules()],
            [module.p for module in model.modules() if isinstance(module, nn.Dropout)],
            model.config.to_dict(),
            model.config._attn_implementation,
            model.classifier.weight.grad.tolist(),
            random.getstate(),
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
        )

    before = state()
    seen: list[str] = []
    report = fastattn.verify(model, cases=[*QUICK, "rows alone"], progress=seen.append)
    assert state() == before
    assert len(model.bert.encoder.layer[0]._forward_hooks) == 1
    assert seen[0] == "right padding" and "rows alone" in seen
    assert {result.case for result in report.results} <= set(CASES)
    hook.remove()


def test_a_failed_verification_leaves_the_model_as_it_was_too(swapped_bert):
    reference, model = swapped_bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0] += 1
    model.train()
    with pytest.raises(fastattn.VerificationError):
        fastattn.verify(model, reference, cases=["right padding", "gradients"])
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.1}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(inputs=[torch.ones(1)]), TypeError, "inputs is a list"),
        (dict(inputs={"input_idz": torch.ones(1, 2).long()}), TypeError, "'input_idz', which the forward of"),
        (dict(inputs={"input_ids": [[1, 2]]}), TypeError, "is a list; a tensor is accepted"),
        (dict(inputs={"input_ids": torch.rand(1, 2)}), TypeError, "whole numbers"),
        (
            dict(inputs={"input_ids": torch.full((1, 2), 999)}),
            ValueError,
            "cannot run the given inputs: IndexError",
        ),
        (dict(inputs={"input_ids": torch.ones(1, 2, device="meta").long()}), ValueError, "is on meta"),
        (dict(cases=["left"]), ValueError, r"cases names \['left'\]; a case is one of .*'left padding'"),
        (dict(cases=[]), ValueError, "a case is one of"),
        (dict(reference="bert"), TypeError, "reference is a str"),
    ],
)
def test_wrong_arguments(swapped_bert, options, error, message):
    _, model = swapped_bert()
    with pytest.raises(error, match=message):
        fastattn.verify(model, **options)


def test_wrong_models(swapped_bert):
    reference, model = swapped_bert()
    with pytest.raises(ValueError, match="no swapped layer to verify"):
        fastattn.verify(reference)
    with pytest.raises(ValueError, match="reference is the model itself"):
        fastattn.verify(model, model)
    with pytest.raises(ValueError, match="reference is on the meta device"):
        fastattn.verify(model, copy.deepcopy(reference).to("meta"))
    with pytest.raises(TypeError, match="inputs lack 'input', which Linear"):
        fastattn.verify(nn.Linear(2, 2), nn.Linear(2, 2), inputs={})
    with pytest.raises(TypeError, match="model is compiled or scripted"):
        fastattn.verify(torch.jit.script(nn.Linear(2, 2)), nn.Linear(2, 2))


def test_under_no_grad_and_inference_mode_gradients_are_compared_all_the_same(swapped_bert):
    _, model = swapped_bert()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            report = fastattn.verify(model, cases=["gradients"])
        assert any(result.output.startswith("gradient of") for result in report.results)


def test_half_precision_compares_no_gradients_and_says_so(swapped_bert):
    _, model = swapped_bert()
    report = fastattn.verify(model.half(), cases=["right padding", "gradients", "autocast"])
    assert {each.case for each in report.not_applicable} == {"gradients", "autocast"}


def test_a_packed_encoder_refuses_what_it_was_asked_to_refuse(swapped_bert):
    _, model = swapped_bert(padding="packed")
    report = fastattn.verify(model, cases=["right padding", "compile"])
    (refused,) = report.not_applicable
    assert refused.case == "compile" and "cannot pack" in refused.reason


def test_special_tokens_are_where_models_look_for_them():
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16
    )
    batches = adversarial_batches(transformers.BartModel(config))
    for case in ("right padding", "left padding"):
        for prefix in ("", "decoder_"):
            ids, mask = batches[case][f"{prefix}input_ids"], batches[case][f"{prefix}attention_mask"]
            assert (ids[mask == 0] == config.pad_token_id).all() and (ids != config.pad_token_id).equal(
                mask == 1
            )
            assert ((ids == config.eos_token_id).sum(1) == 1).all()
    assert (
        batches["right padding"]["input_ids"].shape[1]
        != batches["right padding"]["decoder_input_ids"].shape[1]
    )


def test_the_command_line(bert_config, tmp_path, capsys):
    import json

    from fastattn.cli import main

    transformers.BertModel(bert_config).save_pretrained(tmp_path)
    assert main(["verify", str(tmp_path), "--case", "left padding", "--case", "static cache", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["verify"]
    assert printed["passed"] and printed["not_applicable"][0]["case"] == "static cache"
    assert main(["verify", str(tmp_path), "--case", "left"]) == 2
    assert "a case is one of" in capsys.readouterr().err
