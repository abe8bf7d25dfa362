"""The published augmentations, for a whole batch at once on the device that trains.

Training takes `RandomResizedCrop(S, bicubic)` and a horizontal flip, evaluation `Resize(S*256/224, bicubic)` and
`CenterCrop(S)`; both then normalise. Each of them crops a box, resamples it with Pillow's bicubic filter and maybe
mirrors it, and resampling is linear and separable, so an image becomes `rows @ image @ columns` with two small
matrices of its own: crop, resize and flip of a batch are two batched matrix products. The result is Pillow's but
for rounding ties (one or two levels of 255 in 0.1 % of the values), because values are rounded and clamped after
each of the two passes, columns first, as in Pillow. (Pillow 13 seems to take some tall crops in the other order: up
to 6 levels apart where pixels saturate.) The random numbers come from a CPU generator, so they are the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from control_experiments.training.device import to_device

#: Upper bound of a padded chunk of images of unequal sizes, in values (x 4 bytes when they become floats).
CHUNK_VALUES = 1 << 26


@dataclass
class Views:
    """What to show of each of B images; integer tensors on the CPU.

    Attributes:
        box: `(B, 4)` top, left, height and width of the part of the image that is resized.
        scaled: `(B, 2)` height and width to which the box is resized.
        window: `(B, 2)` top and left of the S x S window of the resized box that is kept.
        flip: `(B,)` whether the window is mirrored, bool.
    """

    box: torch.Tensor
    scaled: torch.Tensor
    window: torch.Tensor
    flip: torch.Tensor


def random_views(sizes: torch.Tensor, size: int, generator: torch.Generator) -> Views:
    """`RandomResizedCrop(size)` and `RandomHorizontalFlip()` for images of `sizes` `(B, 2)`, with torchvision's defaults.

    Like torchvision: a uniform share of the area and a log-uniform aspect ratio, tried ten times, else the largest
    central crop whose ratio is allowed.
    """
    narrowest, widest = 3 / 4, 4 / 3

    def draw(low: float, high: float) -> torch.Tensor:
        return torch.empty(len(sizes), 10, dtype=torch.float64).uniform_(low, high, generator=generator)

    height, width = sizes.double().unbind(1)
    area = (height * width)[:, None] * draw(0.08, 1.0)
    aspect = draw(math.log(narrowest), math.log(widest)).exp()
    wide, high = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (wide > 0) & (wide <= width[:, None]) & (high > 0) & (high <= height[:, None])
    first = fits.int().argmax(1, keepdim=True)  # the first try that fits, if any does
    fitting = fits.any(1)
    own = width / height
    central_width = torch.where(own > widest, (height * widest).round(), width)
    central_height = torch.where(own < narrowest, (width / narrowest).round(), height)
    wide = torch.where(fitting, wide.gather(1, first)[:, 0], central_width)
    high = torch.where(fitting, high.gather(1, first)[:, 0], central_height)
    corner = torch.rand((len(sizes), 2), generator=generator, dtype=torch.float64)
    top = torch.where(fitting, (corner[:, 0] * (height - high + 1)).floor(), ((height - high) / 2).floor())
    left = torch.where(fitting, (corner[:, 1] * (width - wide + 1)).floor(), ((width - wide) / 2).floor())
    box, scaled = torch.stack([top, left, high, wide], 1).long(), torch.full((len(sizes), 2), size)
    return Views(box, scaled, torch.zeros_like(scaled), torch.rand(len(sizes), generator=generator) < 0.5)


def central_views(sizes: torch.Tensor, size: int, crop: float = 224 / 256) -> Views:
    """`Resize(round(size / crop))` of the shorter side and `CenterCrop(size)` for images of `sizes` `(B, 2)`."""
    shorter = max(size, round(size / crop))
    # torchvision: int(shorter * long / short) for the longer side, round((scaled - size) / 2) for the corner
    scaled = (shorter * sizes) // sizes.amin(1, keepdim=True)
    box, window = torch.cat([torch.zeros_like(sizes), sizes], 1), ((scaled - size) / 2).round().long()
    return Views(box, scaled, window, flip=torch.zeros(len(sizes), dtype=torch.bool))


def sizes_of(images: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Heights and widths `(B, 2)` of `(B, 3, H, W)` images or of a list of `(3, H, W)` images."""
    if isinstance(images, torch.Tensor):
        return torch.tensor(images.shape[-2:]).repeat(len(images), 1)
    return torch.tensor([image.shape[-2:] for image in images])


