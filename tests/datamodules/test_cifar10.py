"""CIFAR10 on a tiny set in the published format, and on the real one where it is at hand."""

import hashlib
import pickle
import shutil
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets

from nmlightning.datamodules import cifar10
from nmlightning.datamodules.cifar10 import CIFAR10
from nmlightning.errors import InputError

BATCHES = ["data_batch_1", "data_batch_2", "test_batch"]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with ten images a batch; torchvision is told their MD5 sums."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    draw = np.random.default_rng(0)
    sums = {}
    for name in BATCHES:
        pixels = draw.integers(256, size=(10, 3072), dtype=np.uint8)
        sums[name] = write(folder / name, {"data": pixels, "labels": list(range(10))})
    meta = write(folder / "batches.meta", {"label_names": [str(label) for label in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[n, sums[n]] for n in BATCHES[:2]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    entry = {"filename": "batches.meta", "key": "label_names", "md5": meta}
    monkeypatch.setattr(datasets.CIFAR10, "meta", entry)
    return tmp_path


def write(path: Path, content: object) -> str:
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str, root: str, **__: object) -> None:
        Path(root).mkdir(parents=True, exist_ok=True)  # as torchvision does first
        raise URLError("Name or service not known")

    monkeypatch.setattr(cifar10, "download_and_extract_archive", fail)


def make_data(root: Path, **options: int) -> CIFAR10:
    data = CIFAR10(str(root), **options)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.usefixtures("offline")
def test_cifar10_holds_the_files(tiny: Path) -> None:
    data = make_data(tiny, batch_size=4)
    train, test = data.train, data.validation
    files = datasets.CIFAR10(str(tiny))
    assert torch.equal(train.images, torch.from_numpy(files.data).permute(0, 3, 1, 2))
    assert train.labels.tolist() == files.targets
    assert train.images.is_contiguous()
    assert len(test.labels) == 10
    assert data.test_dataloader().data is data.predict_dataloader().data
    assert data.test_dataloader().data.source is test


def test_cifar10_augments_training_only(tiny: Path) -> None:
    data = make_data(tiny, batch_size=20, device_resident=False)
    (train,), (test,) = data.train_dataloader(), data.val_dataloader()
    assert train.corners.max() > 4 > train.corners.min()
    assert 0 < train.flips.sum() < 20
    assert (test.corners, test.flips) == (None, None)
    x, y = data.on_after_batch_transfer(test, 0)
    assert (x.shape, x.dtype, y.tolist()) == ((10, 3, 32, 32), torch.float32, list(range(10)))
    assert x.shape[1:] == data.image_shape


def test_cifar10_loads_training_images_only_to_train(tiny: Path) -> None:
    data = CIFAR10(str(tiny))
    data.setup("validate")
    with pytest.raises(AssertionError):
        data.train_dataloader()
    data.setup("fit")
    assert data.train_dataloader().data.length == 20


def test_cifar10_resolves_relative_folders(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny.parent))
    monkeypatch.chdir(tiny.parent)
    for root in (f"~/{tiny.name}", tiny.name):
        assert CIFAR10(root).root == tiny


@pytest.mark.usefixtures("offline")
def test_cifar10_explains_absent_files_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        CIFAR10(str(tmp_path)).prepare_data()
    message = str(error.value)
    assert f"not in {tmp_path}/cifar-10-batches-py" in message
    assert "Name or service not known" in message
    assert "--data.root" in message
    assert "--data Digits" in message
    assert "\n" not in message


@pytest.mark.usefixtures("offline")
def test_cifar10_leaves_no_empty_folder_after_a_failed_download(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for root in (tmp_path / "mine", tmp_path / "new" / "data"):
        with pytest.raises(InputError, match="could not be downloaded"):
            CIFAR10(str(root)).prepare_data()
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_cifar10_refuses_absent_files_without_download(tmp_path: Path) -> None:
    data = CIFAR10(str(tmp_path), download=False)
    data.prepare_data()
    message = r"not in .*cifar-10-batches-py: .*--data\.download true"
    with pytest.raises(InputError, match=message):
        data.setup("fit")
    assert list(tmp_path.iterdir()) == [], "nothing was made"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("download", [True, False])
def test_cifar10_names_absent_files(tiny: Path, download: bool) -> None:
    (tiny / "cifar-10-batches-py" / "data_batch_2").unlink()
    data = CIFAR10(str(tiny), download=download)
    look = data.prepare_data if download else data.setup
    with pytest.raises(InputError, match=r"CIFAR-10 in .*cifar-10-batches-py lacks data_batch_2"):
        look()


@pytest.mark.parametrize("name", [*BATCHES, "batches.meta"])
@pytest.mark.parametrize("download", [True, False])
def test_cifar10_names_and_keeps_an_altered_file(tiny: Path, name: str, download: bool) -> None:
    path = tiny / "cifar-10-batches-py" / name
    path.write_bytes(path.read_bytes()[:-7])
    data = CIFAR10(str(tiny), download=download)
    message = rf"{path} is truncated or altered .* delete that file .*--data\.download true"
    with pytest.raises(InputError, match=message):
        data.prepare_data()
    with pytest.raises(InputError, match=message):
        data.setup("fit")
    with pytest.raises(AssertionError):
        data.val_dataloader()
    assert path.exists()


@pytest.mark.parametrize("name", ["data_batch_2", "batches.meta"])
def test_cifar10_downloads_a_file(tiny: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny / "cifar-10-batches-py"
    backup = shutil.copytree(folder, tiny / "server")
    (folder / name).unlink()

    def download(url: str, root: str, **_: object) -> None:
        shutil.copytree(backup, folder, dirs_exist_ok=True)

    monkeypatch.setattr(cifar10, "download_and_extract_archive", download)
    assert make_data(tiny).train_dataloader().data.length == 20


@pytest.mark.real_data
def test_cifar10_constants_equal_the_real_images(data_root: Path) -> None:
    data = CIFAR10(str(data_root), download=False)
    data.setup("fit")
    train, test = data.train, data.validation
    assert train.labels.bincount().tolist() == [5000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    values = torch.arange(256.0, dtype=torch.float64) / 255
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for channel in range(3):
        for part in train.images[:, channel].split(5000):
            counts[channel] += part.flatten().bincount(minlength=256)
    shares = counts / counts.sum(1, keepdim=True)
    mean = shares @ values
    std = (shares @ values**2 - mean**2).sqrt()
    torch.testing.assert_close(mean, torch.tensor(cifar10.MEAN).double(), rtol=0, atol=5e-5)
    torch.testing.assert_close(std, torch.tensor(cifar10.STD).double(), rtol=0, atol=5.1e-5)
