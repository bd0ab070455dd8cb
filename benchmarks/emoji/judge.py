"""What judges emoji: a small picture encoder, trained here as CLIP's is (Radford et al. 2021), against the frozen
sentence embeddings of the captions."""
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, pad
from transformers import ResNetConfig, ResNetModel

from cdm_plugin.data.images import read_image
from cdm_plugin.metrics import frechet_distance

WIDTH = 64


class Judge(nn.Module):
    """Pictures and captions in one space.

    It is trained on all pictures, those of held-out captions too: it has to know what was asked for.

    Args:
        text_width (int): Width of the captions' sentence embeddings.
    """

    def __init__(self, text_width: int) -> None:
        super().__init__()
        self.network = ResNetModel(ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1],
                                                layer_type='basic'))
        self.picture = nn.Linear(256, WIDTH)
        self.text = nn.Linear(text_width, WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to embeddings (B, 64), of which the direction counts for retrieval and the whole
        for the Fréchet distance."""
        return self.picture(self.network(pictures).pooler_output.flatten(1))

    def forward(self, pictures: Tensor, texts: Tensor) -> Tensor:
        """CLIP's symmetric loss of B pairs."""
        logits = self.log_scale.exp() * normalize(self.embed_pictures(pictures)) @ normalize(self.text(texts)).T
        target = torch.arange(len(logits), device=logits.device)
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

    @torch.no_grad()
    def features(self, pictures: Tensor, batch_size: int = 256) -> Tensor:
        """Embeddings of N pictures, on the CPU."""
        device = self.log_scale.device
        return torch.cat([self.embed_pictures(part.to(device)).cpu() for part in pictures.split(batch_size)])

    @torch.no_grad()
    def retrieval(self, features: Tensor, texts: Tensor, asked: Sequence[int], k: int = 1) -> float:
        """Share of pictures whose caption is among the k nearest of all given captions.

        Args:
            features (Tensor): Embeddings of N pictures, (N, 64).
            texts (Tensor): Sentence embeddings of M captions, (M, W).
            asked (Sequence[int]): N numbers of captions, what each picture was to show.
            k (int): Captions that count. Default 1.
        """
        device = self.log_scale.device
        similarity = normalize(features.to(device)) @ normalize(self.text(texts.to(device))).T
        nearest = similarity.topk(min(k, len(texts)), dim=1).indices
        return float((nearest == torch.as_tensor(asked, device=device)[:, None]).any(1).double().mean())


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Moves each picture by up to 4 pixels over white, and adds noise of up to 0.1: generated pictures have both."""
    size, offsets = pictures.shape[-1], torch.randint(0, 9, (len(pictures), 2), generator=generator)
    wide = pad(pictures, (4, 4, 4, 4), value=1.0)
    moved = torch.stack([p[:, y:y + size, x:x + size] for p, (y, x) in zip(wide, offsets.tolist())])
    level = 0.1 * torch.rand((len(moved), 1, 1, 1), generator=generator)
    return moved + level * torch.randn(moved.shape, generator=generator)


def load_pictures(files: list[Path]) -> Tensor:
    """PNG files to (N, 3, H, W) in [-1, 1]."""
    return torch.stack([read_image(file) for file in files])


def train_judge(pictures: Tensor, texts: Tensor, steps: int, device: str = 'cpu', batch_size: int = 256) -> Judge:
    """A judge of its own, from N pictures (N, 3, H, W) and their captions' sentence embeddings (N, W)."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    judge = Judge(texts.shape[1]).to(device).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randperm(len(pictures), generator=generator)[:batch_size]
        loss = judge(augment(pictures[rows], generator).to(device), texts[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval().requires_grad_(False)


def score(judge: Judge, pictures: Tensor, texts: Tensor, asked: Sequence[int],
          references: dict[str, Tensor]) -> dict[str, float]:
    """Retrieval of the caption from N pictures, and their Fréchet distance to sets of features by name."""
    if not pictures.isfinite().all():
        return dict.fromkeys(('retrieval@1', 'retrieval@5', *references))
    features = judge.features(pictures)
    scores = {f'retrieval@{k}': round(judge.retrieval(features, texts, asked, k), 4) for k in (1, 5)}
    return {**scores, **{name: round(frechet_distance(features, other), 3) for name, other in references.items()}}
