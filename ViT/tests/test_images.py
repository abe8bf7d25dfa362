"""Image sources: the same images from every kind of source, and clear errors for what is wrong with one."""

import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from control_experiments.errors import UserError
from control_experiments.training.quiet import quieten
from ViT.images import Decoded, OnDemand, load_data


@pytest.fixture
def folder(tmp_path):
    """Two classes, PNG files (lossless) of unequal sizes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            place = tmp_path / "pets" / split / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (20 + index, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    (tmp_path / "pets" / "README.txt").write_text("no image")
    return tmp_path / "pets"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where tars are unpacked."""
    monkeypatch.setenv("PARALLEL_CONTROL_CACHE", str(tmp_path / "cache"))


def pack(folder, path):
    with tarfile.open(path, "w") as tar:
        tar.add(folder, "some/prefix")
    return path


def equal(a, b):
    pairs = ((a.labels, b.labels), *zip(a.images, b.images, strict=True))
    return all(torch.equal(x, y) for x, y in pairs)


def test_a_folder_its_tar_and_images_on_demand_are_the_same(folder, tmp_path):
    sources = folder, pack(folder, tmp_path / "pets.tar")
    plain, tar = (load_data(str(source), keep="host") for source in sources)
    assert plain.classes == tar.classes == ["cat", "dog"]
    assert equal(plain.train, tar.train) and equal(plain.test, tar.test)
    assert plain.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    first = np.array(Image.open(folder / "train" / "cat" / "0.png"))
    assert torch.equal(plain.train.images[0], torch.from_numpy(first).permute(2, 0, 1))
    indices = torch.tensor([5, 0, 3, 1]).split(3)
    for source in sources:
        lazy = load_data(str(source), keep="files", workers=1).train
        assert isinstance(plain.train, Decoded) and isinstance(lazy, OnDemand)
        for (a, la), (b, lb) in zip(plain.train.batches(indices), lazy.batches(indices), strict=True):
            assert torch.equal(la, lb) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_npz_keeps_pixels_and_labels(npz):
    data = load_data(str(npz))
    file = np.load(npz)
    assert torch.equal(data.train.images, torch.from_numpy(file["x_train"]).permute(0, 3, 1, 2))
    assert data.test.labels.tolist() == file["y_test"].tolist()
    assert data.classes == ["red", "green", "blue"] and len(data.identity["sha256"]) == 64


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("damage", [b"", b"no image", None], ids=["empty", "text", "cut short"])
def test_corrupt_images_are_named(folder, tmp_path, kind, damage):
    for number in (1, 2):
        broken = folder / "train" / "dog" / f"{number}.png"
        broken.write_bytes(broken.read_bytes()[:400] if damage is None else damage)
    source = str(folder if kind == "folder" else pack(folder, tmp_path / "pets.tar"))
    with pytest.raises(UserError, match=r"dog/1\.png is no readable image .*dog/2\.png .*remove 2 of 6 images"):
        load_data(source, keep="host")
    with pytest.raises(UserError, match=r"dog/\d\.png is no readable image"):
        load_data(source)
    lazy = load_data(source, keep="files", workers=1).train
    with pytest.raises(UserError, match=r"^\S*dog/1\.png is no readable image [^\n]*$"):
        next(lazy.batches([torch.tensor([4])]))


def test_more_workers_than_cores_are_no_warning(folder, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quieten()
        next(load_data(str(folder), keep="files", workers=2).train.batches([torch.tensor([0])]))


def test_folders_must_have_both_splits_with_the_same_classes(folder):
    (folder / "test" / "dog").rename(folder / "test" / "wolf")
    with pytest.raises(UserError, match="class folders .* differ: dog only in train"):
        load_data(str(folder))
    (folder / "test").rename(folder / "later")
    with pytest.raises(UserError, match="has no test images"):
        load_data(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "no readable .npz with .*y_test is not a file"),
        ({"x_train": np.zeros((40, 20, 20), np.uint8)}, "must be uint8 N x H x W x 3"),
        ({"y_train": np.zeros(39, int)}, "must hold 40 integers"),
        ({"y_test": np.full(12, 3)}, "12 integers from 0 to 2"),
        ({"classes": np.array([{}], dtype=object)}, "no readable .npz"),
    ],
)
def test_npz_errors(npz, tmp_path, changes, message):
    arrays = {**np.load(npz), **changes}
    np.savez(tmp_path / "bad.npz", **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(UserError, match=message):
        load_data(str(tmp_path / "bad.npz"))


def test_digits_are_split_without_overlap():
    data = load_data("digits")
    assert len(data.train) + len(data.test) == 896 and data.classes == list("56789")
    assert data.train.images.dtype == torch.uint8 and data.train.images.max() > 200
