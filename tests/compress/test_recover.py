"""Recovery: distillation reaches the teacher, an interruption changes nothing, bad input is said first."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fastattn.compress.distillation import Distillation, mapped_layers  # noqa: E402
from fastattn.compress.recovery import recover  # noqa: E402

pytestmark = pytest.mark.model

SIZES = dict(
    vocab_size=60, hidden_size=24, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16
)


def classifier(layers: int = 2, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    # Weights as large as trained ones: answers that differ.
    config = transformers.BertConfig(**SIZES, num_hidden_layers=layers, initializer_range=0.3)
    return transformers.BertForSequenceClassification(config).eval()


def rows(count: int = 32) -> list[dict[str, Any]]:
    """Of several lengths, padded by hand: a row's label is whether its first word is one of the low half."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(count):
        length = 4 + index % 5
        ids = torch.randint(3, 60, (length,), generator=generator).tolist()
        padding = [0] * (8 - length)
        found.append(
            {
                "input_ids": ids + padding,
                "attention_mask": [1] * length + padding,
                "labels": int(ids[0] < 31),
            }
        )
    return found


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_student_comes_nearer_its_teacher_and_the_teacher_stays(tmp_path: Path) -> None:
    teacher, student = classifier(2), classifier(1, seed=3)
    before, given = weights(teacher), rows()
    batch = {name: torch.tensor([row[name] for row in given]) for name in ("input_ids", "attention_mask")}
    distance = (student(**batch).logits - teacher(**batch).logits).norm()
    unlabelled = [{name: row[name] for name in batch} for row in given]
    report = recover(
        student, teacher, unlabelled, output_dir=tmp_path, epochs=12, batch_size=8, learning_rate=2e-3
    )
    assert report.settings["loss"] == "distillation" and report.steps == 48
    assert (student(**batch).logits - teacher(**batch).logits).norm() < 0.6 * distance
    assert report.history[-1]["loss"] < report.history[0]["loss"]
    assert_same(weights(teacher), before)
    assert type(teacher.bert.encoder).__module__.startswith("transformers.") and not student.training


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastattn.compress.recovery_trainer import RecoveryTrainer

    teacher, given = classifier(2), rows(24)
    options: dict[str, Any] = dict(epochs=3, batch_size=4, learning_rate=1e-3, eval_dataset=given[:8])
    whole = classifier(1)
    uninterrupted = recover(whole, teacher, given, output_dir=tmp_path / "whole", **options)

    broken, step = classifier(1), RecoveryTrainer.training_step

    def until_eleven(self: Any, *args: Any, **more: Any) -> Any:
        if self.state.global_step == 11:
            raise KeyboardInterrupt
        return step(self, *args, **more)

    monkeypatch.setattr(RecoveryTrainer, "training_step", until_eleven)
    with pytest.raises(KeyboardInterrupt):
        recover(broken, teacher, given, output_dir=tmp_path / "broken", **options)
    monkeypatch.undo()
    # A half-written checkpoint is what an interruption may leave, too.
    (tmp_path / "broken" / "checkpoints" / "checkpoint-11").mkdir()
    torch.rand(7)
    resumed = recover(classifier(1), teacher, given, output_dir=tmp_path / "broken", **options)
    assert resumed.resumed_from == 10 and resumed.steps == uninterrupted.steps == 18
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "broken")
    assert_same(weights(again), weights(whole))
    assert resumed.history == uninterrupted.history
    assert resumed.metrics == uninterrupted.metrics


@pytest.mark.once
def test_a_finished_run_called_again_gives_the_trained_weights_at_once(tmp_path: Path) -> None:
    teacher, first, second = classifier(2), classifier(1), classifier(1)
    options: dict[str, Any] = dict(output_dir=tmp_path, batch_size=8)
    recover(first, teacher, rows(), **options)
    report = recover(second, teacher, rows(), **options)
    assert report.resumed_from == report.steps
    assert_same(weights(first), weights(second))


