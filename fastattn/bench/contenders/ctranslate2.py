"""CTranslate2 on the CPU: encoders, decoders and encoder-decoders, by its own converters."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastattn.bench.contenders.quiet import quiet
from fastattn.bench.contenders.requirements import require_cpu, require_packages
from fastattn.bench.contenders.runner import Generated, Runner, Stages
from fastattn.bench.contenders.source import Source
from fastattn.bench.timing import MissingError

__all__ = ["build"]

_COMPUTE_TYPES = {"fp32": "float32", "int8": "int8"}

# What CTranslate2's loaders ask a config for and transformers 5 no longer has: the only values that are left.
_GONE = {"position_embedding_type": "absolute", "normalize_before": False}


def build(source: Source, precision: str, stages: Stages) -> Runner:
    """`TransformersConverter`, and CTranslate2's class for the kind of model, on PyTorch's number of threads.

    Raises:
        MissingError: ctranslate2 is not installed, the benchmark does not run on the CPU, or CTranslate2
            cannot convert the model or compute what it answers.
    """
    require_packages("ctranslate2")
    require_cpu(source, "CTranslate2")
    import ctranslate2

    _require_loader(source)
    with stages("save"), quiet():
        saved = source.saved
    folder = source.folder / f"ctranslate2-{precision}"
    with stages("convert"), quiet():
        quantization = None if precision == "fp32" else precision
        _converter(saved, source.model.config).convert(str(folder), quantization=quantization)
    classes = {"encoder": EncoderModel, "decoder": GeneratorModel, "encoder-decoder": TranslatorModel}
    engines = {"encoder": "Encoder", "decoder": "Generator", "encoder-decoder": "Translator"}
    with stages("load"):
        engine = getattr(ctranslate2, engines[source.kind])(
            str(folder),
            device="cpu",
            compute_type=_COMPUTE_TYPES[precision],
            inter_threads=1,
            intra_threads=torch.get_num_threads(),
        )
    source.resources.callback(engine.unload_model)
    runner: Runner = classes[source.kind](engine, source.model.config)
    return runner


def _require_loader(source: Source) -> None:
    from ctranslate2.converters.transformers import _MODEL_LOADERS

    config, name = source.model.config, type(source.model).__name__
    if type(config).__name__ not in _MODEL_LOADERS:
        raise MissingError(f"converter for {name}: CTranslate2 has none for {type(config).__name__}")
    if source.kind == "classifier" or (source.kind == "encoder" and not name.endswith("Model")):
        raise MissingError(f"head of {name}: CTranslate2's encoders give hidden states alone")


def _converter(saved: Path, config: Any) -> Any:
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        """With numbers for words, and what this transformers no longer has put back."""

        def load_model(self, *args: Any, **kwargs: Any) -> Any:
            model = super().load_model(*args, **kwargs)
            for name, value in _GONE.items():
                if not hasattr(model.config, name):
                    setattr(model.config, name, value)
            return model

        def load_tokenizer(self, *args: Any, **kwargs: Any) -> Any:
            return _tokenizer(config)

    return Converter(str(saved))


def _tokenizer(config: Any) -> Any:
    """A vocabulary of numbered words, with the model's special tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = [f"<{index}>" for index in range(config.vocab_size)]
    padding = _special(config, "pad_token_id")
    if config.model_type == "marian":
        words[padding] = "<pad>"  # By this name its loader finds the word to leave out.
    vocabulary = {word: index for index, word in enumerate(words)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=words[0])),
        pad_token=words[padding],
        bos_token=words[_special(config, "bos_token_id")],
        eos_token=words[_special(config, "eos_token_id")],
        unk_token=words[0],
    )


