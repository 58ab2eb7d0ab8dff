import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from nmlightning.errors import InputError
from nmlightning.weights.history import NormHistory

KEY = "channels_norm_conv_w_norm_per_channel_layer"
NORMS = {0: [[1.0, 2.0], [0.5, 0.1], [0.25, 1e-7]], 4: [[3.0], [4.0], [5.0]]}
NAMES = {0: "net.conv1.weight", 4: "net.conv2.weight"}


class Reduced:
    """Pickles as a call of `function`, and the state that is set on what it returns."""

    def __init__(self, function: Any, args: tuple[object, ...], *state: object) -> None:
        self.reduction = function, args, *state

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduction


@dataclass
class Libraries:
    """The ways in which releases of pandas, numpy and torch pickle; none need be installed."""

    monkeypatch: pytest.MonkeyPatch
    pandas: str  # where Series and RangeIndex say that they are
    managers: str
    blocks: str  # the attribute of a Series
    numpy: str
    protocol: int
    _made: dict[str, Any] = field(default_factory=dict)

    def made(self, dotted: str, **attributes: object) -> Any:
        """Return a class that pickles under this name."""
        if dotted not in self._made:
            module, name = dotted.rsplit(".", 1)
            self._made[dotted] = type(name, (), {"__module__": module, **attributes})
            parts = module.split(".")
            for length in range(1, len(parts) + 1):
                package = ".".join(parts[:length])
                if package not in sys.modules:
                    self.monkeypatch.setitem(sys.modules, package, ModuleType(package))
            self.monkeypatch.setattr(sys.modules[module], name, self._made[dotted], raising=False)
        return self._made[dotted]

    def index(self, start: int, stop: int) -> Reduced:
        where = self.pandas if self.pandas == "pandas" else "pandas.core.indexes.range"
        counted = {"name": None, "start": start, "stop": stop, "step": 1}
        new_index = self.made("pandas.core.indexes.base._new_Index")
        return Reduced(new_index, (self.made(f"{where}.RangeIndex"), counted))

    def array(self, entries: Sequence[object]) -> Reduced:
        reconstruct = self.made(f"{self.numpy}.multiarray._reconstruct")
        state = (1, (len(entries),), np.dtype("O"), False, list(entries))
        return Reduced(reconstruct, (np.ndarray, (0,), b"b"), state)

    def series(self, entries: Sequence[object], start: int = 0) -> object:
        """A pandas.Series as `NDFrame.__getstate__` and `BlockManager.__getstate__` write it."""
        index, values = self.index(start, start + len(entries)), self.array(entries)
        blocks = {"axes": [index], "blocks": [{"values": values, "mgr_locs": slice(0, 3, 1)}]}
        state = [index], [values], [index], {"0.14.1": blocks}
        manager = self.made(
            f"{self.managers}.SingleBlockManager", __getstate__=lambda self: self.state
        )()
        manager.state = state
        series = self.made(f"{self.pandas}.Series")()
        vars(series).update({"_metadata": ["name"], self.blocks: manager, "_typ": "series"})
        return series

    def old_tensor(self, row: Sequence[float]) -> Reduced:
        """A tensor as torch 0.3 writes it: its storage is a list."""
        storage = Reduced(self.made("torch.FloatStorage"), (torch.tensor(row).tolist(),))
        return Reduced(self.made("torch._utils._rebuild_tensor"), (storage, 0, (len(row),), (1,)))

    def dump(self, content: object, file: Path) -> Path:
        file.write_bytes(pickle.dumps(content, self.protocol))
        self.monkeypatch.undo()  # what is read finds the true libraries, or none
        return file


AUTHORS = ("pandas.core.series", "pandas.core.internals", "_data", "numpy.core", 3)
WRITERS = {
    "pandas 0.22": AUTHORS,
    "pandas 1": ("pandas.core.series", "pandas.core.internals.managers", "_mgr", "numpy.core", 4),
    "pandas 3": ("pandas", "pandas.core.internals.managers", "_mgr", "numpy._core", 4),
    "python 3.14": ("pandas", "pandas.core.internals.managers", "_mgr", "numpy._core", 5),
}


@pytest.fixture
def authors(monkeypatch: pytest.MonkeyPatch) -> Libraries:
    return Libraries(monkeypatch, *AUTHORS)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "wdon.conv_norms.pkl"


def read(file: Path, **changes: Any) -> NormHistory:
    return NormHistory.from_official_pickle(
        file, **{"names": NAMES, "steps_per_epoch": 10} | changes
    )


def assert_read(history: NormHistory) -> None:
    assert list(history.norms) == list(NAMES.values())
    for index, name in NAMES.items():
        np.testing.assert_array_equal(history.norms[name], np.float32(NORMS[index]))
        assert history.norms[name].dtype == np.float32
    np.testing.assert_array_equal(history.steps, [10, 20, 30])
    np.testing.assert_array_equal(history.epochs, [0, 1, 2])
    assert np.isnan(history.learning_rates).all()
    assert np.isnan(history.weight_decays).all()


