"""The models as jaxdist has them, written as PyTorch's users write them, and their optimizer.

B samples, T tokens, D width, H heads, K features of a head, V vocabulary.
"""

import math

import cases
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x_BxTxD: Tensor) -> Tensor:
        B, T, D = x_BxTxD.shape
        mixed = self.query_key_value(self.attention_norm(x_BxTxD)).view(B, T, 3, self.heads, D // self.heads)
        query_BxHxTxK, key_BxHxTxK, value_BxHxTxK = mixed.permute(2, 0, 3, 1, 4)
        out_BxHxTxK = F.scaled_dot_product_attention(query_BxHxTxK, key_BxHxTxK, value_BxHxTxK, is_causal=True)
        x_BxTxD = x_BxTxD + self.attention_out(out_BxHxTxK.transpose(1, 2).reshape(B, T, D))
        return x_BxTxD + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x_BxTxD)), approximate="tanh"))


class GPT(nn.Module):
    """The mean loss of tokens [B, T + 1]; the head's matrix is the embedding's."""

    def __init__(self, vocabulary: int, layers: int, width: int, heads: int, context: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.final_norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs_BxT, targets_BxT = tokens[:, :-1], tokens[:, 1:]
        x_BxTxD = self.token_embedding(inputs_BxT) + self.position_embedding.weight[: inputs_BxT.shape[1]]
        for block in self.blocks:
            x_BxTxD = block(x_BxTxD)
        logits_BxTxV = F.linear(self.final_norm(x_BxTxD), self.token_embedding.weight)
        return F.cross_entropy(logits_BxTxV.flatten(0, 1), targets_BxT.flatten())


class CNN(nn.Module):
    """The mean loss of images x [B, 1, 28, 28] with labels y [B]."""

    def __init__(self, channels: list[int], hidden: int, classes: int):
        super().__init__()
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(a, b, 3, padding=1) for a, b in zip([1, *channels], channels, strict=False)]
        )
        self.dense = nn.Linear(7 * 7 * channels[-1], hidden)
        self.out = nn.Linear(hidden, classes)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = F.max_pool2d(F.relu(convolution(x)), 2)
        return F.cross_entropy(self.out(F.relu(self.dense(x.flatten(1)))), y)


def build(model: str) -> nn.Module:
    torch.manual_seed(0)
    return GPT(cases.VOCABULARY, **cases.GPT) if model == "gpt" else CNN(**cases.CNN, classes=cases.CLASSES)


def build_optimizer(model: str, module: nn.Module) -> torch.optim.Optimizer:
    """PyTorch's fused kernel; matrices and embeddings decay, as in jaxdist."""
    decay = cases.ADAM["weight_decay"] if model == "gpt" else 0.0
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (cases.ADAM["b1"], cases.ADAM["b2"])
    kind = torch.optim.AdamW if decay else torch.optim.Adam
    return kind(groups, lr=cases.ADAM["learning_rate"], betas=betas, eps=cases.ADAM["eps"], fused=True)
