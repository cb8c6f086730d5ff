"""Batches a model is run on before it is compressed, and what its linear layers are given by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.compress.input_records import RECORDS, InputRecord
from fastattn.layers import MultiheadAttention

__all__ = ["Batch", "Calibration"]

Batch = Mapping[str, Any] | tuple[Any, ...]

# Where a run of `record_in_groups` stops taking more layers: the Hessians of BERT-base's feed-forward
# networks (768 and 3,072 inputs) are 40 MB a layer.
_GROUP_BYTES = 1 << 29


@dataclass(frozen=True)
class Calibration:
    """Batches to run a model on, read as often as needed. Made by `Calibration.of`.

    Args:
        batches: each the keyword arguments of a call of the model, or its positional ones.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> calibration = Calibration.of([torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 1.0]])], model)
        >>> len(calibration)
        2
        >>> calibration.record_inputs(model, ["0"], "absmax")["0"]
        tensor([1., 2.])
    """

    batches: tuple[Batch, ...]

    @classmethod
    def of(cls, calibration: Any, model: nn.Module) -> Calibration:
        """The batches of `calibration`, checked against what `model` takes.

        Args:
            calibration: an iterable of batches (a list, a generator, a `DataLoader`; read once, here), one
                batch alone, or a `Calibration`, which is given back. A batch is a mapping of the model's
                keyword arguments (a tokenizer's output with `return_tensors="pt"`), a tuple or list of its
                positional ones, or a tensor, its first.
            model: what will be run on them.

        Raises:
            TypeError: text or anything else that is no batch, or arguments the model does not take.
            ValueError: no batches, or token ids without the batch dimension.
        """
        if isinstance(calibration, Calibration):
            batches = calibration.batches
        elif isinstance(calibration, (Mapping, Tensor)):
            batches = (_batch(calibration, 0),)
        elif isinstance(calibration, Iterable) and not isinstance(calibration, (str, bytes)):
            batches = tuple(_batch(given, index) for index, given in enumerate(calibration))
        else:
            raise TypeError(
                f"calibration is a {type(calibration).__name__}; it must be an iterable of batches: mappings "
                "of the model's arguments (a tokenizer's output), tuples or tensors"
            )
        if not batches:
            raise ValueError("calibration has no batches (a generator that was already read, perhaps)")
        for index, batch in enumerate(batches):
            _check_arguments(model, batch, index)
        return cls(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def call(self, model: nn.Module, batch: Batch) -> Any:
        """What `model` makes of one batch, on the model's device, in the caller's mode and with gradients if
        the caller has them.
        """
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
        args, kwargs = _arguments(batch)
        return model(
            *(_moved(value, device) for value in args),
            **{name: _moved(value, device) for name, value in kwargs.items()},
        )

    def run(self, model: nn.Module, before: Callable[[Batch], None] | None = None) -> None:
        """Call `model` on every batch, in evaluation mode and without gradients; modes are put back.

        Args:
            before: called with each batch before the model is.
        """
        modes = [(module, module.training) for module in model.modules()]
        fastpath = torch.backends.mha.get_fastpath_enabled()
        model.eval()
        try:
            # torch.nn's encoder would compute whole layers without calling what is in them.
            torch.backends.mha.set_fastpath_enabled(False)
            with torch.no_grad():
                for batch in self.batches:
                    if before is not None:
                        before(batch)
                    self.call(model, batch)
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            for module, training in modes:
                module.training = training

    def record_inputs(
        self, model: nn.Module, names: Sequence[str], kind: str = "absmax"
    ) -> dict[str, Tensor]:
        """What the named layers are given, in one run of all batches; nothing in the model changes.

        Positions count where the batch's `attention_mask` (in a decoder, `decoder_attention_mask`) says that
        they are real, and all where there is none. Everything is float32, on the layer's device.

        Args:
            names: linear layers, as `model.named_modules()` names them. An `nn.MultiheadAttention`'s own name
                stands for its input projections (queries, keys and values together), and `out_proj` below it
                for its output projection: both are recorded though neither is ever called.
            kind: "absmax", the largest magnitude of each input [K]; "hessian", the mean of x x^T [K, K]
                (GPTQ's, up to a factor); or "rows", up to 256 inputs [R, K] drawn with equal chance, the
                same at every run.

        Returns:
            a tensor a name. A layer that no batch reaches (an expert nobody chose) has none.

        Raises:
            ValueError: an unknown kind, a name that is no module, or inputs that are not finite.
        """
        _check_request(model, names, kind)
        modules = dict(model.named_modules())
        records: dict[str, InputRecord] = {name: RECORDS[kind]() for name in names}
        masks: list[Tensor] = []

        def before(batch: Batch) -> None:
            masks[:] = _masks(model, batch)

        with _observed(modules, records, masks):
            self.run(model, before)
        results = {name: record.result() for name, record in records.items() if record.count}
        for name, result in results.items():
            if not bool(result.isfinite().all()):
                raise ValueError(f"the calibration's batches give layer {name!r} inputs that are not finite")
        return results

    def record_in_groups(
        self, model: nn.Module, names: Sequence[str], kind: str, max_bytes: int = _GROUP_BYTES
    ) -> Iterator[dict[str, Tensor]]:
        """`record_inputs` of all names, some at a time: one run a group, made when the group is asked for.

        Layers replaced between two groups are seen by the later one, as GPTQ wants it. A group has at least
        one layer, and as many as keep their records within `max_bytes`.
        """
        _check_request(model, names, kind)
        # Sizes, not layers: those that are replaced meanwhile must be free to go.
        sizes = {name: RECORDS[kind].nbytes(_in_features(model.get_submodule(name))) for name in names}
        group: list[str] = []
        held_bytes = 0
        for name, record_bytes in sizes.items():
            if group and held_bytes + record_bytes > max_bytes:
                yield self.record_inputs(model, group, kind)
                group, held_bytes = [], 0
            group.append(name)
            held_bytes += record_bytes
        if group:
            yield self.record_inputs(model, group, kind)


def _batch(given: Any, index: int) -> Batch:
    """One batch as its arguments.

    Raises:
        TypeError: as `Calibration.of`.
        ValueError: token ids of one dimension.
    """
    if isinstance(given, Tensor):
        return (given,)
    if isinstance(given, Mapping):
        batch: Batch = dict(given)
        values = list(given.values())
    elif isinstance(given, (tuple, list)):
        batch = tuple(given)
        values = list(given)
    else:
        hint = "; tokenize text first" if isinstance(given, (str, bytes)) else ""
        raise TypeError(
            f"calibration batch {index} is a {type(given).__name__}; it must be a mapping of the model's "
            f"arguments, a tuple or a tensor{hint}"
        )
    wrong = next((value for value in values if isinstance(value, (str, bytes, list, tuple))), None)
    if wrong is not None or not any(isinstance(value, Tensor) for value in values):
        raise TypeError(
            f"calibration batch {index} must hold tensors; got {', '.join(type(v).__name__ for v in values)} "
            '(a tokenizer gives tensors with return_tensors="pt")'
        )
    ids = batch.get("input_ids") if isinstance(batch, dict) else None
    if isinstance(ids, Tensor) and ids.dim() < 2:
        raise ValueError(
            f"calibration batch {index}: input_ids is {list(ids.shape)}; it must be [batch, sequence]"
        )
    return batch


def _check_arguments(model: nn.Module, batch: Batch, index: int) -> None:
    """Raise TypeError where `model.forward` does not take the batch, or knows none of its names."""
    parameters = signature(model.forward)
    named = [
        name
        for name, parameter in parameters.parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    args, kwargs = _arguments(batch)
    reason = ""
    try:
        parameters.bind(*args, **kwargs)
    except TypeError as error:
        reason = str(error)
    # transformers' models take any keyword, and overlook those they do not know.
    if named and kwargs and not set(kwargs) & set(named):
        reason = f"it has {', '.join(kwargs)}"
    if reason:
        raise TypeError(
            f"calibration batch {index} does not fit {type(model).__name__}.forward: {reason}; it takes "
            + ", ".join(named)
        )


def _arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), dict(batch)) if isinstance(batch, Mapping) else (batch, {})


def _moved(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if isinstance(value, Tensor) and device is not None else value


def _masks(model: nn.Module, batch: Batch) -> list[Tensor]:
    """bool [B, S] of the batch's real positions, of the encoder's tokens and the decoder's where both are
    given; empty where nothing says.
    """
    args, kwargs = _arguments(batch)
    given = signature(model.forward).bind(*args, **kwargs).arguments
    given = {**given, **given.pop("kwargs", {})}
    masks = [
        mask.bool()
        for name in ("attention_mask", "decoder_attention_mask")
        if isinstance(mask := given.get(name), Tensor) and mask.dim() == 2
    ]
    tokens = given.get("decoder_input_ids", given.get("labels"))
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if is_encoder_decoder and isinstance(tokens, Tensor) and given.get("decoder_attention_mask") is None:
        # A decoder's positions are not told from an encoder's but by their count: where that is the same,
        # all of them count.
        masks.append(torch.ones_like(tokens, dtype=torch.bool))
    return masks


def _real_rows(x: Tensor, masks: list[Tensor]) -> Tensor:
    """[..., K] -> [R, K] float32, without the positions that every mask of their shape calls padding."""
    fitting = [mask.to(x.device) for mask in masks if x.dim() == 3 and mask.shape == x.shape[:2]]
    if fitting:
        x = x[torch.stack(fitting).any(dim=0)]
    return x.detach().reshape(-1, x.shape[-1]).float()


def _check_request(model: nn.Module, names: Sequence[str], kind: str) -> None:
    if kind not in RECORDS:
        raise ValueError(f"kind is {kind!r}; accepted are {', '.join(map(repr, RECORDS))}")
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(f"no module of {type(model).__name__} is named {', '.join(map(repr, unknown))}")


def _in_features(module: nn.Module) -> int:
    if isinstance(module, nn.MultiheadAttention):
        return int(module.embed_dim)
    if (features := getattr(module, "in_features", None)) is not None:
        return int(features)
    weight: Any = module.weight
    # transformers' Conv1D keeps its weight as [K, N].
    return int(weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[-1])


@contextmanager
def _observed(
    modules: Mapping[str, nn.Module], records: Mapping[str, InputRecord], masks: list[Tensor]
) -> Iterator[None]:
    """While it lasts, the inputs of the modules that `records` names go into their records."""

    def hook(record: InputRecord) -> Callable[..., None]:
        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            record.add(_real_rows(tensors[0], masks))

        return observe

    def attention_hook(record: InputRecord) -> Callable[..., None]:
        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            distinct = {id(given[name]): given[name] for name in ("query", "key", "value")}
            for x in distinct.values():
                record.add(_real_rows(x, masks))

        return observe

    handles = []
    classes: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for name, record in records.items():
            module = modules[name]
            parent = modules.get(name.rpartition(".")[0])
            if isinstance(module, nn.MultiheadAttention):
                handles.append(module.register_forward_pre_hook(attention_hook(record), with_kwargs=True))
            elif isinstance(parent, nn.MultiheadAttention) and module is parent.out_proj:
                if type(parent) in (nn.MultiheadAttention, MultiheadAttention):
                    classes.append((parent, type(parent)))
                    parent.__class__ = _ObservedAttention
                    parent.__dict__["observe"] = lambda x, add=record.add: add(_real_rows(x, masks))
            else:
                handles.append(module.register_forward_pre_hook(hook(record), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, kind in classes:
            module.__class__ = kind
            del module.__dict__["observe"]


class _ObservedAttention(MultiheadAttention):
    """`nn.MultiheadAttention` that shows what its output projection, which it reads and never calls, is
    given.
    """

    def output(self, joined: Tensor) -> Tensor:
        self.observe(joined)
        return super().output(joined)
