"""Every family against its untouched eager model: outputs, generation, gradients, restoring, and what people
combine a model with. The cases are in family_cases.py.

python -m pytest tests/models/test_families.py -k "GPT-2"
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import Counter

import pytest
import torch
from family_cases import CASES, FamilyCase
from family_models import (
    TOLERANCE,
    assert_as_exact,
    assert_same,
    assert_same_gradients,
    assert_same_tokens,
    batch,
    build,
    errors,
    fresh,
    gradients,
    has_text,
    outputs,
    pair,
    takes,
    uncached,
)

import fastattn
from fastattn.layers import residual
from fastattn.models import families_in, known_families
from fastattn.swap import is_swapped

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.model

PADDINGS = ("right", "left", "none", "square", "one token")


@pytest.fixture(params=CASES, ids=lambda case: case.name.replace(" ", "-"))
def case(request, record_property) -> FamilyCase:
    found = request.param
    # Into the junit file that docs/models.md is generated from.
    record_property("case", found.name)
    record_property("family", found.family)
    assert found.family in known_families(), f"the adapter of {found.family} is not registered"
    return found


@pytest.fixture(scope="session", autouse=True)
def _versions(record_testsuite_property) -> None:
    """What the results are of."""
    record_testsuite_property("transformers", transformers.__version__)
    record_testsuite_property("torch", torch.__version__)


@pytest.fixture(autouse=True)
def _as_where_kernels_run(request, monkeypatch):
    """Layers hand norms over to the next, as on a GPU, though the operations run in PyTorch here. Generation
    and half precision run as a CPU does, so that both ways are tested.
    """
    if request.node.originalname not in ("test_generation", "test_assisted_decoding", "test_half_precision"):
        monkeypatch.setattr(residual, "runs_in_pytorch", lambda x: False)


def kinds(case: FamilyCase) -> tuple[str, ...]:
    return tuple(kind for kind in PADDINGS if kind != "left" or case.left)


def test_report(case):
    """Every attention layer is swapped, or skipped with a reason; and none of the layers is lost that were
    swapped before.
    """
    model = build(case, case.base)
    attention = {
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("Attention", "SelfAttention", "CrossAttention"))
        and not any(
            type(child).__name__.endswith("Attention") for child in module.modules() if child is not module
        )
    }
    report = fastattn.optimize(model)
    sites = {site.name for site in report.sites if site.kind == "attention"}
    assert families_in(model), f"no adapter is found for the layers of {case.name}"
    assert attention <= sites, f"not in the report: {sorted(attention - sites)}"
    for site in report.sites:
        assert (site.status == "skipped") == bool(site.reason), site
    found = Counter(site.kind for site in report.sites if site.status == "swapped")
    assert case.swapped is not None, f"{case.name}: declare swapped={dict(found)} in family_cases.py"
    assert found == Counter(case.swapped), report.table()


def test_the_test_would_see_a_lost_mask(case):
    """With these weights a mask, a window or a cap that is dropped changes the outputs by far more than the
    tolerance.
    """
    reference, _ = pair(case.name, case.base)
    inputs = batch(reference, "left" if case.left else "none")
    with torch.no_grad():
        expected = outputs(reference(**inputs))
        changed = dict(inputs)
        if has_text(reference):
            name = "attention_mask" if "attention_mask" in inputs else "decoder_attention_mask"
            mask = inputs[name].clone()
            mask[0, 1] = 0
            changed[name] = mask
            # The hidden position itself is left out of the comparison.
            judged = {**inputs, name: mask}
        else:
            changed["pixel_values"] = inputs["pixel_values"].clone()
            changed["pixel_values"][..., -1, -1] += 1.0
            judged = inputs
        assert max(errors(outputs(reference(**changed)), expected, judged).values()) > 100 * TOLERANCE
        for change in case.matters:
            other = build(case, case.base, case.reference, **change)
            other.load_state_dict(reference.state_dict(), strict=False)
            assert max(errors(outputs(other(**inputs)), expected, inputs).values()) > 100 * TOLERANCE, change


@torch.no_grad()
def test_forward(case):
    """Outputs at real positions, every class, on every kind of padding."""
    for head, kind in itertools.product(case.classes, kinds(case)):
        reference, model = pair(case.name, head)
        inputs = batch(model, kind)
        assert_same(model(**inputs), reference(**inputs), inputs, f"{head}, {kind}")


@torch.no_grad()
def test_no_mask(case):
    """Called as most people first do: with the tokens alone."""
    for head in case.classes:
        reference, model = pair(case.name, head)
        inputs = {name: x for name, x in batch(model, "none").items() if not name.endswith("attention_mask")}
        assert_same(model(**inputs), reference(**inputs), inputs, head)


@torch.no_grad()
def test_a_row_of_padding(case):
    """It is finite where the original's is, and changes no other row."""
    for head in case.classes:
        reference, model = pair(case.name, head)
        if not has_text(model):
            continue
        inputs = batch(model, "empty")
        together = outputs(model(**inputs, **uncached(model)))
        # A mean over no position (ModernBERT's head) is not the layers' fault.
        for name, value in outputs(reference(**inputs, **uncached(model))).items():
            assert (together[name].isfinite() | ~value.isfinite()).all(), f"{head}: {name}"
        kept = {name: tensor[[0, 2]] for name, tensor in inputs.items()}
        alone = outputs(model(**kept, **uncached(model)))
        for name, value in together.items():
            if value.shape[:1] != (3,) or name.startswith("logits_per"):
                continue
            error = errors({name: value[[0, 2]]}, {name: alone[name]}, kept)
            assert max(error.values(), default=0.0) <= TOLERANCE, f"{head}: {name}"


