"""The cases of torch's own tests of norms, from the installed torch, on our classes of p = 2.

`torch.testing._internal` has what torch's tests of modules and operators construct and feed; each
check here does to it what those tests do. Where we refuse what torch takes, `REFUSED` says it.
"""

import copy
import inspect
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from nmlightning import norms
from nmlightning.errors import InputError

pytest.importorskip("expecttest", reason="torch.testing imports it")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Fail to import hypothesis:ImportWarning"),
    # Forward mode scripts torch's own decompositions.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

OURS: dict[str, Any] = {
    "BatchNorm1d": norms.LpBatchNorm1d,
    "BatchNorm2d": norms.LpBatchNorm2d,
    "BatchNorm3d": norms.LpBatchNorm3d,
    "LayerNorm": norms.LpLayerNorm,
    "RMSNorm": norms.LpRMSNorm,
}
MODES = [(name, training) for name in OURS for training in (True, False)]
HALVES = (torch.float16, torch.bfloat16)
# What torch's operators take and our layers refuse; docs/compatibility.md says so, too.
REFUSED = {
    "eps must be finite and at least 0": "a negative eps, in operators",
    "momentum must be between 0 and 1": "a negative momentum, in operators",
    "expected 2D or 3D input (got 1D input)": "a batch without channels, in operators",
}


@dataclass(frozen=True)
class Case:
    """What torch's tests construct a norm with and feed to it."""

    name: str
    torchs: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    x: Tensor
    training: bool

    def theirs(self, **more: Any) -> nn.Module:
        """Return torch's norm, with weights and statistics that are not those it starts with."""
        settings = {"dtype": self.x.dtype, **self.keywords, **more}
        layer: nn.Module = self.torchs(*self.arguments, **settings)
        torch.manual_seed(1)
        for name, value in layer.state_dict().items():
            if value.is_floating_point() and not value.is_meta:
                value.uniform_(0.5, 1.5) if name != "bias" else value.normal_()
        return layer.train(self.training)

    def ours(self) -> Any:
        """Return our norm with the state of torch's."""
        layer = self.construct(dtype=self.x.dtype)
        layer.load_state_dict(self.theirs().state_dict())
        return layer.train(self.training)

    def __str__(self) -> str:
        return f"{self.x.dtype} {self.arguments} {self.keywords} {tuple(self.x.shape)}"

    def construct(self, **more: Any) -> Any:
        """Return our norm as it starts."""
        bound = inspect.signature(self.torchs).bind(*self.arguments, **self.keywords, **more)
        return OURS[self.name](**bound.arguments, p=2.0)

    def both(self) -> tuple[Any, nn.Module]:
        return self.ours(), self.theirs()


def module_cases(name: str, training: bool, dtype: torch.dtype) -> Iterator[Case]:
    """Yield what torch's `ModuleInfo` of a norm has."""
    from torch.testing._internal.common_modules import module_db

    info = next(info for info in module_db if info.module_cls is getattr(nn, name))
    inputs = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    )
    for case in inputs:
        made, given = case.constructor_input, case.forward_input
        x = given.args[0]
        yield Case(name, info.module_cls, made.args, made.kwargs, x, training)


def run(layer: Any, x: Tensor) -> list[Tensor | None]:
    """Return the output, the gradients of a random linear loss, and the buffers afterwards."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    wanted = (x, *layer.parameters())
    torch.manual_seed(2)
    grads = torch.autograd.grad(y, wanted, torch.randn(y.shape).to(y), allow_unused=True)
    return [y.detach(), *grads, *layer.buffers()]


def as_function(layer: Any, x: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Return the layer as a function of its input and parameters, and those."""
    names = [name for name, _ in layer.named_parameters()]
    buffers = {name: value.clone() for name, value in layer.named_buffers()}

    def call(x: Tensor, *values: Tensor) -> Tensor:
        fresh = {name: value.clone() for name, value in buffers.items()}
        state = {**dict(zip(names, values, strict=True)), **fresh}
        return torch.func.functional_call(layer, state, (x,))  # type: ignore[no-any-return]

    values = (x, *(q.detach().clone().requires_grad_() for q in layer.parameters()))
    return call, values


