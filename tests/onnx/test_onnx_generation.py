"""`generate` of exported models: the same tokens as the original's, whatever way they are asked for."""

from __future__ import annotations

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import fastattn

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("optimum")

pytestmark = pytest.mark.model

VOCABULARY, POSITIONS = 97, 64
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODERS = {
    # Heads of GroupQueryAttention's sizes: past and present are one buffer.
    "GPT2LMHeadModel": {"n_embd": 48, "n_head": 3, "n_layer": 2, "n_positions": POSITIONS},
    "LlamaForCausalLM": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 80,
        "max_position_embeddings": POSITIONS,
    },
    # No positions given: ALiBi counts the attention mask. Heads of another size, so buffers take turns.
    "BloomForCausalLM": {"hidden_size": 36, "n_head": 3, "n_layer": 2},
}
ENCODER_DECODERS = {
    "T5ForConditionalGeneration": {
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 40,
        "num_layers": 2,
        "num_heads": 3,
        "decoder_start_token_id": 0,
    },
    "BartForConditionalGeneration": {
        "d_model": 48,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 3,
        "decoder_attention_heads": 3,
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 40,
        "max_position_embeddings": POSITIONS,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    },
}


def new_model(name):
    """With logits far enough apart that rounding decides nothing, and nowhere the same token for ever."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**TOKENS, **{**DECODERS, **ENCODER_DECODERS}[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """`exports(name)`: the original and its export loaded; each is exported once."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("generation") / name
            model = new_model(name)
            fastattn.export(model, folder, verify=False, layouts=())
            made[name] = model, fastattn.load(folder)
        return made[name]

    return make


@pytest.fixture(scope="module")
def gpt2(exports):
    return exports("GPT2LMHeadModel")


def prompts(rows=1, width=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, width), generator=generator)


