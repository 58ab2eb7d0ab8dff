"""Test what the probe says of norms in inference against their execution in half."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from nmlightning import InputError, L1LayerNorm, MeanOnlyBatchNorm2d, probe_inference, swap_norms
from nmlightning.export.onnx_norms import LEFT
from nmlightning.export.onnx_values import OnnxFile
from nmlightning.probe import inference
from nmlightning.probe.fp16_emulation import OUTCOMES, RowNorm, run_forms

N = 512
SIGMAS = torch.logspace(-4, 4, 41)
EPS = (1e-5, 1e-12)


def rows(seed: int = 0) -> Tensor:
    """Return a row of Gaussian values for each σ, then an offset, an outlier, equal values, 0."""
    x = torch.randn(len(SIGMAS), N, generator=torch.Generator().manual_seed(seed))
    odd = torch.stack([10 + x[0], x[1], torch.full((N,), 3.0), torch.zeros(N)])
    odd[1, 0] = 2e4
    return torch.cat([x * SIGMAS[:, None], odd])


def execute(steps: str, eps: float, **given: Any) -> Any:
    """Return the y that onnx's own evaluator makes of steps, all in float16."""
    text = '<ir_version: 8, opset_import: ["" : 18]> g (float16[M, N] x) => (float16[M, N] y)'
    given |= {"n": np.float16([N]), "e": np.float16([eps]), "axes": np.array([1])}
    with np.errstate(all="ignore"):
        found = ReferenceEvaluator(parser.parse_model(f"{text} {{ {steps} }}")).run(["y"], given)
    return np.asarray(found[0], np.float64)


def outcomes_of(found: Any, right: Any) -> list[str]:
    """Return what became of each row, by comparing with float64."""
    names = []
    for y, exact in zip(found, right, strict=True):
        error, size = (np.sqrt(np.mean(np.square(v))) for v in (y - exact, exact))
        name = "right" if error <= 0.1 * max(size, 0.1) else "wrong" if y.any() else "dead"
        name = "not finite" if np.isinf(y).any() else name
        names.append("NaN" if np.isnan(y).any() else name)
    return names


def formula(x: Any, eps: float, centred: bool) -> Any:
    d = x - x.mean(1, keepdims=True) if centred else x
    return d / np.sqrt(np.mean(np.square(d), 1, keepdims=True) + eps)


MEANS = {
    "float16": "{0}w = Cast<to=1>({1}) {0}v = ReduceMean({0}w, axes) {0} = Cast<to=10>({0}v)",
    "float16_sums": "{0}v = ReduceSum({1}, axes) {0} = Div({0}v, n)",
}


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("form", MEANS)
def test_verdicts_are_those_of_an_execution_in_float16(form: str, kind: str, eps: float) -> None:
    centred, x = kind == "layer", rows()
    mean = MEANS[form].format
    start = f"{mean('m', 'x')} d = Sub(x, m)" if centred else "d = Identity(x)"
    steps = f"{start} q = Mul(d, d) {mean('s', 'q')} t = Add(s, e) r = Sqrt(t) y = Div(d, r)"
    half = x.half().numpy()
    executed = outcomes_of(execute(steps, eps, x=half), formula(half.astype(float), eps, centred))
    tried = [OUTCOMES[i] for i in run_forms(x, kind, RowNorm(eps, centred))[form].tolist()]
    differing = [i for i, pair in enumerate(zip(tried, executed, strict=True)) if len({*pair}) > 1]
    # Where a sum just leaves float16 or enters it, the order of its terms decides.
    assert len(differing) <= 1, [(float(x[i].std()), tried[i], executed[i]) for i in differing]
    assert {"right", "dead"} <= set(executed)
    overflows = "sums" in form and centred  # the sum of x itself, to inf − inf
    assert ("not finite" in executed or "NaN" in executed) is (eps < 1e-8 or overflows)


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_cures_and_bfloat16_keep_every_row(kind: str, eps: float) -> None:
    tried = run_forms(rows(), kind, RowNorm(eps, kind == "layer"))
    for form in ("scaled", "l1", "bfloat16", "bfloat16_sums"):
        lost = [i for i, outcome in enumerate(tried[form].tolist()) if OUTCOMES[outcome] != "right"]
        assert lost == [], form


def test_bfloat16_loses_what_it_does_not_hold() -> None:
    noise = torch.randn(1, N)
    tried = run_forms(torch.cat([300 + noise, 1e6 * noise]), "layer", RowNorm(1e-5))
    assert [OUTCOMES[i] for i in tried["bfloat16"].tolist()] == ["wrong", "right"]
    assert [OUTCOMES[i] for i in tried["float16"].tolist()] == ["right", "input"]


