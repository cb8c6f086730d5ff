"""Exported encoder-decoders: the encoder's graph, run once, and the decoder's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from fastattn.onnx.runtime.cross_cache import CrossCache
from fastattn.onnx.runtime.decoder_cache import DecoderCache, DecoderGraph
from fastattn.onnx.runtime.generation import OnnxGenerationModel, generation_config_of
from fastattn.onnx.runtime.graph_session import GraphSession

__all__ = ["ExportedEncoder", "OnnxEncoderDecoder"]

Array = np.ndarray[Any, Any]


class ExportedEncoder:
    """The encoder of an exported encoder-decoder.

    Attributes:
        main_input_name: input_ids, or input_features of speech.
    """

    def __init__(self, graph: GraphSession, device: torch.device) -> None:
        self.graph, self.device = graph, device
        self.main_input_name = graph.input_names[0]
        # Whisper's generate computes from its two convolutions' strides how many frames a token covers.
        self.conv1, self.conv2 = SimpleNamespace(stride=(1,)), SimpleNamespace(stride=(2,))

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        input_features: Any = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """The encoder's last hidden state, a torch tensor [batch, sequence, hidden].

        Raises:
            TypeError, ValueError: an input that the graph does not have or cannot take, or an output it does
            not have.
        """
        for name, value in (
            ("output_attentions", output_attentions),
            ("output_hidden_states", output_hidden_states),
        ):
            if value:
                raise ValueError(f"{name}=True, but the export has no such output; ask the original model")
        given = {"input_ids": input_ids, "input_features": input_features, "attention_mask": attention_mask}
        # Speech has a mask of its frames, which the original's encoder ignores as well.
        taken = {
            name: value
            for name, value in given.items()
            if value is not None and (name in self.graph.input_names or name != "attention_mask")
        }
        (states,) = self.graph.run(taken).values()
        return BaseModelOutput(last_hidden_state=torch.from_numpy(states).to(self.device))


class OnnxEncoderDecoder(OnnxGenerationModel):
    """An exported encoder-decoder that generates."""

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        provider: str | None = None,
        session_options: Any = None,
    ) -> None:
        super().__init__(folder, manifest, provider, session_options)
        if len(self.graphs) != 2:
            raise ValueError(
                f"{folder} has {len(self.graphs)} graphs, not encoder and decoder; export it again"
            )
        encoder, decoder = self.graphs.values()
        self.encoder = ExportedEncoder(encoder, self.device)
        self.model = self  # Whisper's generate asks for model.encoder.
        # Without a mask of its own the decoder knows how much is filled by the length of the past alone.
        fused = [*manifest["graphs"].values()][1].get("fusions", {}).get("cached_attention", 0)
        self.decoder_graph = DecoderGraph(decoder, False, fused > 0, self.device)
        self.generation_config = generation_config_of(folder, self.config)

    def get_encoder(self) -> ExportedEncoder:
        return self.encoder

    def new_cache(self, capacity: int) -> DecoderCache:
        return CrossCache(self.decoder_graph, capacity)

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        input_features: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of every decoder position, or of the last ones.

        Args:
            input_ids, input_features: of the encoder, torch or numpy; not needed beside encoder_outputs.
            attention_mask: integers [batch, encoder sequence], 0 = padding; default all ones.
            decoder_input_ids: integers [batch, sequence]: all, or those that follow past_key_values.
            decoder_attention_mask: ones; the export has no padding in the decoder's prompt.
            encoder_outputs: what `get_encoder()` returned.
            past_key_values: what an earlier call returned; it is extended in place.
            use_cache: whether to return the cache; default as the config says.
            logits_to_keep: logits of the last so many positions; 0 for all.
            return_dict: False for a tuple.

        Returns:
            The original's output class with `logits`, `past_key_values` and `encoder_last_hidden_state`.

        Raises:
            TypeError, ValueError: an argument that the export does not have or cannot take.
        """
        taken = (
            self.main_input_name,
            "attention_mask",
            "decoder_input_ids",
            "encoder_outputs",
            "past_key_values",
        )
        self._only_inputs(kwargs, taken)
        if decoder_input_ids is None:
            raise TypeError(f"decoder_input_ids is missing; the model takes {', '.join(taken)}")
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, input_features=input_features, attention_mask=attention_mask
            )
        cache = self._own_cache(past_key_values, 0)
        ids = self._decoder_ids(decoder_input_ids, decoder_attention_mask)
        logits = cache.run(
            {"input_ids": ids, **self._encoded(encoder_outputs, attention_mask)}, logits_to_keep
        )
        cached = self.config.use_cache if use_cache is None else use_cache
        results = {
            "logits": logits,
            "encoder_last_hidden_state": _hidden_states(encoder_outputs),
            **({"past_key_values": cache} if cached else {}),
        }
        return self._answer(
            results, decoder_input_ids, self.config.return_dict if return_dict is None else return_dict
        )

    def _decoder_ids(self, ids: Any, mask: Any) -> Array:
        if mask is not None and not bool((mask != 0).all()):
            raise ValueError(
                "decoder_attention_mask has zeros, but the export has no padding in the decoder's prompt; "
                "give rows of one length"
            )
        return self.decoder_graph.graph.checked("input_ids", ids)

    def _encoded(self, encoder_outputs: Any, attention_mask: Any) -> dict[str, Array]:
        """The decoder graph's inputs that stay the same."""
        checked = self.decoder_graph.graph.checked
        states = checked("encoder_hidden_states", _hidden_states(encoder_outputs))
        if "encoder_attention_mask" not in self.decoder_graph.takes:
            return {"encoder_hidden_states": states}
        mask = np.ones(states.shape[:2], np.int64)
        if attention_mask is not None:
            mask = checked("encoder_attention_mask", attention_mask)
        if mask.shape != states.shape[:2]:
            raise ValueError(
                f"attention_mask must be [batch, encoder sequence], {list(states.shape[:2])}; got "
                f"{list(mask.shape)}"
            )
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def _steps(
        self, input_ids: Tensor, cache: DecoderCache, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> tuple[Callable[[], Array], Callable[[Array], Array]]:
        own = ("encoder_outputs", "past_key_values", "decoder_attention_mask", "logits_to_keep")
        self._only_inputs(
            {name: value for name, value in model_kwargs.items() if name not in own}, ("attention_mask",)
        )
        ids = self._decoder_ids(input_ids, model_kwargs.get("decoder_attention_mask"))[
            :, cache.get_seq_length() :
        ]
        if ids.shape[1] == 0:
            raise ValueError(
                f"the decoder's prompt has {input_ids.shape[1]} tokens and past_key_values holds "
                f"{cache.get_seq_length()}: none is new"
            )
        fixed = self._encoded(model_kwargs["encoder_outputs"], model_kwargs.get("attention_mask"))

        def prefill() -> Array:
            return cache.run({"input_ids": np.ascontiguousarray(ids), **fixed}, keep=1, reuse=True)[:, -1]

        def step(tokens: Array) -> Array:
            return cache.run({"input_ids": tokens}, keep=1, reuse=True)[:, -1]

        return prefill, step


def _hidden_states(encoder_outputs: Any) -> Any:
    return encoder_outputs[0]
