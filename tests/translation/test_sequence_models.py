"""One table of sequence models, and the obligations that each of them keeps."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from translation_rivals import UncachedDecoder

from nmlightning import swap_norms
from nmlightning.errors import InputError
from nmlightning.models import AttentionLSTM, Transformer, beam_search, greedy_search
from nmlightning.translation.tokenizer import BOS, EOS, PAD

VOCABULARY = 13
SMALL: Any = {"width": 16, "hidden": 24, "heads": 2, "encoder_layers": 2, "decoder_layers": 2}
NETS: dict[str, Callable[[], Any]] = {
    "post": lambda: Transformer(VOCABULARY, **SMALL),
    "pre": lambda: Transformer(VOCABULARY, **SMALL, norm_first=True, tied="output"),
    "rms": lambda: Transformer(VOCABULARY, **SMALL, norm="rms", tied="none"),
    "no norm": lambda: Transformer(
        VOCABULARY, **SMALL, norm="none", scale_branches=True, tied="inputs"
    ),
    "lstm": lambda: AttentionLSTM(VOCABULARY, 16),
    "lstm, norm": lambda: AttentionLSTM(VOCABULARY, 16, layer_norm=True, tied="output"),
    "lstm, deep": lambda: AttentionLSTM(VOCABULARY, 16, layers=4, tied="none"),
}
SOURCE = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 2, 0, 0], [12, 12, 7, 2, 0]])
TARGET = torch.tensor([[1, 6, 7, 8, 9, 2], [1, 5, 4, 2, 0, 0], [1, 2, 0, 0, 0, 0]])
every_net = pytest.mark.parametrize("make", NETS.values(), ids=NETS)


def draw(make: Callable[[], Any]) -> Any:
    """Return the net with less plain parameters: a new one writes the same word for ever."""
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        for q in net.parameters():
            q += 0.1 * torch.randn_like(q)
    return net


@every_net
def test_net_ignores_padding(make: Callable[[], Any]) -> None:
    net = draw(make)
    logits = net(SOURCE, TARGET)
    wider = [nn.functional.pad(tokens, (0, 3), value=PAD) for tokens in (SOURCE, TARGET)]
    torch.testing.assert_close(net(*wider)[:, :6], logits)
    torch.testing.assert_close(net(SOURCE[1:2, :3], TARGET[1:2, :4]), logits[1:2, :4])


@every_net
def test_net_ignores_future_tokens(make: Callable[[], Any]) -> None:
    net = draw(make)
    logits = net(SOURCE, TARGET)
    for t in range(1, TARGET.shape[1]):
        other = TARGET.clone()
        other[:, t:] = (other[:, t:] + 3) % VOCABULARY
        torch.testing.assert_close(net(SOURCE, other)[:, :t], logits[:, :t])
        assert (net(SOURCE, other)[:, t] - logits[:, t]).abs().max() > 1e-3


@every_net
def test_net_decodes_with_cache_as_without(make: Callable[[], Any]) -> None:
    """Over more tokens than the cache has room for at first."""
    net = draw(make)
    target = torch.randint(3, VOCABULARY, (3, 40))
    state = net.begin(SOURCE)
    steps = [net.next_logits(target[:, t], state) for t in range(40)]
    torch.testing.assert_close(torch.stack(steps, 1), net(SOURCE, target), rtol=1e-5, atol=1e-5)


@every_net
@pytest.mark.parametrize("rows", [[2, 0], [1, 1, 0, 2, 2], [1, 0, 2], [0], []])
@pytest.mark.parametrize("written", [0, 3])
def test_state_selects_rows(make: Callable[[], Any], rows: list[int], written: int) -> None:
    net = draw(make)
    chosen, target = torch.tensor(rows, dtype=torch.int64), torch.randint(3, VOCABULARY, (3, 6))
    state, logits = net.begin(SOURCE), net(SOURCE, target)[chosen]
    for t in range(written):
        net.next_logits(target[:, t], state)
    state.select(chosen)
    state.select(torch.arange(len(rows)))
    for t in range(written, 6):
        torch.testing.assert_close(
            net.next_logits(target[chosen, t], state), logits[:, t], rtol=1e-5, atol=1e-5
        )


@every_net
def test_net_trains_every_parameter(make: Callable[[], Any]) -> None:
    net = draw(make).train()
    net(SOURCE, TARGET).logsumexp(2).sum().backward()
    for name, q in net.named_parameters():
        # A bias of the keys adds the same to all scores of a query.
        assert name.endswith("key.bias") or q.grad.abs().sum() > 0, name


@every_net
def test_net_drops_out_in_training_alone(make: Callable[[], Any]) -> None:
    net = draw(make)
    assert torch.equal(net(SOURCE, TARGET), net(SOURCE, TARGET))
    net.train()
    assert not torch.equal(net(SOURCE, TARGET), net(SOURCE, TARGET))


@every_net
def test_net_is_made_on_meta_and_reset(make: Callable[[], Any]) -> None:
    with torch.device("meta"):
        net = make()
    net.to_empty(device="cpu").eval().reset_parameters()
    torch.manual_seed(0)
    fresh = make()
    for name, q in net.named_parameters():
        std = fresh.get_parameter(name).std().item()
        assert q.std().item() == pytest.approx(std, rel=0.3, abs=1e-6), name
    assert net(SOURCE, TARGET).isfinite().all()


@every_net
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_net_runs_in_half_precision(make: Callable[[], Any], dtype: torch.dtype) -> None:
    net = draw(make)
    logits = net(SOURCE, TARGET)
    pure = copy.deepcopy(net).to(dtype)
    outputs = [pure(SOURCE, TARGET)]
    assert outputs[0].dtype == dtype
    assert len(greedy_search(pure, SOURCE)) == 3
    # On the CPU nn.LSTM fails under autocast to float16: "could not create a primitive …".
    if not (isinstance(net, AttentionLSTM) and dtype == torch.float16):
        with torch.autocast("cpu", dtype):
            outputs.append(net(SOURCE, TARGET))
            assert len(beam_search(net, SOURCE)) == 3
    for each in outputs:
        # Some dozens of roundings, of numbers of up to 10.
        assert (each.float() - logits).abs().max() < 50 * torch.finfo(dtype).eps


@every_net
def test_net_layer_norms_are_swapped(make: Callable[[], Any]) -> None:
    net = draw(make)
    if not any(isinstance(module, nn.LayerNorm) for module in net.modules()):
        pytest.skip("it has none")
    before = net(SOURCE, TARGET)
    swap_norms(net, "l1", kinds=["layer"])
    assert not any(type(module) is nn.LayerNorm for module in net.modules())
    after = net(SOURCE, TARGET)
    assert after.isfinite().all()
    assert (after - before).abs().max() > 1e-3
    state = net.begin(SOURCE)
    steps = torch.stack([net.next_logits(TARGET[:, t], state) for t in range(6)], 1)
    torch.testing.assert_close(steps, after, rtol=1e-5, atol=1e-5)


@every_net
def test_search_with_cache_equals_search_without(make: Callable[[], Any]) -> None:
    net = draw(make)
    source = torch.randint(3, VOCABULARY, (6, 7))
    source[:, -1] = EOS
    source[1, 3:], source[4, 5:] = PAD, PAD
    plain = UncachedDecoder(net).eval()
    greedy = greedy_search(net, source, extra_length=20)
    assert greedy == greedy_search(plain, source, extra_length=20)
    assert greedy == beam_search(net, source, beam_size=1, extra_length=20)
    beams = beam_search(net, source, extra_length=20)
    assert beams == beam_search(plain, source, extra_length=20)
    assert beams == beam_search(net, source, extra_length=20)
    alone = [beam_search(net, row[row != PAD][None], extra_length=20)[0] for row in source]
    assert beams == alone
    assert {PAD, BOS, EOS}.isdisjoint({token for row in (*beams, *greedy) for token in row})
    assert len({tuple(row) for row in beams}) > 1


@every_net
def test_search_refuses_training_mode(make: Callable[[], Any]) -> None:
    net = make()
    for search in (greedy_search, beam_search):
        with pytest.raises(InputError, match=r"is in training mode, with dropout: call its eval"):
            search(net, SOURCE)


@every_net
@pytest.mark.usefixtures("_one_process")
def test_net_is_trained_by_ranks(make: Callable[[], Any]) -> None:
    net = nn.parallel.DistributedDataParallel(make())
    for _ in range(2):  # The second finds out about parameters that had no gradient.
        net(SOURCE, TARGET).logsumexp(2).sum().backward()
