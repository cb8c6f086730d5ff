"""`fastattn.quantize`: checks, finds the layers, quantizes them one at a time, and reports."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from fastattn.compress.calibration import Calibration
from fastattn.compress.quantization.layers import LayerQuantizer, kept
from fastattn.compress.quantization.originals import Originals, detach, is_quantized
from fastattn.compress.quantization.projections import (
    fold_projections,
    has_folded_projections,
    unfold_projections,
)
from fastattn.compress.quantization.report import QuantizationReport, QuantizedLayerReport
from fastattn.compress.quantization.settings import QuantizationSettings
from fastattn.compress.quantization.speed import Comparison, compare_layers, rows_of
from fastattn.compress.quantization.targets import Target, check_exclude, find_targets, is_open_attention
from fastattn.layers import QuantizedLinear
from fastattn.swap import check_model

__all__ = ["quantize"]


def quantize(
    model: nn.Module,
    scheme: str,
    calibration: Any = None,
    exclude: Sequence[str] | str = (),
    keep_original: bool = False,
    *,
    group_size: int = 64,
    method: str = "auto",
    smooth: float | None = None,
    max_error: float | None = None,
    kv_cache: str | None = None,
    faster_at: int | None = None,
) -> QuantizationReport:
    """Quantize the linear layers of `model`, in place and one at a time; before or after `optimize`.

    `nn.Linear`, transformers' `Conv1D` and the projections of `nn.MultiheadAttention` (`in_proj_weight`
    becomes the layer `in_proj`, and the attention fastattn's class) become `QuantizedLinear`. Embeddings, the
    output head (what a transformers model has outside its base model; of another model its last linear layer)
    and layers whose error is too large stay, as do weights tied to something else; layers that share a weight
    share the quantized one. A transformers model then saves with `save_pretrained` and loads with
    `from_pretrained` or `fastattn.load`.

    Args:
        model: any `nn.Module`, float weights, on any device.
        scheme: "int8": weights by row and, when it runs, inputs by token in 8 bits (the fastest on a CPU);
            "int8-weight": weights alone; "int4-weight": weights in groups of `group_size`; "fp8": as "int8"
            in float8_e4m3fn.
        calibration: batches to run the model on (mappings of its arguments, such as a tokenizer gives,
            tuples, or tensors), for GPTQ, SmoothQuant, and errors measured on outputs. None: from the weights
            alone.
        exclude: names of modules to leave alone, with what is below them, as `named_modules` gives them, with
            shell wildcards.
        keep_original: hold the float layers too, so that `restore` puts the very same back. Without it their
            memory is freed.
        group_size: columns that share a scale in "int4-weight": 32, 64 or 128.
        method: "absmax" rounds to the nearest; "hqq" (Badri and Shaji 2023) and "gptq" (Frantar et al. 2022,
            needs calibration) lose less in "int4-weight", which "auto" takes them for.
        smooth: SmoothQuant's alpha in [0, 1] (Xiao et al. 2022; 0.5 is theirs): moves outliers of "int8" and
            "fp8" inputs into the weights; needs calibration.
        max_error: layers with a relative error `||y - y_q|| / ||y||` above it stay: of their outputs on the
            calibration, without one of their weight. None: 0.03 for int8, 0.25 for int4, 0.08 for fp8.
        kv_cache: "int8" or "fp8": `generate` keeps keys and values in it.
        faster_at: rows a layer multiplies at once where the model will run (the real tokens of a batch; 1
            where one sequence is generated). A layer that is not faster quantized at so many, timed on this
            machine as `model` runs it now (so `optimize` first), stays; so does one that gains less
            than 5%, which is noise. None: layers are quantized whatever their speed.

    Returns:
        The report: every linear layer with its error, bytes, and time beside fp32, and why some stay.

    Raises:
        TypeError: `model` is no `nn.Module`, is compiled or scripted, or calibration holds no batches.
        ValueError: an argument that is none of the accepted values, calibration that is needed and missing, a
            model that is quantized already or has no linear layer, or a pattern in `exclude` that matches
            nothing. The model is then untouched.
        RuntimeError: a layer cannot be run at `faster_at` rows; the model is untouched, too.

    Example:
        >>> import fastattn, transformers
        >>> config = transformers.BertConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
        >>> model = transformers.BertModel(config)
        >>> report = fastattn.quantize(model, "int8")
        >>> report.quantized, type(model.pooler.dense).__name__
        (13, 'QuantizedLinear')
    """
    check_model(model)
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    settings = QuantizationSettings(
        scheme,
        group_size,
        method,
        smooth,
        max_error,
        kv_cache,
        faster_at,
        calibrated=calibration is not None,
    )
    _check_not_quantized(model)
    check_exclude([name for name, _ in model.named_modules()], exclude)
    if not any(True for _ in _linear_like(model)):
        raise ValueError(f"{type(model).__name__} has no linear layer below it that could be replaced")
    if any(each.is_meta for each in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has parameters on the meta device: load its weights first, or quantize "
            "a transformers model while it loads (quantization_config=FastattnConfig(...))"
        )
    batches = None if calibration is None else Calibration.of(calibration, model)
    originals = Originals(keep_original)
    if kv_cache is not None:
        # First, because it knows which caches it cannot take.
        from fastattn.compress.kv_cache import use_quantized_cache

        use_quantized_cache(model, kv_cache)
    try:
        report = _quantized(model, settings, batches, exclude, originals)
    except BaseException:
        if keep_original or not originals.replaced:
            originals.undo(model)
        raise
    if faster_at is not None and not report.quantized:
        originals.undo(model)
        if kv_cache is not None:
            report.notes.append(f"kv_cache {kv_cache!r} is not used, for no layer is quantized")
    elif keep_original or not originals.replaced:
        # Nothing is lost where no layer was replaced: the cache may be all there is to undo.
        originals.attach(model)
    else:
        detach(model)
    report.notes.extend(_notes(model, settings, report))
    return report


def _check_not_quantized(model: nn.Module) -> None:
    other = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if is_quantized(model) or other is not None:
        how = "" if other is None else f" ({getattr(other.quant_method, 'value', other.quant_method)})"
        raise ValueError(
            f"{type(model).__name__} is quantized already{how}: load the float model again, or, where it was "
            "quantized with keep_original=True, call fastattn.restore first"
        )


def _linear_like(model: nn.Module) -> Iterator[nn.Module]:
    for target in find_targets(model):
        yield target.layer
    for module in model.modules():
        if is_open_attention(module):
            yield module


def _quantized(
    model: nn.Module,
    settings: QuantizationSettings,
    batches: Calibration | None,
    exclude: tuple[str, ...],
    originals: Originals,
) -> QuantizationReport:
    attentions = [module for module in model.modules() if is_open_attention(module)]
    for attention in attentions:
        open_attention(attention, originals)
    targets = find_targets(model, exclude)
    compared: dict[str, Comparison] = {}
    if settings.faster_at is not None:
        compared = compare_layers([target for target in targets if not target.reason], settings)
        targets = [_kept_if_slow(target, compared.get(target.name)) for target in targets]
    if all(target.reason for target in targets):
        batches = None
    input_scales: Mapping[str, Tensor] = {}
    if settings.smooth is not None and batches is not None:
        input_scales = _smoothed(model, targets, batches, settings.smooth, originals)
    quantizer = LayerQuantizer(settings, originals, input_scales)
    report = QuantizationReport()
    for entry in quantize_targets(model, targets, quantizer, batches):
        report.layers.append(_with_times(entry, compared.get(entry.name)))
    if settings.faster_at is not None and compared and not any(each.is_faster for each in compared.values()):
        report.notes.append(
            f"nothing is quantized: no layer would be faster at {rows_of(settings.faster_at)} on this machine"
        )
    for attention in attentions:
        close_attention(attention, originals)
    guard_fast_paths(model, originals)
    if "transformers" in sys.modules:
        from fastattn.compress.quantization.transformers_model import describe

        describe(model, settings, exclude, originals)
    return report


def _kept_if_slow(target: Target, compared: Comparison | None) -> Target:
    return target if compared is None or compared.is_faster else replace(target, reason=str(compared))


def _with_times(entry: QuantizedLayerReport, compared: Comparison | None) -> QuantizedLayerReport:
    if compared is None:
        return entry
    return replace(entry, fp32_ms=compared.float_ms, quantized_ms=compared.quantized_ms, rows=compared.rows)


def quantize_targets(
    model: nn.Module, targets: list[Target], quantizer: LayerQuantizer, batches: Calibration | None
) -> list[QuantizedLayerReport]:
    """Quantize every target that has no reason to stay; `targets` is emptied, so that nothing here holds a
    layer that is replaced.
    """
    order = [target.name for target in targets]
    entries = {target.name: kept(target, target.reason) for target in targets if target.reason}
    waiting = {target.name: target for target in targets if not target.reason}
    targets.clear()
    holders = Counter(id(target.layer.weight) for target in waiting.values())
    names = list(waiting)
    with tqdm(total=len(names), desc="quantizing", disable=None, leave=False, unit=" layers") as bar:
        for group, hessians, rows in _records(model, names, quantizer.settings, batches):
            for name in group:
                target = waiting.pop(name)
                shared = holders[id(target.layer.weight)] > 1
                entries[name] = quantizer(target, hessians.pop(name, None), rows.pop(name, None), shared)
                del target
                bar.update()
    return [entries[name] for name in order]


def _records(
    model: nn.Module, names: list[str], settings: QuantizationSettings, batches: Calibration | None
) -> Iterator[tuple[list[str], dict[str, Tensor], dict[str, Tensor]]]:
    """Names of layers, some at a time, with what the calibration gives them: Hessians, and inputs."""
    if batches is None:
        yield names, {}, {}
    elif settings.rounding != "gptq":
        yield from ((list(names), {}, rows) for rows in [batches.record_inputs(model, names, "rows")])
    else:
        done: set[str] = set()
        for hessians in batches.record_in_groups(model, names, "hessian"):
            group = [name for name in names if name in hessians]
            done.update(group)
            yield group, dict(hessians), batches.record_inputs(model, group, "rows")
        yield [name for name in names if name not in done], {}, {}


def _smoothed(
    model: nn.Module, targets: list[Target], batches: Calibration, alpha: float, originals: Originals
) -> Mapping[str, Tensor]:
    from fastattn.compress.quantization.smoothquant import smooth

    names = [target.name for target in targets if not target.reason]
    absmax = batches.record_inputs(model, names, "absmax")
    originals.smoothing = smooth(model, names, absmax, alpha, batches)
    return originals.smoothing.input_scales


def open_attention(attention: Any, originals: Originals) -> None:
    """Make layers of an attention's input projections, where they are none yet."""
    if has_folded_projections(attention):
        originals.attentions.append((attention, type(attention), attention.in_proj_bias))
        unfold_projections(attention)


