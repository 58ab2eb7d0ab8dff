"""Translation networks as an encoder and a greedy step: the same tokens from the files."""

from pathlib import Path

import pytest
import torch
from torch import nn

from nmlightning import InputError
from nmlightning.models import AttentionLSTM, Transformer
from nmlightning.translation import graphs


def make(name: str) -> nn.Module:
    sizes = {"width": 32, "hidden": 32, "heads": 2, "encoder_layers": 1, "decoder_layers": 2}
    return Transformer(40, **sizes) if name == "transformer" else AttentionLSTM(40, width=16)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["onnx", "torch_export"])
@pytest.mark.parametrize("name", ["transformer", "lstm"])
def test_files_translate_as_the_network(name: str, format: str, tmp_path: Path) -> None:
    suffix = ".onnx" if format == "onnx" else ".pt2"
    options = {"source_length": 6, "extra_length": 3}
    reports = graphs.export_translator(make(name), tmp_path / f"a{suffix}", format, **options)
    assert [x.file.name for x in reports] == [f"a.encoder{suffix}", f"a.step{suffix}"]
    assert reports[0].inputs == ("source N × sequence" if name == "transformer" else "source N × 6")
    assert ("keys N × written" in reports[1].inputs) == (name == "transformer")


@pytest.mark.filterwarnings("ignore")
def test_files_of_other_tokens_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_FileModel", lambda *_: make("transformer").eval())
    earlier = tmp_path / "a.encoder.pt2"
    earlier.write_text("mine")
    given = make("transformer"), tmp_path / "a.pt2", "torch_export"
    with pytest.raises(InputError, match="does not translate as the network: nothing is written"):
        graphs.export_translator(*given, overwrite=True)
    assert (list(tmp_path.iterdir()), earlier.read_text()) == ([earlier], "mine")


def test_other_networks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got Linear as onnx"):
        graphs.export_translator(nn.Linear(2, 2), tmp_path / "a.onnx", "onnx")
    with pytest.raises(InputError, match="got AttentionLSTM as state_dict"):
        graphs.export_translator(make("lstm"), tmp_path / "a.pt", "state_dict")
    assert torch.is_grad_enabled()