def ragged(left=True):
    """Three prompts of 5, 9 and 8 tokens, padded."""
    ids, mask = prompts(3), torch.ones(3, 9, dtype=torch.int64)
    for row, padding in ((0, 4), (2, 1)):
        mask[row, slice(0, padding) if left else slice(9 - padding, 9)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def same(models, **arguments):
    """Both generate from one seed; the tokens, which must be the same."""
    answers = []
    for model in models:
        torch.manual_seed(1)
        answers.append(model.generate(**arguments))
    expected, found = answers
    sequences = [answer if isinstance(answer, torch.Tensor) else answer.sequences for answer in answers]
    assert torch.equal(*sequences), f"{sequences[0].tolist()}\n{sequences[1].tolist()}"
    return expected, found


# What each way of generating is called with, beside the prompt.
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "sampling among few": {"do_sample": True, "top_k": 7, "temperature": 0.7, "top_p": 0.9},
    "several of each": {"do_sample": True, "num_return_sequences": 3},
    "three beams": {"num_beams": 3},
    "all three beams": {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "processors": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 9},
    "many ends": {"eos_token_id": list(range(10, 30))},
    "beams with many ends": {"num_beams": 3, "eos_token_id": list(range(10, 30))},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_same_tokens_of_ragged_prompts(exports, name, way):
    arguments = {"do_sample": False, "max_new_tokens": 12, **WAYS[way]}
    expected, _ = same(exports(name), **ragged(left=name in DECODERS), **arguments)
    assert expected.shape[1] > 4 or "eos_token_id" in arguments


@pytest.mark.parametrize("name", list(DECODERS))
def test_one_prompt_to_the_last_position(exports, name):
    """Past every size that buffers had at first."""
    arguments = {"do_sample": False, "max_length": POSITIONS, "eos_token_id": None}
    expected, _ = same(exports(name), inputs=prompts(), **arguments)
    assert expected.shape == (1, POSITIONS)


def test_the_loop_is_our_own(gpt2, monkeypatch):
    """transformers' loop would answer the same, at several times the cost of a token."""
    _, loaded = gpt2
    calls = []
    monkeypatch.setattr(loaded, "forward", lambda **kwargs: calls.append(kwargs))
    for way in ({}, {"do_sample": True}):
        assert loaded.generate(prompts(), max_new_tokens=4, **way).shape == (1, 13)
    assert not calls
    assert type(loaded)._sample is not transformers.GenerationMixin._sample
    # What transformers calls it with.
    theirs = inspect.signature(transformers.GenerationMixin._sample).parameters
    assert list(inspect.signature(type(loaded)._sample).parameters)[: len(theirs)] == list(theirs)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_scores_and_logits(exports, name):
    ids = prompts(2)
    expected, found = same(
        exports(name),
        inputs=ids,
        do_sample=False,
        max_new_tokens=5,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        repetition_penalty=1.2,
    )
    assert type(found) is type(expected)
    for kind in ("scores", "logits"):
        assert len(found[kind]) == len(expected[kind])
        for got, wanted in zip(found[kind], expected[kind], strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=0)


def test_continuing_from_the_cache(gpt2):
    """With the whole conversation as the prompt, and with the new tokens beside the whole mask."""
    first = prompts(2)
    answers = []
    for model in gpt2:
        kept = model.generate(first, do_sample=False, max_new_tokens=5, return_dict_in_generate=True)
        whole = torch.cat((kept.sequences, prompts(2, 4, seed=1)), 1)
        length = kept.past_key_values.get_seq_length()
        again = copy.deepcopy(kept.past_key_values)
        arguments = {"do_sample": False, "max_new_tokens": 6}
        longer = model.generate(whole, past_key_values=kept.past_key_values, **arguments)
        assert kept.past_key_values.get_seq_length() == longer.shape[1] - 1
        mask = torch.ones_like(whole)
        newest = model.generate(whole[:, length:], past_key_values=again, attention_mask=mask, **arguments)
        assert torch.equal(newest, longer[:, length:])
        answers.append(longer)
    assert torch.equal(*answers)


def test_forward_step_by_step(exports):
    for name in DECODERS:
        model, loaded = exports(name)
        batch = ragged()
        with torch.no_grad():
            whole = model(**batch).logits
        kept = loaded(input_ids=batch["input_ids"][:, :6], attention_mask=batch["attention_mask"][:, :6])
        rest = loaded(
            input_ids=batch["input_ids"][:, 6:],
            attention_mask=batch["attention_mask"],
            past_key_values=kept.past_key_values,
        )
        assert type(kept) is type(model(**batch))
        found = torch.cat((kept.logits, rest.logits), 1)
        real = batch["attention_mask"].bool()
        scale = whole.abs().max().item()
        torch.testing.assert_close(found[real], whole[real], atol=1e-4 * scale, rtol=0)
        last = loaded(**batch, logits_to_keep=2).logits
        torch.testing.assert_close(last, loaded(**batch).logits[:, -2:], atol=1e-4 * scale, rtol=0)
        assert loaded(**batch, use_cache=False).past_key_values is None
        assert isinstance(loaded(**batch, return_dict=False), tuple)
        as_numpy = loaded(**{key: value.numpy() for key, value in batch.items()})
        np.testing.assert_array_equal(as_numpy.logits, loaded(**batch).logits.numpy())


def test_forward_of_an_encoder_decoder(exports):
    for name in ENCODER_DECODERS:
        model, loaded = exports(name)
        batch, tokens = ragged(left=False), prompts(3, 5, seed=2)
        with torch.no_grad():
            expected = model(**batch, decoder_input_ids=tokens)
        kept = loaded(**batch, decoder_input_ids=tokens[:, :3])
        encoded = loaded.get_encoder()(**batch)
        rest = loaded(
            encoder_outputs=encoded,
            attention_mask=batch["attention_mask"],
            decoder_input_ids=tokens[:, 3:],
            past_key_values=kept.past_key_values,
        )
        assert type(kept) is type(expected)
        assert [*kept][:2] == ["logits", "past_key_values"]
        scale = expected.logits.abs().max().item()
        found = torch.cat((kept.logits, rest.logits), 1)
        torch.testing.assert_close(found, expected.logits, atol=1e-4 * scale, rtol=0)


def test_prompts_in_chunks_and_drafted_tokens(gpt2):
    arguments = {"inputs": prompts(), "do_sample": False, "max_new_tokens": 12}
    for way in ({"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": gpt2[0]}):
        same(gpt2, **arguments, **way)
    same(gpt2, **{**arguments, "inputs": prompts(2)}, prefill_chunk_size=4)


def test_no_prompt_begins_with_the_first_token(gpt2):
    same(gpt2, do_sample=False, max_new_tokens=5)


class Longer(transformers.StoppingCriteria):
    """Rows stop one after the other."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.arange(input_ids.shape[0]) + 11 < input_ids.shape[1]


def test_stopping_criteria_and_streamers(gpt2):
    arguments = {**ragged(), "do_sample": False, "max_new_tokens": 12}
    expected, _ = same(gpt2, **arguments, stopping_criteria=[Longer()])
    assert expected.shape[1] == 14
    streams = []

    class Stream:
        def put(self, value):
            streams[-1].append(value.tolist())

        def end(self):
            streams[-1].append("end")

    for model in gpt2:
        streams.append([])
        model.generate(prompts(), streamer=Stream(), do_sample=False, max_new_tokens=6)
    assert streams[0] == streams[1]
    assert streams[1][-1] == "end" and len(streams[1]) == 8


def test_stop_strings(gpt2):
    # A character a token; the last three are no text by themselves.
    characters = {chr(33 + token if token < 94 else 100 + token): token for token in range(VOCABULARY)}
    tokenizer = transformers.GPT2Tokenizer(vocab=characters, merges=[])
    arguments = {"do_sample": False, "max_new_tokens": 12}
    whole, _ = same(gpt2, inputs=prompts(), **arguments)
    new = whole[0, 9:].tolist()
    token = next(token for token in new[3:] if token < 94)
    stop = {"stop_strings": [tokenizer.decode([token])], "tokenizer": tokenizer}
    stopped, _ = same(gpt2, inputs=prompts(), **arguments, **stop)
    assert stopped[0, 9:].tolist() == new[: new.index(token) + 1]


def test_eight_threads_generate_their_own(gpt2):
    _, loaded = gpt2
    batches = [prompts(1 + seed % 3, 3 + seed, seed) for seed in range(16)]
    arguments = {"do_sample": False, "max_new_tokens": 8}
    expected = [loaded.generate(ids, **arguments) for ids in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda ids: loaded.generate(ids, **arguments), batches))
    assert all(torch.equal(got, wanted) for got, wanted in zip(found, expected, strict=True))


def test_generation_config_is_the_saved_one_and_can_be_changed(exports, tmp_path):
    model, loaded = exports("GPT2LMHeadModel")
    assert loaded.can_generate()
    assert loaded.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    loaded.save_pretrained(tmp_path)
    again = type(loaded).from_pretrained(tmp_path)
    again.generation_config.max_new_tokens = 3
    assert again.generate(prompts()).shape == (1, 12)
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False)
    assert torch.equal(*(each.generate(prompts(), generation_config=config) for each in (model, loaded)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_length": 4}, ValueError, "Input length of input_ids is 9"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"inputs": torch.full((1, 3), VOCABULARY)}, ValueError, "input_ids must lie between 0 and 96"),
        ({"max_new_tokens": POSITIONS}, ValueError, f"{POSITIONS + 1} positions; the model has {POSITIONS}"),
        ({"output_attentions": True, "return_dict_in_generate": True}, ValueError, "no such output"),
        ({"token_type_idz": 1}, ValueError, "token_type_idz"),
        ({"cache_implementation": "static"}, ValueError, "an export has one cache"),
        ({"past_key_values": "cache"}, TypeError, "past_key_values is a str"),
    ],
    ids=str,
)
def test_bad_arguments_of_generate(gpt2, arguments, error, message):
    with pytest.raises(error, match=message):
        gpt2[1].generate(**{"inputs": prompts(), "do_sample": False, **arguments})


def test_bad_arguments_of_forward(exports):
    _, loaded = exports("GPT2LMHeadModel")
    ids = prompts(2)
    cache = loaded(ids).past_key_values
    for arguments, error, message in (
        ({}, TypeError, "input_ids is missing; the model takes input_ids, attention_mask, position_ids"),
        ({"input_ids": ids, "labels": ids}, TypeError, "unexpected input 'labels'"),
        ({"input_ids": ids, "output_hidden_states": True}, ValueError, "ask the original GPT2LMHeadModel"),
        ({"input_ids": ids.float()}, TypeError, "input_ids is float32"),
        ({"input_ids": ids, "attention_mask": ids[:, :3]}, ValueError, r"\[2, 9\]; got \[2, 3\]"),
        ({"input_ids": prompts(1, 70)}, ValueError, f"70 positions; the model has {POSITIONS}"),
        ({"input_ids": ids[:1], "past_key_values": cache}, ValueError, "past_key_values holds 2 rows"),
        ({"input_ids": ids, "position_ids": ids[:, :2]}, ValueError, r"position_ids must be .* got \[2, 2\]"),
    ):
        with pytest.raises(error, match=message):
            loaded(**arguments)
    _, positionless = exports("BloomForCausalLM")
    with pytest.raises((TypeError, ValueError), match="position_ids"):
        positionless(input_ids=ids, position_ids=ids)
    _, other = exports("LlamaForCausalLM")
    with pytest.raises(ValueError, match="cache of another model"):
        other(input_ids=ids, past_key_values=cache)
