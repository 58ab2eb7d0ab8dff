"""A run that is resumed within an epoch resumes with the very next batch, pixel by pixel."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from nmlightning.cli import main
from nmlightning.datamodules.imagenet import ImageNet
from nmlightning.errors import InputError
from nmlightning.tasks.classification import ImageClassifier
from trainers import quiet_trainer

pytestmark = [
    # From 3.12 on Python warns of forking where threads run, as torch's do; workers use none.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Skipped a damaged image"),
]
SAVED_AT = 4  # batches: the second of three of the second epoch
WHOLE = 9


class Recorder(pl.Callback):
    """Keeps every training batch, by global step, and saves a checkpoint in mid-epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        torch.save(batch, self.folder / f"{trainer.global_step}.{trainer.global_rank}.pt")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == SAVED_AT and trainer.ckpt_path is None:
            trainer.save_checkpoint(self.folder / "mid.ckpt")


def fit(root: Path, seen: Path, seed: int = 1, devices: int = 1, **options: Any) -> None:
    """Train for three epochs and leave every batch in `seen`."""
    seen.mkdir()
    pl.seed_everything(seed, verbose=False)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16**2, 3))
    task = ImageClassifier(net, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.01))
    ckpt_path = options.pop("ckpt_path", None)
    strategy = "auto" if devices == 1 else "ddp_fork"
    trainer = quiet_trainer(Recorder(seen), max_epochs=3, strategy=strategy, devices=devices)
    settings = {"batch_size": 4 // devices, "num_workers": 0, "image_size": 16, **options}
    trainer.fit(task, ImageNet(str(root), **settings), ckpt_path=ckpt_path)


def read(seen: Path, devices: int = 1) -> dict[int, tuple[Tensor, Tensor]]:
    """Return the images and labels of all ranks together, by global step."""
    steps = sorted({int(path.name.split(".")[0]) for path in seen.glob("*.pt")})
    batches = {
        step: [torch.load(seen / f"{step}.{rank}.pt") for rank in range(devices)] for step in steps
    }
    return {
        step: (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
        for step, parts in batches.items()
    }


def assert_same(found: dict[int, Any], whole: dict[int, Any], start: int = 0) -> None:
    assert list(found) == list(whole)[start:]
    for step, (images, labels) in found.items():
        assert torch.equal(images, whole[step][0]), step
        assert torch.equal(labels, whole[step][1]), step


@pytest.fixture(params=["folder", "shards"])
def root(request: pytest.FixtureRequest, image_folder: Path, tmp_path: Path) -> Path:
    if request.param == "folder":
        return image_folder
    pytest.importorskip("litdata")
    assert main(["shard", str(image_folder), f"{tmp_path}/shards", "--shard_size", "2"]) == 0
    return tmp_path / "shards"


@pytest.mark.parametrize("workers", [0, 2])
def test_imagenet_resumes(root: Path, tmp_path: Path, workers: int) -> None:
    """Whatever the number of workers, and the seed that the resumed run is given."""
    fit(root, tmp_path / "whole", num_workers=workers)
    whole = read(tmp_path / "whole")
    assert list(whole) == list(range(WHOLE))
    assert not torch.equal(whole[0][1], whole[WHOLE // 3][1]), "another epoch, another order"
    ckpt = tmp_path / "whole" / "mid.ckpt"
    fit(root, tmp_path / "resumed", 2, ckpt_path=ckpt, num_workers=workers)
    assert_same(read(tmp_path / "resumed"), whole, SAVED_AT)


@pytest.mark.usefixtures("_forks")
def test_imagenet_resumes_on_two_processes(root: Path, tmp_path: Path) -> None:
    fit(root, tmp_path / "one")
    fit(root, tmp_path / "two", devices=2, num_workers=1)
    whole = read(tmp_path / "one")
    assert_same(read(tmp_path / "two", devices=2), whole)
    ckpt = tmp_path / "one" / "mid.ckpt"
    fit(root, tmp_path / "resumed", devices=2, num_workers=1, ckpt_path=ckpt)
    assert_same(read(tmp_path / "resumed", devices=2), whole, SAVED_AT)


def test_damaged_images_resume(image_folder: Path, tmp_path: Path) -> None:
    for name in ("a/1", "b/0", "b/1", "c/3"):
        (image_folder / "train" / f"{name}.JPEG").write_bytes(b"")
    fit(image_folder, tmp_path / "whole", damaged="skip")
    ckpt = tmp_path / "whole" / "mid.ckpt"
    fit(image_folder, tmp_path / "resumed", damaged="skip", num_workers=2, ckpt_path=ckpt)
    whole = read(tmp_path / "whole")
    assert {len(labels) for _, labels in whole.values()} == {4}
    assert_same(read(tmp_path / "resumed"), whole, SAVED_AT)


def test_resume_refuses_other_data(image_folder: Path, tmp_path: Path) -> None:
    fit(image_folder, tmp_path / "whole")
    ckpt = tmp_path / "whole" / "mid.ckpt"
    message = "within an epoch with 4 images a batch on all processes, and this run has 3, so the"
    with pytest.raises(InputError, match=message):
        fit(image_folder, tmp_path / "batch", ckpt_path=ckpt, batch_size=3)
    (image_folder / "train/b/0.JPEG").rename(image_folder / "train/b/5.JPEG")
    with pytest.raises(InputError, match=r"an epoch of other images, by their .*, so the rest"):
        fit(image_folder, tmp_path / "others", ckpt_path=ckpt)
    (image_folder / "train/b/5.JPEG").unlink()
    with pytest.raises(InputError, match="an epoch with 12 images, and this run has 11, so the"):
        fit(image_folder, tmp_path / "fewer", ckpt_path=ckpt)


def test_imagenet_state_determines_the_order(image_folder: Path) -> None:
    data = ImageNet(str(image_folder), batch_size=4, num_workers=0)
    data.setup("fit")
    assert data.state_dict() == {}, "of a module that has not been trained with"
    torch.manual_seed(3)
    data.train_dataloader()
    digest = data.train.digest
    state = {"seed": 3, "images": 12, "shard_size": 1, "world_batch": 4, "digest": digest}
    assert data.state_dict() == state
    torch.manual_seed(4)
    data.load_state_dict(state)
    data.train_dataloader()
    assert data.state_dict() == state
    data.teardown("fit")
    data.train_dataloader()
    assert data.state_dict() == {**state, "seed": 4}, "the next run has its own seed"


def digest(root: Path) -> str:
    data = ImageNet(str(root))
    data.setup("fit")
    return data.train.digest


def test_imagenet_digest_depends_on_names_labels_and_order(
    image_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("litdata")

    def write(name: str) -> Path:
        assert main(["shard", str(image_folder), f"{tmp_path}/{name}", "--shard_size", "2"]) == 0
        return tmp_path / name

    digests = [digest(image_folder), digest(write("first"))]
    assert digests[1] != digests[0], "in the order in which they were mixed"
    assert digest(write("again")) == digests[1]
    image_folder = image_folder.rename(tmp_path / "moved")
    assert digest(image_folder) == digests[0], "wherever the folder is"
    (image_folder / "train/a/0.JPEG").rename(image_folder / "train/b/00.JPEG")
    digests += [digest(image_folder), digest(write("other"))]
    for part in ("train", "val"):
        (image_folder / part / "a").rename(image_folder / part / "d")
    digests += [digest(image_folder), digest(write("relabelled"))]
    assert len(set(digests)) == 6
