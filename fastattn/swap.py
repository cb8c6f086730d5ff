"""optimize, restore, optimized: swap fused layers into a model in place, report it, and put everything
back.
"""

from __future__ import annotations

import copy
import fnmatch
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastattn.layers import FusedLayer, QuantizedLinear
from fastattn.models.drift import unknown
from fastattn.models.family import Family, Site, families_in, known_families
from fastattn.models.links import link_layers, unlink
from fastattn.packing import PADDINGS
from fastattn.report import format_table
from fastattn.tuning.cache import cache_file, stored

if TYPE_CHECKING:
    from fastattn.tuning.outcome import Tuning

__all__ = [
    "SiteReport",
    "SwapReport",
    "check_model",
    "is_swapped",
    "optimize",
    "optimized",
    "plan",
    "restore",
    "unfuse",
]

MODES = ("auto", "inference", "training")

# Instance attributes of swapped modules; `restore` takes them away again.
ORIGINAL_CONFIG = "_fastattn_original_config"
_PADDING = "fastattn_padding"
_THRESHOLD = "fastattn_threshold"
# The attribute of a quantized model with what it was; `compress.quantization.originals` sets it.
QUANTIZED = "_fastattn_quantized"


@dataclass(frozen=True)
class SiteReport:
    """One layer: its name in the model, its kind, whether it is swapped, and why not."""

    name: str
    kind: str
    status: str
    reason: str = ""