@pytest.mark.parametrize("eps", EPS)
def test_verdicts_of_running_variances(eps: float) -> None:
    variance = torch.logspace(-9, 6, 31)
    norm = nn.BatchNorm1d(len(variance), eps=eps, affine=False).eval()
    norm.running_var.copy_(variance)
    x = torch.randn(64, len(variance)) * variance.sqrt()
    (layer,) = probe_inference(norm, [x]).layers
    half, v = x.T.half().numpy(), variance.half().numpy()[:, None]
    steps = "t = Add(v, e) r = Sqrt(t) y = Div(x, r)"
    right = half.astype(float) / np.sqrt(variance.double().numpy()[:, None] + eps)
    executed = outcomes_of(execute(steps, eps, x=half, v=v), right)
    counts = {name: executed.count(name) for name in set(executed)}
    assert {k: n for k, n in layer.outcomes["float16"].items() if n} == counts
    assert counts["dead"] == (variance > 65520).sum()
    held = layer.held["running_var"]
    assert held["inf"] == pytest.approx(counts["dead"] / 31)
    assert held["0"] == pytest.approx(float((variance < 2**-25).sum()) / 31)
    np.testing.assert_allclose(layer.scales, variance.sqrt(), rtol=1e-6)


def test_rows_that_are_not_finite_count_for_no_form() -> None:
    """A function may run the model."""
    x = torch.randn(4, 8)
    x[1, 2], x[2, 0] = torch.nan, torch.inf
    found = probe_inference(nn.Sequential(nn.LayerNorm(8)), [lambda net: net(x)])
    counts = {name: sum(tried.values()) for name, tried in found.layers[0].outcomes.items()}
    assert set(counts.values()) == {2}
    assert "gives inf or NaN in float32, to 1 layer" in found.describe()
    assert "does not hold x" not in found.describe()


