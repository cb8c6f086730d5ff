"""The families the registry-driven test runs over: each its public configuration shrunk, odd features kept.

What is kept is what breaks implementations: head sizes that are no power of two, grouped queries, windows
shorter than the test's sequences, soft caps, sinks, partial rotary, post-norm and pre-norm, relative buckets,
gated MLPs, tied and factorized embeddings, layers of mixed types. `matters` names changes of the
configuration that must show in the output; if one does not, the test could not see that feature lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CASES", "PAD", "VOCABULARY", "FamilyCase"]

VOCABULARY = 97
PAD = 0


@dataclass(frozen=True)
class FamilyCase:
    """One configuration of a family, and what it must be able to do.

    Attributes:
        name: as docs/models.md shows it.
        family: the adapter's module in fastattn.models.
        config: name of the configuration class, and its `options`.
        base, heads: model classes; the first head is the language model's where there is one.
        swapped: layers that must be swapped in `base`, by kind, once the family has an adapter.
        dispatches: whether its attention asks transformers' attention interface.
        generates: whether the first head generates; `caches` are the cache implementations it takes.
        assisted: whether prompt-lookup decoding works on the original.
        packs: whether padding is never computed (the encoder's, of encoder-decoders).
        left: whether left padding means something to it.
        positions: whether several sequences may come in one row, told apart by `position_ids`.
        compiles: why the untouched model itself is not one graph; empty where it is.
        reference: the implementation compared with; "eager" where the original's is right.
        recorded: why the original's own attentions are wrong; empty where they are right.
        matters: configuration changes that must change the output.
        std: of the random weights; wide enough that attention is not uniform.
    """

    name: str
    family: str
    config: str
    options: Mapping[str, Any]
    base: str
    heads: tuple[str, ...]
    swapped: Mapping[str, int] | None = None
    dispatches: bool = True
    generates: bool = False
    caches: tuple[str, ...] = ("dynamic", "static")
    assisted: bool = True
    packs: bool = True
    left: bool = True
    positions: bool = False
    compiles: str = ""
    reference: str = "eager"
    recorded: str = ""
    matters: tuple[Mapping[str, Any], ...] = field(default=())
    std: float = 0.3

    @property
    def classes(self) -> tuple[str, ...]:
        return (self.base, *self.heads)


_SPECIAL = dict(vocab_size=VOCABULARY, pad_token_id=PAD, bos_token_id=1, eos_token_id=2)
_BERT = dict(
    vocab_size=VOCABULARY,
    hidden_size=60,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=144,
    max_position_embeddings=66,
)
_ROBERTA = {
    **_BERT,
    **dict(type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1, bos_token_id=0, eos_token_id=2),
}
_LLAMA = dict(
    **_SPECIAL,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
_FULL = dict(layer_types=["full_attention"] * 3)
_FALCON = dict(**_SPECIAL, hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
_T5 = dict(
    vocab_size=VOCABULARY,
    d_model=48,
    d_kv=12,
    d_ff=56,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
    pad_token_id=PAD,
    eos_token_id=2,
    decoder_start_token_id=PAD,
)
_BART = dict(
    **_SPECIAL,
    d_model=40,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=2,
    encoder_ffn_dim=72,
    decoder_ffn_dim=56,
    max_position_embeddings=64,
    decoder_start_token_id=2,
    forced_eos_token_id=None,
)
_VISION = dict(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=80,
    image_size=24,
    patch_size=8,
)


def _encoder(name: str, family: str, prefix: str, options: Mapping[str, Any], *heads: str, **more: Any):
    return FamilyCase(
        name,
        family,
        f"{prefix}Config",
        options,
        f"{prefix}Model",
        tuple(prefix + head for head in heads),
        **more,
    )


def _decoder(name: str, family: str, prefix: str, options: Mapping[str, Any], *heads: str, **more: Any):
    return _encoder(name, family, prefix, options, *heads, **{"generates": True, "packs": False, **more})


CASES = (
    _encoder(
        "BERT",
        "bert",
        "Bert",
        _BERT,
        "ForMaskedLM",
        "ForSequenceClassification",
        swapped={"attention": 3, "residual_norm": 6, "activation": 3, "encoder": 1},
    ),
    _encoder(
        "RoBERTa",
        "roberta",
        "Roberta",
        _ROBERTA,
        "ForMaskedLM",
        "ForTokenClassification",
        swapped={"attention": 3, "residual_norm": 6, "activation": 3, "encoder": 1},
    ),
    _encoder(
        "XLM-R",
        "xlm_roberta",
        "XLMRoberta",
        _ROBERTA,
        "ForMaskedLM",
        "ForSequenceClassification",
        swapped={"attention": 3, "residual_norm": 6, "activation": 3, "encoder": 1},
    ),
    _encoder(
        "DistilBERT",
        "distilbert",
        "DistilBert",
        dict(
            vocab_size=VOCABULARY, dim=60, n_layers=3, n_heads=3, hidden_dim=144, max_position_embeddings=66
        ),
        "ForMaskedLM",
        "ForQuestionAnswering",
        swapped={"attention": 3, "residual_norm": 3, "activation": 3, "encoder": 1},
    ),
    _encoder(
        "ELECTRA",
        "electra",
        "Electra",
        {**_BERT, "embedding_size": 24},
        "ForMaskedLM",
        "ForPreTraining",
        swapped={"attention": 3, "residual_norm": 6, "activation": 3, "encoder": 1},
    ),
    _encoder(
        "ALBERT",
        "albert",
        "Albert",
        {**_BERT, "embedding_size": 24, "hidden_act": "gelu_new", "num_hidden_groups": 1},
        "ForMaskedLM",
        "ForSequenceClassification",
        swapped={"attention": 1, "residual_norm": 1, "encoder": 1},
    ),
    _encoder(
        "MPNet",
        "mpnet",
        "MPNet",
        {**_BERT, "relative_attention_num_buckets": 32, "pad_token_id": 1},
        "ForMaskedLM",
        "ForSequenceClassification",
        dispatches=False,
        swapped={"attention": 3, "residual_norm": 6, "activation": 3, "encoder": 1},
    ),
    # deberta-v3: shared position keys, log buckets, no absolute positions.
    _encoder(
        "DeBERTa-v3",
        "deberta_v2",
        "DebertaV2",
        dict(
            **_BERT,
            type_vocab_size=0,
            relative_attention=True,
            position_buckets=4,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            layer_norm_eps=1e-7,
            pad_token_id=PAD,
        ),
        "ForMaskedLM",
        "ForSequenceClassification",
        dispatches=False,
        matters=({"pos_att_type": ["p2c"]}, {"pos_att_type": ["c2p"]}, {"max_relative_positions": 8}),
        swapped={"attention": 3, "residual_norm": 6, "activation": 3, "encoder": 1},
    ),
    # deberta-v2-xlarge: a convolution beside the first layer.
    _encoder(
        "DeBERTa-v2 xlarge",
        "deberta_v2",
        "DebertaV2",
        dict(
            **_BERT,
            type_vocab_size=0,
            relative_attention=True,
            position_buckets=4,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            conv_kernel_size=3,
            conv_act="gelu",
            pad_token_id=PAD,
        ),
        "ForMaskedLM",
        "ForTokenClassification",
        dispatches=False,
        swapped={"attention": 3, "residual_norm": 6, "activation": 3, "encoder": 1},
    ),
    _encoder(
        "ModernBERT",
        "modernbert",
        "ModernBert",
        dict(
            **_SPECIAL,
            cls_token_id=1,
            sep_token_id=2,
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=56,
            max_position_embeddings=64,
            local_attention=8,
            global_attn_every_n_layers=3,
            classifier_pooling="mean",
        ),
        "ForMaskedLM",
        "ForSequenceClassification",
        matters=({"local_attention": 64},),
        swapped={"attention": 4, "residual_norm": 4, "activation": 4},
    ),
    _decoder(
        "GPT-2",
        "gpt2",
        "GPT2",
        dict(**_SPECIAL, n_embd=60, n_head=3, n_layer=2, n_positions=64),
        "LMHeadModel",
        "ForSequenceClassification",
        swapped={"attention": 2, "residual_norm": 2, "activation": 2},
    ),
    _decoder(
        "GPT-Neo",
        "gpt_neo",
        "GPTNeo",
        dict(
            **_SPECIAL,
            hidden_size=60,
            num_heads=3,
            num_layers=2,
            attention_types=[[["global", "local"], 1]],
            window_size=5,
            max_position_embeddings=64,
        ),
        "ForCausalLM",
        "ForSequenceClassification",
        dispatches=False,
        matters=({"window_size": 64},),
        # Its scores are not scaled: wide weights make attention one-hot.
        std=0.2,
        swapped={"attention": 2, "residual_norm": 2, "activation": 2},
    ),
    _decoder(
        "GPT-J",
        "gptj",
        "GPTJ",
        dict(**_SPECIAL, n_embd=60, n_head=3, n_layer=2, n_positions=64, rotary_dim=8),
        "ForCausalLM",
        "ForSequenceClassification",
        dispatches=False,
        matters=({"rotary_dim": 4},),
        swapped={"attention": 2, "residual_norm": 2, "activation": 2},
    ),
    *(
        _decoder(
            name,
            "gpt_neox",
            "GPTNeoX",
            dict(
                **_SPECIAL,
                hidden_size=48,
                num_attention_heads=3,
                num_hidden_layers=2,
                intermediate_size=80,
                max_position_embeddings=64,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.25,
                },
                use_parallel_residual=parallel,
            ),
            "ForCausalLM",
            "ForTokenClassification",
            positions=True,
            swapped={"attention": 2, "residual_norm": 2, "activation": 2},
            matters=({"use_parallel_residual": not parallel},),
        )
        for name, parallel in (("GPT-NeoX", True), ("GPT-NeoX serial", False))
    ),
    *(
        _decoder(
            name,
            "opt",
            "OPT",
            dict(
                **_SPECIAL,
                hidden_size=60,
                num_attention_heads=3,
                num_hidden_layers=2,
                ffn_dim=80,
                max_position_embeddings=64,
                do_layer_norm_before=before,
                word_embed_proj_dim=width,
            ),
            "ForCausalLM",
            "ForSequenceClassification",
            swapped={"attention": 2, "residual_norm": 2},
        )
        # opt-350m alone normalizes after the residual and projects its embeddings.
        for name, before, width in (("OPT", True, 60), ("OPT 350m", False, 24))
    ),
    _decoder(
        "BLOOM",
        "bloom",
        "Bloom",
        dict(**_SPECIAL, hidden_size=60, n_head=3, n_layer=2),
        "ForCausalLM",
        "ForTokenClassification",
        dispatches=False,
        swapped={"attention": 2, "residual_norm": 2, "activation": 2},
    ),
    _decoder(
        "Falcon 7b",
        "falcon",
        "Falcon",
        dict(**_FALCON, multi_query=True, parallel_attn=True, bias=False, max_position_embeddings=64),
        "ForCausalLM",
        "ForTokenClassification",
        dispatches=False,
        swapped={"attention": 2, "residual_norm": 2},
    ),
    _decoder(
        "Falcon 40b",
        "falcon",
        "Falcon",
        dict(
            **_FALCON, new_decoder_architecture=True, num_kv_heads=2, bias=False, max_position_embeddings=64
        ),
        "ForCausalLM",
        "ForSequenceClassification",
        dispatches=False,
        swapped={"attention": 2, "residual_norm": 2},
    ),
    _decoder(
        "Falcon rw",
        "falcon",
        "Falcon",
        dict(**_FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True),
        "ForCausalLM",
        "ForTokenClassification",
        dispatches=False,
        # Eager attention adds ALiBi twice, in the mask and in the layer; and this ALiBi takes no mask of four
        # dimensions, which a static cache has.
        reference="sdpa",
        recorded="transformers adds ALiBi twice where attentions are recorded",
        caches=("dynamic",),
        matters=({"alibi": False},),
        swapped={"attention": 2, "residual_norm": 2, "activation": 2},
    ),
    # Llama 3.2: scaled frequencies, tied embeddings.
    _decoder(
        "Llama",
        "llama",
        "Llama",
        dict(
            **_LLAMA,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ),
        "ForCausalLM",
        "ForSequenceClassification",
        swapped={"attention": 2, "residual_norm": 2, "norm": 5, "activation": 2},
        positions=True,
    ),
    _decoder(
        "Mistral",
        "mistral",
        "Mistral",
        dict(**_LLAMA, head_dim=12, sliding_window=5),
        "ForCausalLM",
        "ForTokenClassification",
        positions=True,
        matters=({"sliding_window": None},),
        swapped={"attention": 2, "residual_norm": 2, "norm": 5, "activation": 2},
    ),
    _decoder(
        "Qwen2",
        "qwen2",
        "Qwen2",
        dict(**_LLAMA, use_sliding_window=True, sliding_window=5, max_window_layers=1),
        "ForCausalLM",
        "ForSequenceClassification",
        positions=True,
        matters=({"use_sliding_window": False},),
        swapped={"attention": 2, "residual_norm": 2, "norm": 5, "activation": 2},
    ),
    _decoder(
        "Qwen3",
        "qwen3",
        "Qwen3",
        dict(**_LLAMA, head_dim=12),
        "ForCausalLM",
        "ForSequenceClassification",
        positions=True,
        swapped={"attention": 2, "residual_norm": 2, "norm": 9, "activation": 2},
    ),
    _decoder(
        "Gemma 2",
        "gemma2",
        "Gemma2",
        dict(
            **{**_LLAMA, "num_hidden_layers": 3},
            head_dim=12,
            sliding_window=5,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=10.0,
        ),
        "ForCausalLM",
        "ForSequenceClassification",
        positions=True,
        matters=(_FULL, {"attn_logit_softcapping": None}, {"query_pre_attn_scalar": 4}),
        swapped={"attention": 3, "residual_norm": 3, "norm": 13, "activation": 3},
    ),
    FamilyCase(
        "Gemma 3",
        "gemma3",
        "Gemma3TextConfig",
        dict(
            **{**_LLAMA, "num_hidden_layers": 3},
            head_dim=12,
            sliding_window=5,
            query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        "Gemma3TextModel",
        ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
        generates=True,
        packs=False,
        positions=True,
        matters=(_FULL,),
        swapped={"attention": 3, "residual_norm": 3, "norm": 19, "activation": 3},
    ),
    _decoder(
        "Phi",
        "phi",
        "Phi",
        dict(
            **_LLAMA,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            hidden_act="gelu_new",
        ),
        "ForCausalLM",
        "ForSequenceClassification",
        positions=True,
        swapped={"attention": 2, "residual_norm": 2, "activation": 2},
    ),
    _decoder(
        "gpt-oss",
        "gpt_oss",
        "GptOss",
        dict(
            **_LLAMA,
            head_dim=12,
            sliding_window=5,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 16,
            },
        ),
        "ForCausalLM",
        "ForSequenceClassification",
        matters=({"layer_types": ["full_attention"] * 2},),
        swapped={"attention": 2, "residual_norm": 2, "norm": 5},
    ),
    FamilyCase(
        "T5",
        "t5",
        "T5Config",
        _T5,
        "T5Model",
        ("T5ForConditionalGeneration", "T5EncoderModel"),
        generates=True,
        matters=({"relative_attention_max_distance": 64},),
        # Its scores are not scaled either.
        std=0.15,
        swapped={"attention": 6, "residual_norm": 10, "norm": 12, "encoder": 2},
    ),
    # google/t5-v1_1: gated GELU, heads wider than the model, embeddings not tied.
    FamilyCase(
        "T5 v1.1",
        "t5",
        "T5Config",
        {**_T5, "d_kv": 20, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "T5Model",
        ("T5ForConditionalGeneration", "T5ForTokenClassification"),
        std=0.15,
        generates=True,
        swapped={"attention": 6, "residual_norm": 10, "norm": 12, "activation": 4, "encoder": 2},
    ),
    FamilyCase(
        "BART",
        "bart",
        "BartConfig",
        dict(**_BART, scale_embedding=False),
        "BartModel",
        ("BartForConditionalGeneration", "BartForCausalLM"),
        generates=True,
        swapped={"attention": 6, "residual_norm": 2, "encoder": 2},
    ),
    FamilyCase(
        "mBART",
        "mbart",
        "MBartConfig",
        dict(**_BART, scale_embedding=True),
        "MBartModel",
        ("MBartForConditionalGeneration", "MBartForCausalLM"),
        generates=True,
        swapped={"attention": 6, "residual_norm": 2, "encoder": 2},
    ),
    FamilyCase(
        "Marian",
        "marian",
        "MarianConfig",
        dict(**{**_BART, "decoder_start_token_id": PAD}, scale_embedding=True, activation_function="swish"),
        "MarianModel",
        ("MarianMTModel", "MarianForCausalLM"),
        generates=True,
        swapped={"attention": 6, "residual_norm": 2, "encoder": 2},
    ),
    FamilyCase(
        "Pegasus",
        "pegasus",
        "PegasusConfig",
        dict(**{**_BART, "decoder_start_token_id": PAD}, scale_embedding=True, activation_function="relu"),
        "PegasusModel",
        ("PegasusForConditionalGeneration", "PegasusForCausalLM"),
        generates=True,
        swapped={"attention": 6, "residual_norm": 2, "encoder": 2},
    ),
    FamilyCase(
        "ViT",
        "vit",
        "ViTConfig",
        _VISION,
        "ViTModel",
        ("ViTForImageClassification", "ViTForMaskedImageModeling"),
        packs=False,
        left=False,
        swapped={"attention": 2, "residual_norm": 2, "activation": 2},
    ),
    FamilyCase(
        "CLIP",
        "clip",
        "CLIPConfig",
        dict(
            text_config=dict(
                **_SPECIAL,
                hidden_size=40,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=72,
                max_position_embeddings=64,
            ),
            vision_config=_VISION,
            projection_dim=24,
        ),
        "CLIPModel",
        ("CLIPTextModelWithProjection", "CLIPVisionModelWithProjection"),
        packs=False,
        swapped={"attention": 4, "residual_norm": 4},
    ),
    FamilyCase(
        "Whisper",
        "whisper",
        "WhisperConfig",
        dict(
            **{**_BART, "max_target_positions": 64, "max_source_positions": 12, "decoder_start_token_id": 3},
            num_mel_bins=8,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        "WhisperModel",
        ("WhisperForConditionalGeneration", "WhisperForAudioClassification"),
        generates=True,
        packs=False,
        swapped={"attention": 6, "residual_norm": 4},
    ),
)