def _special(config: Any, name: str) -> int:
    """A special token's number; 0 where the model has none, or several."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and 0 <= value < config.vocab_size else 0


class EncoderModel(Runner):
    """CTranslate2's `Encoder`."""

    def __init__(self, engine: Any, config: Any) -> None:
        self._engine = engine

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`last_hidden_state` [batch, sequence, hidden], undefined at padding, and `pooler_output` where the
        model has one, of right-padded sequences.
        """
        types = inputs.get("token_type_ids")
        found = self._engine.forward_batch(
            _view(inputs["input_ids"]),
            _view(inputs["attention_mask"].sum(1)),
            # None are all 0, and save the lists.
            token_type_ids=types.tolist() if types is not None and bool(types.any()) else None,
        )
        outputs = {"last_hidden_state": _tensor(found.last_hidden_state)}
        if found.pooler_output is not None:
            outputs["pooler_output"] = _tensor(found.pooler_output)
        return outputs


class GeneratorModel(Runner):
    """CTranslate2's `Generator`."""

    def __init__(self, engine: Any, config: Any) -> None:
        self._engine = engine

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The `logits` [batch, 1, vocabulary] after left-padded prompts."""
        # Decoding one token computes no logits but the last position's, which `forward_batch` does.
        found = self._generate(_real(inputs), 1, return_logits_vocab=True)
        return {"logits": torch.stack([_tensor(each.logits[0][-1]).view(1, -1) for each in found])}

    def generate(self, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> Generated:
        prompts = _real(inputs)
        stamps = Stamps(len(prompts))
        found = self._generate(prompts, new_tokens, stamps)
        return Generated(torch.tensor([each.sequences_ids[0] for each in found]), stamps.times_ms(new_tokens))

    def logits(self, inputs: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        before = tokens[:, :-1].tolist()
        prompts = _real(inputs)
        whole = [[*prompt, *more] for prompt, more in zip(prompts, before, strict=True)]
        # [batch, longest, vocabulary], undefined past the end of a sequence.
        logits = _tensor(self._engine.forward_batch(whole))
        return torch.stack(
            [row[len(prompt) - 1 :][: tokens.shape[1]] for row, prompt in zip(logits, prompts, strict=True)]
        )

    def _generate(
        self, prompts: list[list[int]], new_tokens: int, stamps: Stamps | None = None, **options: Any
    ) -> list[Any]:
        """Exactly `new_tokens` tokens after each prompt, greedily, none of them an end."""
        lengths = [len(prompt) for prompt in prompts]
        # Of a batch it forwards as many tokens as the shortest prompt has at once, the rest of longer ones in
        # the decoding loop: past some difference one sequence after another takes fewer steps.
        together = max(lengths) - min(lengths) + new_tokens <= len(prompts) * new_tokens
        found: list[Any] = []
        for batch in [prompts] if together else [[prompt] for prompt in prompts]:
            found += self._engine.generate_batch(
                _words(batch),
                max_length=new_tokens,
                min_length=new_tokens,
                sampling_topk=1,
                include_prompt_in_result=False,
                end_token=[],
                callback=None if stamps is None else stamps.callback(len(found)),
                **options,
            )
        return found


class TranslatorModel(Runner):
    """CTranslate2's `Translator`."""

    def __init__(self, engine: Any, config: Any) -> None:
        self._engine, self._padding, self._vocabulary = engine, config.pad_token_id, config.vocab_size

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        raise MissingError("encoder's output: CTranslate2's Translator gives translations alone")

    def generate(self, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> Generated:
        stamps = Stamps(len(inputs["input_ids"]))
        found = self._translate(inputs, new_tokens, callback=stamps.callback(0))
        tokens = torch.tensor([[self._number(word) for word in each.hypotheses[0]] for each in found])
        return Generated(tokens, stamps.times_ms(new_tokens))

    def logits(self, inputs: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        # Every step of a translation that must begin with these tokens.
        found = self._translate(
            inputs,
            tokens.shape[1],
            target_prefix=_words(tokens[:, :-1].tolist()),
            return_logits_vocab=True,
        )
        logits = torch.stack(
            [torch.stack([_tensor(step).view(-1) for step in each.logits[0]]) for each in found]
        )
        if logits.shape[-1] == self._vocabulary - 1:
            # Marian's conversion leaves the padding out: it gets the mean, neither likely nor unlikely.
            mean = logits.mean(-1, keepdim=True)
            logits = torch.cat((logits[..., : self._padding], mean, logits[..., self._padding :]), -1)
        return logits

    def _translate(self, inputs: Mapping[str, torch.Tensor], new_tokens: int, **options: Any) -> Any:
        return self._engine.translate_batch(
            _words(_real(inputs)),
            beam_size=1,
            max_decoding_length=new_tokens,
            min_decoding_length=new_tokens,
            max_input_length=0,
            end_token=[],
            **options,
        )

    def _number(self, word: str) -> int:
        return self._padding if word == "<pad>" else int(word[1:-1])


class Stamps:
    """When each token was there, from the moment this is made."""

    def __init__(self, batch: int) -> None:
        self._begin = time.perf_counter()
        self._ms: list[list[float]] = [[] for _ in range(batch)]

    def callback(self, start: int) -> Any:
        """What CTranslate2 calls with each token of a batch whose first sequence is number `start`."""

        def note(step: Any) -> bool:
            self._ms[start + step.batch_id].append((time.perf_counter() - self._begin) * 1e3)
            return False

        return note

    def times_ms(self, new_tokens: int) -> tuple[float, ...]:
        """Of each token, when the last of the sequences had it."""
        return tuple(max(times[index] for times in self._ms) for index in range(new_tokens))


def _real(inputs: Mapping[str, torch.Tensor]) -> list[list[int]]:
    """The tokens of each sequence without padding, on whichever side that is."""
    pairs = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


def _words(sequences: Iterable[Iterable[int]]) -> list[list[str]]:
    return [[f"<{number}>" for number in sequence] for sequence in sequences]


def _view(tensor: torch.Tensor) -> Any:
    import ctranslate2

    return ctranslate2.StorageView.from_array(tensor.int().numpy())


def _tensor(view: Any) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.array(view))
