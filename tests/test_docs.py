"""The documentation names no file that is gone, and what it tells to run or to write is tried."""

import contextlib
import doctest
import importlib
import io
import pickle
import re
import runpy
import shlex
from collections import Counter
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning
import torch
import torchvision
import yaml
from torch import nn
from torch.utils.data import DataLoader

import nmlightning
from lightning_modules import PlModule
from nmlightning.cli import LIGHTNING_COMMANDS, main
from nmlightning.commands.argument_parser import ArgumentParser
from nmlightning.commands.files import shipped_configs
from trainers import quiet_trainer
from translation_runs import make_net, make_text, make_translator

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "configs", "docs", "examples", "findings", "nmlightning", "tests")
# From the root, anything in a folder of the project; from the package or alone, a source.
FROM_ROOT = rf"(?:{'|'.join(FOLDERS)})/[\w/.-]*\w(?![*\w…{{])"
SOURCE = r"(?:[\w-]+/)*[\w-]+\.(?:py|cpp)\b"
NAMED_PATH = re.compile(rf"(?<![\w/.:-])(?:{FROM_ROOT}|{SOURCE})")
PATTERNS = ("*.md", "*.cfg", "*.toml", "*.yml", "Makefile", "configs/*", "docs/**/*.md")
CODE = ("nmlightning/**/*.py", "nmlightning/**/*.cpp", "nmlightning/**/*.h", "benchmarks/*.py")
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"(?:\w+=\S+ )*(?:nm|make|python|pip|pytest|torchrun|srun|echo|\.) ")


def exists(name: str) -> bool:
    if "/" not in name:
        return any(path for folder in FOLDERS for path in (ROOT / folder).rglob(name))
    shipped = name.replace("nmlightning/configs", "configs")  # the place in the wheel, by setup.cfg
    return (ROOT / shipped).exists() or (ROOT / "nmlightning" / name).exists()


def test_texts_name_no_path_that_is_gone() -> None:
    gone = [
        f"{path.relative_to(ROOT)}: {name}"
        for pattern in (*PATTERNS, "tests/**/*.md", *CODE)
        for path in ROOT.glob(pattern)
        for name in NAMED_PATH.findall(re.sub(r"https?://\S+", "", path.read_text("utf-8")))
        if not exists(name)
    ]
    assert not gone, "\n".join(["", *gone])


def test_every_picture_can_be_taken_anew_and_is_small() -> None:
    ways = runpy.run_path(str(ROOT / "docs" / "take_pictures.py"))["TAKEN"].values()
    names = [name for way in ways for name in way.__doc__.split(":")[0].split(", ")]
    for file in (ROOT / "docs" / "pictures").iterdir():
        assert any(fnmatch(file.stem, name) for name in names), file.name
        assert file.stat().st_size < 200_000, file.name


def blocks(language: str) -> list[Any]:
    """Return the code of each page that has some, with the page's name as its id."""
    found = {page: [b for a, b in BLOCK.findall(page.read_text("utf-8")) if a == language]
             for page in PAGES}  # fmt: skip
    return [pytest.param(c, id=str(page.relative_to(ROOT))) for page, c in found.items() if c]


class Reads(PlModule):
    """The module of a reader, with its own data."""

    def build(self) -> None:
        self.net = nmlightning.models.CifarResNet(8)

    def train_dataloader(self) -> Any:
        return DataLoader([(torch.randn(3, 32, 32), i) for i in range(8)], 4)


@pytest.fixture
def world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> dict[str, Any]:
    """What the pages take for granted: names, and files in the current folder."""
    monkeypatch.chdir(tmp_path)
    net: nn.Module = nmlightning.models.CifarResNet(8)
    net.embed = nn.Embedding(4, 4)
    norms = {k: np.ones((3, len(w))) for k, w in net.named_parameters() if w.dim() == 4}
    Path("runs/wd_on/version_0").mkdir(parents=True)
    history = nmlightning.NormHistory.from_arrays(norms, range(3), range(3))
    history.save("runs/wd_on/version_0/weight_norms.safetensors")
    series = {f"{4 * i}": [torch.ones(len(x[0]))] for i, x in enumerate(norms.values())}
    Path("wdon.conv_norms.pkl").write_bytes(pickle.dumps(series))
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), "last.pt")
    torch.save({"state_dict": net.state_dict()}, "last.ckpt")
    if "translation" in request.node.name:
        trainer = quiet_trainer(limit_train_batches=1, limit_val_batches=0)
        trainer.fit(make_translator(), make_text(tmp_path))
        trainer.save_checkpoint("last.ckpt")
        net = make_net()
    names = {name: getattr(nmlightning, name) for name in nmlightning.__all__}
    return {
        **names, **vars(nmlightning.callbacks), "torch": torch, "torchvision": torchvision,
        "nn": nn, "net": net, "model": net, "optimizer": torch.optim.SGD(net.parameters(), 0.1),
        "Trainer": pytorch_lightning.Trainer, "your_module": Reads(), "nmlightning": nmlightning,
        "batches": [(torch.randn(4, 3, 32, 32), torch.arange(4))],
    }  # fmt: skip