@torch.no_grad()
def test_packing(case):
    """Padding is not computed: padded positions come back as zeros, and `padding="packed"` never refuses."""
    if not case.packs:
        pytest.skip("its padding is computed, or it has none")
    reference = build(case, case.base)
    inputs = batch(reference, "right")
    padding = ~inputs["attention_mask"].bool()
    model = fresh(case, case.base, padding="packed")
    result = model(**inputs)
    hidden = result.get("encoder_last_hidden_state", result[0])
    assert not hidden[padding].any()
    assert_same(result, reference(**inputs), inputs)
    model = fresh(case, case.base, padding="padded")
    assert_same(model(**inputs), reference(**inputs), inputs)


@torch.no_grad()
def test_generation(case):
    """Greedy and three beams, every cache, left padding (of the decoder's input, or of the encoder's)."""
    if not case.generates:
        pytest.skip("does not generate")
    reference, model = pair(case.name, case.heads[0])
    inputs = batch(model, "left")
    for cache, beams in itertools.product(case.caches, (1, 3)):
        assert_same_tokens(model, reference, inputs, num_beams=beams, cache_implementation=cache)
    assert_same_tokens(model, reference, inputs, use_cache=False, max_new_tokens=3)


@torch.no_grad()
def test_assisted_decoding(case):
    """Candidates are verified several at a time, and the cache is cut back where they were wrong."""
    if not (case.generates):
        pytest.skip("does not generate")
    reference, model = pair(case.name, case.heads[0])
    inputs = {name: x[:1] for name, x in batch(model, "none").items()}
    if "input_ids" in inputs:
        # A text that repeats itself, so that there are candidates.
        inputs["input_ids"] = inputs["input_ids"][:, :4].repeat(1, 4)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert_same_tokens(model, reference, inputs, prompt_lookup_num_tokens=3)


