"""The Trainer that `recover` trains and measures with. Imported only where transformers is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from fastattn.compress.distillation import named_outputs

__all__ = ["RecoveryTrainer", "recovery_trainer"]

Loss = Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, Any]]

# What labels of unequal length are padded with; losses leave it out.
_NO_LABEL = -100


class RecoveryTrainer(Trainer):
    """A Trainer on a loss of ours; with none it measures by the model's own."""

    def __init__(self, loss: Loss | None, **options: Any) -> None:
        super().__init__(**options)
        self.recovery_loss = loss
        # Our loss is a mean over the batch: the Trainer shall not count its items.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.recovery_loss is not None:
            loss, output = self.recovery_loss(model, inputs)
        else:
            output = model(**inputs)
            # A module without a loss of its own is measured by the metrics alone.
            loss = named_outputs(output).get("loss", torch.tensor(float("nan")))
        return (loss, named_outputs(output)) if return_outputs else loss


class _Progress(TrainerCallback):
    """A bar on standard error: the Trainer's own writes its log to standard output."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="recover", disable=None, leave=False
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.4g}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def recovery_trainer(
    model: nn.Module,
    loss: Loss | None,
    train_rows: Any,
    eval_rows: Any,
    tokenizer: Any,
    metrics: Any,
    **arguments: Any,
) -> RecoveryTrainer:
    """A trainer that saves every `save_steps` and keeps the last checkpoint."""
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    trainer = RecoveryTrainer(
        loss,
        model=model,
        args=TrainingArguments(
            weight_decay=0.01,
            lr_scheduler_type="linear",
            save_strategy="steps",
            save_total_limit=1,
            report_to="none",
            # A plain module's rows have the names of its forward's arguments, too.
            remove_unused_columns=True,
            dataloader_pin_memory=not arguments["use_cpu"],
            **arguments,
        ),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=_Collator(tokenizer),
        compute_metrics=metrics,
    )
    if use_cache is not None:
        # The Trainer switches it off, and what is saved would never generate with a cache again.
        config.use_cache = use_cache
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Progress)
    return trainer


class _Collator:
    """Rows to a batch: token ids and what goes with them padded by the tokenizer, labels by -100."""

    def __init__(self, tokenizer: Any) -> None:
        self.pad = None if tokenizer is None else DataCollatorWithPadding(tokenizer)

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        if self.pad is None or "input_ids" not in rows[0]:
            batch: dict[str, Any] = default_data_collator([dict(row) for row in rows])
            return batch
        labels = [row["labels"] for row in rows if "labels" in row]
        without = [{name: each for name, each in row.items() if name != "labels"} for row in rows]
        batch = dict(self.pad(without))
        if labels and not hasattr(labels[0], "__len__"):
            batch["labels"] = torch.tensor(labels)
        elif labels:
            length = max(map(len, labels))
            batch["labels"] = torch.tensor(
                [[*map(int, row), *[_NO_LABEL] * (length - len(row))] for row in labels]
            )
        return batch
