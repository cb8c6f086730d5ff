"""Fine-tuning through transformers' Trainer, padding-free, for the scripts of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import fastattn

__all__ = ["batches", "fine_tune"]


def batches(tokenizer: Any, texts: list[str], batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Texts as padded batches of real lengths, in the order given."""
    return [
        dict(tokenizer(texts[start : start + batch_size], padding=True, truncation=True, return_tensors="pt"))
        for start in range(0, len(texts), batch_size)
    ]


def fine_tune(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    collator: Any,
    folder: Path,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    weight_decay: float = 0.01,
    bf16: bool = True,
) -> None:
    """Train `model` on `rows` with AdamW, a tenth of the steps warming up, and save it to `folder`.

    The layers are fastattn's while it trains, so that padding is not computed; what is saved is the model's
    own. With `bf16` the products run in bfloat16 and the weights stay float32.
    """
    from transformers import Trainer, TrainingArguments

    steps = epochs * -(-len(rows) // batch_size)
    arguments = TrainingArguments(
        output_dir=str(folder / "training"),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        weight_decay=weight_decay,
        warmup_steps=steps // 10,
        lr_scheduler_type="linear",
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        logging_steps=50,
        seed=0,
        dataloader_pin_memory=False,
    )
    with fastattn.optimized(model, mode="training"):
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator).train()
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
