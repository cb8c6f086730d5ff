"""Every kind of architecture on this machine: encoders on ragged batches, encoder-decoders, decoders,
interleaved with the untouched model.

    python benchmarks/families.py --name cpu-families            # about eight minutes on two cores
    python benchmarks/families.py --name cpu-families --runs minilm-stsb,t5-small-decode

Writes benchmarks/results/NAME.json. The exit status is 1 where a promise does not hold.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastattn
from fastattn.bench import Workload
from fastattn.bench.environment import capture_environment
from fastattn.bench.files import require_writable, write_text
from fastattn.bench.parity import compare
from fastattn.bench.ratio import METHOD
from fastattn.bench.timing import Contender, measure
from fastattn.cli.models import load_model
from fastattn.report import format_table
from fastattn.verification import shared_copy

RESULTS = Path(__file__).parent / "results"
SCHEMA = "fastattn.families/1"

RAGGED, SINGLE = Workload(8, 128, 0.47), Workload(1, 128, 1.0)
# "Not slower" is a lower bound of 0.97.
NOT_SLOWER = 0.97


@dataclass(frozen=True)
class Run:
    """One model doing one thing.

    Attributes:
        name: of the row.
        model: makes the untouched model.
        work: makes, from a model, what is timed.
        at_least: the ratio promised over the faster of the untouched eager and SDPA models; "bert" is what
            BERT reaches in the same process, less a twentieth.
        bound: "value", or "low" where the lower end of the interval is judged.
    """

    name: str
    model: Callable[[], torch.nn.Module]
    work: Callable[[torch.nn.Module], Callable[[], Any]]
    at_least: float | str = NOT_SLOWER
    bound: str = "low"


def build(class_name: str, config_name: str, **options: Any) -> torch.nn.Module:
    """A model of random weights: the seed is fixed, the configuration the class's own default but for
    `options`.
    """
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: torch.nn.Module = getattr(transformers, class_name)(
            getattr(transformers, config_name)(**options)
        )
    return model.eval()


def random_model(name: str) -> torch.nn.Module:
    """One of the models that every verb can be given by name."""
    return load_model(name)[0]


def encode(model: Any, workload: Workload = RAGGED, encoder: bool = False) -> Callable[[], Any]:
    """The last hidden state of a batch of tokens, of the model's encoder alone where it has two halves."""
    batch = workload.tokens(model.config.vocab_size, avoid=model.config.pad_token_id)
    module = model.get_encoder() if encoder else model
    return lambda: module(**batch)[0] * batch["attention_mask"][..., None]


def encode_sentences(model: Any) -> Callable[[], Any]:
    """Four batches of 64 consecutive sentences of STS-B, each padded to its longest: fill 0.55."""
    _, tokenizer = load_model("minilm")
    with open(Path(os.environ["FASTATTN_DATA"]) / "stsb" / "dev.csv", newline="", encoding="utf-8") as file:
        texts = [text for row in csv.reader(file) for text in row[:2]]
    groups = [texts[start : start + 64] for start in range(64, 320, 64)]
    batches = [dict(tokenizer(group, padding=True, return_tensors="pt")) for group in groups]
    return lambda: [model(**batch)[0] * batch["attention_mask"][..., None] for batch in batches]


def torch_encoder(
    d_model: int, heads: int, layers: int, activation: str = "relu", norm_first: bool = False
) -> torch.nn.Module:
    """torch.nn's own encoder, with random weights. In evaluation, without gradients, batch first and
    post-norm, it makes a nested tensor of a batch with padding: its own fast path.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # A pre-norm encoder is told that it makes no nested tensor.
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(
            d_model, heads, 4 * d_model, activation=activation, batch_first=True, norm_first=norm_first
        )
        return torch.nn.TransformerEncoder(layer, layers).eval()


def encode_vectors(model: Any, workload: Workload) -> Callable[[], Any]:
    """The output of torch.nn's encoder for a padded batch, at real positions."""
    mask = workload.tokens(10)["attention_mask"]
    width = model.layers[0].linear1.in_features
    src = torch.randn(*mask.shape, width, generator=torch.Generator().manual_seed(0))
    padding = mask == 0
    return lambda: model(src, src_key_padding_mask=padding) * mask[..., None]


def prefill(model: Any, batch_size: int = 1, length: int = 128) -> Callable[[], Any]:
    """The logits of the token after a prompt."""
    ids = Workload(batch_size, length).tokens(model.config.vocab_size)["input_ids"]
    return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1).logits


def decode_step(model: Any, batch_size: int = 1, length: int = 128) -> Callable[[], Any]:
    """One more token after a prompt, from its cache."""
    ids = Workload(batch_size, length).tokens(model.config.vocab_size)["input_ids"]
    with torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    token = ids[:, :1]

    def step() -> Any:
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return step