@pytest.mark.parametrize("codes", blocks("python"))
@pytest.mark.filterwarnings("ignore")
def test_python_of_a_page_runs_and_prints_what_it_says(
    codes: list[str], world: dict[str, Any]
) -> None:
    for code in codes:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, world)
        for said in re.findall(r"^print\(.*\)(?:\n|  )# (.*)$", code, re.M):
            assert said in printed.getvalue()


@pytest.mark.parametrize("codes", blocks("yaml"))
def test_yaml_of_a_page_is_of_a_config(codes: list[str], tmp_path: Path) -> None:
    for code in codes:
        content = yaml.safe_load(code)
        content = {"trainer": {"callbacks": content}} if isinstance(content, list) else content
        (tmp_path / "page.yaml").write_text(yaml.safe_dump(content))
        words = ["fit", "--config", "cifar_l1", "--config", str(tmp_path / "page.yaml")]
        with contextlib.redirect_stdout(io.StringIO()):
            assert main([*words, "--print_config"]) == 0


class Parsed(Exception):
    """Raised in place of what a command would do, with the words that are those of `nm fit`."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = ArgumentParser.parse_known_args

    def stop(self: Any, *given: Any, **more: Any) -> Any:
        raise Parsed(*parse(self, *given, **more))

    monkeypatch.setattr(ArgumentParser, "parse_known_args", stop)


def try_nm(words: list[str]) -> None:
    """Parse a command of `nm`: of those that train, all but where a checkpoint lies."""
    if words[0] not in LIGHTNING_COMMANDS:
        with pytest.raises(Parsed) as parsed:
            main(words)
        assert not parsed.value.args[1] or words[0] == "probe"
        words = ["fit", "--config", "cifar_l2", *parsed.value.args[1]]
    if "--ckpt_path" in words:
        place = words.index("--ckpt_path")
        assert words[place + 1].endswith((".ckpt", "last"))
        words = words[:place] + words[place + 2 :]
    words = [re.sub(r"runs/(\w+)/version_\d+/config.yaml", r"\1", word) for word in words]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*words, "--print_config"]) == 0


@cache  # several pages have the same
def try_line(line: str) -> str:
    """Try what can be tried of a line without doing it; return what it is."""
    words = shlex.split(re.split(r" [|] | [<>] ", line)[-1 if " | " in line else 0], comments=True)
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    for name in {"nm", "nmlightning"} & set(words):
        try_nm(words[words.index(name) + 1 :])
        return name
    files = [word for word in words if word.endswith(".py")]
    assert all((ROOT / file).is_file() for file in files), line
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text("utf-8"), line
    extras = re.findall(r"\.\[(\w+)\]", line)
    assert all(f"\n{extra} =" in (ROOT / "setup.cfg").read_text("utf-8") for extra in extras), line
    return words[0]


@pytest.mark.parametrize("codes", blocks(""))
@pytest.mark.usefixtures("parse_only")
def test_commands_of_a_page_parse(codes: list[str]) -> None:
    for code in codes:
        lines = [line for line in code.replace("\\\n", " ").splitlines() if line.strip("# ")]
        lines = [line for line in lines if not line.startswith("#")]
        if any(map(COMMAND.match, lines)):  # else it is what a command prints
            assert all(map(COMMAND.match, lines)), f"commands and output:\n{code}"
            print(Counter(map(try_line, lines)))


def public() -> dict[str, Any]:
    """Return what the packages export."""
    named: dict[str, Any] = {}
    for path in ROOT.glob("nmlightning/**/__init__.py"):
        package = importlib.import_module(".".join(path.parent.relative_to(ROOT).parts))
        exported = re.findall(r"import \w+ as (\w+)", path.read_text("utf-8"))
        named |= {name: getattr(package, name) for name in exported}
    return named


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(page.read_text("utf-8") for page in ROOT.glob("docs/api/*.md"))
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", text, re.M)}
    assert public().keys() <= shown, public().keys() - shown


def test_examples_of_the_reference_give_what_they_say(world: dict[str, Any]) -> None:
    cases = [
        case
        for name, value in public().items()
        for case in doctest.DocTestFinder().find(
            value, name, globs={**world, **vars(importlib.import_module(value.__module__))}
        )
    ]
    assert [case.name for case in cases if doctest.DocTestRunner().run(case).failed] == []


def test_readme_is_short_and_every_config_has_a_row() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(readme.split()) < 650
    assert len(BLOCK.findall(readme)) == 3
    assert max(len(line) for _, code in BLOCK.findall(readme) for line in code.splitlines()) <= 80
    for link, anchor in re.findall(r"\]\((?!http)([^)#]+)#?([^)]*)\)", readme):
        titles = re.findall(r"^#+ (.*)", (ROOT / link).read_text("utf-8", "ignore"), re.M)
        slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert anchor in ["", *slugs], link
    links = [x for page in PAGES for x in re.findall(r"\]\((http.*?)\)", page.read_text("utf-8"))]
    assert all(re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/\S*)?", link) for link in links), links
    table = (ROOT / "docs/how_to/reproduce.md").read_text("utf-8")
    assert all(f"`{name}`" in table for name in shipped_configs())
