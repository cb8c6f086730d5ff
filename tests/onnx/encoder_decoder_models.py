"""Small encoder-decoders of every family, and their exported graphs run by hand in plain ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

VOCABULARY, PAD = 97, 0

_TOKENS = dict(vocab_size=VOCABULARY, pad_token_id=PAD, bos_token_id=1, eos_token_id=2)
_T5 = dict(
    **_TOKENS,
    d_model=40,
    # Heads wider than the model, of a size that ONNX Runtime's kernels take.
    d_kv=16,
    d_ff=56,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
    decoder_start_token_id=PAD,
)
# Tracing takes the time it takes: a second layer only where T5 and BART stand for the others.
_T5_ONE_LAYER = dict(num_layers=1, num_decoder_layers=1)
_BART = dict(
    **_TOKENS,
    d_model=48,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=3,
    encoder_ffn_dim=72,
    decoder_ffn_dim=56,
    max_position_embeddings=64,
    decoder_start_token_id=2,
    forced_eos_token_id=None,
)
_SPEECH = dict(
    **_BART,
    max_target_positions=64,
    max_source_positions=12,
    num_mel_bins=8,
    suppress_tokens=None,
    begin_suppress_tokens=None,
)

# Name -> configuration class, its options, model class.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "T5": ("T5Config", _T5, "T5ForConditionalGeneration"),
    "T5 v1.1": (
        "T5Config",
        # A head size that ONNX Runtime's kernel for caches does not take.
        {**_T5, **_T5_ONE_LAYER, "d_kv": 20, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "T5ForConditionalGeneration",
    ),
    "BART": (
        "BartConfig",
        {**_BART, "encoder_layers": 2, "decoder_layers": 2},
        "BartForConditionalGeneration",
    ),
    "mBART": ("MBartConfig", {**_BART, "scale_embedding": True}, "MBartForConditionalGeneration"),
    "Marian": (
        "MarianConfig",
        {**_BART, "decoder_start_token_id": PAD, "activation_function": "swish"},
        "MarianMTModel",
    ),
    "Pegasus": (
        "PegasusConfig",
        {**_BART, "decoder_start_token_id": PAD, "activation_function": "relu"},
        "PegasusForConditionalGeneration",
    ),
    "Whisper": ("WhisperConfig", _SPEECH, "WhisperForConditionalGeneration"),
}


def layers_of(model: Any) -> int:
    """The decoder's."""
    layers: int = getattr(model.config, "num_decoder_layers", None) or model.config.decoder_layers
    return layers


def new_model(name: str, model_class: str | None = None) -> Any:
    """The untouched model in eval mode, weights wide enough that masks and positions show in the outputs."""
    import transformers

    config_class, options, own_class = FAMILIES[name]
    config = getattr(transformers, config_class)(**options)
    torch.manual_seed(0)
    model = getattr(transformers, model_class or own_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * (0.15 if "T5" in name else 0.3)
            # Norm weights keep their ones, and no bias stays zero.
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return model


def sources(model: Any, kind: str) -> dict[str, Tensor]:
    """What is to be encoded: padded "right" or "left", with "holes", "none", "one" row; Whisper's sound."""
    generator = torch.Generator().manual_seed(1)
    lengths = {"none": [9, 9], "one": [7]}.get(kind, [11, 4, 1])
    rows, width = len(lengths), max(lengths)
    if model.config.model_type == "whisper":
        shape = (rows, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        return {"input_features": torch.randn(shape, generator=generator)}
    position, length = torch.arange(width), torch.tensor(lengths)[:, None]
    mask = position >= width - length if kind == "left" else position < length
    if kind == "holes":
        mask = torch.rand(rows, width, generator=generator) > 0.4
        mask[:, 5] = True
    ids = torch.randint(4, VOCABULARY, mask.shape, generator=generator)
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}


class Session:
    """A graph in plain ONNX Runtime.

    Attributes:
        onnx: the session.
        outputs: names of the outputs, in order.
    """

    def __init__(self, file: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        # It warns that logits_to_keep may be overridden, which is what it is for.
        options.log_severity_level = 3
        self.onnx = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.outputs = [value.name for value in self.onnx.get_outputs()]

    def run(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The outputs, given torch or numpy inputs."""
        feeds = {name: x.numpy() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        found = self.onnx.run(self.outputs, feeds)
        return dict(zip(self.outputs, map(torch.from_numpy, found), strict=True))


class Graphs:
    """The two graphs of an exported folder in plain ONNX Runtime, fed as other loaders feed them."""

    def __init__(self, folder: Path) -> None:
        self.encoder, self.decoder = (
            Session(folder / f"{name}.onnx") for name in ("encoder_model", "decoder_model_merged")
        )

    def encode(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.encoder.run(inputs)["last_hidden_state"]

    def first(self, states: Tensor, mask: Tensor | None, dummy_length: int = 0) -> dict[str, Any]:
        """The inputs of the first step but for the tokens, with dummies for the caches."""
        feeds: dict[str, Any] = {"encoder_hidden_states": states, "use_cache_branch": np.array([False])}
        if mask is not None:
            feeds["encoder_attention_mask"] = mask
        for value in self.decoder.onnx.get_inputs():
            if value.name.startswith("past_key_values"):
                length = dummy_length if ".encoder." in value.name else 0
                feeds[value.name] = torch.full((len(states), value.shape[1], length, value.shape[3]), 7.0)
        return feeds

    def step(self, feeds: dict[str, Any], tokens: Tensor, **more: Any) -> tuple[Tensor, dict[str, Any]]:
        """The logits, and the inputs of the next step but for its tokens."""
        found = self.decoder.run({**feeds, "input_ids": tokens, **more})
        logits = found.pop("logits")
        caches = {name.replace("present", "past_key_values"): x for name, x in found.items()}
        return logits, {**feeds, **caches, "use_cache_branch": np.array([True])}

    def greedy(self, inputs: dict[str, Tensor], start: int, count: int) -> tuple[Tensor, Tensor]:
        """`count` tokens after the first, and the logits they were chosen by."""
        feeds = self.first(self.encode(inputs), inputs.get("attention_mask"))
        rows = len(next(iter(inputs.values())))
        tokens, chosen_by = torch.full((rows, 1), start), []
        for _ in range(count):
            logits, feeds = self.step(feeds, tokens[:, -1:].contiguous())
            chosen_by.append(logits[:, -1])
            tokens = torch.cat((tokens, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
        return tokens, torch.stack(chosen_by, dim=1)
