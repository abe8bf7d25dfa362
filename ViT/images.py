"""Labelled images: where they come from, decoded once to uint8 and kept where training reads them fastest.

Sources: torchvision's own datasets (downloaded on first use), an `.npz`, a folder or tar of class folders, and
scikit-learn's digits. A *source* is anything with `len(source)` and `source[i] -> (PIL image, label)`;
:class:`Decoded` holds one in memory, :class:`OnDemand` decodes it anew each epoch when it is too large.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch
import torchvision
from accelerate.utils import send_to_device
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader
from torchvision import datasets
from tqdm import tqdm

from control_experiments.errors import UserError
from control_experiments.paths import cache_folder
from control_experiments.training.checksums import fingerprint
from control_experiments.training.device import to_device
from ViT.finetune import HUB

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff"}
#: What Pillow may take a file for: it knows more formats, some of which start other programs.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "PPM", "TIFF")
TEST_NAMES = ("test", "val", "valid", "validation")
NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test", "classes")
#: Share of the free memory that decoded images may take, on the device and on the host.
DEVICE_SHARE, HOST_SHARE = 0.25, 0.5

#: Of `hold_out`, not a run's own seed: runs that are compared must hold out the same images.
SPLIT_SEED = 0

Images = torch.Tensor | Sequence[torch.Tensor]


def decode(source, index: int) -> tuple[torch.Tensor, int]:
    """Entry `index` as (`(3, H, W)` uint8, label). Raises UserError: it is no readable image."""
    try:
        image, label = source[index]
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous(), int(label)
    except Exception as error:  # what Pillow raises for a broken file depends on its format and version
        name = source.paths[index] if isinstance(source, Files) else f"{type(source).__name__} image {index}"
        raise UserError(f"{name} is no readable image ({error})") from error


class Decoded:
    """Images in memory: one tensor `(N, 3, H, W)` if all have one size, else a list; labels `(N,)` beside them."""

    def __init__(self, images: Images, labels: torch.Tensor):
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def bytes(self) -> int:
        return sum(image.nbytes for image in self.images)

    def to(self, device: torch.device) -> Decoded:
        return Decoded(*send_to_device((self.images, self.labels), device))

    def batches(self, indices: Sequence[torch.Tensor]) -> Iterator[tuple[Images, torch.Tensor]]:
        """For each index tensor (on the CPU) the uint8 images and their labels."""
        for chosen in indices:
            on_device = to_device(chosen, self.labels.device)
            if isinstance(self.images, torch.Tensor):
                yield self.images[on_device], self.labels[on_device]
            else:
                yield [self.images[i] for i in chosen.tolist()], self.labels[on_device]


class OnDemand:
    """Images decoded by worker processes when a batch asks for them: for sets that fit in no memory."""

    bytes = 0

    def __init__(self, source, workers: int):
        self.source, self.workers = source, workers

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | UserError:
        try:
            return decode(self.source, index)
        except UserError as error:  # raised in a worker it would arrive with the worker's traceback in its message
            return error

    def batches(self, indices: Sequence[torch.Tensor]) -> Iterator[tuple[Images, torch.Tensor]]:
        """As `Decoded.batches`."""
        chosen = [part.tolist() for part in indices]
        for entries in DataLoader(self, batch_sampler=chosen, num_workers=self.workers, collate_fn=list):
            for entry in entries:
                if isinstance(entry, UserError):
                    raise entry
            images, labels = zip(*entries, strict=True)
            yield images, torch.tensor(labels)


def read(source, keep: str, workers: int) -> Decoded | OnDemand:
    """Decode a whole source, or leave it to be decoded on demand when it is too large for the host's memory.
    Raises UserError: images that cannot be read, by name."""
    if keep == "auto":  # by 16 images spread over the source
        sizes = [decode(source, index)[0].nbytes for index in {len(source) * i // 16 for i in range(16)}]
        room = HOST_SHARE * psutil.virtual_memory().available
        keep = "files" if len(source) * sum(sizes) > room * len(sizes) else "host"
    if keep == "files":
        return OnDemand(source, workers)
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(decode, source, index) for index in range(len(source))]
        broken = [str(f.exception()) for f in tqdm(futures, "decoding", leave=False, disable=None) if f.exception()]
    if broken:
        raise UserError(f"{'; '.join(broken[:20])}: repair or remove {len(broken)} of {len(source)} images")
    images, labels = zip(*(future.result() for future in futures), strict=True)
    if len({image.shape for image in images}) == 1:
        images = torch.stack(images)
    return Decoded(images, torch.tensor(labels))


@dataclass
class Files:
    """Image files with labels."""

    paths: Sequence[Path]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.paths[index], formats=FORMATS) as image:
            image.load()
            return image, self.labels[index]


@dataclass
class ImageData:
    """A data set with its two splits.

    Attributes:
        name: short, for run names and tables.
        classes: class names by label.
        identity: the record's `data`: id and sha256 (of the file or folder) or the version that fixes it.
    """

    name: str
    train: Decoded | OnDemand
    test: Decoded | OnDemand
    classes: list[str]
    identity: dict

    def place(self, device: torch.device, keep: str = "auto") -> None:
        """Move decoded images to the training device if they fit there (a quarter of what is free)."""
        if device.type != "cuda" or keep not in ("auto", "device"):
            return
        size = self.train.bytes + self.test.bytes
        if keep == "device" or size < DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
            self.train, self.test = (part.to(device) if isinstance(part, Decoded) else part for part in (self.train, self.test))


def load_data(name: str, *, root: str = "data", keep: str = "auto", workers: int = 8) -> ImageData:
    """Load a data set by its torchvision name, "digits", or the path of an `.npz`, a folder or a tar.

    Args:
        keep: "auto", "device", "host" (decoded in memory) or "files" (decoded on demand).
        workers: threads that decode, or processes for "files".

    Raises UserError: there is no such data, or it is not what its kind of source must be.
    """
    if name == "digits":
        return load_digits_data()
    if name in HUB:
        return _torchvision(name, root, keep, workers)
    path = Path(name)
    if path.suffix == ".npz":
        return _npz(path)
    identity = {"id": path.name, "sha256": fingerprint(path)}
    splits, classes = _class_folders(path if path.is_dir() else _unpacked(path, identity["sha256"]), path)
    parts = (read(files, keep, workers) for files in splits)
    return ImageData(path.stem, *parts, classes, identity)


def _images(folder: Path) -> list[Path]:
    """The image files below a folder."""
    found = folder.rglob("*")
    return sorted(file for file in found if file.suffix.lower() in SUFFIXES and file.name[0] != "." and file.is_file())


def read_folder(folder: str, workers: int) -> tuple[list[Path], Decoded]:
    """All images below a folder: their paths, and their pixels with labels that say nothing. Raises UserError: no folder, no
    image in it, or images that cannot be read."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{folder} is no folder of images")
    paths = _images(root)
    if not paths:
        raise UserError(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))})")
    return paths, read(Files(paths, [0] * len(paths)), "host", workers)


