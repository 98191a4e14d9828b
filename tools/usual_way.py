"""How domain-adversarial training is usually scripted: our own code, the baseline of tools.benchmark.

A `Dataset` that turns one image after the other into a PIL image and through torchvision's transforms, a `DataLoader`
with two workers for each domain, fp32, one forward pass for each domain, `.item()` on the losses in every step.
Network, batch, device and optimiser are those of the recipe.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from data_loader import DigitSet
from methods.networks import NETWORKS, build_network
from methods.recipes import Config
from model import reverse_gradient

WORKERS = 2
ENDLESS = 10_000_000  # images to draw: the workers start once and not in every round


class Digits(Dataset):
    """One (C, S, S) tensor in [0, 1] and its label at a time."""

    def __init__(self, digits: DigitSet, transform: Callable[[Image.Image], torch.Tensor]):
        self.images, self.labels, self.transform = digits.images.numpy(), digits.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = self.images[index].transpose(1, 2, 0)
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
        return self.transform(image.convert("RGB")), self.labels[index]


def per_image(x: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit variance."""
    return (x - x.mean()) / x.std().clamp_min(1e-3)


def transform_of(config: Config, training: bool) -> Callable[[Image.Image], torch.Tensor]:
    """The recipe's preprocessing from torchvision's parts; augmentation in training alone."""
    size = NETWORKS[config.network].image_size
    steps: list[Callable] = [transforms.Resize((size, size))]
    if training and config.augmentation == "affine":
        steps.append(transforms.RandomAffine(15, (0.06, 0.06), (0.85, 1.15), 9))
    steps.append(transforms.ToTensor())
    if config.normalisation == "per-image":
        steps.append(per_image)
    elif config.normalisation == "mean":
        steps.append(transforms.Normalize((0.5, 0.5, 0.5), (1, 1, 1)))
    return transforms.Compose(steps)


def domain_loss(logits: torch.Tensor, domain: int) -> torch.Tensor:
    """Of a whole batch from one domain, 0 = source, 1 = target. Shape: (N,) -> ()"""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, domain))


class UsualWay:
    """A network with its two loaders; `train` and `test` go on where they stopped."""

    def __init__(self, config: Config, source: DigitSet, target: DigitSet, device: torch.device):
        self.config, self.device = config, device
        self.model = build_network(config.network, config.dropout).to(device)
        if config.optimizer == "sgd":
            sgd = torch.optim.SGD(self.model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
            self.optimizer: torch.optim.Optimizer = sgd
        else:
            betas = (config.momentum, 0.999)
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), config.lr, betas, weight_decay=config.weight_decay
            )
        self.batches_s, self.batches_t = (self.batches(digits, True) for digits in (source, target))
        self.test_batches = self.batches(source, False)

    def batches(self, digits: DigitSet, training: bool) -> Iterator:
        data = Digits(digits, transform_of(self.config, training))
        sampler = RandomSampler(data, replacement=True, num_samples=ENDLESS)
        pinned = self.device.type == "cuda"
        return iter(DataLoader(data, self.config.batch_size, sampler=sampler, num_workers=WORKERS, pin_memory=pinned))

    def train(self, steps: int) -> int:
        """So many steps; returns how many images they saw."""
        self.model.train()
        for _ in range(steps):
            (x_s, y_s), (x_t, _) = next(self.batches_s), next(self.batches_t)
            x_s, y_s, x_t = x_s.to(self.device), y_s.to(self.device), x_t.to(self.device)
            f_s = self.model.extractor(x_s)
            loss_label = F.cross_entropy(self.model.classifier(f_s), y_s)
            loss_s = domain_loss(self.model.discriminator(reverse_gradient(f_s, 0.1)), 0)
            loss_t = domain_loss(self.model.discriminator(reverse_gradient(self.model.extractor(x_t), 0.1)), 1)
            loss = loss_label + loss_s + loss_t
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss_label.item(), loss_s.item(), loss_t.item()  # for the progress bar, as usual
        return steps * 2 * self.config.batch_size

    @torch.no_grad()
    def test(self, steps: int) -> int:
        """So many batches; returns how many images they held."""
        self.model.eval()
        correct = 0
        for _ in range(steps):
            x, y = next(self.test_batches)
            correct += (self.model(x.to(self.device)).argmax(1).cpu() == y).sum().item()
        return steps * self.config.batch_size
