"""tinyshakespeare: a small GPT-2 trained from nothing, then quantized; perplexity, size and speed of each,
and the perplexity of the trained one where it reads a text token by token from a quantized cache.

    FASTATTN_DATA=... python benchmarks/quality/language_model.py --output CHECKPOINTS [--train-only]

Writes benchmarks/results/quality-language-model.json. What is finished is in CHECKPOINTS and not done again.
"""

from __future__ import annotations

import argparse
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from fine_tuning import fine_tune
from record import linear_share, promise, record
from torch.nn.functional import cross_entropy

from fastattn.compress import sweep
from fastattn.compress.kv_cache import KV_CACHES, QuantizedCache

_VOCABULARY = 2048
_CONTEXT = 128
_BATCH = 16
# Windows that are read token by token at a time.
_READ = 64
# Windows of a timed batch, a prompt each; and of the text that calibrates.
_TIMED, _CALIBRATION = 4, 64
_POINTS: list[dict[str, Any]] = [
    {"name": "fused"},
    {"quantize": "int8"},
    {"quantize": "int8-weight"},
    *({"quantize": {"scheme": "int4-weight", "method": method}} for method in ("absmax", "hqq", "gptq")),
]


def read() -> tuple[str, str]:
    """The first nine tenths to train on, the last to validate."""
    text = (Path(os.environ["FASTATTN_DATA"]) / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    border = text.index("\n\n", len(text) * 9 // 10)
    return text[:border], text[border:]


def train_tokenizer(text: str) -> Any:
    """A byte-level BPE of this text's own."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [text], vocab_size=_VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )  # fmt: skip


def windows(tokenizer: Any, text: str, length: int, stride: int) -> list[list[int]]:
    ids = tokenizer(text)["input_ids"]
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, stride)]


def perplexity(model: Any, tokenizer: Any, text: str) -> float:
    """exp of the mean loss of a next token over windows of the context that do not overlap."""
    rows = torch.tensor(windows(tokenizer, text, _CONTEXT, _CONTEXT))
    with torch.inference_mode():
        losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in rows.split(_BATCH)]
    return float((torch.stack(losses).sum() / len(rows)).exp())


def cached_perplexity(model: Any, tokenizer: Any, text: str, kind: str | None) -> float:
    """`perplexity` where every token is a call of its own and sees those before it in a cache.

    Args:
        kind: what past keys and values are kept in, "int8" or "fp8"; None as they are.
    """
    from transformers import DynamicCache

    rows = torch.tensor(windows(tokenizer, text, _CONTEXT, _CONTEXT))
    losses = []
    with torch.inference_mode():
        for batch in rows.split(_READ):
            cache = DynamicCache(config=model.config) if kind is None else QuantizedCache(model.config, kind)
            for token, following in pairwise(batch.split(1, dim=1)):
                logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
                losses.append(cross_entropy(logits, following[:, 0], reduction="sum"))
    return float((torch.stack(losses).sum() / (len(rows) * (_CONTEXT - 1))).exp())


def train(folder: Path) -> None:
    """Train a GPT-2 of 4 layers and 256 columns, and its tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel, default_data_collator

    text, _ = read()
    tokenizer = train_tokenizer(text)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=256, n_embd=256, n_layer=4, n_head=4,
            bos_token_id=0, eos_token_id=0, embd_pdrop=0.1, resid_pdrop=0.1, attn_pdrop=0.1,
        )
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids} for ids in windows(tokenizer, text, _CONTEXT, _CONTEXT // 2)]
    fine_tune(
        model, tokenizer, rows, default_data_collator, folder,
        epochs=6, learning_rate=1e-3, batch_size=_BATCH, weight_decay=0.1,
    )  # fmt: skip


def compress(folder: Path) -> int:
    """Measure every point; the exit status says whether promises are kept."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    text, held_out = read()
    rows = torch.tensor(windows(tokenizer, text, _CONTEXT, _CONTEXT)[:_CALIBRATION])
    prompts = torch.tensor(windows(tokenizer, held_out, _CONTEXT, _CONTEXT)[:_TIMED])
    result = sweep(
        model,
        lambda each: {"perplexity": perplexity(each, tokenizer, held_out), **linear_share(each)},
        _POINTS,
        folder=folder / "sweep",
        calibration=[{"input_ids": batch} for batch in rows.split(_BATCH)],
        workload={"input_ids": prompts},
        higher_is_better=False,
    )
    points = {point.name: point for point in result.points}
    int4 = [point.score for name, point in points.items() if name.startswith("int4") and point.score]
    before = result.untouched.score or float("nan")

    def grown(score: float | None) -> float | None:
        return None if score is None else 100 * (score / before - 1)

    unquantized = cached_perplexity(model, tokenizer, held_out, None)
    cached = {kind: cached_perplexity(model, tokenizer, held_out, kind) for kind in KV_CACHES}

    return record(
        "language-model",
        result,
        [
            promise("int8: per cent of perplexity added", grown(points["int8"].score), 1.0),
            promise("int4-weight, the best method: per cent added", grown(min(int4, default=None)), 3.0),
            *(
                promise(
                    f"{kind} cache, token by token: per cent added to {unquantized:.5g}",
                    100 * (score / unquantized - 1),
                    1.0,
                )
                for kind, score in cached.items()
            ),
        ],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder of the checkpoints")
    parser.add_argument("--train-only", action="store_true", help="train, and compress nothing")
    args = parser.parse_args()
    if not (args.output / "config.json").is_file():
        train(args.output)
    return 0 if args.train_only else compress(args.output)


if __name__ == "__main__":
    raise SystemExit(main())
