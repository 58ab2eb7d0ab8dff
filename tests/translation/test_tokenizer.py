"""A joint byte-pair vocabulary: what goes in comes out, and nothing is unknown."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nmlightning.errors import InputError
from nmlightning.translation.tokenizer import BOS, EOS, PAD, SMALLEST, SPECIAL_TOKENS, UNK, JointBPE

SENTENCES = ["Ein kleines Haus steht am See.", "A little house by the lake.", "Häuser, Bäume"] * 5


@pytest.fixture(scope="module")
def bpe() -> JointBPE:
    return JointBPE.train(SENTENCES, vocab_size=300)


@pytest.mark.parametrize(
    "text",
    [
        "Ein Haus",
        "",
        "zwei  Wörter ",
        "日本語 🙂 \u0301e",
        "a\u2028b\x0bc\x85d\u00a0e\x00f\rg\th",
        "<s> is no begin, </s> no end and <pad> <unk> nothing",
        "Ġ is what a space is called within",
        "".join(map(chr, range(33, 0x2FF))),
    ],
)
def test_tokenizer_decodes_what_it_encodes(bpe: JointBPE, text: str) -> None:
    (tokens,) = bpe.encode([text])
    assert bpe.decode([tokens]) == [text]
    assert all(len(SPECIAL_TOKENS) <= token < bpe.vocab_size for token in tokens)


def test_tokenizer_drops_one_leading_space(bpe: JointBPE) -> None:
    assert bpe.decode(bpe.encode([" a", "  a"])) == ["a", " a"]


def test_tokenizer_encodes_a_word_alike_everywhere(bpe: JointBPE) -> None:
    first, second = bpe.encode(["Haus am", "am Haus"])
    assert sorted(first) == sorted(second)


def test_tokenizer_has_special_tokens_first(bpe: JointBPE) -> None:
    (tokens,) = bpe.encode(["a house"])
    assert bpe.decode([[BOS, *tokens, EOS, PAD, PAD, UNK], []]) == ["a house", ""]
    vocabulary = json.loads(bpe.to_json())["model"]["vocab"]
    assert sorted(vocabulary, key=vocabulary.__getitem__)[: len(SPECIAL_TOKENS)] == list(
        SPECIAL_TOKENS
    )


def test_tokenizer_marks_invalid_bytes(bpe: JointBPE) -> None:
    (tokens,) = bpe.encode(["ß"])
    assert bpe.decode([tokens[:-1]])[0].endswith("\ufffd")


def test_tokenizer_merges_equal_the_definition() -> None:
    """The most frequent pair of neighbours is joined first: l and o, then lo and w."""
    bpe = JointBPE.train(["low low low lot lo"], vocab_size=SMALLEST + 3)
    merges = json.loads(bpe.to_json())["model"]["merges"]
    assert [tuple(merge) for merge in merges] == [("l", "o"), ("Ġ", "lo"), ("Ġlo", "w")]
    assert bpe.vocab_size == SMALLEST + 3


def test_tokenizer_stops_without_pairs_to_merge() -> None:
    assert JointBPE.train(["ab"], vocab_size=32000).vocab_size == SMALLEST + 2


def test_tokenizer_training_is_deterministic(bpe: JointBPE) -> None:
    code = (
        "from nmlightning.translation.tokenizer import JointBPE\n"
        f"print(JointBPE.train({SENTENCES!r}, vocab_size=300).digest)"
    )
    again = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code], capture_output=True, text=True, check=True
    )
    assert again.stdout.strip() == bpe.digest
    assert JointBPE.train(SENTENCES[::-1], vocab_size=300).digest == bpe.digest, "counts matter"
    assert JointBPE.train(SENTENCES, vocab_size=299).digest != bpe.digest


def test_tokenizer_saves_and_loads(bpe: JointBPE, tmp_path: Path) -> None:
    path = tmp_path / "bpe.json"
    bpe.save(path)
    assert [path] == list(tmp_path.iterdir())
    for again in (JointBPE.load(path), JointBPE.from_json(bpe.to_json())):
        assert again.digest == bpe.digest
        assert again.encode(["<s> Haus"]) == bpe.encode(["<s> Haus"])


def _changed(change: Callable[[dict[str, Any]], object]) -> str:
    content = json.loads(JointBPE.train(["a"], vocab_size=SMALLEST).to_json())
    change(content)
    return json.dumps(content)


def _rename_begin(content: dict[str, Any]) -> None:
    content["added_tokens"][1]["content"] = "[CLS]"
    content["model"]["vocab"]["[CLS]"] = content["model"]["vocab"].pop("<s>")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "bpe.json is not a tokenizer .*: give a file that JointBPE.save wrote"),
        ("{}", "bpe.json is not a tokenizer"),
        ("\x00", "bpe.json is not a tokenizer"),
        (_changed(_rename_begin), r"begins with <pad> \[CLS\] </s> <unk> and not with <pad> <s>"),
        (_changed(lambda c: c.update(pre_tokenizer=None)), "is a tokenizer of another kind"),
        (_changed(lambda c: c.update(normalizer={"type": "NFC"})), "of another kind"),
    ],
)
def test_tokenizer_refuses_other_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bpe.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as raised:
        JointBPE.load(path)
    assert "\n" not in str(raised.value)


def test_tokenizer_loads_from_a_checkpoint(bpe: JointBPE, tmp_path: Path) -> None:
    translator, other = tmp_path / "last.ckpt", tmp_path / "other.ckpt"
    torch.save({"tokenizer": bpe.to_json(), "state_dict": {"w": torch.zeros(3)}}, translator)
    torch.save({"state_dict": {}}, other)
    assert JointBPE.load(translator).digest == bpe.digest
    with pytest.raises(InputError, match=r"other\.ckpt has no tokenizer: it is from another task"):
        JointBPE.load(other)


def test_tokenizer_refuses_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the tokenizer .*none.json cannot be read"):
        JointBPE.load(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b"\xe4")
    with pytest.raises(InputError, match=r"latin.json cannot be read"):
        JointBPE.load(tmp_path / "latin.json")
