"""A class refiner of convolutions."""

from torch import Tensor, nn
from torch.nn.functional import gelu

from grn.weights.pretrained import Pretrained


class ConvRefiner(Pretrained, nn.Module):
    """Residual convolutions over the tokens' places. `Pretrained` is what `grn.export` needs, and nothing else does.

    Args:
        channels: D, of the tokenizer.
        classes: K, values of a token.
        num_labels: also the index of "no label".
        size: tokens a side.
        width, depth: of the network.
    """

    def __init__(self, *, channels: int, classes: int, num_labels: int, size: int, width: int = 64, depth: int = 4):
        super().__init__()
        self.channels, self.classes, self.num_labels, self.size = channels, classes, num_labels, size
        self.tokens = nn.ModuleList(nn.Embedding(classes, width) for _ in range(channels))
        self.labels = nn.Embedding(num_labels + 1, width)
        self.signal = nn.Linear(1, width)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.head = nn.Conv2d(width, classes * channels, 1)

    def forward(self, tokens: Tensor, signal_ratio: Tensor, labels: Tensor) -> Tensor:
        """Corrupted tokens int64 [B, D, 1, H, W], signal ratios [B], labels int64 [B] -> logits [B, K, D, 1, H, W]."""
        hidden = sum(embed(tokens[:, channel, 0]) for channel, embed in enumerate(self.tokens))
        asked = self.labels(labels) + self.signal(signal_ratio.to(hidden.dtype)[:, None])
        hidden = (hidden + asked[:, None, None]).movedim(-1, 1)
        for block in self.blocks:
            hidden = hidden + gelu(block(hidden))
        return self.head(hidden).unflatten(1, (self.classes, self.channels)).unsqueeze(3)
