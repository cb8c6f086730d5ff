"""Small BERTs whose every parameter counts, and one export shared by the tests that only run it."""

from __future__ import annotations

import pytest
import torch

LAYERS = 2


@pytest.fixture(autouse=True, scope="module")
def _brief_speed(brief_speed) -> None:
    """In every test of this folder."""


def small_config(**changes):
    import transformers

    arguments = {
        "vocab_size": 400,
        "hidden_size": 60,
        "num_attention_heads": 3,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 144,
        "max_position_embeddings": 64,
    }
    return transformers.BertConfig(**{**arguments, **changes})


@pytest.fixture(scope="session")
def new_bert():
    """Makes `new_bert(class_name="BertModel", **config)` in training mode, with no bias left at zero."""

    def make(class_name="BertModel", **changes):
        import transformers

        torch.manual_seed(0)
        model = getattr(transformers, class_name)(small_config(**changes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model

    return make


@pytest.fixture(scope="session")
def exported(new_bert, tmp_path_factory):
    """An untouched BertModel in eval mode and the folder it was exported to."""
    import fastattn

    model = new_bert()
    folder = tmp_path_factory.mktemp("exported") / "bert"
    fastattn.export(model, folder, verify=False)
    return model.eval(), folder


@pytest.fixture(scope="session")
def exported_model(exported):
    import fastattn

    return fastattn.load(exported[1])