def test_folded_weights_are_judged_by_channel() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-12)).eval()
    w, norm = net[0].weight, net[1]
    nn.init.constant_(w, 1.0)
    with torch.no_grad():
        w[3, 0] = 1e-9
    norm.running_var.copy_(torch.tensor([1e-12, 1.0, 1e20, 1.0]))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    (layer,) = probe_inference(net, [torch.randn(2, 3, 5, 5)]).layers
    assert layer.lost("folded") == {"not finite": 1, "dead": 1}
    assert layer.held["weight of 0"] == pytest.approx({"inf": 1 / 4, "0": 1 / 3, "subnormal": 0})
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Norms(nn.Module):
    """A norm of every kind, on inputs whose sizes differ from channel to channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.group, self.instance = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8)
        self.layer, self.rms = nn.LayerNorm(36), nn.RMSNorm(36, eps=1e-6)
        nn.init.uniform_(self.batch.running_var, 1e-3, 1e3)
        nn.init.uniform_(self.batch.running_mean, -1, 1)
        nn.init.uniform_(self.batch.weight, 0.1, 100)

    def forward(self, x: Tensor) -> Any:
        x = self.batch(self.conv(x).relu())
        y = 1e3 * self.instance(100 * self.group(300 * x)).flatten(2)
        return self.rms(y + self.layer(y))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, Path]:
    torch.manual_seed(0)
    net, x = Norms().eval(), torch.randn(2, 3, 8, 8)
    file = tmp_path_factory.mktemp("onnx") / "norms.onnx"
    torch.onnx.export(net, (x,), file, dynamo=True, external_data=False, verbose=False)
    return net, x, file


def by_kind(found: Any) -> dict[str, Any]:
    """Return all that was measured, but for the names, by the kind of norm."""
    plain = {x.pop("kind"): x for x in found.as_plain()["layers"]}
    for layer in plain.values():
        for key in ("name", "class", "in_float16"):
            del layer[key]
    return plain


def test_a_file_gets_the_answer_of_its_module(
    exported: tuple[nn.Module, Tensor, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, file = exported
    monkeypatch.setattr(inference, "_AT_ONCE", 2)
    of_net, of_file = probe_inference(net, [x, x]), probe_inference(str(file), [x, x])
    assert [layer.name for layer in of_net.layers] == ["batch", "group", "instance", "layer", "rms"]
    expected, found = by_kind(of_net), by_kind(of_file)
    assert expected.keys() == found.keys()
    assert expected["instance"]["lost"]["float16"]
    for kind, plain in found.items():
        torch.testing.assert_close(plain, expected[kind], rtol=1e-3, atol=1e-3, msg=kind)


def test_a_norm_is_measured_by_definition(exported: tuple[nn.Module, Tensor, Path]) -> None:
    net, x, _ = exported
    assert isinstance(net, Norms)
    layer = next(v for v in probe_inference(net, [x]).layers if v.name == "group")
    with torch.no_grad():
        parts = (300 * net.batch(net.conv(x).relu())).reshape(2 * 2, -1)
    np.testing.assert_allclose(layer.scales, parts.std(1, correction=0), rtol=1e-5)
    assert layer.largest == pytest.approx(float(parts.abs().max()))
    assert layer.values == parts.shape[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_leave_a_dtype_where_they_do_in_it(dtype: torch.dtype) -> None:
    x = rows()[: len(SIGMAS)] * (1.0 if dtype == torch.float16 else 1e18)
    (layer,) = probe_inference(nn.RMSNorm(N), [x]).layers
    squares = x.to(dtype).square()
    lost = {
        "overflow": squares.isinf().any(1),
        "sum_overflow": squares.sum(1).isinf(),
        "underflow": squares.float().mean(1) < torch.finfo(dtype).tiny,
    }
    shares = {name: float(found.double().mean()) for name, found in lost.items()}
    assert layer.squares(str(dtype)[6:]) == shares


def make_graph(nodes: list[Any], shape: list[Any], tensors: dict[str, Any]) -> onnx.ModelProto:
    """Return a model from x to y, both of a shape, with float32 constants."""
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    arrays = [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in tensors.items()]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_folded_weights_of_a_file_are_those_of_its_module(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-12)).eval()
    net[1].running_var.copy_(torch.tensor([1e-12, 1e-9, 1e20, 1.0]))
    tensors = {name: value.detach().numpy() for name, value in net.state_dict().items()}
    names = ["h", *(f"1.{x}" for x in ("weight", "bias", "running_mean", "running_var"))]
    nodes = [
        helper.make_node("Conv", ["x", "0.weight"], ["h"], "0", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", names, ["b"], epsilon=1e-12),
        helper.make_node("Conv", ["b", "back"], ["c"]),
        helper.make_node("GroupNormalization", ["c", "g", "g"], ["y"], num_groups=3),
    ]
    more = {"back": np.ones((3, 4, 1, 1)), "g": np.ones(3)}
    onnx.save(make_graph(nodes, [2, 3, 5, 5], {**tensors, **more}), tmp_path / "net.onnx")
    x = torch.randn(2, 3, 5, 5)
    expected = probe_inference(net, [x]).layers[0]
    batch, group = probe_inference(tmp_path / "net.onnx", [x]).layers
    assert (batch.name, batch.held, batch.outcomes["folded"]) == (
        "1", expected.held, expected.outcomes["folded"],
    )  # fmt: skip
    assert expected.lost("folded").keys() == {"not finite", "dead"}
    assert (group.kind, group.values, len(group.scales)) == ("group", 25, 6)


def test_weights_stay_in_the_file(tmp_path: Path) -> None:
    """Of those in the file itself and of external ones, embedded at offsets that are not even."""
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    norm = helper.make_node("LayerNormalization", ["h", "n.weight"], ["y"], epsilon=1e-5)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), norm]
    model = make_graph(nodes, ["n", 64], {"w": weight, "n.weight": weight[0]})
    onnx.save(model, tmp_path / "in.onnx")
    external = {"save_as_external_data": True, "location": "w", "size_threshold": 9}
    onnx.save(model, tmp_path / "out.onnx", **external)
    x = np.random.default_rng(1).standard_normal((5, 64))
    expected = (x.astype(np.float32) @ weight).std(1)
    for name in ("in.onnx", "out.onnx"):
        file = OnnxFile(tmp_path / name)
        assert file.model.ByteSize() < 1000 < weight.nbytes
        np.testing.assert_array_equal(file.read("w"), weight)
        for batch in (x, (x,), {"x": x}, {"arr_0": torch.from_numpy(x)}):
            (layer,) = probe_inference(tmp_path / name, [batch]).layers
            assert (layer.name, layer.type_name) == ("n", "LayerNormalization")
            np.testing.assert_allclose(layer.scales, expected, rtol=1e-5)
    (tmp_path / "w").unlink()
    with pytest.raises(InputError, match="onnx' keeps weights in w, not beside it"):
        OnnxFile(tmp_path / "out.onnx")
    (tmp_path / "in.onnx").write_bytes((tmp_path / "in.onnx").read_bytes()[:-5000])
    with pytest.raises(InputError, match="onnx' is no ONNX file, or is truncated"):
        OnnxFile(tmp_path / "in.onnx")


class Own(nn.Module):
    """An RMS norm of no library, which only its computation tells."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.epsilon = nn.Parameter(torch.ones(64)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt() * self.scale


class OwnRMSNorm(Own):
    pass


def test_nodes_of_unknown_norms_are_named(tmp_path: Path) -> None:
    onnx.save(
        onnx.parser.parse_model(
            '<ir_version: 9, opset_import: ["" : 17]> g (float[2, 4] x) => (float[2, 4] y)'
            "<float[4] w = {1, 1, 1, 1}> { h = LayerNormalization(x, w) y = LpNormalization(h) }"
        ),
        tmp_path / "a.onnx",
    )
    found = probe_inference(tmp_path / "a.onnx", [np.ones((2, 4), "float32")])
    assert [layer.kind for layer in found.layers] == ["layer"]
    assert found.left_out == {"y": LEFT["other"]}


