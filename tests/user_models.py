"""Models of a user's own, for `--model user_models:FACTORY`: small enough to train in a test."""

from torch import Tensor, nn


def tiny(num_classes: int) -> nn.Module:
    """Three convolutions with BatchNorm; their channels can all be cut."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))


def two_convolutions(first: int = 16, second: int = 24) -> nn.Sequential:
    """A BatchNorm behind the first, a bias in both."""
    return nn.Sequential(
        nn.Conv2d(3, first, 3, padding=1),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(second, 4),
    )


class Baked(nn.Module):
    """A network whose own code relies on every width, so that nothing of it can be cut."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=4, padding=1)
        self.head = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.conv(images).cumsum(1).mean((2, 3)))


def baked(num_classes: int) -> nn.Module:
    return Baked(num_classes)


def plain(num_classes: int) -> nn.Module:
    """A network without BatchNorm, which `bn_scale` cannot judge."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes)
    )


def seven() -> nn.Module:
    """A network with as many outputs as it likes."""
    return tiny(7)


def half(num_classes: int = 10) -> nn.Module:
    """Return a network in half precision."""
    return tiny(num_classes).half()