def _class_folders(folder: Path, named: Path) -> tuple[list[Files], list[str]]:
    """The training and the test images below a folder, called `named` in errors, and the names of their classes."""
    images, splits = sorted(_images(folder), key=lambda path: (path.parent.name, path)), []
    for names in (("train",), TEST_NAMES):
        found = [path for path in images if path.parent.parent.name in names]
        if not found:
            wanted = f"train/CLASS/*.jpg and {'|'.join(TEST_NAMES)}/CLASS/*.jpg"
            raise UserError(f"{named} has no {names[0]} images: it must hold {wanted}")
        splits.append(found)
    train, test = ({path.parent.name for path in found} for found in splits)
    if only := sorted(train ^ test):
        where = "train" if only[0] in train else "test"
        raise UserError(f"the class folders of {named} differ: {only[0]} only in {where}; train and test must have the same")
    labels = {name: label for label, name in enumerate(sorted(train))}
    return [Files(found, [labels[path.parent.name] for path in found]) for found in splits], list(labels)


def _unpacked(tar: Path, checksum: str) -> Path:
    """The folder below the cache that holds what is in a tar. Raises UserError: it is none that can be read, or has members
    outside of itself."""
    folder = cache_folder() / "images" / checksum
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        images = Path(place) / "images"
        images.mkdir()
        try:
            with tarfile.open(tar) as file:
                for member in file:
                    if member.size < 0:  # after which tarfile would go round in circles
                        raise tarfile.ReadError("a member has a negative size")
                    target = Path(os.path.normpath(images / member.name))
                    if not target.is_relative_to(images):
                        raise tarfile.ReadError(f"{member.name!r} is outside the destination")
                    # Python before 3.11.4 extracts without looking; of a link this is what it names
                    if source := file.extractfile(member):
                        target.parent.mkdir(parents=True, exist_ok=True)
                        with open(target, "wb") as copy:
                            shutil.copyfileobj(source, copy)
        except Exception as error:  # tarfile lets many kinds through for a broken header
            raise UserError(
                f"{tar} is no .npz, no folder of class folders and no tar that can be unpacked ({error})"
            ) from error
        with suppress(OSError):  # another run was first
            os.rename(images, folder)
    return folder


