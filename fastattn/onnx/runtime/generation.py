"""`generate` of exported models: transformers' own, with the decoding loop and the caches of this package."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from fastattn.onnx.runtime.decode_loop import Decoded, decode
from fastattn.onnx.runtime.decoder_cache import DecoderCache
from fastattn.onnx.runtime.pretrained import OnnxPretrainedModel

__all__ = ["OnnxGenerationModel"]

Array = np.ndarray[Any, Any]


class OnnxGenerationModel(OnnxPretrainedModel):
    """A model with a cache and transformers' `generate`: configurations, processors, criteria, streamers,
    beams.

    Greedy decoding and sampling run in a loop of their own on preallocated buffers; every other way to
    generate runs transformers' code over `forward`.
    """

    generates = True

    def can_generate(self) -> bool:
        return True

    @abstractmethod
    def new_cache(self, capacity: int) -> DecoderCache:
        """An empty cache that expects so many positions."""

    # The three methods below are where transformers' GenerationMixin.generate asks the model; were one of
    # them renamed, generate would take its own loop, over `forward`, and answer the same more slowly.

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}; an export has one "
                "cache of its own: leave it out"
            )
        if generation_config.use_cache is False:
            return
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.new_cache(generation_config.max_length)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy decoding and sampling."""
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(generation_config, name):
                raise ValueError(
                    f"{name}=True, but the export has no such output; ask the original {self.architecture}"
                )
        for name in ("tokenizer", "assistant_tokenizer"):
            model_kwargs.pop(name, None)  # Of stop strings, which are stopping criteria by now.
        device = input_ids.device
        cache = self._own_cache(model_kwargs.get("past_key_values"), generation_config.max_length)
        prefill, step = self._steps(input_ids.cpu(), cache, generation_config, model_kwargs)
        pad = generation_config._pad_token_tensor
        wanted = generation_config.return_dict_in_generate
        decoded = decode(
            input_ids.cpu(),
            prefill,
            step,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            do_sample=generation_config.do_sample,
            pad_token_id=None if pad is None else pad.cpu(),
            keep_scores=bool(wanted and generation_config.output_scores),
            keep_logits=bool(wanted and generation_config.output_logits),
            streamer=streamer,
        )
        decoded.sequences = decoded.sequences.to(device)
        return self._generated(decoded, cache, generation_config) if wanted else decoded.sequences

    @abstractmethod
    def _steps(
        self, input_ids: Tensor, cache: DecoderCache, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> tuple[Callable[[], Array], Callable[[Array], Array]]:
        """What `decode` calls for the logits of the prompt and of every next token."""

    def _generated(self, decoded: Decoded, cache: DecoderCache, generation_config: Any) -> Any:
        encoder_decoder = self.config.is_encoder_decoder
        made: Any = GenerateEncoderDecoderOutput if encoder_decoder else GenerateDecoderOnlyOutput
        return made(
            sequences=decoded.sequences,
            scores=tuple(decoded.scores) if generation_config.output_scores else None,
            logits=tuple(decoded.logits) if generation_config.output_logits else None,
            past_key_values=cache if generation_config.use_cache else None,
        )

    def _own_cache(self, given: Any, capacity: int) -> DecoderCache:
        """`given`, or a new cache where there is none yet.

        Raises:
            TypeError: another kind of cache, that is not empty.
        """
        if isinstance(given, DecoderCache):
            if given.decoder.session is not self.session:
                raise ValueError("past_key_values is the cache of another model")
            return given
        if given is None or (hasattr(given, "get_seq_length") and given.get_seq_length() == 0):
            return self.new_cache(capacity)
        raise TypeError(
            f"past_key_values is a {type(given).__name__}; it must be what this model returned as such"
        )


def generation_config_of(folder: Path, config: Any) -> Any:
    """What is saved beside the model, or made of its config.

    Raises:
        ValueError: the file cannot be read.
    """
    if not (folder / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{folder / 'generation_config.json'} cannot be read ({error}); export the model again"
        ) from error


def as_int64(value: Tensor | Array) -> Array:
    """A contiguous array."""
    array = value.cpu().numpy() if isinstance(value, torch.Tensor) else value
    return np.ascontiguousarray(array, np.int64)
