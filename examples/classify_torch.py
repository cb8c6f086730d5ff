"""A classifier written by hand from torch.nn's layers, trained with padding: does a text repeat its first
word?
"""

import torch
from torch import nn

import fastattn

torch.manual_seed(0)
WORDS, FEATURES, PADDING = 12, 32, 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(FEATURES, num_heads=4, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(FEATURES), nn.LayerNorm(FEATURES)
        self.mlp = nn.Sequential(nn.Linear(FEATURES, 64), nn.GELU(), nn.Linear(64, FEATURES))

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, key_padding_mask=padding, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, FEATURES), nn.Embedding(8, FEATURES)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(FEATURES, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x, ids == PADDING)
        return self.head(x[:, 0])


def texts(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of 4 to 8 words, and whether the first word comes again."""
    ids = torch.randint(1, WORDS, (count, 8))
    ids[torch.arange(8) >= torch.randint(4, 9, (count, 1))] = PADDING
    return ids, (ids[:, 1:] == ids[:, :1]).any(dim=1).long()


model = Classifier()
fastattn.optimize(model)  # the one line

optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(301):
    ids, labels = texts(64)
    loss = nn.functional.cross_entropy(model(ids), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
ids, labels = texts(512)
model.eval()
with torch.no_grad():
    found = model(ids).argmax(dim=1)
print(f"texts that repeat their first word: {labels.float().mean():.0%}")
print("answers right:", "nearly all" if (found == labels).float().mean() > 0.95 else "too few")