@pytest.mark.parametrize("new_tensors", [False, True], ids=["torch 0.3", "torch"])
@pytest.mark.parametrize("writer", WRITERS)
def test_files_of_all_releases(
    monkeypatch: pytest.MonkeyPatch, file: Path, writer: str, new_tensors: bool
) -> None:
    libraries = Libraries(monkeypatch, *WRITERS[writer])
    tensor: Callable[[Any], object] = torch.tensor if new_tensors else libraries.old_tensor
    content = {
        f"{KEY}{index}": libraries.series([tensor(row) for row in rows])
        for index, rows in NORMS.items()
    }
    history = read(libraries.dump(content, file))
    assert_read(history)
    assert history.provenance == {"official_pickle": file.name}


def test_a_file_of_the_installed_pandas(file: Path) -> None:
    pandas = pytest.importorskip("pandas")
    content = {
        f"{KEY}{index}": pandas.Series([torch.tensor(row) for row in rows], dtype=object)
        for index, rows in NORMS.items()
    }
    file.write_bytes(pickle.dumps(content))
    assert_read(read(file))


def write(libraries: Libraries, file: Path, **changes: object) -> Path:
    """Write the authors' file, with other series under some keys."""
    content = {
        f"{KEY}{index}": libraries.series([libraries.old_tensor(row) for row in rows])
        for index, rows in NORMS.items()
    }
    return libraries.dump(content | changes, file)


def test_an_epoch_sees_the_norms_of_its_end(authors: Libraries, file: Path) -> None:
    """As the authors' optimizer does, which takes entry e while it trains epoch e."""
    history = read(write(authors, file))
    for epoch, step in enumerate([0, 10, 20]):
        assert history.place(epoch=epoch) == history.place(step=step) == (epoch, epoch, 0.0)


def test_it_can_be_kept_as_a_recording(authors: Libraries, file: Path, tmp_path: Path) -> None:
    read(write(authors, file)).save(tmp_path / "weight_norms.safetensors")
    assert_read(NormHistory.load(tmp_path))


def test_a_tensor_that_is_part_of_a_storage(authors: Libraries, file: Path) -> None:
    rows = torch.tensor([[1.0], [3.0], [4.0], [5.0], [6.0]])[1:4]
    assert_read(read(write(authors, file, **{f"{KEY}4": authors.series(list(rows))})))


def test_names_of_other_parameters_are_not_used(authors: Libraries, file: Path) -> None:
    assert_read(read(write(authors, file), names={1: "net.bn.weight", **NAMES}))


def test_neither_torch_nor_pandas_is_imported(authors: Libraries, file: Path) -> None:
    code = (
        "import sys; from nmlightning.weights.history import NormHistory;"
        f"print(NormHistory.from_official_pickle({str(write(authors, file))!r}, {NAMES},"
        " steps_per_epoch=10)); assert not {'torch', 'pandas'} & set(sys.modules)"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert printed == "NormHistory(3 records of 2 weights, steps 10 to 30)\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps_per_epoch": 0}, "steps_per_epoch must be a whole number of at least 1, got 0."),
        ({"steps_per_epoch": "1"}, "steps_per_epoch must be a whole number of at least 1, got '1'"),
        ({"names": {0: "a"}}, "the norms of the parameters 0, 4, and names has no 4."),
        ({"names": {0: "a", 4: "a"}}, "0, 4, and names gives two of them the same name."),
    ],
)
def test_arguments_that_do_not_fit(
    authors: Libraries, file: Path, changes: dict[str, Any], message: str
) -> None:
    write(authors, file)
    with pytest.raises(InputError, match=re.escape(message)):
        read(file, **changes)


def test_a_missing_file(file: Path) -> None:
    with pytest.raises(InputError, match=rf"no pickle of the norms of .* at .*{file.name}\.$"):
        read(file)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(authors: Libraries, file: Path, share: float) -> None:
    content = write(authors, file).read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=rf"{file.name} cannot be used: it is truncated or no p"):
        read(file)


@pytest.mark.parametrize(
    "content", [{}, [1.0], None, {"epoch": 1}, {3: 1}, {f"{KEY}-1": 1}, {f"last_{KEY}1": 1}]
)
def test_another_pickle(file: Path, content: object) -> None:
    file.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"it holds no dict of norms|it has another key than chan"):
        read(file)


def old(authors: Libraries, *entries: Any) -> object:
    return authors.series([authors.old_tensor(entry) for entry in entries])


def rebuilt(authors: Libraries, *args: object) -> object:
    """A series of one tensor that is rebuilt from these arguments."""
    return authors.series([Reduced(authors.made("torch._utils._rebuild_tensor"), args)])


def storage(authors: Libraries, *args: object) -> Reduced:
    return Reduced(authors.made("torch.FloatStorage"), args)


NO_TENSOR = "an entry of parameter 4 is no torch.FloatTensor of shape (channels,)"
NO_SERIES = "parameter 4 has no pandas.Series"
NO_EPOCHS = "the series of parameter 4 does not count epochs from 0"


