"""Every task on every kind of model: right answers pass, planted wrong ones are caught."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tiny_sources import MODELS, source_of

from fastattn.bench.contenders import BUILDERS, Generated, Runner, Source, Stages, TrainStep
from fastattn.bench.parity import Parity
from fastattn.bench.tasks import Work, work_for
from fastattn.bench.workloads import Workload

pytestmark = pytest.mark.model

CASES = [
    ("bert", "encode"), ("bert", "train"), ("bert-classifier", "classify"), ("bert-classifier", "train"),
    ("gpt2", "prefill"), ("gpt2", "decode"), ("gpt2", "train"), ("llama", "prefill"), ("llama", "decode"),
    ("llama", "train"), ("t5", "encode"), ("t5", "decode"), ("t5", "train"),
]  # fmt: skip
FORWARD = [case for case in CASES if case[1] in ("encode", "classify", "prefill")]
DECODE = [case for case in CASES if case[1] == "decode"]
NEW = 5


@cache
def source(name: str) -> Source:
    return source_of(MODELS[name]())


@cache
def runner(name: str, key: str, precision: str) -> Runner:
    return BUILDERS[key].build(source(name), precision, Stages())


@cache
def expecting(name: str, task: Any) -> Work:
    """The work on a ragged batch, its right answer known."""
    workload = Workload(4, 12, 0.6, task=task, new_tokens=NEW if task == "decode" else 0)
    origin = source(name)
    work = work_for(workload, origin.model, origin.kind, origin.device)
    work.expect(runner(name, "eager", "fp32"))
    return work


class Altered(Runner):
    """Another runner whose results are changed on their way out."""

    def __init__(self, inner: Runner, change: Callable[[Any], Any], logits: Any = lambda x: x) -> None:
        self.inner, self.change, self.change_logits = inner, change, logits

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        return self.change(dict(self.inner.forward(inputs)))

    def generate(self, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> Generated:
        result: Generated = self.change(self.inner.generate(inputs, new_tokens))
        return result

    def logits(self, inputs: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.change_logits(self.inner.logits(inputs, tokens))
        return result

    def train_step(self, inputs: Mapping[str, torch.Tensor]) -> TrainStep:
        result: TrainStep = self.change(self.inner.train_step(inputs))
        return result


def judged(work: Work, subject: Runner, precision: str, untouched: Runner | None = None) -> Parity:
    prepared = work.prepared(subject, precision)
    output = prepared.run()
    answer = output if prepared.answer is None else prepared.answer(output)
    return work.check(precision, answer, work.limit(precision, untouched))


@pytest.mark.parametrize(("name", "task"), CASES)
@pytest.mark.parametrize("key", ["sdpa", "fastattn", "fastattn-padded"])
def test_the_swapped_and_the_untouched_model_are_right_in_fp32(name: str, task: str, key: str) -> None:
    figure = judged(expecting(name, task), runner(name, key, "fp32"), "fp32")
    assert figure.passed and figure.kind == "parity", figure


@pytest.mark.parametrize(("name", "task"), CASES)
def test_bf16_is_held_to_what_the_untouched_model_loses_in_it(name: str, task: str) -> None:
    work, untouched = expecting(name, task), runner(name, "sdpa", "bf16")
    figure = judged(work, runner(name, "fastattn", "bf16"), "bf16", untouched)
    assert figure.passed and figure.kind == "precision" and figure.relative_error > 1e-5, figure
    assert figure.tolerance <= work.maximum < 1


def _rows_swapped(output: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x[[1, 0, *range(2, len(x))]] if isinstance(x, torch.Tensor) else x for name, x in output.items()
    }


def _with_nan(output: dict[str, Any]) -> dict[str, Any]:
    # The first token of a sequence is real where padding is on the right; the last always is on the left.
    main = next(iter(output))
    changed = output[main].clone()
    changed.view(-1)[-1 if main == "logits" else 0] = math.nan
    return {**output, main: changed}


def _slightly_off(output: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x + 3e-4 * x.abs().max() if isinstance(x, torch.Tensor) else x for name, x in output.items()
    }


@pytest.mark.parametrize(("name", "task"), FORWARD)
@pytest.mark.parametrize("change", [_rows_swapped, _with_nan, _slightly_off])
def test_a_wrong_forward_is_caught(name: str, task: str, change: Callable[[Any], Any]) -> None:
    work = expecting(name, task)
    assert not judged(work, Altered(runner(name, "sdpa", "fp32"), change), "fp32").passed
    if change is _slightly_off:
        return
    bf16 = runner(name, "sdpa", "bf16")
    assert not judged(work, Altered(bf16, change), "bf16", bf16).passed
    # An untrained classifier's logits are nearly the same whatever the sequence.
    if (task, change) != ("classify", _rows_swapped):
        assert not judged(work, Altered(runner(name, "sdpa", "fp32"), change), "int8").passed


@pytest.mark.parametrize(("name", "task"), FORWARD)
def test_noise_within_an_int8_gate_passes_and_beyond_it_does_not(name: str, task: str) -> None:
    work = expecting(name, task)

    def noisy(part: float) -> Altered:
        def change(output: dict[str, Any]) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(0)
            return {
                name: x + part * x.std() * torch.randn(x.shape, generator=generator)
                for name, x in output.items()
                if isinstance(x, torch.Tensor)
            }

        return Altered(runner(name, "sdpa", "fp32"), change)

    near, far = judged(work, noisy(0.05), "int8"), judged(work, noisy(1.5), "int8")
    assert near.passed and near.kind == "precision" and near.relative_error > 0
    assert not far.passed and far.tolerance == pytest.approx(0.02 if task == "classify" else 0.05)


def test_labels_of_a_single_sequence_are_judged_over_more_of_them() -> None:
    origin = source("bert-classifier")
    work = work_for(Workload(1, 12, task="classify"), origin.model, origin.kind, origin.device)
    # The head says nothing about the one sequence: whatever rounding adds is all there is.
    row = origin.model(**work.inputs).logits.detach()[0]

    def seen(change: Callable[[torch.Tensor], torch.Tensor]) -> Altered:
        inner = runner("bert-classifier", "sdpa", "fp32")
        return Altered(inner, lambda output: {"logits": change(output["logits"] - row)})

    work.expect(seen(lambda x: x))
    right = judged(work, seen(lambda x: x + 0.01 * x.new_tensor([1, -1, 1, -1, 1])), "int8")
    assert right.passed and right.relative_error > 0, right
    assert judged(work, seen(lambda x: x), "fp32").passed
    for wrong in (lambda x: x.roll(1, -1), lambda x: 2 * x, lambda x: 0 * x):
        assert not judged(work, seen(wrong), "int8").passed


def test_a_contender_without_an_output_beside_the_main_one_is_compared_on_what_it_has() -> None:
    work, right = expecting("bert", "encode"), runner("bert", "sdpa", "fp32")
    alone = Altered(right, lambda output: {"last_hidden_state": output["last_hidden_state"]})
    lone = Altered(right, lambda output: output["last_hidden_state"])
    assert judged(work, alone, "fp32").passed and judged(work, lone, "fp32").passed
    with pytest.raises(ValueError, match="no 'last_hidden_state'; it has pooler_output"):
        judged(work, Altered(right, lambda output: {"pooler_output": output["pooler_output"]}), "fp32")


def test_logits_of_the_last_position_alone_are_enough_after_a_prompt() -> None:
    work, right = expecting("gpt2", "prefill"), runner("gpt2", "sdpa", "fp32")
    assert judged(work, Altered(right, lambda output: output["logits"][:, -1]), "fp32").passed
    assert not judged(work, Altered(right, lambda output: output["logits"][:, -1].flip(0)), "fp32").passed


def _another_token(place: tuple[int, int]) -> Callable[[Generated], Generated]:
    def change(generated: Generated) -> Generated:
        tokens = generated.tokens.clone()
        tokens[place] = (tokens[place] + 1) % 99
        return replace(generated, tokens=tokens)

    return change


@pytest.mark.parametrize(("name", "task"), DECODE)
@pytest.mark.parametrize("place", [(0, 0), (3, NEW - 1)])
def test_one_wrong_token_is_caught_in_every_precision(name: str, task: str, place: tuple[int, int]) -> None:
    work, right = expecting(name, task), runner(name, "fastattn", "fp32")
    figure = judged(work, Altered(right, _another_token(place)), "fp32")
    assert not figure.passed and figure.output == "tokens" and figure.relative_error >= 1 / (4 * NEW)
    bf16 = runner(name, "sdpa", "bf16")
    assert not judged(work, Altered(right, _another_token(place)), "bf16", bf16).passed
    assert not judged(work, Altered(right, _another_token(place)), "int8").passed


@pytest.mark.parametrize(("name", "task"), DECODE)
def test_wrong_logits_and_swapped_prompts_are_caught_in_lower_precisions(name: str, task: str) -> None:
    work, right, bf16 = expecting(name, task), runner(name, "fastattn", "fp32"), runner(name, "sdpa", "bf16")
    swapped = Altered(right, lambda x: replace(x, tokens=x.tokens.flip(0)), lambda x: x.flip(0))
    poisoned = Altered(right, lambda x: x, lambda x: x * math.nan)
    for precision, untouched in (("bf16", bf16), ("int8", None)):
        assert judged(work, right, precision, untouched).passed
        assert not judged(work, swapped, precision, untouched).passed
        assert not judged(work, poisoned, precision, untouched).passed


def test_an_offset_that_all_logits_share_does_not_make_wrong_ones_look_right() -> None:
    work, right = expecting("gpt2", "decode"), runner("gpt2", "fastattn", "fp32")
    shuffled = Altered(right, lambda x: x, lambda x: x.roll(1, -1) - 1000)
    assert not judged(work, shuffled, "int8").passed


def test_too_few_tokens_are_an_error() -> None:
    work, right = expecting("gpt2", "decode"), runner("gpt2", "sdpa", "fp32")
    short = Altered(right, lambda x: replace(x, tokens=x.tokens[:, :-1]))
    for precision in ("fp32", "int8"):
        with pytest.raises(ValueError, match=r"\[4, 4\], the reference's are \[4, 5\]"):
            judged(work, short, precision)


def test_a_tie_may_be_decided_either_way_and_what_follows_is_not_compared() -> None:
    class Fixed(Runner):
        """Tokens 1, 2, 3, where 2 and 4 are as good as each other."""

        def __init__(self, tokens: list[int], gap: float) -> None:
            self.tokens, self.gap = torch.tensor([tokens]), gap

        def generate(self, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> Generated:
            return Generated(self.tokens)

        def logits(self, inputs: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
            logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3]]), 99).float()
            logits[0, 1, 4] = 1 - self.gap
            return logits

    origin = source("gpt2")
    for gap, tokens, passes in (
        (5e-5, [1, 4, 9], True),
        (5e-5, [1, 5, 9], False),
        (5e-3, [1, 4, 3], False),
        (5e-5, [4, 2, 3], False),
    ):
        work = work_for(Workload(1, 4, task="decode", new_tokens=3), origin.model, origin.kind, origin.device)
        work.expect(Fixed([1, 2, 3], gap))
        assert judged(work, Fixed(tokens, gap), "fp32").passed is passes, (gap, tokens)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("factor", [0.0, -1.0, 1.001, math.nan])
def test_one_wrong_gradient_is_caught(name: str, factor: float) -> None:
    work, right = expecting(name, "train"), runner(name, "sdpa", "fp32")
    # A large one: those that are zero but for rounding may be anything of that size.
    reference = work.prepared(right, "fp32").run().gradients
    largest = max(reference, key=lambda parameter: float(reference[parameter].abs().max()))

    def change(step: TrainStep) -> TrainStep:
        return replace(step, gradients={**step.gradients, largest: step.gradients[largest] * factor})

    figure = judged(work, Altered(right, change), "fp32")
    assert not figure.passed and figure.output == f"gradient of {largest}", figure
    if factor != 1.001:
        bf16 = runner(name, "sdpa", "bf16")
        assert not judged(work, Altered(bf16, change), "bf16", bf16).passed


def test_a_missing_gradient_and_a_wrong_loss_are_caught() -> None:
    work, right = expecting("llama", "train"), runner("llama", "sdpa", "fp32")

    def without(step: TrainStep) -> TrainStep:
        kept = {name: x for name, x in step.gradients.items() if "embed" not in name}
        return replace(step, gradients=kept)

    assert not judged(work, Altered(right, without), "fp32").passed
    figure = judged(work, Altered(right, lambda step: replace(step, loss=step.loss * 1.01)), "fp32")
    assert not figure.passed and figure.output == "loss"


def test_prompts_are_padded_on_the_left_and_everything_else_on_the_right() -> None:
    for name, task in CASES:
        work = expecting(name, task)
        mask = work.inputs["attention_mask"].bool()
        assert bool((~mask).any())
        left = name in ("gpt2", "llama") and task != "train"
        ordered = mask[:, 1:] >= mask[:, :-1] if left else mask[:, :-1] >= mask[:, 1:]
        assert bool(ordered.all()), (name, task)
        real = torch.cat([row[kept] for row, kept in zip(work.inputs["input_ids"], mask, strict=True)])
        plain = work.workload.tokens(99, avoid=getattr(source(name).model.config, "pad_token_id", None))
        assert torch.equal(real, plain["input_ids"][plain["attention_mask"].bool()]), (name, task)


def test_what_a_prompts_padding_holds_changes_no_answer() -> None:
    work, subject = expecting("gpt2", "decode"), runner("gpt2", "eager", "fp32")
    mask = work.inputs["attention_mask"]
    other = {**work.inputs, "input_ids": work.inputs["input_ids"].masked_fill(mask == 0, 77)}
    assert torch.equal(subject.generate(work.inputs, NEW).tokens, subject.generate(other, NEW).tokens)
    # One at a time there is no padding at all.
    for index, row in enumerate(mask):
        alone = {name: x[index : index + 1, row.bool()] for name, x in work.inputs.items()}
        expected = subject.generate(work.inputs, NEW).tokens[index]
        assert torch.equal(subject.generate(alone, NEW).tokens[0], expected)


def test_labels_are_the_batchs_tokens_and_padding_has_none() -> None:
    for name in ("gpt2", "llama", "t5"):
        inputs = expecting(name, "train").inputs
        real = inputs["attention_mask"].bool()
        assert bool((inputs["labels"][~real] == -100).all())
        assert torch.equal(inputs["labels"][real], inputs["input_ids"][real])
    assert expecting("bert-classifier", "train").inputs["labels"].shape == (4,)
    assert "labels" not in expecting("bert", "train").inputs


@pytest.mark.parametrize(("name", "task"), [*DECODE, ("llama", "train")])
def test_parts_of_a_call_are_told(name: str, task: str) -> None:
    prepared = expecting(name, task).prepared(runner(name, "fastattn", "fp32"), "fp32")
    assert prepared.parts is not None
    parts = prepared.parts(prepared.run())
    counts = {"first_token_ms": 1, "inter_token_ms": NEW - 1} if task == "decode" else {}
    counts = counts or {"forward_ms": 1, "backward_ms": 1}
    assert {part: len(values) for part, values in parts.items()} == counts
    assert all(value > 0 for values in parts.values() for value in values)


def test_a_precision_without_a_gate_is_refused() -> None:
    with pytest.raises(ValueError, match="precision is 'int3'; it must be one of fp32, bf16, fp16"):
        expecting("bert", "encode").limit("int3", None)
    with pytest.raises(ValueError, match="takes the untouched model in bf16"):
        work_for(Workload(2, 8), source("bert").model, "encoder", torch.device("cpu")).limit("bf16", None)
