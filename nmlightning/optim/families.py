"""Optimizer families: how norms and decay act under each; which one steps inside a wrapper."""

import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, optim

from nmlightning.errors import InputError
from nmlightning.optim.parameters import find_keeper
from nmlightning.weights.channel_norms import equilibrium_rotation

Power = Literal["auto", 1, 2]

# The step of these follows the gradient, which falls with ‖w‖, and the angle again: ‖w‖².
_GRADIENT = (optim.SGD,)
# The step of these is the gradient divided by its own size, so that only the angle is left: ‖w‖.
_NORMALISED = (
    *(optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.RMSprop),
    *((optim.Muon,) if hasattr(optim, "Muon") else ()),
)
# Classes of the known packages by the power that benchmarks/equilibrium.py finds. The step of the
# last ones is proportional to the weight's own norm, if their options say nothing else.
_NAMED: Mapping[int, str] = {
    2: "SGDW|SGDP|SGDScheduleFree|ScheduleFreeSGD",
    1: "Lion|Tiger|SignSGD|Muon|AdaMuon|NorMuon|SOAP|A(DOPT|dopt)|AdEMAMix|AdaBelief|Adan|CAME"
    "|LaProp|MARS|Mars|StableAdamW|NAdamW|AdamP|AdamC|(Nv)?NovoGrad|AdafactorBigVision"
    "|AdamWScheduleFree|ScheduleFreeAdamW",
    0: "Adafactor|AdaFactor|LARS",
}
# Classes with Adam's step, of torch and of other packages (torchao, bitsandbytes, apex, timm,
# DeepSpeed, Colossal-AI).
_ADAM = r"_?(Fused|Paged|Hybrid|(DeepSpeed)?CPU)?R?AdamW?(\d+bit|Fp8|Legacy)?"
# Whose classes are what their names say: an AdamW from elsewhere may step as it likes.
_KNOWN = (
    *("torch", "torch_xla", "torchao", "timm", "transformers", "pytorch_optimizer", "heavyball"),
    *("bitsandbytes", "apex", "deepspeed", "colossalai", "fairscale", "fairseq", "megatron"),
    "schedulefree",
)
# Those with the average of AdamW's steps, and those that decay beside the step unless told.
_LIKE_ADAM = "AdaBelief|LaProp|SOAP|StableAdamW"
_BESIDE = r".*AdamW(\d+bit|Fp8|Legacy)?|SOAP|Lion"
# What a group, or the whole optimizer, calls a decay beside the step.
_DECOUPLED = (
    *("decoupled_weight_decay", "weight_decouple", "decoupled_decay", "decoupled"),
    *("is_adamw", "adam_w_mode", "adamw_mode"),
)
# λ alone, or times η² / max η; a step with some of its parts left out.
_OTHERWISE = ("fixed_decay", "decouple_lr", "corrected_weight_decay", "caution", "cautious")


def choose_power(optimizer: optim.Optimizer, power: Power | int | str) -> int:
    """Return `power`, or for "auto" that of the optimizer's family.

    The effective learning rate of a scale-invariant weight is η / ‖w‖^power: 2 for SGD, 1 where
    the gradient's size is divided out (Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Muon, Lion).
    """
    if power in (1, 2):
        return int(power)
    if power != "auto":
        raise InputError(f"power is 'auto', 1 or 2, got {power!r}.")
    name, known = type(optimizer).__name__, known_power(optimizer)
    if known == 0:
        raise InputError(
            f"The steps of {name} are proportional to the weight's norm: its effective learning "
            "rate is the same at every norm, and there is nothing to correct."
        )
    if known is not None:
        return known
    raise InputError(
        f"The power for {name} is not known: give power=2 if its step is proportional to the "
        "gradient, as that of SGD, or power=1 if it does not depend on the gradient's size, as "
        "that of Adam."
    )


def known_power(optimizer: optim.Optimizer) -> int | None:
    """Return the power of the optimizer's family, or None where it is of none that is known.

    It is 0 where a step is proportional to the weight's norm, as Adafactor's.
    """
    optimizer = find_keeper(optimizer)
    if isinstance(optimizer, _GRADIENT):
        return 2
    if isinstance(optimizer, _NORMALISED) or _match(_ADAM, optimizer, known=False):
        return 1
    powers = (power for power, names in _NAMED.items() if _match(names, optimizer))
    power, options = next(powers, None), optimizer.defaults
    # timm's Adafactor scales by the weight only the rate that it computes itself.
    given = type(optimizer).__module__.startswith("timm.") and not options.get("relative_step")
    return 1 if power == 0 and (given or not options.get("scale_parameter", True)) else power


