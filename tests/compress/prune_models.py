"""Small models for the tests of pruning, and whether one was touched."""

from __future__ import annotations

import torch
import transformers

__all__ = ["SMALL", "assert_untouched", "batches", "bert", "llama", "state", "t5"]

SMALL = dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24)


def bert(head="BertModel", **options):
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**SMALL, **options})
    return getattr(transformers, head)(config).eval()


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{**SMALL, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2, **options}
    )
    return transformers.LlamaForCausalLM(config).eval()


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def batches(model, count=2):
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(1, 50, (3, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 6:] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if model.config.is_encoder_decoder:
            batch["labels"] = ids
        found.append(batch)
    return found


def state(model):
    config = model.config.to_dict() if hasattr(model, "config") else {}
    return {name: (id(x), x.clone()) for name, x in model.state_dict(keep_vars=True).items()}, config


def assert_untouched(model, before):
    values, config = before
    now = model.state_dict(keep_vars=True)
    assert now.keys() == values.keys()
    assert all(id(now[name]) == key and torch.equal(now[name], x) for name, (key, x) in values.items())
    assert not hasattr(model, "config") or model.config.to_dict() == config