def render(images: torch.Tensor | Sequence[torch.Tensor], views: Views, size: int, device: torch.device | str) -> torch.Tensor:
    """Crop, resize and flip uint8 images; return `(B, 3, size, size)` float32 of whole levels 0 ... 255 on `device`.

    Images of one size come as a `(B, 3, H, W)` tensor, others as a list of `(3, H, W)` tensors, of which only the
    boxes travel, in padded chunks of at most `CHUNK_VALUES` values.
    """
    if isinstance(images, torch.Tensor):
        return _resample(to_device(images, device), views, size)
    result = torch.empty(len(images), 3, size, size, device=device)
    for chunk in _chunks(views.box[:, 2:]):
        part = Views(views.box[chunk] * torch.tensor([0, 0, 1, 1]), views.scaled[chunk], views.window[chunk], views.flip[chunk])
        high, wide = part.box[:, 2:].amax(0).tolist()
        padded = torch.zeros(len(chunk), 3, high, wide, dtype=torch.uint8, device=images[chunk[0]].device)
        for row, index in enumerate(chunk):
            top, left, height, width = views.box[index].tolist()
            padded[row, :, :height, :width] = images[index][:, top : top + height, left : left + width]
        result[to_device(torch.tensor(chunk), device)] = _resample(to_device(padded, device), part, size)
    return result


def normalise(levels: torch.Tensor) -> torch.Tensor:
    """Levels 0 ... 255 to inputs of zero mean and unit deviation by the ImageNet statistics that timm defines."""
    statistics = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    mean, deviation = (levels.new_tensor(values).view(3, 1, 1) * 255 for values in statistics)
    return (levels - mean).div_(deviation)


def _chunks(boxes: torch.Tensor) -> list[list[int]]:
    """Indices grouped so that images of similar size are padded together and no chunk is too large."""
    chunks: list[list[int]] = []
    extent = torch.zeros(2, dtype=torch.long)
    for index in (boxes[:, 0] * boxes[:, 1]).argsort().tolist():
        extent = torch.maximum(extent, boxes[index])
        if chunks and 3 * int(extent.prod()) * (len(chunks[-1]) + 1) <= CHUNK_VALUES:
            chunks[-1].append(index)
        else:
            chunks.append([index])
            extent = boxes[index].clone()
    return chunks


def _resample(pixels: torch.Tensor, views: Views, size: int) -> torch.Tensor:
    numbers = torch.cat([views.box, views.scaled, views.window, views.flip[:, None].long()], 1)
    top, left, height, width, high, wide, first_row, first_column, flip = to_device(numbers, pixels.device).float().unbind(1)
    outputs = torch.arange(size, device=pixels.device, dtype=torch.float32)
    mirrored = torch.where(flip[:, None] > 0, size - 1 - outputs, outputs)
    columns = _bicubic(left, width, wide, first_column[:, None] + mirrored, pixels.shape[-1])
    rows = _bicubic(top, height, high, first_row[:, None] + outputs, pixels.shape[-2])
    with torch.autocast(pixels.device.type, enabled=False):
        half = _levels(pixels.float() @ columns.transpose(1, 2)[:, None])
        return _levels(rows[:, None] @ half)


def _bicubic(start, length, scaled, outputs, extent: int) -> torch.Tensor:
    """Pillow's antialiased bicubic filter (a = -1/2) as matrices `(B, outputs, extent)`.

    Row o holds the weights with which output pixel `outputs[b, o]` of a line of `scaled[b]` pixels sees the
    `length[b]` input pixels from `start[b]` on; other input pixels have weight 0.
    """
    step = (length / scaled)[:, None]
    centre = (outputs + 0.5) * step
    position = torch.arange(extent, device=outputs.device) - start[:, None]
    x = ((position[:, None, :] + 0.5 - centre[..., None]) / step.clamp(min=1)[..., None]).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    inside = (position >= 0) & (position < length[:, None])
    weight = weight * inside[:, None, :]
    return weight / weight.sum(-1, keepdim=True)


def _levels(values: torch.Tensor) -> torch.Tensor:
    """Round half up and clamp, as Pillow does between and after its two passes."""
    return values.add_(0.5).floor_().clamp_(0, 255)
