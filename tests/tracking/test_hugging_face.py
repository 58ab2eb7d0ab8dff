"""Hugging Face's Trainer and accelerate, whose steps are tracked by the same hooks."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nmlightning import Hyperball, InputError, NormHistory, track_norms

pytestmark = pytest.mark.filterwarnings("ignore")  # of packages that the tests do not pin


class Regression(nn.Module):
    """A layer, whose loss is what the Trainer minimises."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layer(x) - labels).square().mean()}


def train(folder: Path, resume: bool = False, **options: Any) -> tuple[Any, list[Any]]:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    callback_class = import_module("nmlightning.tracking.hugging_face").NormTrackerCallback
    logged: list[Any] = []
    torch.manual_seed(1)
    data = [{"x": torch.randn(4), "labels": torch.randn(3)} for _ in range(24)]
    settings = {"max_steps": 6, "save_steps": 3, "report_to": [], "use_cpu": True} | options
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=0.1, lr_scheduler_type="constant", disable_tqdm=True, max_grad_norm=0.1,
        **settings,
    )  # fmt: skip
    callback = callback_class(
        rule=Hyperball(), quantities=["rotation", "gradient_norm"],
        log=lambda values, step: (logged.append((step, values)), trainer.log(values)),
    )  # fmt: skip
    trainer = transformers.Trainer(
        Regression(), arguments, train_dataset=data, callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer, logged


def test_trainer_records_logs_steers_and_resumes(tmp_path: Path) -> None:
    trainer, logged = train(tmp_path / "whole")
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5, 6]
    assert 0 < logged[0][1]["gradient_norm/layer"] <= 0.1 / 3**0.5 * (1 + 1e-5)  # clipped
    assert any("rotation/layer" in entry for entry in trainer.state.log_history)
    whole = NormHistory.load(tmp_path / "whole")
    assert whole.steps.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert whole.provenance["finished"]
    norms = whole.norms["layer.weight"]
    np.testing.assert_allclose((norms**2).sum(1), (norms[0] ** 2).sum(), rtol=1e-5)  # Hyperball
    train(tmp_path / "parts", max_steps=3)
    train(tmp_path / "parts", resume=True)
    parts = NormHistory.load(tmp_path / "parts")
    assert parts.steps.tolist() == whole.steps.tolist()
    np.testing.assert_array_equal(parts.norms["layer.weight"], norms)
    callback = import_module("nmlightning.tracking.hugging_face").NormTrackerCallback
    with pytest.raises(InputError, match="clips gradients before it calls anyone"):
        callback(quantities=["unclipped_gradient_norm"])


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "nmlightning.tracking.hugging_face", raising=False)
    with pytest.raises(InputError, match="pip install transformers accelerate"):
        import_module("nmlightning.tracking.hugging_face")


def test_accelerate_prepares_what_is_tracked() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Regression()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    with track_norms(model, optimizer, log=lambda *_: None) as tracker:
        for _ in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.ones(2, 4), torch.ones(2, 3))["loss"])
                optimizer.step()
                optimizer.zero_grad()
    assert tracker.history.steps.tolist() == [0, 1, 2]
