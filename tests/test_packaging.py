"""Builds the wheel, leaves the source behind, and tries what a user would have installed."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser
from email.parser import HeaderParser
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import nmlightning
from nmlightning.export.formats import FORMATS
from nmlightning.translation.sources import TEXT_PACKAGES

ROOT = Path(__file__).parents[1]
SHORT = [f"--trainer.{x}" for x in ("max_epochs=1", "limit_train_batches=2", "limit_val_batches=1")]


def run(*command: object, cwd: Path, **env: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def pip_install(*arguments: object, target: Path) -> None:
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation")
    run(*pip, "--target", target, *arguments, cwd=target.parent)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built from, so that no build folder is left in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("nmlightning", "configs", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", folder, source, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed") / "site"
    pip_install(wheel, target=target)
    return target


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "nmlightning").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    configs = {f"nmlightning/{path.relative_to(ROOT)}" for path in ROOT.glob("configs/*.yaml")}
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert shipped == package | configs
    assert {"nmlightning/py.typed", "nmlightning/configs/quickstart.yaml"} <= shipped


def test_wheel_says_who_and_where_and_links_to_no_file_beside_it(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    metadata = HeaderParser().parsestr(archive.read(name).decode())
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert metadata["Version"] == nmlightning.__version__ == citation["version"]
    assert metadata["Author"] == citation["authors"][0]["name"]
    assert metadata["Project-URL"] == f"Paper, {citation['preferred-citation']['url']}"
    prose = re.sub(r"```.*?```", "", str(metadata.get_payload()), flags=re.DOTALL)
    assert prose.startswith("# nmlightning")
    assert re.findall(r"\]\((?!https?:)[^)]*\)|<(?:img|source|a)\b[^>]*>", prose) == []


def test_description_has_captions_for_pictures_and_no_sentence_with_a_dead_link() -> None:
    given = (
        '![a](b.png) [c](https://c.org) <p><img src="b" alt="d"></p>. See [`f`](#f), and\n[e](e.md)'
    )
    code = "\n```\nx[0](y)\n```\n"
    given += f".\nStay 1.5.\n\n# Gone\n\n[g](g.md).\n\n# Code\n{code}[![h](h.png)](h.md)"
    made = runpy.run_path(str(ROOT / "setup.py"))["describe"](given)
    assert made == f"*a* [c](https://c.org) *d*. \nStay 1.5.\n\n# Code\n{code.rstrip()}"


def test_texts_install_nothing_that_no_index_has() -> None:
    """Until there is a release an extra is installed from a checkout, and by messages as packages.

    Remove this test with the first upload to an index.
    """
    found = (ROOT.glob(x) for x in ("*.md", "docs/**/*.md", "examples/*", "nmlightning/**/*.py"))
    texts = {path: path.read_text("utf-8") for paths in found for path in paths}
    wanting = r"install (-\w+ )*['\"]?nmlightning\b"
    assert [str(path) for path, text in texts.items() if re.search(wanting, text)] == []
    extras = ConfigParser()
    extras.read(ROOT / "setup.cfg")
    onnx = (*FORMATS["onnx"].needs, "onnxruntime")
    for extra, packages in (("text", TEXT_PACKAGES), ("export", onnx)):
        lines = extras["options.extras_require"][extra]
        assert re.findall(r"^([\w-]+)>=", lines, flags=re.MULTILINE) == list(packages)


@pytest.mark.parametrize("words", [["CPU=1"], []])
def test_make_installs_without_cuda_if_asked(words: list[str]) -> None:
    option = "--extra-index-url https://download.pytorch.org/whl/cpu "
    plan = run("make", "-n", "VENV=new", "quickstart", *words, cwd=ROOT, MAKEFLAGS="")
    assert (option in plan) == bool(words)


@pytest.mark.skipif(not find_spec("mkdocstrings"), reason="the extra docs is not installed")
def test_site_refuses_a_dead_link_and_is_searched_from_its_folder(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.[!j]*"))
    (tmp_path / "mkdocs.yml").write_text(f"INHERIT: {ROOT}/mkdocs.yml\nnav: [index.md]")
    plan = run("make", "-n", "docs", cwd=ROOT, MAKEFLAGS="")
    build = [sys.executable, "-m", "mkdocs", *re.findall(r"/mkdocs (build .*)", plan)[0].split()]
    (tmp_path / "docs/index.md").write_text("[link](gone.md)")
    with pytest.raises(AssertionError, match=r"gone\.md"):
        run(*build, cwd=tmp_path)
    (tmp_path / "docs/index.md").write_text("# Equilibrium")
    run(*build, cwd=tmp_path)
    if shutil.which("chromium"):
        browser = "chromium --headless=new --no-sandbox --disable-gpu --virtual-time-budget=9000"
        page = f"{(tmp_path / 'site/index.html').as_uri()}?q=equilibrium"
        assert "1 matching" in run(*browser.split(), "--dump-dom", page, cwd=tmp_path)


@pytest.mark.parametrize("command", ["nm", "nmlightning"])
def test_wheel_has_both_commands(installed: Path, tmp_path: Path, command: str) -> None:
    nm = installed / "bin" / command
    assert "fit" in run(nm, "--help", cwd=tmp_path, PYTHONPATH=str(installed))


def test_quickstart_runs_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""}
    where = "import nmlightning; print(nmlightning.__file__)"
    assert str(installed) in run(sys.executable, "-c", where, cwd=tmp_path, **environment)

    nm = (installed / "bin" / "nm", "fit", "--config", "configs/quickstart.yaml")
    run(*nm, *SHORT, cwd=tmp_path, **environment)

    run_folder = tmp_path / "runs" / "quickstart" / "version_0"
    assert (run_folder / "config.yaml").is_file()
    assert (run_folder / "checkpoints" / "last.ckpt").is_file()


def test_editable_install_finds_the_configs(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip_install("--editable", source, target=target)
    # -S: the environment's packages without its .pth files, one of which may be an nmlightning.
    code = f"import site; site.addsitedir({str(target)!r}); import nmlightning.cli as c; c.main()"
    packages = sysconfig.get_path("purelib")
    help_text = run(sys.executable, "-S", "-c", code, cwd=tmp_path, PYTHONPATH=packages)
    assert "quickstart" in help_text
