"""Encoders of the registry-driven family test."""

from __future__ import annotations

from family_case import PAD, SPECIAL, VOCABULARY, encoder

__all__ = ["ENCODERS"]

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

ENCODERS = (
    encoder(
        "BERT",
        "bert",
        "Bert",
        _BERT,
        "ForMaskedLM",
        "ForSequenceClassification",
        swapped={"attention": 3, "residual_norm": 6, "activation": 3, "encoder": 1},
    ),
    encoder(
        "RoBERTa",
        "roberta",
        "Roberta",
        _ROBERTA,
        "ForMaskedLM",
        "ForTokenClassification",
        swapped={"attention": 3, "residual_norm": 6, "activation": 3, "encoder": 1},
    ),
    encoder(
        "XLM-R",
        "xlm_roberta",
        "XLMRoberta",
        _ROBERTA,
        "ForMaskedLM",
        "ForSequenceClassification",
        swapped={"attention": 3, "residual_norm": 6, "activation": 3, "encoder": 1},
    ),
    encoder(
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
    encoder(
        "ELECTRA",
        "electra",
        "Electra",
        {**_BERT, "embedding_size": 24},
        "ForMaskedLM",
        "ForPreTraining",
        swapped={"attention": 3, "residual_norm": 6, "activation": 3, "encoder": 1},
    ),
    encoder(
        "ALBERT",
        "albert",
        "Albert",
        {**_BERT, "embedding_size": 24, "hidden_act": "gelu_new", "num_hidden_groups": 1},
        "ForMaskedLM",
        "ForSequenceClassification",
        swapped={"attention": 1, "residual_norm": 1, "encoder": 1},
    ),
    encoder(
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
    encoder(
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
    encoder(
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
    encoder(
        "ModernBERT",
        "modernbert",
        "ModernBert",
        dict(
            **SPECIAL,
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
)