@torch.no_grad()
def test_packed_position_ids(case):
    """Several sequences in one row, told apart by positions that start again."""
    if not case.positions:
        pytest.skip("the original does not tell sequences apart by their positions")
    reference, model = pair(case.name, case.base)
    inputs = batch(model, "none")
    lengths = (7, 1, 9)
    packed = dict(
        input_ids=inputs["input_ids"][:1],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        use_cache=False,
    )
    expected = reference(**packed)
    assert_same(model(**packed), expected, {})
    alone = reference(input_ids=packed["input_ids"][:, :7], use_cache=False).last_hidden_state
    assert_same({"": expected.last_hidden_state[:, :7]}, {"": alone}, {}, "the original packs")
    second = reference(input_ids=packed["input_ids"][:, 8:], use_cache=False).last_hidden_state
    assert_same({"": expected.last_hidden_state[:, 8:]}, {"": second}, {}, "the original packs")


def test_gradients(case):
    """Of every parameter, training mode, dropout zero."""
    for head, kind in ((case.base, "right"), (case.heads[0], "left" if case.left else "none")):
        reference, model = pair(case.name, head)
        inputs = batch(model, kind)
        assert_same_gradients(gradients(model, inputs), gradients(reference, inputs), f"{head}, {kind}")


@pytest.mark.parametrize("reentrant", [False, True], ids=["not-reentrant", "reentrant"])
def test_gradient_checkpointing(case, reentrant):
    model, reference = fresh(case, case.base), build(case, case.base, case.reference)
    if not model.supports_gradient_checkpointing:
        pytest.skip("the original has none")
    inputs = batch(model, "right")
    for each in (model, reference):
        each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant and takes(model, "input_ids"):
            each.enable_input_require_grads()
    try:
        expected = gradients(reference, inputs)
    except RuntimeError as error:
        assert reentrant, error
        pytest.skip("the original cannot be checkpointed so: its layers share a tensor with gradients")
    assert_same_gradients(gradients(model, inputs), expected)


@torch.no_grad()
def test_restore(case):
    """Classes, config objects, instance attributes, state_dict keys and outputs, bit for bit."""
    for head in case.classes[:2]:
        model = build(case, head)
        inputs = batch(model, "right")

        def state(model=model):
            return [
                (name, type(module), id(module.__dict__.get("config")), sorted(module.__dict__))
                for name, module in model.named_modules()
            ]

        # A first call leaves traces of its own (recording hooks, rotary caches).
        before = outputs(model(**inputs))
        expected, keys = state(), list(model.state_dict())
        parameters = [id(parameter) for parameter in model.parameters()]
        fastattn.optimize(model)
        model(**inputs)
        assert list(model.state_dict()) == keys
        assert [id(parameter) for parameter in model.parameters()] == parameters
        assert [type(m).__name__ for m in model.modules()] == [cls.__name__ for _, cls, _, _ in expected]
        fastattn.restore(model)
        assert not is_swapped(model) and state() == expected and list(model.state_dict()) == keys
        after = outputs(model(**inputs))
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_copies(case):
    """deepcopy and pickle after a forward with gradients give a model that computes the same."""
    model = fresh(case, case.base)
    inputs = batch(model, "right")
    model(**inputs, **uncached(model))
    with torch.no_grad():
        expected = outputs(model(**inputs))
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            found = outputs(again(**inputs))
            assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
            assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_peft(case):
    """LoRA on every linear layer, put on before and after optimize."""
    peft = pytest.importorskip("peft")

    def adapted(model):
        torch.manual_seed(0)
        # Adapters that change something from the start, by as much as the weights do.
        options = dict(target_modules="all-linear", init_lora_weights=False)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=1, **options)).eval()

    reference = adapted(build(case, case.base, case.reference))
    inputs = batch(build(case, case.base), "right")
    expected = gradients(reference, inputs)
    with torch.no_grad():
        wanted = reference(**inputs)
    before = adapted(build(case, case.base))
    fastattn.optimize(before)
    for context, model in (("optimized first", adapted(fresh(case, case.base))), ("adapted first", before)):
        with torch.no_grad():
            assert_same(model(**inputs), wanted, inputs, context)
        assert_same_gradients(gradients(model, inputs), expected, context)


