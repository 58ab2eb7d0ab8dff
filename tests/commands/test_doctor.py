"""Test that `nm doctor` tells what a report of a bug needs, and notices a layer that is wrong."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from nmlightning.cli import main
from nmlightning.commands import doctor
from nmlightning.commands.doctor import TOLERANCES, disagreement, exact_input
from nmlightning.int8 import Int8Linear
from nmlightning.kernels import norm_backend
from nmlightning.kernels.dispatch import requested_backend
from nmlightning.norms import L1BatchNorm2d


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TIMED", {4: (2, 8, 4, 4), 2: (4, 16)})
    monkeypatch.setattr(doctor, "ROUNDS", 2)
    monkeypatch.setenv("COLUMNS", "80")


def test_doctor_prints_versions_backends_and_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    assert max(map(len, out.splitlines())) <= 80
    for subject in doctor.SUBJECTS:
        assert re.search(rf"^ *{re.escape(subject.name)}( +\S+ *){{4}}$", out, re.MULTILINE), out
    for name in doctor.make_int8_layers("cpu"):
        assert re.search(rf"^ *{name}( +(\S+)( int8)?){{2}} *$", out, re.MULTILINE), out
    assert re.search(r"formula, float32: \d+ cases right", out) or "C++, float32" in out
    assert "WRONG" not in out
    assert re.search(r"L1 batch norm +\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\) of BatchNorm2d", out)


def test_doctor_names_a_wrong_norm_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(L1BatchNorm2d):
        def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
            y = super().forward(input, residual)
            return y if input.dtype == torch.float64 else y * 1.01

    subject = doctor.Subject("L1 batch norm", Wrong)
    monkeypatch.setattr(doctor, "SUBJECTS", (subject,))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"float32: 2 cases 2 WRONG, largest error 1\.0e-02 of the largest", out)
    assert out.count("WRONG: L1 batch norm N") == 6


@pytest.mark.parametrize(("what", "error"), [("output", "1.0e-02"), ("integers", "nan")])
def test_doctor_names_a_wrong_int8_layer_and_fails(
    what: str, error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(Int8Linear):
        def forward(self, input: Tensor) -> Tensor:
            if requested_backend() == "formula":
                return super().forward(input)
            return super().forward(-input) if what == "integers" else super().forward(input) * 1.01

    layers = {"linear": Wrong(64, 64, False, rounding="nearest")}
    monkeypatch.setattr(doctor, "make_int8_layers", lambda device: layers)
    with norm_backend("auto"):
        assert main(["doctor"]) == 1
    assert f"WRONG: linear: {error}" in capsys.readouterr().out


def test_doctor_inputs_have_exact_sums_in_every_dtype() -> None:
    for dtype in TOLERANCES:
        x = exact_input((16, 4, 8, 8), dtype, "cpu")
        assert torch.equal(x.float(), exact_input((16, 4, 8, 8), torch.float32, "cpu"))
        eighths = x.double() * 8
        assert torch.equal(eighths, eighths.round())
        assert eighths.abs().max() == 24


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_doctor_check_of_the_formula_passes_in_float64(dtype: torch.dtype) -> None:
    layer = L1BatchNorm2d(4)
    with norm_backend("formula"):
        error = disagreement(layer, exact_input((16, 4, 8, 8), dtype, "cpu"))
    assert 0 < error <= TOLERANCES[dtype]
    assert layer.num_batches_tracked == 0  # it is a copy that ran


def test_doctor_prints_no_version_of_an_absent_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", ("no-such-package",))
    assert ("may use", "no-such-package –") in doctor.describe_versions()


def test_doctor_describes_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        name, major, minor, total_memory = "NVIDIA H200", 9, 0, 139 * 2**30

    def properties(_: Any) -> type[Gpu]:
        return Gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    ((_, _), (_, gpu)) = doctor.describe_devices()
    assert gpu.startswith("NVIDIA H200, sm_90, 139 GiB, CUDA ")
