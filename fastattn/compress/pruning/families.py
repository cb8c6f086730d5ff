"""The table: what each family's layers call their parts. Fused layers are found by the classes they derive
from.
"""

from __future__ import annotations

from fastattn.compress.pruning.layouts import (
    Attention,
    Experts,
    FeedForward,
    Layout,
    Stack,
    TorchAttention,
)

__all__ = ["LAYOUTS"]

_BERT_SIZES = (("num_attention_heads", "heads"), ("all_head_size", "width"))
_BERT = Attention("attention_head_size", "../output.dense", "query", "key", "value", attributes=_BERT_SIZES)
_BERT_LAYER = FeedForward("intermediate.dense", "output.dense")
_BERT_STACK = Stack("layer", ("num_hidden_layers",))

# Llama's names, those of most decoders.
_LLAMA = Attention(
    "head_dim", "o_proj", "q_proj", "k_proj", "v_proj", attributes=(("num_key_value_groups", "group"),)
)
_LLAMA_MLP = FeedForward("up_proj", "down_proj", "gate_proj", attributes=("intermediate_size",))
_LLAMA_STACK = Stack("layers", ("num_hidden_layers",), lists=("layer_types",))

# BART's names, those of most encoder-decoders.
_BART = Attention("head_dim", "out_proj", "q_proj", "k_proj", "v_proj", attributes=(("num_heads", "heads"),))
_BART_LAYER = FeedForward("fc1", "fc2")
_BART_ENCODER = Stack("layers", ("encoder_layers",))
_BART_DECODER = Stack("layers", ("decoder_layers",))

_T5 = Attention(
    "key_value_proj_dim",
    "o",
    "q",
    "k",
    "v",
    attributes=(("n_heads", "heads"), ("inner_dim", "width")),
    by_head=(("relative_attention_bias.weight", 1),),
    linked=True,
)
_GPT2_SIZES = (("num_heads", "heads"), ("split_size", "width"))

LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "activation.MultiheadAttention": (TorchAttention(),),
    "transformer.TransformerEncoderLayer": (FeedForward("linear1", "linear2"),),
    "transformer.TransformerDecoderLayer": (FeedForward("linear1", "linear2"),),
    "transformer.TransformerEncoder": (Stack("layers", own_counts=("num_layers",)),),
    "transformer.TransformerDecoder": (Stack("layers", own_counts=("num_layers",)),),
    "albert.AlbertAttention": (
        Attention("attention_head_size", "dense", "query", "key", "value", attributes=_BERT_SIZES),
    ),
    "albert.AlbertLayer": (FeedForward("ffn", "ffn_output"),),
    "albert.AlbertTransformer": (
        Stack("albert_layer_groups", ("num_hidden_layers",), repeats="num_hidden_layers"),
    ),
    **{
        f"{module}.{name}{part}": (layout,)
        for module, name in (
            ("bert", "Bert"),
            ("electra", "Electra"),
            ("roberta", "Roberta"),
            ("xlm_roberta", "XLMRoberta"),
        )
        for part, layout in (
            ("SelfAttention", _BERT),
            ("CrossAttention", _BERT),
            ("Layer", _BERT_LAYER),
            ("Encoder", _BERT_STACK),
        )
    },
    **{
        f"{module}.{name}{part}": (layout,)
        for module, name in (
            ("bart", "Bart"),
            ("marian", "Marian"),
            ("mbart", "MBart"),
            ("pegasus", "Pegasus"),
            ("whisper", "Whisper"),
        )
        for part, layout in (
            ("Attention", _BART),
            ("EncoderLayer", _BART_LAYER),
            ("DecoderLayer", _BART_LAYER),
            ("Encoder", _BART_ENCODER),
            ("Decoder", _BART_DECODER),
        )
    },
    **{
        f"{module}.{name}{part}": (layout,)
        for module, name, model in (
            ("gemma2", "Gemma2", "Model"),
            ("gemma3", "Gemma3", "TextModel"),
            ("llama", "Llama", "Model"),
            ("mistral", "Mistral", "Model"),
            ("qwen2", "Qwen2", "Model"),
            ("qwen3", "Qwen3", "Model"),
        )
        for part, layout in (("Attention", _LLAMA), ("MLP", _LLAMA_MLP), (model, _LLAMA_STACK))
    },
    "bloom.BloomAttention": (
        Attention(
            "head_dim",
            "dense",
            "query_key_value",
            joint="by group",
            attributes=_GPT2_SIZES,
            alibi="always",
        ),
    ),
    "bloom.BloomMLP": (FeedForward("dense_h_to_4h", "dense_4h_to_h"),),
    "bloom.BloomModel": (Stack("h", ("n_layer",)),),
    "clip.CLIPAttention": (_BART,),
    "clip.CLIPMLP": (_BART_LAYER,),
    "clip.CLIPEncoder": (Stack("layers", ("num_hidden_layers",)),),
    "deberta_v2.DisentangledSelfAttention": (
        Attention(
            "attention_head_size",
            "../output.dense",
            "query_proj",
            "key_proj",
            "value_proj",
            attributes=_BERT_SIZES,
            by_width=("pos_key_proj", "pos_query_proj"),
        ),
    ),
    "deberta_v2.DebertaV2Layer": (_BERT_LAYER,),
    "deberta_v2.DebertaV2Encoder": (
        Stack("layer", ("num_hidden_layers",), first_stays=("a convolution runs beside it", "conv")),
    ),
    "distilbert.DistilBertSelfAttention": (
        Attention(
            "attention_head_size", "out_lin", "q_lin", "k_lin", "v_lin", attributes=(("n_heads", "heads"),)
        ),
    ),
    "distilbert.FFN": (FeedForward("lin1", "lin2"),),
    "distilbert.Transformer": (Stack("layer", ("n_layers",), own_counts=("n_layers",)),),
    "falcon.FalconAttention": (
        Attention(
            "head_dim",
            "dense",
            "query_key_value",
            joint="by group",
            kv_heads="num_kv_heads",
            attributes=(*_GPT2_SIZES, ("num_kv_heads", "kv_heads")),
            alibi="config.alibi",
        ),
    ),
    "falcon.FalconMLP": (FeedForward("dense_h_to_4h", "dense_4h_to_h"),),
    "falcon.FalconModel": (Stack("h", ("num_hidden_layers",)),),
    "gpt2.GPT2Attention": (
        Attention(
            "head_dim",
            "c_proj",
            "c_attn",
            joint="blocks",
            attributes=_GPT2_SIZES,
            only="not is_cross_attention",
        ),
        Attention(
            "head_dim",
            "c_proj",
            "q_attn",
            "c_attn",
            joint="key and value",
            attributes=_GPT2_SIZES,
            only="is_cross_attention",
        ),
    ),
    "gpt2.GPT2MLP": (FeedForward("c_fc", "c_proj"),),
    "gpt2.GPT2Model": (Stack("h", ("n_layer",)),),
    "gpt_neo.GPTNeoSelfAttention": (_BART,),
    "gpt_neo.GPTNeoMLP": (FeedForward("c_fc", "c_proj"),),
    "gpt_neo.GPTNeoModel": (Stack("h", ("num_layers",), lists=("attention_layers",)),),
    "gpt_neox.GPTNeoXAttention": (Attention("head_size", "dense", "query_key_value", joint="by group"),),
    "gpt_neox.GPTNeoXMLP": (FeedForward("dense_h_to_4h", "dense_4h_to_h"),),
    "gpt_neox.GPTNeoXModel": (Stack("layers", ("num_hidden_layers",)),),
    "gpt_oss.GptOssAttention": (
        Attention(
            "head_dim",
            "o_proj",
            "q_proj",
            "k_proj",
            "v_proj",
            attributes=(("num_key_value_groups", "group"),),
            by_head=(("sinks", 0),),
        ),
    ),
    "gpt_oss.GptOssExperts": (
        Experts("gate_up_proj", "gate_up_proj_bias", "down_proj", attributes=("intermediate_size",)),
    ),
    "gpt_oss.GptOssModel": (_LLAMA_STACK,),
    "gptj.GPTJAttention": (
        Attention(
            "head_dim",
            "out_proj",
            "q_proj",
            "k_proj",
            "v_proj",
            attributes=(("num_attention_heads", "heads"),),
        ),
    ),
    "gptj.GPTJMLP": (FeedForward("fc_in", "fc_out"),),
    "gptj.GPTJModel": (Stack("h", ("n_layer",)),),
    "modernbert.ModernBertAttention": (Attention("head_dim", "Wo", "Wqkv", joint="blocks"),),
    "modernbert.ModernBertMLP": (FeedForward("Wi", "Wo", joint=True),),
    "modernbert.ModernBertModel": (
        Stack(
            "layers",
            ("num_hidden_layers",),
            lists=("layer_types",),
            first_stays=("it alone has no norm before its attention", ""),
        ),
    ),
    "mpnet.MPNetSelfAttention": (
        Attention(
            "attention_head_size",
            "o",
            "q",
            "k",
            "v",
            attributes=_BERT_SIZES,
            by_head=(("../../../../relative_attention_bias.weight", 1),),
            linked=True,
        ),
    ),
    "mpnet.MPNetLayer": (_BERT_LAYER,),
    "mpnet.MPNetEncoder": (_BERT_STACK,),
    "opt.OPTAttention": (_BART,),
    "opt.OPTDecoderLayer": (_BART_LAYER,),
    "opt.OPTDecoder": (Stack("layers", ("num_hidden_layers",)),),
    "phi.PhiAttention": (
        Attention(
            "head_dim", "dense", "q_proj", "k_proj", "v_proj", attributes=(("num_key_value_groups", "group"),)
        ),
    ),
    "phi.PhiMLP": (_BART_LAYER,),
    "phi.PhiModel": (_LLAMA_STACK,),
    "t5.T5Attention": (_T5,),
    "t5.T5DenseActDense": (FeedForward("wi", "wo"),),
    "t5.T5DenseGatedActDense": (FeedForward("wi_1", "wo", "wi_0"),),
    "t5.T5Stack": (
        Stack("block", ("num_layers",), root_counts=("num_layers",), only="not is_decoder"),
        Stack("block", ("num_layers",), root_counts=("num_decoder_layers",), only="is_decoder"),
    ),
    "vit.ViTAttention": (_LLAMA,),
    "vit.ViTMLP": (_BART_LAYER,),
    "vit.ViTModel": (_LLAMA_STACK,),
}