def _npz(path: Path) -> ImageData:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: np.atleast_1d(file[key]) for key in NPZ_KEYS}
    except Exception as error:  # NumPy, zipfile and zlib each have their own kinds for a broken file
        layout = f"{', '.join(NPZ_KEYS)} (images uint8 N x H x W x 3, labels integers, class names)"
        raise UserError(f"{path} is no readable .npz with {layout}: {error}") from error
    classes, splits = [str(name) for name in arrays["classes"]], []
    for split in ("train", "test"):
        pixels, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or not pixels.size:
            raise UserError(f"x_{split} of {path} is {pixels.dtype} {pixels.shape}: it must be uint8 N x H x W x 3")
        integers = labels.shape == (len(pixels),) and labels.dtype.kind in "iu"
        if not integers or labels.min() < 0 or labels.max() >= len(classes):
            raise UserError(
                f"y_{split} of {path} must hold {len(pixels)} integers from 0 to {len(classes) - 1}, for the classes"
            )
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        splits.append(Decoded(images, torch.from_numpy(labels.astype(np.int64))))
    return ImageData(path.stem, *splits, classes, {"id": path.name, "sha256": fingerprint(path)})


def load_digits_data(first: int = 5, last: int = 9) -> ImageData:
    """The digits `first` to `last` of scikit-learn's 8 x 8 digits; every fifth image is a test image.

    0 to 4 are what the tiny model was trained on before (`tiny_model.build_tiny`).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    chosen = (bunch.target >= first) & (bunch.target <= last)
    pixels = np.repeat((bunch.images[chosen] * 15.9375).astype(np.uint8)[:, None], 3, axis=1)
    labels = torch.from_numpy(bunch.target[chosen].astype(np.int64) - first)
    test = torch.arange(len(labels)) % 5 == 0
    images = torch.from_numpy(pixels)
    train, held = (Decoded(images[part], labels[part]) for part in (~test, test))
    checksum = hashlib.sha256(pixels.tobytes() + labels.numpy().tobytes()).hexdigest()
    identity = {"id": f"scikit-learn digits {first}-{last}", "sha256": checksum}
    return ImageData("digits", train, held, [str(digit) for digit in range(first, last + 1)], identity)


def _torchvision(name: str, root: str, keep: str, workers: int) -> ImageData:
    fetch = {"root": root, "download": True}
    makers = {
        "cifar100": lambda split: datasets.CIFAR100(**fetch, train=split == "train"),
        "svhn": lambda split: datasets.SVHN(**fetch, split=split),
        "food101": lambda split: datasets.Food101(**fetch, split=split),
        "flowers102": lambda split: datasets.Flowers102(**fetch, split=split),
        # not free to download: torchvision wants its tar files in the folder and says so
        "imagenet": lambda split: datasets.ImageNet(root, split=split.replace("test", "val")),
    }
    try:
        first, test = (makers[name](split) for split in ("train", "test"))
        # Flowers102's official training and validation parts together, as usual, have 2040 images
        train = first if name != "flowers102" else ConcatDataset([first, makers[name]("val")])
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"torchvision cannot get {name} in {root} ({error}): check the network, or put its files there"
        ) from error
    classes = getattr(first, "classes", None) or [str(digit) for digit in range(10)]  # SVHN names none
    classes = [entry if isinstance(entry, str) else entry[0] for entry in classes]
    revision = f"torchvision {torchvision.__version__}, which checks its own checksums"
    parts = (read(part, keep, workers) for part in (train, test))
    return ImageData(name, *parts, classes, {"id": name, "revision": revision})


def hold_out(data: ImageData, share: float) -> ImageData:
    """The data with `share` of each class's training images, at least one and not all, in the place of its test
    images. Raises UserError: the training images are decoded on demand, or no class has two of them."""
    train = data.train
    if not isinstance(train, Decoded):
        instead = "leave out --keep files, or take data that fit in memory"
        raise UserError(f"--validation_share needs images that are decoded once: {instead}")
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    held = torch.zeros(len(train), dtype=torch.bool)
    for label in train.labels.unique():
        members = (train.labels == label).nonzero().flatten()
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    if not held.any():
        raise UserError(f"{data.name} has one training image for each class: there is none to hold out")
    (train, held_out) = (Decoded(*next(train.batches([part.nonzero().flatten()]))) for part in (~held, held))
    split = f"{share:g} of the training images of each class, drawn with seed {SPLIT_SEED}, in the place of the test images"
    return replace(data, train=train, test=held_out, identity={**data.identity, "split": split})
