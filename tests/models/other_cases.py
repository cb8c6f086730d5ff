"""Encoder-decoders, vision and audio models of the registry-driven family test."""

from __future__ import annotations

from family_case import PAD, SPECIAL, VOCABULARY, FamilyCase

__all__ = ["OTHERS"]

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
    **SPECIAL,
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

OTHERS = (
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
        swapped={"attention": 6, "residual_norm": 2, "norm": 1, "encoder": 2},
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
        swapped={"attention": 6, "residual_norm": 2, "norm": 1, "encoder": 2},
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
                **SPECIAL,
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
