"""A split of a data set: its batches, normalised and augmented on the device, and how images are held out of one.

Shape letters: B images of a batch, C channels, H height, W width, N images of a split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from compressor.errors import DataError, InputError
from compressor.training.data.augmentation import Augmentation, Rows
from compressor.training.data.images import CHUNK, Images, Progress, Resident, take_ahead

_SAMPLED = 2000  # images on disk of which mean and deviation are taken: decoding all would double the time to load


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a data set: images, what they show, and how they are normalised and augmented.

    Attributes:
        images: where the pixels are; splits of one data set may share them.
        indices: `(N,)` int64, which of those images belong to this split.
        targets: `(N,)` int64, class indices.
        mean, std: per channel, in pixel values from 0 to 255, of the train split: every split has the same.
        shift: augmentation moves an image by up to so many pixels each way.
        mirror: whether augmentation flips left and right.
    """

    images: Images
    indices: Tensor
    targets: Tensor
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    shift: int = 0
    mirror: bool = False

    @staticmethod
    def from_arrays(images: Images, targets: Tensor, start: int = 0) -> Split:
        """Return the split of consecutive images that begins at index `start`, not normalised yet."""
        return Split(images, torch.arange(start, start + len(targets)), targets.long())

    def __len__(self) -> int:
        """Return `N`, the number of images."""
        return len(self.indices)

    def part(self, number: int, parts: int) -> Split:
        """Return every `parts`-th image, from image `number` on."""
        mine = slice(number, None, parts)
        return replace(self, indices=self.indices[mine], targets=self.targets[mine])

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: torch.Generator | None = None,
        augment: Augmentation | None = None,
        balanced: bool = False,
        device: str | torch.device = "cpu",
        drop_last: bool = False,
        done: int = 0,
        draws: Tensor | None = None,
        rows: Rows = lambda whole: whole,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through the split once.

        Args:
            batch_size: images in a batch; the last batch may have fewer.
            shuffle: CPU generator of the order and of the augmentation; None keeps the order. Its state is all the
                randomness there is: the same state yields the same batches on every device.
            augment: how images differ every time; needs `shuffle`. None: they do not.
            balanced: draw with replacement, every class equally often on average, as many images as the split has;
                needs `shuffle`.
            device: where the batches are made.
            drop_last: leave an incomplete last batch out.
            done: go on behind so many batches; `draws` is the state that `shuffle` had then.
            rows: gets a tensor with a row for every image of a batch and returns the rows that are wanted; they are
                what they are in the whole batch, and no other image is read.

        Yields:
            Normalised images `(B, C, H, W)` float32, and class indices `(B,)` int64.

        Raises:
            InputError: augmentation or balance without a generator.
            DataError: an image on disk that became unreadable.
        """
        for name, draws_at_random in ((f"augment={augment}", augment), ("balanced=True", balanced)):
            if draws_at_random and shuffle is None:
                raise InputError(f"{name} draws at random: pass shuffle=torch.Generator() as well")
        order = self._order(shuffle, balanced)
        if drop_last:
            order = order[: len(self) - len(self) % batch_size]
        if shuffle is not None and draws is not None:
            shuffle.set_state(draws)  # the order is that of the whole epoch, what is drawn for images goes on
        batches = torch.split(order, batch_size)[done:]
        chosen = [rows(whole) for whole in batches]
        taken = take_ahead(self.images, [self.indices[each] for each in chosen], torch.device(device))
        for whole, own, pixels in zip(batches, chosen, taken, strict=True):
            if augment and shuffle is not None:
                # NOTE: drawn here, not ahead: the generator's state must be that of the batch at hand.
                pixels = augment(pixels, rows, len(whole), self.shift, self.mirror, shuffle)
            yield self._normalised(pixels), self.targets[own].to(device)

    def chosen(self, number: int, batch_size: int, state: Tensor, *, balanced: bool = False) -> Tensor:
        """Return which images batch `number` of an epoch holds, by their index in the data set.

        Args:
            number: from 0.
            batch_size, balanced: as in `batches`.
            state: of the generator that shuffled, as it was before the epoch.
        """
        generator = torch.Generator()
        generator.set_state(state)
        return self.indices[torch.split(self._order(generator, balanced), batch_size)[number]]

    def _order(self, shuffle: torch.Generator | None, balanced: bool) -> Tensor:
        if shuffle is None:
            return torch.arange(len(self))
        if not balanced:
            return torch.randperm(len(self), generator=shuffle)
        # 90 cats and 10 dogs: each dog is drawn nine times as often as each cat, so that 50 of 100 images show dogs.
        rarity = 1 / torch.bincount(self.targets).double()
        return torch.multinomial(rarity[self.targets], len(self), replacement=True, generator=shuffle)

    def _normalised(self, pixels: Tensor) -> Tensor:
        # Bytes travel to the device and are kept there; only the batch at hand is float, four times as large.
        mean, std = (torch.tensor(values, device=pixels.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return pixels.float().sub_(mean).div_(std)


def stratified_split(split: Split, share: float, seed: int, classes: Sequence[str]) -> tuple[Split, Split]:
    """Split every class at random: what stays, and the share that is held out; each has at least one image.

    Of classes with 12, 5 and 2 images, a share of 0.25 holds 3, 1 and 1 out: each is rounded for itself.
    """
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(split), dtype=torch.bool)
    for target, name in enumerate(classes):
        members = (split.targets == target).nonzero().flatten()
        if len(members) < 2:
            raise DataError(f"class {name!r} has {len(members)} training image: it needs 2 or more, one is held out")
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    # By mask, so that both keep the order that the images had.
    stay, out = (replace(split, indices=split.indices[mask], targets=split.targets[mask]) for mask in (~held, held))
    return stay, out


def moments(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel; of 2,000 images spread over the split if they are on disk."""
    stride = 1 if isinstance(split.images, Resident) else max(1, len(split) // _SAMPLED)
    # Counting the 256 values of a byte is exact, and the order of the images makes no difference to a sum.
    counts = torch.zeros(split.images.shape[0], 256, dtype=torch.int64)
    for indices in torch.split(split.indices[::stride], CHUNK):
        pixels = split.images.take(indices, torch.device("cpu"))
        counts += torch.stack([channel.flatten().bincount(minlength=256) for channel in pixels.unbind(1)])
    weights = counts.double() / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64)
    mean = weights @ levels
    variance = (weights * (levels - mean[:, None]) ** 2).sum(1)
    # A channel that never changes has no deviation; one level of 256 keeps it finite.
    return tuple(mean.tolist()), tuple(variance.sqrt().clamp_min(1).tolist())


@dataclass(frozen=True)
class Request:
    """What a loader in `DATASETS` is told; see `load_data`."""

    path: str
    image_size: tuple[int, int] | None
    root: Path
    download: bool
    on_progress: Progress
    cache: Path | None = None


@dataclass(frozen=True, eq=False)
class RawDataset:
    """What a loader in `DATASETS` returns: splits that are neither normalised nor augmented yet.

    Attributes:
        classes: their names.
        train, test: the splits.
        validation: None where it is still to be taken out of `train`.
        natural: whether a mirrored image, moved by an eighth of its size, is still of its class.
    """

    classes: tuple[str, ...]
    train: Split
    test: Split
    validation: Split | None = None
    natural: bool = True
