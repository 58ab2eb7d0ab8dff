"""What every test may rely on: a fixed seed, and the real data where it is at hand."""

from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data-root", default="data", help="the folder with the real data sets")


@pytest.fixture(scope="session")
def data_root(request: pytest.FixtureRequest) -> Path:
    """The folder with the real data sets; a test that asks for it is marked `real_data`."""
    return Path(request.config.getoption("--data-root")).resolve()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cifar = Path(config.getoption("--data-root")) / "cifar-10-batches-py"
    if cifar.is_dir():
        return
    skip = pytest.mark.skip(reason=f"{cifar} is not there; say where the data is by --data-root")
    for item in items:
        if "real_data" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