def decode_step_after_encoder(model: Any, batch_size: int = 1, generated: int = 16) -> Callable[[], Any]:
    """One more token of an encoder-decoder, from the caches of 32 source tokens and 16 generated ones."""
    from transformers.modeling_outputs import BaseModelOutput

    source = Workload(batch_size, 32, 1.0 if batch_size == 1 else 0.6).tokens(
        model.config.vocab_size, avoid=model.config.pad_token_id
    )
    mask = source["attention_mask"]
    ids = Workload(batch_size, generated).tokens(model.config.vocab_size)["input_ids"]
    with torch.inference_mode():
        states = BaseModelOutput(last_hidden_state=model.get_encoder()(**source).last_hidden_state)
        cache = model(
            encoder_outputs=states, attention_mask=mask, decoder_input_ids=ids, use_cache=True
        ).past_key_values
    token = ids[:, :1]

    def step() -> Any:
        logits = model(
            encoder_outputs=states,
            attention_mask=mask,
            decoder_input_ids=token,
            past_key_values=cache,
            use_cache=True,
        ).logits
        cache.crop(-1)
        return logits

    return step


# opus-mt's own sizes; Marian's defaults are BART's.
MARIAN = dict(
    vocab_size=58101, d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8,
    decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048, max_position_embeddings=512,
    pad_token_id=58100, eos_token_id=0, decoder_start_token_id=58100, scale_embedding=True,
    activation_function="swish",
)  # fmt: skip

bert = partial(random_model, "bert-base-random")
roberta = partial(build, "RobertaModel", "RobertaConfig", max_position_embeddings=514, vocab_size=50265)
distilbert = partial(build, "DistilBertModel", "DistilBertConfig")
electra = partial(
    build, "ElectraModel", "ElectraConfig", embedding_size=768, hidden_size=768, intermediate_size=3072,
    num_attention_heads=12,
)  # fmt: skip
modernbert = partial(build, "ModernBertModel", "ModernBertConfig")
t5_small = partial(random_model, "t5-small-random")
marian = partial(build, "MarianMTModel", "MarianConfig", **MARIAN)
gpt2 = partial(random_model, "gpt2-random")
llama = partial(random_model, "llama-100m-random")

small = partial(torch_encoder, 512, 8, 6)
pre_norm = partial(torch_encoder, 512, 8, 6, norm_first=True)
large = partial(torch_encoder, 768, 12, 12, activation="gelu")


def half_filled(batch_size: int, length: int) -> Callable[[Any], Callable[[], Any]]:
    return partial(encode_vectors, workload=Workload(batch_size, length, 0.5))


def full(batch_size: int, length: int) -> Callable[[Any], Callable[[], Any]]:
    return partial(encode_vectors, workload=Workload(batch_size, length, 1.0))


RUNS = (
    Run("BERT-base encode", bert, encode, at_least=1.0, bound="value"),
    Run("RoBERTa-base encode", roberta, encode, at_least="bert", bound="value"),
    Run("DistilBERT encode", distilbert, encode, at_least="bert", bound="value"),
    Run("ELECTRA-base encode", electra, encode, at_least="bert", bound="value"),
    Run("ModernBERT-base encode", modernbert, encode, at_least="bert", bound="value"),
    Run("MiniLM STS-B batch of 64", lambda: load_model("minilm")[0], encode_sentences, 1.7, "value"),
    Run("nn.TransformerEncoder 6 x 512, 16 x 128, 50% fill", small, half_filled(16, 128), 1.5, "value"),
    Run("nn.TransformerEncoder 6 x 512, 8 x 128, 50% fill", small, half_filled(8, 128), 1.5, "value"),
    Run("nn.TransformerEncoder 6 x 512, 8 x 512, 50% fill", small, half_filled(8, 512), 1.5, "value"),
    Run("nn.TransformerEncoder pre-norm, 16 x 128, 50% fill", pre_norm, half_filled(16, 128), 1.5, "value"),
    Run("nn.TransformerEncoder 12 x 768, 8 x 128, 50% fill", large, half_filled(8, 128), 1.5, "value"),
    Run("nn.TransformerEncoder 6 x 512, 16 x 128, full", small, full(16, 128)),
    Run("T5-small encode", t5_small, partial(encode, encoder=True)),
    Run("T5-small decode, batch 1", t5_small, decode_step_after_encoder),
    Run("T5-small decode, batch 8", t5_small, partial(decode_step_after_encoder, batch_size=8)),
    Run("Marian encode", marian, partial(encode, encoder=True)),
    Run("Marian decode, batch 1", marian, decode_step_after_encoder),
    Run("Marian decode, batch 8", marian, partial(decode_step_after_encoder, batch_size=8)),
    Run("GPT-2 prefill 1 x 128", gpt2, prefill),
    Run("GPT-2 prefill 4 x 256", gpt2, partial(prefill, batch_size=4, length=256)),
    Run("GPT-2 decode, batch 1", gpt2, decode_step),
    Run("Llama 100M prefill 1 x 128", llama, prefill),
    Run("Llama 100M prefill 4 x 256", llama, partial(prefill, batch_size=4, length=256)),
    Run("Llama 100M decode, batch 1", llama, decode_step),
)