@dataclass
class SwapReport:
    """What `optimize` did. `sites` has one entry a layer, `notes` what holds for the whole model."""

    sites: list[SiteReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def swapped(self) -> int:
        return sum(site.status == "swapped" for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        return {"sites": [asdict(site) for site in self.sites], "notes": list(self.notes)}

    def table(self) -> str:
        """Swapped layers counted by kind, then every skipped layer with its reason, then the notes."""
        counts = Counter((site.kind, site.status) for site in self.sites)
        rows = [(kind, status, count) for (kind, status), count in counts.items()]
        parts = [format_table(("kind", "status", "layers"), rows)]
        skipped = [(site.name or "(model)", site.kind, site.reason) for site in self.sites if site.reason]
        if skipped:
            parts.append(format_table(("skipped layer", "kind", "reason"), skipped))
        parts.extend(f"note: {note}" for note in self.notes)
        return "\n\n".join(parts)


@dataclass
class _Plan:
    """What would be done: nothing in the model has changed yet."""

    report: SwapReport
    swaps: list[tuple[nn.Module, Site]]
    configs: list[Any]


def plan(model: nn.Module, exclude: Sequence[str] = ()) -> SwapReport:
    """The report `optimize` would give, without changing the model."""
    return _plan(model, tuple(exclude)).report


def optimize(
    model: nn.Module,
    mode: str = "auto",
    padding: str = "auto",
    cuda_graphs: bool = False,
    exclude: Sequence[str] = (),
) -> SwapReport:
    """Swap fused layers into `model`, in place: same parameters, same state_dict, same class names.

    Args:
        model: any `nn.Module` that holds layers of a known family; it keeps working for training, saving and
            export.
        mode: "auto", "inference" or "training". Every swap of this version serves both, so all three swap the
            same; "auto" also reads what `fastattn tune` measured on this machine, and the report says what of
            it was applied. It changes which of two ways a batch is computed, never what its outputs mean.
        padding: "auto" runs encoders on real tokens only wherever the call allows it (and, with mode "auto",
            where `fastattn tune` did not find the padded way faster), "packed" raises where it does not,
            "padded" never does. Padded positions of a packed encoder's last hidden state are zero.
        cuda_graphs: not available in this version; True raises.
        exclude: names of modules to leave alone, as `named_modules` gives them, with shell wildcards.

    Returns:
        The report: every layer swapped or skipped, with the reason. Calling twice changes nothing more,
        except that `padding` and what was tuned take their new values.

    Raises:
        TypeError: `model` is not an `nn.Module`, or is compiled or scripted.
        ValueError: an argument that is none of the accepted values, or a pattern in `exclude` that matches
            nothing.

    Example:
        >>> import fastattn, transformers
        >>> config = transformers.BertConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
        >>> fastattn.optimize(transformers.BertModel(config)).swapped
        9
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {MODES}")
    if padding not in PADDINGS:
        raise ValueError(f"padding is {padding!r}; it must be one of {PADDINGS}")
    if cuda_graphs:
        raise ValueError("cuda_graphs=True is not available in this version; leave it False")
    planned = _plan(model, tuple([exclude] if isinstance(exclude, str) else exclude))
    # What was measured on the device that the model is on.
    device = next((parameter.device.type for parameter in model.parameters()), "")
    tuning = stored(device) if mode == "auto" else None
    changed: list[nn.Module] = []
    try:
        _apply(model, planned, padding, tuning, changed)
    except BaseException:
        for module in changed:
            _restore_module(module)
        raise
    if tuning is not None:
        packs = padding == "auto" and any(hasattr(site.replacement, _THRESHOLD) for _, site in planned.swaps)
        said = [f"tuned: {line}" for line in tuning.applied()] if packs else []
        said += [f"tuning advises: {line}" for line in tuning.advice()]
        where = f"{tuning.measured_utc} UTC on this machine, {cache_file()}"
        planned.report.notes.extend(f"{line} (measured {where})" for line in said)
    return planned.report


def restore(model: nn.Module) -> None:
    """Put back the classes and the config object `model` had before `optimize`, and the float layers it had
    before `quantize(keep_original=True)`; a model never changed is left alone.

    Settings changed on the model's config in between are carried over to the original config object.

    Raises:
        TypeError: `model` is not an `nn.Module`, or is compiled or scripted.
        ValueError: its float layers were not kept, or it was loaded quantized: the message says what to load
            again, and nothing has changed.
    """
    check_model(model)
    # Quantizing may have left every layer and changed the cache alone.
    if QUANTIZED in model.__dict__ or any(isinstance(each, QuantizedLinear) for each in model.modules()):
        from fastattn.compress.quantization.originals import put_back

        put_back(model)
    unfuse(model)


def unfuse(model: nn.Module) -> None:
    """Put back the classes and the config object `model` had before `optimize`; quantized layers stay."""
    for module in model.modules():
        _restore_module(module)


@contextmanager
def optimized(model: nn.Module, **options: Any) -> Iterator[nn.Module]:
    """`optimize(model, **options)` for the duration of a `with` statement: what was swapped before stays so,
    and so does what `quantize` did before or within.

    Example:
        >>> import fastattn, transformers
        >>> model = transformers.BertModel(
        ...     transformers.BertConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
        ... )
        >>> with fastattn.optimized(model):
        ...     type(model.encoder).__module__
        'fastattn.models.bert'
        >>> type(model.encoder).__module__
        'transformers.models.bert.modeling_bert'
    """
    before = {id(module) for module in model.modules() if _is_changed(module)}
    optimize(model, **options)
    try:
        yield model
    finally:
        for module in model.modules():
            if id(module) not in before:
                _restore_module(module)


def _is_changed(module: nn.Module) -> bool:
    return isinstance(module, FusedLayer) or ORIGINAL_CONFIG in module.__dict__


def is_swapped(model: nn.Module) -> bool:
    """Whether any layer of `model` is a fused one."""
    return any(isinstance(module, FusedLayer) for module in model.modules())


def check_model(model: Any) -> None:
    """Raise TypeError, with the way out, unless the layers of `model` can be replaced."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module is accepted")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model is scripted: its layers can no longer be swapped; optimize it before torch.jit"
        )
    if isinstance(model, nn.DataParallel):
        raise TypeError(
            "model is wrapped in DataParallel: optimize the model inside (model.module), then wrap it"
        )
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            which = f"its module {name!r}" if name else "model"
            raise TypeError(
                f"{which} is compiled: call fastattn on the model before torch.compile, then compile it"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"its module {name!r} is scripted: call fastattn on the model before torch.jit")


def _plan(model: nn.Module, exclude: tuple[str, ...]) -> _Plan:
    check_model(model)
    families = families_in(model)
    names = {name: module for name, module in model.named_modules()}
    for pattern in exclude:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"exclude names {pattern!r}, which no module of the model is called")
    planned = _Plan(SwapReport(), [], [])
    for name, module in names.items():
        for family in families:
            _plan_module(planned, family, name, module, exclude)
    _plan_attention(planned, names, exclude)
    position = {name: index for index, name in enumerate(names)}
    planned.report.sites.sort(key=lambda site: position[site.name])
    if not planned.report.sites:
        known = ", ".join(known_families())
        reason = (
            f"{type(model).__name__} has no layer of a known family ({known}) and no attention layer that "
        )
        reason += "asks transformers' attention interface"
        planned.report.sites.append(SiteReport("", "model", "skipped", reason))
    elif not families and planned.configs:
        planned.report.notes.append(
            f"{type(model).__name__} is of no known family: only its attention runs through fastattn"
        )
    for family in families:
        planned.report.notes.extend(f"{family.name}: {limit}" for limit in family.limits)
    return planned


def _excluded(name: str, exclude: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)