def test_statistics_may_stand_behind_identities(tmp_path: Path) -> None:
    """As torch's older exporter has equal ones."""
    text = '<ir_version: 9, opset_import: ["" : 17]> g (float[2, 2, 3] x) => (float[2, 2, 3] y)'
    text += "<float[2] w = {1, 4}> { v = Identity(w) y = BatchNormalization(x, w, w, v, v) }"
    onnx.save(parser.parse_model(text), tmp_path / "a.onnx")
    (layer,) = probe_inference(tmp_path / "a.onnx", [np.ones((2, 2, 3), "float32")]).layers
    assert (layer.kind, layer.scales.tolist()) == ("batch", [1, 2])


def test_norms_of_every_class_are_measured_or_named() -> None:
    encoder = nn.TransformerEncoderLayer(64, 2, 64, batch_first=True)
    others = [OwnRMSNorm(), nn.LocalResponseNorm(2), L1LayerNorm(64), nn.RMSNorm(64)]
    net = nn.Sequential(nn.TransformerEncoder(encoder, 2), *others)
    found = probe_inference(net, [(torch.randn(2, 9, 64),)])
    kinds = {layer.name: (layer.kind, layer.eps) for layer in found.layers}
    assert [kind for kind, _ in kinds.values()] == ["layer"] * 4 + ["rms", "layer", "rms"]
    assert (kinds["1"][1], kinds["4"][1]) == (1e-6, torch.finfo(torch.float32).eps)
    assert found.left_out.keys() == {"2"}
    assert found.left_out["2"].startswith("LocalResponseNorm: it does not compute a layer or an")
    assert not net[0].layers[0].norm1._forward_pre_hooks
    assert net.training


@pytest.mark.parametrize("norm", ["scaled", "l1"])
def test_swapped_norms_are_tried_by_their_own_formula(norm: str) -> None:
    net = nn.Sequential(nn.LayerNorm(N), nn.RMSNorm(N, 1e-5))
    swap_norms(net, norm, kinds=["layer", "rms"])
    x = rows()[torch.tensor([20, 30, 40])]  # σ of 1, 100 and 10,000, the latter rounded to inf
    layer, rms = probe_inference(net, [x.half().float()]).layers
    # Exported, L1 squares its scale, which is infinite from 256 on.
    for found in (layer.lost("float16"), layer.lost("float16_sums")):
        assert sum(found.values()) == (norm == "l1")
    assert layer.lost("scaled") == layer.lost("l1") == rms.lost("float16") == {}


def test_a_report_of_inference_is_read_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    norm = nn.LayerNorm(N, eps=1e-12)
    found = probe_inference(nn.Sequential(norm, nn.Linear(N, 8), nn.BatchNorm1d(8)), [rows()])
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 80
    assert "Nothing is lost by bfloat16, bfloat16 sums, scaled, L1, folded." in str(found)
    assert "scaled" not in str(found.table())


# Of the exported file where there is no model.
BAD_INPUT: dict[str, tuple[Any, Any, str]] = {
    "no norm": (nn.Linear(3, 3), [torch.ones(2, 3)], "no norm to measure in Linear."),
    "no scale": (MeanOnlyBatchNorm2d(3), [], "MeanOnlyBatchNorm2d: it has no scale."),
    "no batch": (nn.LayerNorm(3), [], "No batch was run: the data are empty."),
    "shape": (nn.LayerNorm(3), [torch.ones(2, 4)], "does not take these inputs: shape .* invalid"),
    "file": ("none.onnx", [], "there is no file 'none.onnx' in /"),
    "names": (None, [{"a": np.ones(1)}], "the inputs are a; .*norms.onnx takes x"),
    "count": (None, [(np.ones(1), np.ones(1))], "the inputs are arr_0, arr_1; .* takes x"),
    "dtype": (None, [np.ones((2, 3, 8, 8), "complex64")], "'x' of .*: Cannot cast array data"),
    "sizes": (None, [np.ones((2, 3, 8, 9))], "onnxruntime cannot run .* Got: 9 Expected: 8"),
}


@pytest.mark.parametrize(("model", "batches", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_told_in_a_line(
    model: Any, batches: Any, message: str, exported: tuple[nn.Module, Tensor, Path]
) -> None:
    with pytest.raises(InputError, match=message) as told:
        probe_inference(model or exported[2], batches)
    assert "\n" not in str(told.value)


def test_a_file_needs_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmlightning.export.onnx_values.find_spec", {"onnx": 1}.get)
    with pytest.raises(InputError, match="needs onnxruntime: pip install onnxruntime"):
        probe_inference("net.onnx", [])