def close_attention(attention: Any, originals: Originals) -> None:
    """Undo `open_attention` where nothing of the attention was quantized."""
    if any(isinstance(each, QuantizedLinear) for each in attention.children()):
        return
    for index, (opened, cls, bias) in enumerate(originals.attentions):
        if opened is attention:
            fold_projections(attention, bias)
            attention.__class__ = cls
            del originals.attentions[index]
            return


def guard_fast_paths(model: nn.Module, originals: Originals) -> None:
    """Keep torch.nn's encoders from their path for inference, which reads the weights of whole layers, and
    from the nested tensors that only it takes.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and is_quantized(module):
            originals.set_attribute(module, "activation_relu_or_gelu", 0)
        elif isinstance(module, nn.TransformerEncoder) and is_quantized(module):
            originals.set_attribute(module, "use_nested_tensor", False)


def _notes(model: nn.Module, settings: QuantizationSettings, report: QuantizationReport) -> list[str]:
    notes = []
    devices = {each.device.type for each in model.buffers()}
    if not devices <= {"cpu", "meta"}:
        notes.append(
            "on a GPU quantized products run the PyTorch reference in this version: they save memory, not "
            "time"
        )
    elif settings.scheme == "fp8":
        notes.append("'fp8' is for GPUs: on a CPU its products run the PyTorch reference")
    slower: dict[tuple[int, ...], set[str]] = {}
    for layer in report.layers:
        if layer.slower_at_rows:
            slower.setdefault(layer.slower_at_rows, set()).add(f"{layer.shape[0]} x {layer.shape[1]}")
    for rows, shapes in sorted(slower.items()):
        at = f"{', '.join(str(each) for each in rows)} row{'s' if rows != (1,) else ''}"
        notes.append(
            f"not recommended at {at} for layers of {', '.join(sorted(shapes))}: measured slower than "
            "unquantized on this machine"
        )
    experts = {
        type(module).__name__
        for module in model.modules()
        if any(each is not None and each.dim() > 2 for each in module._parameters.values())
        and not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }
    if experts:
        notes.append(f"weights outside linear layers stay: those of {', '.join(sorted(experts))}")
    return notes