@pytest.mark.parametrize(
    ("series", "message"),
    [
        (lambda a: [1.0], NO_SERIES),
        (lambda a: Reduced(a.made(f"{a.pandas}.Series"), (1,)), NO_SERIES),
        (lambda a: Reduced(a.made(f"{a.pandas}.Series"), (), {"_data": 1}), NO_EPOCHS),
        (lambda a: a.series([]), NO_EPOCHS),
        (lambda a: a.series([a.old_tensor([1.0])] * 3, start=1), NO_EPOCHS),
        (lambda a: a.series([1.0, 2.0, 3.0]), NO_TENSOR),
        (lambda a: a.series([torch.tensor(1.0)] * 3), NO_TENSOR),
        (lambda a: a.series([torch.ones(2, 2)] * 3), NO_TENSOR),
        (lambda a: a.series([torch.ones(4)[::2]] * 3), NO_TENSOR),
        (lambda a: a.series([torch.ones(0)] * 3), NO_TENSOR),
        (lambda a: rebuilt(a), NO_TENSOR),
        (lambda a: rebuilt(a, [1.0], 0, (1,), (1,)), NO_TENSOR),
        (lambda a: rebuilt(a, storage(a), 0, (1,), (1,)), NO_TENSOR),
        (lambda a: rebuilt(a, storage(a, 10**12), 0, (1,), (1,)), NO_TENSOR),
        (lambda a: rebuilt(a, storage(a, [[1.0]]), 0, (1,), (1,)), NO_TENSOR),
        (lambda a: rebuilt(a, storage(a, [1.0]), 0, (10**12,), (0,)), NO_TENSOR),
        (lambda a: rebuilt(a, storage(a, [1.0]), 0, (10**12,), (1,)), NO_TENSOR),
        (lambda a: rebuilt(a, storage(a, [1.0]), 1, (1,), (1,)), NO_TENSOR),
        (lambda a: rebuilt(a, storage(a, [1.0]), -1, (1,), (1,)), NO_TENSOR),
        (lambda a: a.series([torch.ones(1).double()] * 3), "refuses to load 'torch.DoubleStorage'"),
        (lambda a: old(a, [1.0], [1.0, 2.0], [1.0]), "channels of parameter 4 changes between"),
        (lambda a: old(a, [1.0], [1.0]), "conv2.weight has shape (2, 1), expected (3, channels)"),
        (lambda a: old(a, [1.0], [-1.0], [1.0]), "conv2.weight has a negative norm in record 1"),
        (lambda a: old(a, [1.0], [1.0], [np.nan]), "conv2.weight are not finite from record 2"),
        (lambda a: old(a, [np.inf], [1.0], [1.0]), "conv2.weight are not finite from record 0"),
        (lambda a: rebuilt(a, storage(a, [1e99]), 0, (1,), (1,)), "has shape (1, 1), expected (3"),
    ],
)
def test_series_that_are_none(
    authors: Libraries, file: Path, series: Callable[[Libraries], object], message: str
) -> None:
    write(authors, file, **{f"{KEY}4": series(authors)})
    with pytest.raises(InputError, match=f"{file.name} cannot be used: .*{re.escape(message)}"):
        read(file)


class Attack:
    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.made}",)


@pytest.mark.parametrize("place", ["content", "series", "entry", "saved", "fifth pickle"])
def test_nothing_is_run(authors: Libraries, file: Path, tmp_path: Path, place: str) -> None:
    made = tmp_path / "made"
    attack = Attack(made)
    saved = (4 if place == "fifth pickle" else 0) * pickle.dumps(1) + pickle.dumps(attack)
    load_from_bytes = Reduced(authors.made("torch.storage._load_from_bytes"), (saved,))
    series = {
        "series": attack,
        "entry": authors.series([attack]),
        "saved": rebuilt(authors, load_from_bytes, 0, (1,), (1,)),
        "fifth pickle": rebuilt(authors, load_from_bytes, 0, (1,), (1,)),
    }
    content: object = attack if place == "content" else {f"{KEY}4": series[place]}
    authors.dump(content, file)
    with pytest.raises(InputError, match=r"refuses to load '\w+\.system'\.$"):
        read(file)
    assert not made.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved + b"1",
        lambda saved: saved[:-1],
        lambda saved: saved[:-4],
        lambda saved: saved[:-40],
        lambda saved: saved.replace(b"ctorch\nFloatStorage\n", b"cnumpy\nndarray\n"),
    ],
)
def test_a_damaged_storage(
    authors: Libraries, file: Path, change: Callable[[bytes], bytes]
) -> None:
    """What torch.save wrote goes on after its end, stops before it, or is no storage."""
    _, (storage, *_) = torch.ones(1).__reduce_ex__(2)
    _, (saved,) = storage.__reduce__()
    load_from_bytes = Reduced(authors.made("torch.storage._load_from_bytes"), (change(saved),))
    authors.dump({f"{KEY}4": rebuilt(authors, load_from_bytes, 0, (1,), (1,))}, file)
    with pytest.raises(InputError, match=r"is no torch.FloatTensor|truncated or no pickle"):
        read(file)