def contenders(run: Run) -> Iterator[Contender]:
    """All on the same weights in memory: one token's time is reading them, from pages that may be better or
    worse placed.
    """
    base: Any = run.model()
    if not hasattr(base, "set_attn_implementation"):
        yield Contender("torch.nn fp32", run.work(shared_copy(base)))
    for implementation in ("eager", "sdpa") if hasattr(base, "set_attn_implementation") else ():
        model: Any = shared_copy(base)
        model.set_attn_implementation(implementation)
        yield Contender(f"{implementation.replace('sdpa', 'SDPA')} fp32", run.work(model))
    fastattn.optimize(base)
    yield Contender("fastattn fp32", run.work(base), highlight=True)


def measured(run: Run, budget_s: float) -> dict[str, Any]:
    """The rows of one run; parity of each against the untouched eager model's output."""
    with torch.inference_mode():
        entries = list(contenders(run))
        assert entries[0].run is not None
        expected = entries[0].run()
        rows = measure(
            entries,
            check=lambda contender, output: compare(expected, output),
            baseline=[each.name for each in entries if not each.highlight],
            budget_s=budget_s,
            min_rounds=9,
            progress=True,
            label=run.name,
        )
    return {"run": run.name, "rows": [row.to_dict() for row in rows]}


def verdicts(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each run promises beside what was measured; nothing holds without a ratio, nor a ratio without
    parity.
    """
    ratios = {each["run"]: each["rows"][-1]["ratio"] for each in results}
    found = []
    for run in RUNS:
        if run.name not in ratios:
            continue
        ratio = ratios[run.name]
        at_least: Any = run.at_least
        if at_least == "bert":
            reached = ratios.get("BERT-base encode")
            at_least = 0.95 * reached["value"] if reached else None
        holds = ratio is not None and at_least is not None and ratio[run.bound] >= at_least
        found.append(
            {"run": run.name, "at_least": at_least, "bound": run.bound, "ratio": ratio, "holds": bool(holds)}
        )
    return found


def table(results: list[dict[str, Any]], judged: list[dict[str, Any]]) -> str:
    rows = []
    for result, verdict in zip(results, judged, strict=True):
        ours = result["rows"][-1]
        base = next((row for row in result["rows"] if row["baseline"]), None)
        ratio, parity = verdict["ratio"], ours["parity"]
        rows.append(
            (
                result["run"],
                "-" if base is None else f"{base['min_ms']:.1f} / {base['median_ms']:.1f} ({base['name']})",
                f"{ours['min_ms']:.1f} / {ours['median_ms']:.1f}" if ours["median_ms"] else ours["reason"],
                f"{ratio['value']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "-",
                f"{parity['relative_error']:.0e}" if parity else "-",
                f"{verdict['at_least']:.2f} ({verdict['bound']})"
                if verdict["at_least"]
                else "needs BERT-base encode",
                "yes" if verdict["holds"] else "NO",
            )
        )
    header = ("run", "untouched, min / median ms", "fastattn", "ratio (95%)", "error", "promised", "holds")
    return format_table(header, rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results")
    parser.add_argument("--runs", default="", help="comma-separated parts of names; all if left out")
    parser.add_argument("--budget", type=float, default=20.0, metavar="SECONDS", help="timing of each run")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args(argv)
    target = require_writable(args.output / f"{args.name}.json")
    wanted = [part.strip().lower() for part in args.runs.split(",") if part.strip()]
    runs = [run for run in RUNS if not wanted or any(part in run.name.lower() for part in wanted)]
    if not runs:
        parser.error(f"--runs {args.runs!r} names none of: {', '.join(run.name for run in RUNS)}")
    if not os.environ.get("FASTATTN_DATA") and any(run.work is encode_sentences for run in runs):
        parser.error("FASTATTN_DATA must name the folder with the data sets (stsb/dev.csv)")

    environment = capture_environment()
    results = [measured(run, args.budget) for run in runs]
    judged = verdicts(results)
    document = {
        "schema": SCHEMA,
        "name": args.name,
        "command": f"python benchmarks/families.py --name {args.name}",
        "method": METHOD,
        "environment": environment,
        "results": results,
        "promises": judged,
    }
    write_text(target, json.dumps(document, indent=1, allow_nan=False) + "\n")
    print(table(results, judged))
    return 0 if all(each["holds"] for each in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
