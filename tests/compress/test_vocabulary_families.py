"""Every family's tables, heads, biases and ids lose the same rows, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from fastattn.compress.vocabulary import trim_vocabulary

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.model

TEXT = "w7 w3 w21 w9 w30 w7"
SMALL = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
SEQ2SEQ = dict(
    vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
)  # fmt: skip
IDS = dict(bos_token_id=0, pad_token_id=1, eos_token_id=2)
START = dict(decoder_start_token_id=2)

# The model's class -> its config's options; the config's class is the one the model names.
CASES = {
    "BertForPreTraining": dict(**SMALL, pad_token_id=1),
    "DistilBertForMaskedLM": dict(
        vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=32, pad_token_id=1
    ),
    "RobertaForMaskedLM": dict(**SMALL, **IDS, max_position_embeddings=30),
    "MPNetForMaskedLM": dict(**SMALL, **IDS, max_position_embeddings=30),
    "ElectraForMaskedLM": dict(**SMALL, embedding_size=12, pad_token_id=1),
    "AlbertForMaskedLM": dict(**SMALL, embedding_size=12, pad_token_id=1),
    "DebertaV2ForMaskedLM": dict(**SMALL, pad_token_id=1, legacy=False),
    "ModernBertForMaskedLM": dict(**SMALL, **IDS, cls_token_id=0, sep_token_id=2),
    "CLIPTextModel": dict(**SMALL, **IDS),
    "BartForConditionalGeneration": dict(**SEQ2SEQ, **IDS, **START, forced_eos_token_id=2),
    "MarianMTModel": dict(**SEQ2SEQ, pad_token_id=39, eos_token_id=2, decoder_start_token_id=39),
    "M2M100ForConditionalGeneration": dict(**SEQ2SEQ, **IDS, **START),
    "T5ForConditionalGeneration": dict(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    ),
    "WhisperForConditionalGeneration": dict(
        **SEQ2SEQ, **IDS, **START, num_mel_bins=8, max_source_positions=8, max_target_positions=16,
    ),
    "GPT2LMHeadModel": dict(vocab_size=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=2),
    "LlamaForCausalLM": dict(**SMALL, **IDS),
    "GPTJForCausalLM": dict(vocab_size=40, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, **IDS),
    "OPTForCausalLM": dict(
        vocab_size=40, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=16, **IDS,
    ),
    "FalconForCausalLM": dict(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **IDS
    ),
}  # fmt: skip


def tokenizer() -> Tokenizer:
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(36))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<pad>", "</s>"])
    return made


def outputs(model, using: Tokenizer):
    """All hidden states of the text, an end and a padding, and the logits of the tokens `using` has."""
    names = [*using.encode(TEXT).tokens, "</s>", "<pad>"]
    ids = torch.tensor([[using.token_to_id(name) for name in names]])
    batch = {"input_ids": ids, "attention_mask": (torch.arange(len(names)) < len(names) - 1).long()[None]}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    if "Whisper" in type(model).__name__:
        batch = {"input_features": torch.ones(1, 8, 16), "decoder_input_ids": ids}
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    states = [*(out.get("hidden_states") or ()), *(out.get("decoder_hidden_states") or ())]
    states += [out[name] for name in ("pooler_output",) if out.get(name) is not None]
    logits = next((out[name] for name in ("logits", "prediction_logits") if out.get(name) is not None), None)
    return states, logits


@pytest.mark.parametrize("name", CASES)
def test_a_family_loses_rows_and_nothing_else(name, tmp_path):
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**CASES[name])).eval()
    using, before = tokenizer(), copy.deepcopy(model)
    states, logits = outputs(model, using)
    trimmed, report = trim_vocabulary(model, using, [TEXT])
    new_states, new_logits = outputs(model, trimmed)
    assert states and all(torch.equal(a, b) for a, b in zip(states, new_states, strict=True))
    kept = {using.token_to_id(word): index for word, index in trimmed.get_vocab().items()}
    if logits is not None:
        assert new_logits.shape[-1] == report.tokens_after < 12
        old, new = map(list, zip(*sorted(kept.items()), strict=True))
        torch.testing.assert_close(new_logits[..., new], logits[..., old])
    assert not [n for n, tensor in model.state_dict().items() if report.tokens_before in tensor.shape]
    for holder in ("config", "generation_config"):
        config, old_config = getattr(model, holder, None), getattr(before, holder, None)
        for field in ("pad_token_id", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id"):
            if isinstance(index := getattr(old_config, field, None), int):
                assert getattr(config, field) == kept[index], field
    if name == "DebertaV2ForMaskedLM" and transformers.__version__ < "5.2":
        # 5.17 cannot load this head, trimmed or not: it ties a weight that the head does not have.
        return
    model.save_pretrained(tmp_path)
    again_states, _ = outputs(kind.from_pretrained(tmp_path).eval(), trimmed)
    assert all(torch.equal(a, b) for a, b in zip(states, again_states, strict=True))