def check_values(case: Case) -> None:
    ours, theirs = case.both()
    assert isinstance(ours, case.torchs)
    before = case.x._version
    if case.x.dtype in HALVES:  # torch's own sums of gradients in half are 0.3 off
        exact = theirs.double()
        expected = run(exact, case.x.double())
        tolerances = {"rtol": 2e-2, "atol": 2e-2}
    else:
        expected, tolerances = run(theirs, case.x), {}
    torch.testing.assert_close(run(ours, case.x), expected, check_dtype=False, **tolerances)
    assert ours(case.x).dtype == case.x.dtype
    assert case.x._version == before, "the input is not written to"


def check_non_contiguous(case: Case) -> None:
    ours, theirs = case.both()
    x = torch.repeat_interleave(case.x.detach(), 2, dim=-1)[..., ::2]
    assert x.numel() < 2 or not x.is_contiguous()
    torch.testing.assert_close(run(ours, x), run(theirs, x))


def check_memory_format(case: Case) -> None:
    ours, theirs = case.both()
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    x = case.x.detach().contiguous(memory_format=formats.get(case.x.dim(), torch.contiguous_format))
    if case.name.startswith("Batch"):  # torch's layer norm forgets the format
        assert ours(x).stride() == theirs(x).stride()
    torch.testing.assert_close(run(ours, x), run(theirs, x))


def check_pickling(case: Case) -> None:
    ours = case.ours()
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for layer in (torch.load(file, weights_only=False), copy.deepcopy(ours)):
        torch.testing.assert_close(run(layer, case.x), run(case.ours(), case.x), rtol=0, atol=0)
        assert repr(layer) == repr(ours)


def check_factory(case: Case) -> None:
    on_meta = case.construct(device="meta")
    assert all(tensor.is_meta for tensor in on_meta.state_dict().values())
    assert on_meta.train(case.training)(case.x.to("meta")).shape == case.x.shape
    layer = on_meta.to_empty(device="cpu")
    layer.reset_parameters()
    fresh = case.torchs(*case.arguments, **case.keywords).train(case.training)
    x = case.x.float()
    torch.testing.assert_close(run(layer, x), run(fresh, x))


def check_gradcheck(case: Case) -> None:
    call, values = as_function(case.ours(), case.x)
    assert gradcheck(call, values, check_batched_grad=True, fast_mode=True)


def check_gradgradcheck(case: Case) -> None:
    call, values = as_function(case.ours(), case.x)
    assert gradgradcheck(call, values, fast_mode=True)


def check_forward_mode(case: Case) -> None:
    outputs = []
    for layer in case.both():
        call, values = as_function(layer, case.x.detach())
        torch.manual_seed(3)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(v.detach(), torch.randn_like(v)) for v in values]
            outputs.append(forward_ad.unpack_dual(call(*duals)).tangent)
    torch.testing.assert_close(*outputs)


def check_vmap(case: Case) -> None:
    """Map over inputs, and gradients over samples, which need statistics of their own."""
    if case.training and case.name.startswith("Batch"):
        untracked = {**case.keywords, "track_running_stats": False}
        case = replace(case, keywords=untracked, arguments=case.arguments[:4])
    x = torch.stack([case.x.detach(), 2 * case.x.detach() + 1])
    results = []
    for layer in case.both():
        call, (_, *values) = as_function(layer, case.x)
        loss = partial(lambda call, values, x: call(x, *values).square().sum(), call, values)
        mapped = torch.func.vmap(lambda x, c=call, v=values: c(x, *v), randomness="error")
        results.append((mapped(x), torch.func.vmap(torch.func.grad(loss))(x)))
    torch.testing.assert_close(*results)


CHECKS: dict[str, tuple[Callable[[Case], None], tuple[torch.dtype, ...]]] = {
    "values": (check_values, (torch.float32, torch.float64, *HALVES)),
    "non_contiguous": (check_non_contiguous, (torch.float32,)),
    "memory_format": (check_memory_format, (torch.float32,)),
    "pickling": (check_pickling, (torch.float32,)),
    "factory": (check_factory, (torch.float32,)),
    "gradcheck": (check_gradcheck, (torch.float64,)),
    "gradgradcheck": (check_gradgradcheck, (torch.float64,)),
    "forward_mode": (check_forward_mode, (torch.float32, torch.float64)),
    "vmap": (check_vmap, (torch.float32,)),
}


