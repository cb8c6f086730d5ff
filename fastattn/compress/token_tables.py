"""What of a model is counted by token: tables of embeddings, output heads, and the ids its configs name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastattn.compress.configs import is_config

__all__ = ["TokenTables", "find_tables", "named_ids", "rename_ids"]

# Attributes that hold ids of tokens: pad_token_id, image_token_index, padding_idx ...
_ID = re.compile(r"_?(\w+_)?token_(id|ids|index)|padding_idx|pad_index")
# Lists of ids, of lists of ids, and of pairs of a position and an id, in a generation config.
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
_PAIRS = ("forced_decoder_ids",)
_NAMED = ("lang_to_id", "task_to_id")


@dataclass(frozen=True)
class TokenTables:
    """The tensors of a model that have one row, or one number, a token.

    Attributes:
        rows: how many tokens there are.
        entries: name -> (the module, its tensor's name); several may hold one tied parameter.
    """

    rows: int
    entries: Mapping[str, tuple[nn.Module, str]]

    @property
    def tensors(self) -> list[Tensor]:
        """Each once, however many modules share it."""
        tensors = [getattr(module, name) for module, name in self.entries.values()]
        return list({id(tensor): tensor for tensor in tensors}.values())

    def keep(self, kept: Tensor) -> None:
        """Leave the tokens `kept` [new rows] alone, in that order. Parameters stay the same objects."""
        new: dict[int, Tensor] = {}
        for tensor in self.tensors:
            dim = 0 if tensor.shape[0] == self.rows else tensor.ndim - 1
            new[id(tensor)] = tensor.data.index_select(dim, kept.to(tensor.device))
        for module, name in self.entries.values():
            tensor = getattr(module, name)
            if isinstance(tensor, nn.Parameter):
                tensor.data = new[id(tensor)]
                tensor.grad = None
            else:
                setattr(module, name, new[id(tensor)])
            for count in ("num_embeddings", "out_features"):
                if hasattr(module, count):
                    setattr(module, count, len(kept))


def find_tables(model: nn.Module, highest_id: int) -> TokenTables:
    """The tables of `model`: what its `get_input_embeddings` and `get_output_embeddings` say, else the
    embedding that has a row for every id up to `highest_id`, and the linear layer with as many outputs.

    Raises:
        ValueError: there is none, it has too few rows, or which one it is cannot be told.
    """
    found: dict[str, tuple[nn.Module, str]] = {}
    names = {module: name for name, module in model.named_modules()}
    inputs = {module for module in _given(model, "get_input_embeddings") if hasattr(module, "num_embeddings")}
    embeddings = inputs or _plain_embeddings(model, highest_id)
    sizes = {_outputs(module) for module in embeddings}
    if len(sizes) > 1:
        raise ValueError(
            f"the model has tables of {sorted(sizes)} tokens; one vocabulary can be trimmed, not two"
        )
    (rows,) = sizes
    if rows <= highest_id:
        raise ValueError(
            f"the tokenizer has ids up to {highest_id} and the model {rows} rows of embeddings; they are not "
            "of one another, or the model was not resized when tokens were added"
        )
    heads = [module for module in _given(model, "get_output_embeddings") if _outputs(module) == rows]
    if not inputs:
        heads = _plain_heads(model, rows, embeddings)
    for module in (*embeddings, *heads):
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            raise ValueError(
                f"{names[module]!r} ({type(module).__name__}) holds no plain weight; trim the vocabulary "
                "before it is quantized, parametrized or given adapters"
            )
        if _outputs(module) == rows:
            found[f"{names[module]}.weight"] = (module, "weight")
    shared = {id(module._parameters[name]) for module, name in found.values()}
    shared |= {id(module.bias) for module in heads if getattr(module, "bias", None) is not None}
    for name, module in model.named_modules():
        for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
            for own, tensor in tensors.items():
                if tensor is None:
                    continue
                # A bias that a head adds itself, such as BART's final_logits_bias: not a norm's or another
                # linear layer's, which have weights of their own.
                alone = getattr(module, "weight", None) is None or id(module.weight) in shared
                added = "bias" in own and tensor.numel() == rows == tensor.shape[-1] and alone
                if (id(tensor) in shared and kind == "parameter") or added:
                    found[f"{name}.{own}".lstrip(".")] = (module, own)
    known = {module for module, _ in found.values()}
    for name, module in model.named_modules():
        other = isinstance(module, nn.Embedding) and module.num_embeddings == rows and module not in known
        if other and "position" not in name:
            raise ValueError(
                f"{name!r} is a table of {rows} rows, too, and the model does not say what it is"
            )
    return TokenTables(rows, found)


def _given(model: nn.Module, method: str) -> list[nn.Module]:
    """What a method of the model, and of the models inside it, gives."""
    found = []
    for module in model.modules():
        try:
            given = getattr(module, method)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(given, nn.Module):
            found.append(given)
    return found


def _outputs(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.ndim == 2 else 0


def _plain_embeddings(model: nn.Module, highest_id: int) -> set[nn.Module]:
    tables = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and "pos" not in name.lower()
    ]
    fitting = [module.num_embeddings for _, module in tables if module.num_embeddings > highest_id]
    if not fitting:
        held = (
            ", ".join(f"{name} [{module.num_embeddings} rows]" for name, module in tables) or "no embedding"
        )
        raise ValueError(f"the tokenizer has ids up to {highest_id}, and {type(model).__name__} holds {held}")
    return {module for _, module in tables if module.num_embeddings == min(fitting)}


def _plain_heads(model: nn.Module, rows: int, embeddings: set[nn.Module]) -> list[nn.Module]:
    tied = {id(module.weight) for module in embeddings}
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == rows
    }
    heads = [module for module in linears.values() if id(module.weight) in tied]
    if not heads and len(linears) > 1:
        raise ValueError(
            f"{', '.join(linears)} all have {rows} outputs, as many as there are tokens; which is the output "
            "head cannot be told"
        )
    return list(heads or linears.values())


def named_ids(model: nn.Module, rows: int) -> set[int]:
    """Ids that the model's configs and modules name, and those that cannot move: RoBERTa and its like count
    positions from the padding's id, so all up to it stay.
    """
    found: set[int] = set()
    for holder in _holders(model, rows):
        for name, value in vars(holder).items():
            if _ID.fullmatch(name):
                found.update(index for index in _flat(value) if 0 <= index < rows)
            elif name in _NAMED and isinstance(value, dict):
                found.update(value.values())
            elif name in _PAIRS:
                found.update(index for _, index in value or () if index is not None)
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if "position" in name and isinstance(padding, int):
            found.update(range(padding + 1))
    return found


def rename_ids(model: nn.Module, rows: int, ids: Mapping[int, int]) -> None:
    """Write the new ids, and the new number of them, wherever the old ones were."""
    for holder in list(_holders(model, rows)):
        for name, value in list(vars(holder).items()):
            new = _renamed(name, value, rows, ids)
            if new is not value:
                setattr(holder, name, new)


def _renamed(name: str, value: Any, rows: int, ids: Mapping[int, int]) -> Any:
    if value is None:
        return value
    if name in ("vocab_size", "decoder_vocab_size"):
        return len(ids) if value == rows else value
    if name in _PAIRS:
        return [[place, index if index is None else ids[index]] for place, index in value]
    if name in _NAMED and isinstance(value, dict):
        return {key: ids[index] for key, index in value.items()}
    if name in _LISTS or _ID.fullmatch(name):
        return _mapped(value, lambda index: index if not 0 <= index < rows else ids.get(index))
    return value


def _mapped(value: Any, new_id: Callable[[int], int | None]) -> Any:
    """Ids, or lists of them, renamed; a sequence of ids that lost one cannot occur any more and goes."""
    if isinstance(value, bool) or not isinstance(value, int | list | tuple):
        return value
    if isinstance(value, int):
        return new_id(value)
    if value and all(isinstance(one, list | tuple) for one in value):
        inner = [_mapped(one, new_id) for one in value]
        return [new for new, old in zip(inner, value, strict=True) if len(new) == len(old)]
    return type(value)(new for one in value if (new := _mapped(one, new_id)) is not None)


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _flat(one)


def _holders(model: nn.Module, rows: int) -> Iterator[Any]:
    """What may hold ids of this vocabulary: modules and configs, but no table or config of something else."""
    seen: set[int] = set()
    for module in model.modules():
        if not isinstance(module, nn.Embedding) or module.num_embeddings == rows:
            yield module
        waiting = [value for value in module.__dict__.values() if is_config(value)]
        while waiting:
            config = waiting.pop()
            if id(config) in seen:
                continue
            seen.add(id(config))
            waiting += [value for value in vars(config).values() if is_config(value)]
            if getattr(config, "vocab_size", rows) in (rows, None):
                yield config