@pytest.mark.once
def test_metrics_of_both_models_are_in_the_report_and_the_folder(tmp_path: Path) -> None:
    teacher, student = classifier(2), classifier(1)
    config = copy.deepcopy(student.config.to_dict())
    report = recover(
        student, teacher, rows(), eval_dataset=rows(8), output_dir=tmp_path, metrics=accuracy, batch_size=8
    )
    assert {"before", "after", "teacher"} == report.metrics.keys()
    assert all({"loss", "accuracy"} == each.keys() for each in report.metrics.values())
    assert "accuracy" in report.table()
    saved = json.loads((tmp_path / "recovery.json").read_text(encoding="utf-8"))
    assert saved["schema"] == "fastattn.recovery/1" and saved["metrics"] == report.metrics
    assert student.config.use_cache == config["use_cache"]


@pytest.mark.once
def test_it_trains_a_decoder_by_the_text_alone_and_an_encoder_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gpt = transformers.GPT2Config(vocab_size=60, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    teacher, texts = transformers.GPT2LMHeadModel(gpt).eval(), [{"input_ids": [5, 6, 7, 8]}] * 8
    student = copy.deepcopy(teacher)
    report = recover(student, teacher, texts, output_dir=tmp_path / "gpt", batch_size=4, hidden_states=False)
    assert report.steps == 2 and student.config.use_cache
    t5 = transformers.T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    source = transformers.T5ForConditionalGeneration(t5).eval()
    pairs = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0], "labels": [9, 10, -100, -100]}] * 4
    target = copy.deepcopy(source)
    report = recover(target, source, pairs, output_dir=tmp_path / "t5", batch_size=2, loss="distillation")
    assert report.steps == 2


@pytest.mark.once
def test_a_plain_module_is_taught_by_its_outputs(tmp_path: Path) -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    teacher, student = Plain().eval(), Plain().eval()
    given = [{"x": torch.randn(4, 8)} for _ in range(16)]
    x = torch.stack([row["x"] for row in given])
    before = (teacher(x) - student(x)).norm()
    recover(student, teacher, given, output_dir=tmp_path, epochs=10, batch_size=8, learning_rate=1e-2)
    assert (teacher(x) - student(x)).norm() < 0.8 * before
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hard"}, "loss is 'hard'; it must be one of auto, task, distillation, both"),
        ({"teacher": None, "loss": "both"}, "needs a teacher"),
        ({"train_dataset": []}, "without rows"),
        ({"train_dataset": [[1, 2]]}, "a mapping is accepted"),
        ({"epochs": 0}, "epochs is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"teacher": "wider"}, "pass hidden_states=False"),
        ({"teacher": None, "train_dataset": [{"input_ids": [3, 4]}]}, "neither a teacher nor a label"),
    ],
)
def test_bad_input_is_said_and_changes_nothing(tmp_path: Path, options: Any, message: str) -> None:
    student, teacher = classifier(1), classifier(2)
    if options.get("teacher") == "wider":
        config = transformers.BertConfig(**{**SIZES, "hidden_size": 32}, num_hidden_layers=2)
        options = {"teacher": transformers.BertForSequenceClassification(config)}
    given = {"teacher": teacher, "train_dataset": rows(8), **options}
    before, place = weights(student), tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        recover(student, output_dir=place, **given)
    assert not place.exists()
    assert_same(weights(student), before)


@pytest.mark.once
def test_a_folder_with_another_run_is_left_alone(tmp_path: Path) -> None:
    teacher = classifier(2)
    recover(classifier(1), teacher, rows(8), output_dir=tmp_path, batch_size=8)
    with pytest.raises(ValueError, match="other arguments: learning_rate differ"):
        recover(classifier(1), teacher, rows(8), output_dir=tmp_path, batch_size=8, learning_rate=1e-3)
    report = recover(
        classifier(1), teacher, rows(8), output_dir=tmp_path, batch_size=8, learning_rate=1e-3, resume=False
    )
    assert report.resumed_from == 0