def _is_known(part: Any) -> bool:
    return str(part.__module__).partition(".")[0] in _KNOWN


def _match(names: str, optimizer: optim.Optimizer, *, known: bool = True) -> re.Match[str] | None:
    """Return the match of the name of a class, of a `known` package unless not asked."""
    classes = (cls for cls in type(optimizer).__mro__ if not known or _is_known(cls))
    return next(filter(None, (re.fullmatch(names, cls.__name__) for cls in classes)), None)


def _decays_beside(optimizer: optim.Optimizer, group: Mapping[str, Any], default: bool) -> bool:
    """Return whether a group decays beside the step, by λ times its learning rate."""
    options = {**vars(optimizer), **group}
    decoupled = next((options[key] for key in _DECOUPLED if key in options), default)
    return bool(decoupled) and not any(group.get(key) for key in _OTHERWISE)


def expected_rotation(optimizer: optim.Optimizer, group: Mapping[str, Any]) -> float | None:
    """Return the `equilibrium_rotation` of weights in a parameter group of `optimizer`.

    None without weight decay, where there is no equilibrium, and for all but SGD without dampening
    and, where the decay is beside the step, SGDW, Lion and those that step as AdamW does: Adam,
    RAdam, AdaBelief, LaProp, SOAP, StableAdamW; also classes of these names, of known
    packages. A class from elsewhere has it only if it extends one without a step of its own, for no
    step is tried out.
    """
    rate, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
    if not (decay and _is_known(type(optimizer).step)):
        return None
    momentum, nesterov = group.get("momentum", 0.0), bool(group.get("nesterov"))
    if isinstance(optimizer, optim.SGD):
        if momentum and group["dampening"]:
            return None
        return equilibrium_rotation(rate, decay, momentum=momentum, nesterov=nesterov)
    if not _decays_beside(optimizer, group, default=bool(_match(_BESIDE, optimizer))):
        return None
    if _match("SGDW", optimizer) and not (nesterov or (momentum and group["dampening"])):
        return equilibrium_rotation(rate, decay, beta1=momentum)
    if _match(f"{_ADAM}|{_LIKE_ADAM}", optimizer):
        return equilibrium_rotation(rate, decay, beta1=group["betas"][0])
    if _match("Lion", optimizer):
        beta1, beta2 = group["betas"]
        return equilibrium_rotation(rate, decay, beta1=beta1, signed_beta2=beta2)
    return None


def group_numbers(optimizer: optim.Optimizer) -> dict[Tensor, int]:
    """Return the parameters that an optimizer has, and the parameter group of each."""
    return {q: n for n, group in enumerate(optimizer.param_groups) for q in group["params"]}


def find_steps(optimizer: Any, *, in_place: bool = True) -> list[optim.Optimizer]:
    """Return the optimizers whose hooks see a step, outermost first; the last one takes it.

    A wrapper may be stepped as a whole, as Lookahead is, or have what it wraps step in a method of
    its own, as SAM does in `second_step`; or have no hooks, as accelerate's `AcceleratedOptimizer`.
    One whose eval() puts other weights in place is refused to a rule that changes them `in_place`.
    """
    if hasattr(optimizer, "fused_backward"):
        raise InputError(
            f"{type(optimizer).__name__} moves the weights in fused_backward, with no step that a "
            "rule could hook into: take another optimizer."
        )
    steps: list[optim.Optimizer] = []
    outermost, inner = optimizer, [optimizer]
    known = group_numbers(outermost).keys() if hasattr(outermost, "param_groups") else set()
    while len(inner) == 1 and isinstance(inner[0], optim.Optimizer):
        if inner[0] is not outermost and not known <= group_numbers(inner[0]).keys():
            break  # as in ZeroRedundancyOptimizer, each rank's own, or copies of the weights
        optimizer = inner[0]
        if "_optimizer_step_pre_hooks" in vars(optimizer):
            optimizer._patch_step_function()  # timm's Lookahead has hooks, and does not call them
            steps.append(optimizer)
        inner = list({id(x): x for x in optimizers_in(vars(optimizer).values())}.values())
    if not steps or len(inner) > 1:
        raise InputError(_refusal(outermost, [x for x in inner if x is not outermost]))
    for each in steps if in_place else ():
        if hasattr(each, "train") and hasattr(each, "eval"):
            raise InputError(f"{type(each).__name__} is no optimizer for this rule: {_AVERAGES}.")
    return steps


