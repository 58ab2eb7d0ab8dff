"""Batch norms where other code expects torch's: by class, by position, traced and exported."""

import io
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import fuse_modules, fuse_modules_qat
from torch.fx.experimental import optimization
from torch.nn.utils import prune
from torchvision.models.feature_extraction import create_feature_extractor

from batch_norm_contract import NORMS, TORCH, Norm, each_kind, every_norm
from nmlightning import norms, swap_norms
from nmlightning.errors import InputError
from nmlightning.export.fold import fold_norms
from nmlightning.norms import registry

ALL = {**NORMS, "half_l2": Norm("HalfL2")}
deprecated = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
ONNX = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:It is recommended that const"
)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 8, 8)


def make_net(norm: str = "l1", images: Tensor | None = None) -> nn.Sequential:
    """Return a swapped net whose running statistics are something."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    net.append(nn.BatchNorm2d(4))
    swap_norms(net, norm)
    net(torch.randn(4, 3, 8, 8) if images is None else images)
    return net


@pytest.mark.parametrize("norm", ALL.values(), ids=ALL)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_is_torchs_batch_norm_of_its_dimension(norm: Norm, dims: int) -> None:
    layer = norm.layer(dims=dims)
    assert [d for d, cls in TORCH.items() if isinstance(layer, cls)] == [dims]
    assert type(layer) is not TORCH[dims]


@pytest.mark.parametrize("norm", ALL.values(), ids=ALL)
def test_positional_arguments_are_torchs(norm: Norm) -> None:
    cls = type(norm.layer())
    layer, theirs = cls(8, 1e-3, None, False, False), nn.BatchNorm2d(8, 1e-3, None, False, False)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
        assert getattr(layer, name) == getattr(theirs, name)
    for name in ("L1LayerNorm", "LpLayerNorm", "L1RMSNorm", "LpRMSNorm", "ScaledLayerNorm"):
        kind = getattr(norms, name)
        assert (kind(8, 1e-3, False).eps, kind(8, 1e-3, False).weight) == (1e-3, None)
    assert norms.LpLayerNorm(8, 1e-3, True, False).bias is None


@pytest.mark.parametrize("number", [1, 2.0, math.inf])
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        *((cls, "p") for cls in (norms.LpBatchNorm1d, norms.LpLayerNorm, norms.LpRMSNorm)),
        *((norms.TopKBatchNorm2d, "k"), (norms.RangeBatchNorm3d, "chunks")),
    ],
)
def test_powers_and_counts_by_position_are_refused(cls: Any, name: str, number: float) -> None:
    with pytest.raises(InputError, match=rf"is eps, .* {cls.__name__}\(8, {name}={number}\)"):
        cls(8, number)
    assert cls(8, eps=2.0).eps == 2  # by its name it is one


@pytest.mark.parametrize("norm", ["l1", "range", "mean", "half_l2"])
def test_freezing_by_class_stops_running_statistics(norm: str, images: Tensor) -> None:
    net = make_net(norm)
    [layer.eval() for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    before = [b.clone() for b in net.buffers()]
    net(images)
    assert all(map(torch.equal, before, net.buffers()))


@every_norm
@deprecated
def test_script_and_trace_evaluate(norm: Norm, images: Tensor) -> None:
    layer = norm.layer()
    layer(images)
    expected = layer.eval()(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(layer, images)
        trained = norm.layer()
        in_training = torch.jit.trace(trained, images, check_trace=False)
    torch.testing.assert_close(in_training(images), trained(images))
    scripted = torch.jit.script(layer)
    for other in (traced, scripted, torch.jit.freeze(scripted)):
        torch.testing.assert_close(other(images), expected)
    with pytest.raises(torch.jit.Error, match="only evaluates: call eval"):
        scripted.train()(images)
    with pytest.raises(InputError, match="in evaluation, with running statistics and not fused"):
        torch.jit.script(layer.train())


@each_kind
@pytest.mark.parametrize("training", [False, True])
def test_fx_records_one_call(norm: Norm, training: bool, images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), norm.layer(), nn.ReLU()).train(training)
    traced = torch.fx.symbolic_trace(net)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    torch.testing.assert_close(traced(images), net(images))
    features = create_feature_extractor(net, {"1": "norm"}).train(training)
    torch.testing.assert_close(features(images)["norm"], net[1](net[0](images)))
    alone = torch.fx.symbolic_trace(net[1].eval())
    torch.testing.assert_close(alone(images), net[1](images))


def test_fusing_by_torch_computes_the_same_or_says_so(images: Tensor) -> None:
    net = make_net().eval()
    expected = net(images)
    fused = nn.utils.fusion.fuse_conv_bn_eval(net[0], net[1])
    torch.testing.assert_close(fused(images), net[1](net[0](images)), rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match=r"not L1BatchNorm2d: call fold_norms\(model\), or"):
        torch.testing.assert_close(optimization.fuse(net)(images), expected)
    assert len(fold_norms(net)) == 2
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_export_in_training_warns(strict: bool, images: Tensor) -> None:
    net = make_net()
    with pytest.warns(UserWarning, match=r"L1BatchNorm2d is exported in training mode .* eval"):
        torch.export.export(net, (images,), strict=strict)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = torch.export.export(net.eval(), (images,), strict=strict)
    torch.testing.assert_close(program.module()(images), net(images))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called == {f"aten.{name}.default" for name in ("conv2d", "batch_norm", "relu")}


@ONNX
def test_onnx_takes_evaluation_and_refuses_training(images: Tensor) -> None:
    net, file = make_net(), io.BytesIO()
    torch.onnx.export(net, (images,), file, dynamo=False)  # puts it in evaluation meanwhile
    assert b"BatchNormalization" in file.getvalue() or b"Conv" in file.getvalue()
    for training in (torch.onnx.TrainingMode.TRAINING, torch.onnx.TrainingMode.PRESERVE):
        with pytest.raises(
            InputError, match=r"ONNX has no L1BatchNorm2d in training: call eval\(\)"
        ):
            torch.onnx.export(net, (images,), io.BytesIO(), dynamo=False, training=training)


@ONNX
@pytest.mark.parametrize(
    "layer",
    [
        norms.L1LayerNorm(8),
        norms.LpLayerNorm((5, 8), p=3.0),
        norms.LpRMSNorm(8, p=1.5),
        norms.ScaledLayerNorm((5, 8)),
        norms.ScaledRMSNorm(8),
        *(
            cls(4, track_running_stats=False)
            for name, cls in vars(norms).items()
            if name.endswith("BatchNorm2d") and "Half" not in name
        ),
    ],
    ids=str,
)
def test_norms_of_the_inputs_own_statistics_are_exported_and_saved(layer: nn.Module) -> None:
    reference, x, file = (
        pytest.importorskip("onnx.reference"),
        torch.randn(2, 4, 5, 8),
        io.BytesIO(),
    )
    torch.onnx.export(layer.eval(), (x,), file, dynamo=False, input_names=["x"])
    (y,) = reference.ReferenceEvaluator(file.getvalue()).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), layer(x).detach(), atol=1e-5, rtol=0)
    torch.jit.save(torch.jit.trace(layer, x), io.BytesIO())


@pytest.mark.parametrize("norm", ["l1", "mean"])
def test_conversion_to_another_norm_is_refused(norm: str) -> None:
    layers = pytest.importorskip("timm.layers")
    convert_sync, convert_split = layers.convert_sync_batchnorm, layers.convert_splitbn_model
    for convert in (nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync, convert_split):
        with pytest.raises(
            InputError, match=r"convert_s.* would make .* its sync, .* revert the swap"
        ):
            convert(make_net(norm))
    synchronised = make_net(norm)
    swap_norms(synchronised, norm, {"sync": True})
    with pytest.raises(InputError, match=r"do not call it \(its sync is on\), or revert the swap"):
        convert_sync(synchronised)


def test_freezing_keeps_the_outputs_and_unfreezing_warns(images: Tensor) -> None:
    layers = pytest.importorskip("timm.layers")
    net = make_net().eval()
    expected = net(images)
    layers.freeze_batch_norm_2d(net)
    torch.testing.assert_close(net(images), expected)
    line = "L1BatchNorm2d in Sequential is replaced by BatchNorm2d"
    with pytest.warns(UserWarning, match=line) as caught:
        layers.unfreeze_batch_norm_2d(net)
    assert len(caught) == 2
    both = nn.Sequential(layers.BatchNormAct2d(8))
    swap_norms(both, "l1")
    layers.freeze_batch_norm_2d(both)
    with pytest.warns(UserWarning, match=r"^L1BatchNormAct2d in Sequential is replaced by"):
        layers.unfreeze_batch_norm_2d(both)
    assert len(swap_norms(net, "l1")) == 2
    net[1] = norms.LInfBatchNorm2d(8)  # of ours, and no norm: both are meant
    net[1] = nn.Identity()
    with pytest.warns(UserWarning, match=line):
        net[4] = nn.BatchNorm2d(4)


@pytest.mark.parametrize("norm", [x for x, norm in registry.NORMS.items() if norm.batch][1:])
def test_eager_fusing_of_torch_ao_is_that_of_its_own_norm(norm: str, images: Tensor) -> None:
    net = make_net("l2").append(nn.BatchNorm2d(4)).append(nn.ReLU())
    swap_norms(net, norm, {"k": 3} if norm == "topk" else {})
    net(images)
    expected = net.eval()(images)
    fused = fuse_modules(net, [["0", "1", "2"], ["3", "4"], ["5", "6"]])
    assert [type(layer).__name__ for layer in fused][::3] == ["ConvReLU2d", "Conv2d", "Identity"]
    torch.testing.assert_close(fused(images), expected, rtol=1e-4, atol=1e-5)
    line = f"torch fuses {type(net[1]).__name__} in evaluation only, and without a ReLU of its"
    for fuse in (fuse_modules, fuse_modules_qat):
        with pytest.raises(InputError, match=line):
            fuse(net.train(), [["0", "1"]])


def test_pruned_norm_trains_and_evaluates() -> None:
    layer, x = norms.LpBatchNorm2d(4, p=2), torch.randn(8, 4, 3, 3)
    theirs = nn.BatchNorm2d(4)
    for each in (layer, theirs):
        prune.random_unstructured(each, "weight", amount=0.0)
        each.weight_mask[1:3] = 0
        assert torch.count_nonzero(each(x)[:, 1:3]) == 0
    torch.testing.assert_close(layer.eval()(x), theirs.eval()(x))


@deprecated
def test_layer_norms_are_recorded_traced_and_refuse_scripting() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8)).eval()
    swap_norms(net, "l1", kinds=["layer", "rms"])
    x = torch.randn(2, 8)
    graph = torch.fx.symbolic_trace(net)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(net, x)
    for copy_of_it in (graph, traced):
        torch.testing.assert_close(copy_of_it(2 * x), net(2 * x))
    with pytest.raises(InputError, match=r"torch.jit.script cannot compile L1LayerNorm: use"):
        torch.jit.script(net)
