"""How what an optimizer keeps of a scale-invariant weight goes with the weight's scale."""

from torch.optim import Optimizer, RMSprop

# By c to this power it is larger where the weight is c times as long, whose gradients are 1/c as
# large. Averages of steps that the gradient's size was divided out of stay as they are.
_POWERS = {
    "momentum_buffer": -1,
    "exp_avg": -1,
    "exp_avg_sq": -2,
    "max_exp_avg_sq": -2,
    "exp_inf": -1,
    "square_avg": -2,
    "grad_avg": -1,
    "sum": -2,
    "acc_delta": 0,
    "prev": -1,
    "step_size": 0,
    "ax": 1,
}


def buffer_power(optimizer: Optimizer, name: str) -> int:
    """Return the power of the weight's scale that a buffer goes with; 0 for one not known.

    Args:
        optimizer: whose buffer it is.
        name: in its state, such as `exp_avg`.
    """
    if isinstance(optimizer, RMSprop) and name == "momentum_buffer":
        return 0  # it adds up gradients that were divided by their size
    return _POWERS.get(name, 0)
