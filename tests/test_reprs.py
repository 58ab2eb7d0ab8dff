"""What the library's objects show in `print`, in a shell and as the last value of a cell."""

import re
from typing import Any

import pytest
import torch
from torch import nn

import nmlightning as nm
from nmlightning import callbacks, optim
from nmlightning.commands import run_report
from nmlightning.tasks import numerics

SETTINGS: list[tuple[Any, str]] = [
    (nm.NormSwap(), "NormSwap(norm='l1', kinds=['batch'])"),
    (
        nm.NormSwap("topk", {"k": 3}, exclude=["net.bn1"]),
        "NormSwap(norm='topk', options={'k': 3}, kinds=['batch'], exclude=['net.bn1'])",
    ),
    (nm.WeightNormSwap(p="inf"), "WeightNormSwap(kind='bounded', p=inf, rho='init', gain='none')"),
    (
        nm.Int8Swap(bits=4, norms=None),
        "Int8Swap(bits=4, gradient_bits=8, rounding='stochastic', "
        "bifurcate=True, weight_gradient='float32', norms=None, weight_range='tensor', "
        "momentum=0.1)",
    ),
    (
        nm.WeightNormTracker(steering=optim.Hyperball()),
        "WeightNormTracker(every='epoch', steering=Hyperball(granularity='auto'))",
    ),
    (nm.RadialProjection(delta=0.2), "RadialProjection(delta=0.2)"),
    (
        nm.LRCorrection("runs/wd_on", max_rotation=None),
        "LRCorrection(reference='runs/wd_on', mode='stable', power='auto', granularity='channel', "
        "max_rotation=None, align='interpolate')",
    ),
    (callbacks.ExactResume(), "ExactResume()"),
    (callbacks.checkpoints.EndCheckpoint(), "EndCheckpoint()"),
    (numerics.CompilationNotice("Net"), "CompilationNotice(task='Net')"),
    (run_report.SkippedStepCount(), "SkippedStepCount()"),
    (run_report.MetricsBar(), "MetricsBar()"),
]


@pytest.mark.parametrize(("thing", "shown"), SETTINGS)
def test_callbacks_and_rules_show_their_settings(thing: Any, shown: str) -> None:
    assert repr(thing) == shown


TORCHS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.RMSNorm)
LAYERS = [x for x in nm.__all__ if re.search(r"BatchNorm\dd$|LayerNorm$|RMSNorm$", x)]
OURS = {"Lp": "p=1.0", "TopK": "k=10", "Range": "chunks=16"}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_show_what_torchs_do_and_what_is_ours(name: str) -> None:
    layer = getattr(nm, name)(64)
    torchs = next(cls for cls in type(layer).__mro__ if cls in TORCHS)(64)
    shown = layer.extra_repr().split(", ")
    assert set(torchs.extra_repr().split(", ")) <= set(shown)
    own = next((text for start, text in OURS.items() if name.startswith(start)), shown[0])
    assert own in shown
    assert ("constant='exact'" in shown) is not name.startswith(("MeanOnly", "HalfL2", "Scaled"))


def test_a_weight_norm_shows_its_kind() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    nm.apply_weight_norm(net, "weight", p=1)
    assert re.search(r"WeightNorm\(kind='weight', p=1, rho=\S+, gain='channel', proj", repr(net))


def reports() -> dict[str, tuple[Any, str]]:
    """Return a report of each function, and a reason or a heading that it has to show."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sigmoid(), nn.GroupNorm(2, 8))
    batch = torch.randn(4, 3, 9, 9)
    probed = nm.probe_norms(net, [batch], lambda net, x: net(x).square().mean())
    swapped = nm.swap_norms(net, fuse="relu")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    handle = nm.DecayEquivalentLR(0.1).attach(optimizer, net)
    alone = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    return {
        "probe": (probed, "L2 op by op"),
        "swap": (swapped, "not swapped 3: no swap is defined for this norm"),
        "fuse": (swapped, "not fused 1: "),
        "attach": (handle, "DecayEquivalentLR steers 1 of 1 weights"),
        "weight norm": (
            nm.apply_weight_norm(nn.Sequential(*net, *map(nn.Linear, (8, 8), (8, 3)))),
            "linear layers",
        ),
        "fold": (nm.fold_norms(alone), "not folded 0: "),
    }


@pytest.mark.parametrize("columns", ["80", ""])
def test_reports_print_their_reasons(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for report, text in reports().values():
        assert text in str(report)
        assert repr(report) == str(report)
        if columns:
            assert max(map(len, str(report).splitlines())) <= 80
