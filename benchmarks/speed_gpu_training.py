"""H5 to H7: training on a GPU, ResNet-50's step and ResNet-56 on CIFAR-10 from end to end."""

import copy
import os
from collections.abc import Iterator, Set
from functools import partial

import torch
from epoch_by_trainer import TakeTurns, make_trainer, time_epochs
from interleaved import quartiles_of, quartiles_of_ratio, time_rounds
from norm_layers import backend_of
from plain_training import Tutorial
from speed_data import RandomCIFAR, torchvision_loader
from speed_layers import swapped
from speed_plan import Plan
from speed_weights import EVERY
from targets import Bound, Measurement, Result
from torch import nn
from training_step import NETS, draw_images, make_step_of
from weight_norms import make_record

from nmlightning import CIFAR10, apply_weight_norm
from nmlightning.datamodules.image_data import LabelledImages

COMPILED = "reduce-overhead"
CIFAR_IMAGES = 50_000
EPOCHS = 5
STEPS_IN_A_ROW = 10


def measure_large_step(plan: Plan, targets: Set[str], device: str = "cuda") -> Iterator[Result]:
    """Yield H5: ResNet-50 in channels_last and bf16, with L1 and with batch norm."""
    images = draw_images(plan.large_net, plan.gpu_large_batch, device, torch.channels_last)
    nets = {"BN": NETS[plan.large_net][0]().to(device, memory_format=torch.channels_last)}
    for fuse in (None, "add_relu"):
        nets[f"L1, {fuse}" if fuse else "L1"] = swapped(nets["BN"], fuse)
    steps = {n: make_step_of(net, images, torch.bfloat16).run for n, net in nets.items()}
    times = time_rounds(steps, plan.rounds, device=device)
    for name in set(nets) - {"BN"}:
        yield Measurement(
            "H5",
            f"step with {name} / BN",
            f"{plan.large_net}, batch {plan.gpu_large_batch}, NHWC, bf16",
            backend_of(nets[name].bn1, images.to(torch.bfloat16)),
            quartiles_of_ratio(times, name, to="BN"),
            Bound(1.0) if name != "L1" else None,
        )


def measure_cifar(plan: Plan, targets: Set[str], device: str = "cuda") -> Iterator[Result]:
    """Yield H6, an epoch of CIFAR-10's size, and H7, what is added to its steps."""
    if "H6" in targets:
        yield from _measure_epochs(plan, device)
    if "H7" in targets:
        yield from _measure_additions(plan, device)


def _measure_epochs(plan: Plan, device: str) -> Iterator[Result]:
    images = CIFAR_IMAGES if device == "cuda" else plan.images
    data = RandomCIFAR(images, plan.batch)
    net = NETS[plan.net][0]()
    compiled = COMPILED if device == "cuda" else None
    times = time_epochs(copy.deepcopy(net), data, EPOCHS, device, compiled)
    plain = _time_plain_lightning(net, data, device)
    seen = images // plan.batch * plan.batch
    case = f"{plan.net}, batch {plan.batch}, bf16-mixed, compile {COMPILED}"
    speeds = quartiles_of([seen / seconds for seconds in times["trainer"]])
    least = Bound(30_000, is_least=True)
    yield Measurement("H6", "training", case, "", speeds, least, "images/s")
    faster = quartiles_of([other / own for other, own in zip(plain, times["trainer"], strict=True)])
    what = "plain Lightning with torchvision's loader / epoch by Trainer.fit"
    yield Measurement("H6", what, case, "", faster, Bound(4, is_least=True))
    ratio = quartiles_of_ratio(times, "trainer", to="loop")
    yield Measurement("H6", "epoch by Trainer.fit / bare loop", case, "", ratio, Bound(1.1))


def _time_plain_lightning(net: nn.Module, data: CIFAR10, device: str) -> list[float]:
    """Return the seconds of epochs of a module as in a tutorial, with workers and PIL images."""
    assert isinstance(data.train, LabelledImages)
    workers = min(8, (os.cpu_count() or 1) - 1) if device == "cuda" else 0
    loader = torchvision_loader(data.train.images, data.train.labels, data.batch_size, workers)
    turns = TakeTurns(lambda: None)
    make_trainer(device, EPOCHS + 1, turns).fit(Tutorial(net), loader)
    return turns.times["trainer"][1:]


def _measure_additions(plan: Plan, device: str) -> Iterator[Result]:
    images = draw_images(plan.net, plan.batch, device)
    net = NETS[plan.net][0]().to(device)
    bounded, record = copy.deepcopy(net), make_record(net)
    apply_weight_norm(bounded)
    nets = {"step": net, "bounded": bounded}
    for each in nets.values() if device == "cuda" else ():
        each.compile(mode=COMPILED, dynamic=False)
    calls = {name: make_step_of(each, images, torch.bfloat16).run for name, each in nets.items()}
    times = time_rounds(
        {**calls, "record": record}, plan.rounds, device=device, repeats=STEPS_IN_A_ROW
    )
    shares = [100 * a / b / EVERY for a, b in zip(times["record"], times["step"], strict=True)]
    row = partial(Measurement, "H7", case=f"{plan.net}, batch {plan.batch}", backend="")
    what = f"recording the norms every {EVERY} steps, of a compiled step"
    yield row(what=what, quartiles=quartiles_of(shares), bound=Bound(0.3), unit="%")
    ratio = quartiles_of_ratio(times, "bounded", to="step")
    what = "compiled step with bounded weight norm / without"
    yield row(what=what, quartiles=ratio, bound=Bound(1.005))