@pytest.mark.once
@torch.no_grad()
def test_compile(case):
    """One graph, the same outputs, with padding."""
    if case.compiles:
        pytest.skip(f"the original is not one graph: {case.compiles}")
    reference, model = pair(case.name, case.base)
    inputs = batch(model, "left" if case.left else "none")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(**inputs, **uncached(model)), reference(**inputs, **uncached(model)), inputs)


@pytest.mark.once
@torch.no_grad()
def test_export(case):
    """`torch.export` traces it with padding, its program gives the same outputs, and the model still runs."""
    reference, model = build(case, case.base, case.reference), fresh(case, case.base)
    inputs = batch(model, "right")
    program = torch.export.export(model, (), {**inputs, **uncached(model)}, strict=False)
    expected = reference(**inputs, **uncached(model))
    assert_same(program.module()(**inputs, **uncached(model)), expected, inputs)
    assert_same(model(**inputs, **uncached(model)), expected, inputs, "after the export")


@torch.no_grad()
def test_recorded_outputs(case):
    """Hidden states and attentions are those of the original, as many, of the same shapes."""
    if case.recorded:
        pytest.skip(case.recorded)
    asked = dict(output_hidden_states=True, output_attentions=True)
    for head in case.classes[:2]:
        reference, model = pair(case.name, head)
        inputs = batch(model, "right")
        expected = outputs(reference(**inputs, **asked))
        names = [name for name in expected if "hidden_states" in name or "attentions" in name]
        assert names
        assert_same(model(**inputs, **asked), expected, inputs, head)
        # Recording leaves hooks on the layers; the next call must not mind.
        assert_same(model(**inputs), reference(**inputs), inputs, head)


@torch.no_grad()
def test_hooks(case):
    """A hook on any layer within sees its calls and changes what it returns: fusion goes around none."""

    def hooked(model) -> tuple[torch.nn.Module, set[str]]:
        called = set()

        def scale(name):
            def hook(module, arguments, result):
                called.add(name)
                return result * 1.05 if torch.is_tensor(result) and result.is_floating_point() else None

            return hook

        for name, module in model.named_modules():
            # Dropout does nothing here, and is not always called.
            if not list(module.children()) and "Dropout" not in type(module).__name__:
                module.register_forward_hook(scale(name))
        return model, called

    model, ours = hooked(fresh(case, case.base))
    reference, theirs = hooked(build(case, case.base, case.reference))
    inputs = batch(model, "right")
    found, expected = model(**inputs), reference(**inputs)
    assert ours == theirs
    assert_same(found, expected, inputs)


@torch.no_grad()
def test_hooks_between_layers(case):
    """What a hook makes of a layer's output is what the next layer starts from."""

    def hooked(model):
        for module in model.modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) > 1:
                module[0].register_forward_hook(
                    lambda _, __, out: (out[0] * 1.5, *out[1:]) if isinstance(out, tuple) else out * 1.5
                )
        return model

    model, reference = hooked(fresh(case, case.base)), hooked(build(case, case.base, case.reference))
    inputs = batch(model, "right")
    assert_same(model(**inputs), reference(**inputs), inputs)


@torch.no_grad()
def test_autocast(case):
    """Where float32 weights run in bfloat16: held to the same rule as half precision."""
    reference, model = pair(case.name, case.base)
    inputs = batch(model, "right")
    true = outputs(reference(**inputs))
    with torch.autocast("cpu", torch.bfloat16):
        own, found = outputs(reference(**inputs)), outputs(model(**inputs))
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in own.items()}
    assert_as_exact(found, own, true, inputs, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@torch.no_grad()
def test_half_precision(case, dtype):
    """At most twice as far from float32 as the original in that dtype, plus two units of its precision."""
    exact, _ = pair(case.name, case.base)
    reference = build(case, case.base, case.reference).to(dtype)
    model = fresh(case, case.base).to(dtype)
    inputs = batch(model, "right")
    cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    true = outputs(exact(**inputs))
    assert_as_exact(outputs(model(**cast)), outputs(reference(**cast)), true, inputs, dtype)