class PartHook:
    """Calls a function before or after a method of an optimizer, until it is removed."""

    def __init__(
        self, optimizer: optim.Optimizer, name: str, **functions: Callable[..., Any]
    ) -> None:
        self._optimizer, self._name, self._method = optimizer, name, getattr(optimizer, name)
        self._functions = functions
        setattr(optimizer, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "before" in self._functions:
            self._functions["before"](self._optimizer, (self._optimizer,), {})
        answer = self._method(*args, **kwargs)
        if "after" in self._functions:
            self._functions["after"](self._optimizer)
        return answer

    def remove(self) -> None:
        """Call the method alone."""
        self._functions = {}
        if vars(self._optimizer)[self._name] is self:
            setattr(self._optimizer, self._name, self._method)


_AVERAGES = (
    "its eval() puts averages in place of the weights, whose norms a rule would not reach; take "
    "one without, such as AdamW with a learning-rate schedule"
)


class StepHooks:
    """Calls a function before and after each step of nested optimizers, outermost first.

    A step is what the outermost does that is called, if the last one steps meanwhile. `before` may
    return other arguments of the step, as a hook of torch's. Compiled code calls them as they are.
    """

    def __init__(
        self,
        optimizers: Sequence[optim.Optimizer],
        before: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        after: Callable[[], None],
    ) -> None:
        self._before, self._after = before, after
        self._innermost, self._stepped = len(optimizers) - 1, False
        self._level = math.inf  # that of the call which began the step
        self._within = 0  # calls of one step within another of the same object
        self._hooks: list[Any] = []
        for level, each in enumerate(optimizers):
            enter, leave = partial(self._enter, level), partial(self._leave, level)
            self._hooks += [each.register_step_pre_hook(enter), each.register_step_post_hook(leave)]
            # SAM steps in parts, between which the weights stand elsewhere.
            last = "third_step" if hasattr(each, "third_step") else "second_step"
            if hasattr(each, "first_step") and hasattr(each, last):
                self._hooks.append(PartHook(each, "first_step", before=enter))
                self._hooks.append(PartHook(each, last, after=leave))

    def remove(self) -> bool:
        """Let the optimizers step as they did before; return whether they did not already."""
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook.remove()
        return bool(hooks)

    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator, unused-ignore]
    def _enter(self, level: int, optimizer: optim.Optimizer, *call: Any) -> Any:
        """Begin a step, unless this is within one of an optimizer further out, or of its own."""
        # The level is this one, too, where an error ended the step before.
        within = level == self._level and _calls_in_progress(optimizer) > 1
        self._stepped = level == self._innermost or (self._stepped and level > self._level)
        self._within = self._within + 1 if within else 0
        if level > self._level or within:
            return None
        self._level = level
        return self._before(*call)

    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator, unused-ignore]
    def _leave(self, level: int, *_: Any) -> None:
        """End it where it began; a wrapper that only gathers gradients took none."""
        if level == self._level and self._within:
            self._within -= 1
        elif level == self._level:
            self._level = math.inf
            if self._stepped:
                self._after()


def _calls_in_progress(optimizer: optim.Optimizer) -> int:
    """Return how often torch's wrapper around `step`, which calls hooks, runs now for one object.

    It is twice where a step calls that of the class it extends, once this class was used itself.
    """
    calls, frame = 0, sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        calls += frame.f_code.co_name == "wrapper" and frame.f_locals.get("self") is optimizer
    return calls


def optimizers_in(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the optimizers among attributes, and those in lists and dicts of these."""
    for value in values:
        if callable(getattr(value, "step", None)) and hasattr(value, "param_groups"):
            yield value
        elif isinstance(value, list | tuple):
            yield from optimizers_in(value)
        elif isinstance(value, Mapping) and not isinstance(next(iter(value), None), str):
            yield from optimizers_in(value.values())


def _refusal(optimizer: Any, inner: list[Any]) -> str:
    name = type(optimizer).__name__
    inner = inner or list(optimizers_in(getattr(optimizer, "__dict__", {}).values()))
    if len(inner) > 1:
        names = ", ".join(sorted({type(x).__name__ for x in inner}))
        return f"{name} steps with {len(inner)} optimizers ({names}): attach a rule to each."
    way_out = "attach it to the optimizer itself"
    if inner:
        way_out = (
            f"attach it to the {type(inner[0]).__name__} in it, if nothing else moves the weights"
        )
        if type(optimizer).__module__.startswith("schedulefree"):
            way_out = _AVERAGES
    return f"A rule hooks into the steps of a torch Optimizer, which {name} is not: {way_out}."
