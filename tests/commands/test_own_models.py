"""Test that the command line finds the user's own models and what they take, or says why not."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nmlightning import InputError
from nmlightning.commands.own_models import bind_inputs, is_own_model, load_model, read_arrays

MODULE = """
import torch
from os import mkdir as mkea
net, number = torch.nn.Linear(3, 2), 5
def make(): return torch.nn.Dropout()
def fail(): raise ValueError("of no\\nkind")
class Home: make = make
"""


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("ours_of_test.py").write_text(MODULE)
    Path("broken_of_test.py").write_text("import no_such_package")
    Path("failing_of_test.py").write_text("1 / 0")


def test_own_models_are_told_from_files() -> None:
    assert is_own_model("my.package:make_model")
    assert not any(map(is_own_model, ("a.ckpt", "http://h/a.ckpt", "C:\\a.onnx", "a:b/c")))


def test_model_is_a_factorys_or_an_object_in_evaluation() -> None:
    assert type(load_model("torch.nn:Identity")) is nn.Identity
    assert type(load_model("ours_of_test:net")) is nn.Linear
    for name in ("make", "Home.make"):
        assert not load_model(f"ours_of_test:{name}").training


WRONG_MODELS = {
    "no_such:make": "no module 'no_such', installed or in /.*, to take make from",
    "ours_of_test.inner:make": "there is no module 'ours_of_test.inner'",
    "broken_of_test:make": "importing broken_of_test raised ModuleNotFoundError: No module named",
    "failing_of_test:make": "importing failing_of_test raised ZeroDivisionError: division by zero",
    "ours_of_test:mkae": "ours_of_test has no 'mkae'. Did you mean 'make'",
    "ours_of_test:toch": "ours_of_test has no 'toch'.$",
    "ours_of_test:fail": "ours_of_test:fail raised ValueError: of no kind$",
    "ours_of_test:number": "gives a int, and not an nn.Module",
    "ours_of_test:Home": "gives a Home, and not",
}


@pytest.mark.parametrize(("name", "message"), WRONG_MODELS.items())
def test_wrong_models_are_told_in_a_line(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(name)


class Pair(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return ids if mask is None else ids * mask


def test_arrays_are_arguments_by_name_or_in_order() -> None:
    np.savez("x.npz", mask=np.ones(2), ids=np.arange(2))
    named = bind_inputs(Pair(), read_arrays(Path("x.npz")))
    assert isinstance(named, dict)
    types = {name: x.dtype for name, x in named.items()}
    assert types == {"mask": torch.float32, "ids": torch.int64}
    ordered = bind_inputs(Pair(), {"b": np.arange(2), "a": np.ones(2, np.float16)})
    assert isinstance(ordered, tuple)
    assert [x.dtype for x in ordered] == [torch.int64, torch.float32]


def test_wrong_inputs_are_told_in_a_line() -> None:
    np.savez("text.npz", a=np.array(["x"]))
    np.savez("objects.npz", a=np.array([{}]))
    np.savez("empty.npz")
    np.save("one.npy", np.ones(2))
    for file, message in {
        "no.npz": "--inputs: there is no file 'no.npz' in /",
        "text.npz": "'a' of 'text.npz' is <U1, no numbers",
        "objects.npz": "'objects.npz' cannot be read as an .npz of numbers, as np.savez writes it.",
        "empty.npz": "'empty.npz' holds no array",
        "one.npy": "'one.npy' cannot be read as an .npz",
        "ours_of_test.py": "'ours_of_test.py' cannot be read as an .npz",
    }.items():
        with pytest.raises(InputError, match=re.escape(message).replace(r"/$", "/")):
            read_arrays(Path(file))
    with pytest.raises(InputError, match="has a, b, c, and Pair takes ids, mask: too many pos"):
        bind_inputs(Pair(), dict.fromkeys("abc", np.ones(2)))
    with pytest.raises(InputError, match=r"ids, mask, and no 'maks'\. Did you mean 'mask'"):
        bind_inputs(Pair(), dict.fromkeys(["ids", "maks"], np.ones(2)))
    with pytest.raises(InputError, match="has mask, and Pair takes ids, mask: missing a required"):
        bind_inputs(Pair(), {"mask": np.ones(2)})
