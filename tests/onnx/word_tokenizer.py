"""A tokenizer of one token a word, for models that need one and no package to bring it."""

from __future__ import annotations

SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def word_tokenizer(words, pair=True):
    """Special tokens 0 to 6, then w7, w8, ...; `pair` frames texts as BERT does."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: token for token, word in enumerate(SPECIAL)}
    vocabulary.update({f"w{token}": token for token in range(len(SPECIAL), words)})
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if pair:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 4), ("[SEP]", 5)],
        )
    names = ("pad_token", "bos_token", "eos_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        padding_side="right" if pair else "left",
        **dict(zip(names, SPECIAL, strict=True)),
    )