def operator_sample(operator: str, sample: Any) -> tuple[Any, list[Tensor], Callable[..., Tensor]]:
    """Return our norm for a sample of an `OpInfo`, its tensors, and torch's operator on them."""
    given = dict(zip(("training", "momentum", "eps"), sample.args[4:], strict=False))
    keywords = {**given, **sample.kwargs}
    x, arguments = sample.input, sample.args
    training = keywords.pop("training", False)
    settings = {"p": 2.0, "dtype": x.dtype, **keywords}
    if operator == "batch_norm":
        running = arguments[:2]
        learned = arguments[2:4]
        cls = OURS[f"BatchNorm{max(x.dim() - 2, 1)}d"]
        layer = cls(x.shape[1] if x.dim() > 1 else 1, affine=learned[0] is not None,
                    track_running_stats=running[0] is not None, **settings)  # fmt: skip
        if running[0] is not None and x.dim() > 1:
            layer.running_mean, layer.running_var = (r.clone() for r in running)
        theirs = partial(nn.functional.batch_norm, running_mean=running[0], training=training,
                         running_var=running[1], **keywords)  # fmt: skip
    else:
        shape, *learned = arguments
        cls = OURS["LayerNorm" if operator == "layer_norm" else "RMSNorm"]
        layer = cls(shape, elementwise_affine=bool(learned), **settings)
        theirs = partial(getattr(nn.functional, operator), normalized_shape=shape, **keywords)
    values = [value for value in learned if value is not None]
    return layer.train(training), [x, *values], theirs


def check_operator(operator: str, sample: Any) -> None:
    """Compare output and gradients with torch's operator's; in float64, check derivatives."""
    layer, tensors, theirs = operator_sample(operator, sample)
    names = [name for name, _ in layer.named_parameters()]

    def ours(x: Tensor, *values: Tensor) -> Tensor:
        buffers = copy.deepcopy(dict(layer.named_buffers()))
        state = {**dict(zip(names, values, strict=True)), **buffers}
        return torch.func.functional_call(layer, state, (x,))  # type: ignore[no-any-return]

    def torchs(x: Tensor, *values: Tensor) -> Tensor:
        given = {k: v.clone() if isinstance(v, Tensor) else v for k, v in theirs.keywords.items()}
        return theirs.func(x, **given, **dict(zip(names, values, strict=True)))  # type: ignore[no-any-return]

    results = []
    for function in (ours, torchs):
        y = function(*tensors)
        torch.manual_seed(2)
        results.append((y, torch.autograd.grad(y, tensors, torch.randn(y.shape).to(y))))
    # Of one value with eps 1e-5 the gradient is 0, and torch's 1.2e-4.
    torch.testing.assert_close(*results, rtol=1e-4, atol=5e-4)
    if tensors[0].dtype == torch.float64 and tensors[0].numel():
        assert gradcheck(ours, tuple(tensors), check_batched_grad=True, fast_mode=True)
        assert gradgradcheck(ours, tuple(tensors), fast_mode=True)


def operator_samples(operator: str, dtype: torch.dtype) -> list[Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    name = f"nn.functional.{operator}"
    info = next(x for x in op_db if x.name == name and not x.variant_test_name)
    return list(info.sample_inputs("cpu", dtype, requires_grad=True))


def hold(checks: Iterable[tuple[str, Callable[[], None]]]) -> None:
    """Do checks by name, and tell at once all that fail, but for what is said to be refused."""
    failed = []
    for name, check in checks:
        try:
            check()
        except Exception as error:
            refused = isinstance(error, InputError) and str(error).startswith(tuple(REFUSED))
            failed += [] if refused else [f"{name}: {type(error).__name__}: {str(error)[:200]}"]
    assert not failed, "\n".join(failed)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("name", "training"), MODES)
def test_as_torchs_module(name: str, training: bool, check: str) -> None:
    function, dtypes = CHECKS[check]
    cases = (case for dtype in dtypes for case in module_cases(name, training, dtype))
    hold((str(case), partial(function, case)) for case in cases)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("operator", ["batch_norm", "layer_norm", "rms_norm"])
def test_as_torchs_operator(operator: str) -> None:
    dtypes = torch.float32, torch.float64
    samples = (sample for dtype in dtypes for sample in operator_samples(operator, dtype))
    hold((str(sample), partial(check_operator, operator, sample)) for sample in samples)
