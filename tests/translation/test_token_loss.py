"""token_loss against torch's cross-entropy, and that padding counts for nothing."""

import pytest
import torch
from torch.nn import functional as F

from nmlightning.translation.metrics import token_loss
from nmlightning.translation.tokenizer import PAD


def draw(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    logits = 3 * torch.randn(4, 7, 11, dtype=dtype)
    targets = torch.randint(1, 11, (4, 7))
    targets[0, 3:] = targets[2, 5:] = PAD
    return logits.requires_grad_(), targets


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_is_torchs_cross_entropy_with_its_gradient(smoothing: float) -> None:
    logits, targets = draw()
    ours = token_loss(logits, targets, smoothing)
    theirs = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, label_smoothing=smoothing
    )
    torch.testing.assert_close(ours.loss, theirs)
    (grad,) = torch.autograd.grad(ours.loss, logits)
    (expected,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(grad, expected)
    assert not grad[targets == PAD].any()


def test_the_likelihood_is_not_smoothed_and_has_no_gradient() -> None:
    logits, targets = draw()
    step = token_loss(logits, targets, 0.3)
    plain = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="sum"
    )
    torch.testing.assert_close(step.negative_log_likelihood, plain.detach())
    assert not step.negative_log_likelihood.requires_grad
    assert step.tokens == (targets != PAD).sum() == 22


def test_padding_may_hold_anything() -> None:
    logits, targets = draw()
    changed = torch.where((targets == PAD).unsqueeze(2), torch.inf, logits)
    ours = token_loss(torch.nan_to_num(changed, posinf=1e4), targets, 0.1)
    torch.testing.assert_close(ours.loss, token_loss(logits, targets, 0.1).loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    logits, targets = draw(dtype)
    step = token_loss(logits, targets, 0.1)
    assert step.loss.dtype == step.negative_log_likelihood.dtype == torch.float32
    torch.testing.assert_close(step.loss, token_loss(logits.float(), targets, 0.1).loss)