def _plan_module(
    planned: _Plan, family: Family, name: str, module: nn.Module, exclude: tuple[str, ...]
) -> None:
    for site in family.sites:
        original = site.replacement.fastattn_original
        if not isinstance(module, original) or not f".{name}".endswith(site.name and f".{site.name}"):
            continue
        reason = ""
        if _excluded(name, exclude):
            reason = "excluded by the caller"
        elif type(module) is site.replacement:
            pass
        elif type(module) is not original:
            reason = (
                f"{type(module).__qualname__} is a subclass of {original.__name__} with a forward of its own"
            )
        elif "forward" in module.__dict__:
            reason = "its forward is replaced on the instance (an accelerate hook, for one)"
        else:
            reason = unknown(site.replacement) or site.replacement.cannot_replace(module) or ""
        status = "skipped" if reason else "swapped"
        planned.report.sites.append(SiteReport(name, site.kind, status, reason))
        if not reason:
            planned.swaps.append((module, site))


def _plan_attention(planned: _Plan, names: dict[str, nn.Module], exclude: tuple[str, ...]) -> None:
    """Choose the configs to switch to our attention, those whose attention layers will all understand our
    mask, and report the layers that need nothing else.
    """
    if "transformers" not in sys.modules:
        return
    from fastattn.models.dispatch import cannot_dispatch, dispatches

    reported = {site.name: site for site in planned.report.sites if site.kind == "attention"}
    owners: dict[int, Any] = {}
    layers: dict[int, list[str]] = {}
    obstacles: dict[int, str] = {}
    for name, module in names.items():
        original: Any = _class_before(module)
        if not dispatches(original):
            continue
        config = getattr(module, "config", None)
        if not hasattr(config, "_attn_implementation"):
            if name not in reported:
                reason = "it has no configuration that names its attention implementation"
                planned.report.sites.append(SiteReport(name, "attention", "skipped", reason))
            continue
        key = id(config)
        owners[key] = config
        if name in reported:
            reason = reported[name].reason
        else:
            layers.setdefault(key, []).append(name)
            reason = "excluded by the caller" if _excluded(name, exclude) else cannot_dispatch(original) or ""
        if reason:
            obstacles.setdefault(key, f"{name}: {reason}")
    for key, config in owners.items():
        reason = obstacles.get(key, "")
        if not reason:
            planned.configs.append(config)
        elif any(site.kind == "attention" and site.status == "swapped" for site in planned.report.sites):
            planned.report.notes.append(
                f"attention layer {reason.partition(':')[0]} is left alone and needs the original's mask, "
                "so the encoder around it runs padded"
            )
        for name in layers.get(key, ()):
            own = reason.removeprefix(f"{name}: ")
            shared = f"it shares its configuration, and so its mask, with {reason}"
            status = "skipped" if reason else "swapped"
            said = "" if not reason else own if own != reason else shared
            planned.report.sites.append(SiteReport(name, "attention", status, said))


def _class_before(module: nn.Module) -> type[nn.Module]:
    """The class a module had before it was swapped."""
    return module.fastattn_original if isinstance(module, FusedLayer) else type(module)


def _apply(
    model: nn.Module, planned: _Plan, padding: str, tuning: Tuning | None, changed: list[nn.Module]
) -> None:
    """Carry the plan out; `changed` collects the modules that were not as they are now."""
    for config in planned.configs:
        from fastattn.models.interface import NAME

        if config._attn_implementation == NAME:
            continue
        replacement = copy.deepcopy(config)
        replacement._attn_implementation = NAME
        for module in model.modules():
            if module.__dict__.get("config") is config:
                changed.append(module)
                module.__dict__[ORIGINAL_CONFIG] = config
                module.__dict__["config"] = replacement
    for module, site in planned.swaps:
        if type(module) is not site.replacement:
            changed.append(module)
            module.__class__ = site.replacement
        if hasattr(site.replacement, _PADDING):
            module.__dict__[_PADDING] = padding
            module.__dict__[_THRESHOLD] = None if tuning is None else tuning.threshold
    if planned.swaps:
        link_layers(model)


def _restore_module(module: nn.Module) -> None:
    if isinstance(module, FusedLayer) and not module.must_stay:
        module.__dict__.pop(_PADDING, None)
        module.__dict__.pop(_THRESHOLD, None)
        unlink(module)
        module.__class__ = module.fastattn_original  # type: ignore[assignment]
    original = module.__dict__.pop(ORIGINAL_CONFIG, None)
    if original is not None:
        changed = module.__dict__["config"]
        for name, value in changed.__dict__.items():
            if name != "_attn_implementation_internal" and original.__dict__.get(name) != value:
                setattr(original, name, value)
        module.__dict__["config"] = original
