"""Drawing all parameters of a network anew."""

from torch import nn


def reset_parts(net: nn.Module) -> None:
    """Call `reset_parameters` of every part that has it, of an inner part before its outer one.

    So what a part draws of those inside it comes last.
    """
    for module in reversed([*net.modules()][1:]):
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