@pytest.mark.once
def test_the_student_itself_and_a_student_without_gradients_are_refused(tmp_path: Path) -> None:
    student = classifier(1)
    with pytest.raises(ValueError, match="the student itself"):
        recover(student, student, rows(8), output_dir=tmp_path)
    with pytest.raises(ValueError, match="recover before quantizing"):
        recover(student.requires_grad_(False), classifier(2), rows(8), output_dir=tmp_path)


@pytest.mark.once
def test_padding_and_scale_do_not_count_in_the_loss() -> None:
    distillation = Distillation(temperature=3.0)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    logits, states = torch.randn(2, 3, 5), torch.randn(2, 3, 4)
    other = logits + torch.randn(2, 3, 5) * mask[..., None]

    def loss(mine: torch.Tensor, states_of_mine: torch.Tensor, factor: float = 1.0) -> float:
        student = {"logits": mine, "hidden_states": (states_of_mine * factor,) * 2}
        teacher = {"logits": logits, "hidden_states": (states * factor,) * 3}
        return float(distillation.loss(student, teacher, {"attention_mask": mask}))

    assert loss(logits, states) == pytest.approx(0.0, abs=1e-6)
    changed = other.masked_fill(mask[..., None] == 0, 1e4)
    assert loss(other, states) > 0
    assert loss(changed, states) == pytest.approx(loss(other, states))
    assert loss(logits, states + 0.1) == pytest.approx(loss(logits, states + 0.1, 1000.0), rel=1e-4)
    # Hinton et al.: the gradient of the softened divergence keeps its scale by the square of the temperature.
    real = mask.bool()
    p, q = (logits[real] / 3).softmax(-1), (other[real] / 3).softmax(-1)
    expected = 9 * (p * (p / q).log()).sum(-1).mean()
    assert loss(other, states) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.once
def test_layers_are_mapped_from_the_first_to_the_last() -> None:
    assert mapped_layers(7, 7) == list(range(7))
    assert mapped_layers(4, 13) == [0, 4, 8, 12]
    assert mapped_layers(2, 7) == [0, 6]


@pytest.mark.once
def test_the_loss_is_the_same_on_the_fused_layers() -> None:
    """Training runs without padding; what is learnt must be what the plain layers would learn."""
    import fastattn

    teacher, student, given = classifier(2), classifier(1, seed=3), rows(8)
    batch = {name: torch.tensor([row[name] for row in given]) for name in ("input_ids", "attention_mask")}

    def loss() -> torch.Tensor:
        taught, learnt = (each(**batch, output_hidden_states=True) for each in (teacher, student))
        return Distillation().loss(learnt, taught, batch)

    plain = loss()
    plain.backward()
    gradients = {
        name: each.grad.clone() for name, each in student.named_parameters() if each.grad is not None
    }
    student.zero_grad()
    with fastattn.optimized(student, mode="training"), fastattn.optimized(teacher):
        fused = loss()
        fused.backward()
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)
    for name, each in student.named_parameters():
        if name in gradients:
            torch.testing.assert_close(each.grad, gradients[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.once
def test_training_in_bf16_leaves_both_models_in_float32(tmp_path: Path) -> None:
    teacher, student = classifier(2), classifier(1)
    batch = {name: torch.tensor([row[name] for row in rows(4)]) for name in ("input_ids", "attention_mask")}
    before = teacher(**batch).logits
    recover(
        student, teacher, rows(16), eval_dataset=rows(8), output_dir=tmp_path, batch_size=8, precision="bf16"
    )
    assert torch.equal(teacher(**batch).logits, before)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(student(**batch).logits, again(**batch).logits)
    assert "forward" not in {**student.__dict__, **teacher.__dict__}
    assert {each.dtype for each in student.parameters()} == {torch.float32}
