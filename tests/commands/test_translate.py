"""Test `nm translate` on a run of `nm fit`: lines in and out, and one line for bad input."""

import csv
import io
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from nmlightning.cli import main
from quickstart_runs import LAST, SHORT, SMALL, Answer, fit_in
from scripts import run_python

OPTIONS = shlex.split(
    "--model.net.width 32 --model.net.hidden 32 --model.net.encoder_layers 1 "
    "--model.net.decoder_layers 1 --model.extra_length 5 --data.pairs 400 "
    "--trainer.limit_train_batches 6 --trainer.limit_val_batches 0 "
    "--trainer.callbacks+ WeightNormSwap --trainer.callbacks.layers [linear]"
)


Translate = Callable[..., Answer]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a short run, with L1 norms and bounded weights."""
    folder = tmp_path_factory.mktemp("trained")
    return fit_in(folder, "translate_quickstart", *SHORT, *OPTIONS) / LAST


@pytest.fixture
def translate(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Translate:
    """Give `nm translate` some bytes to read and return what it answers."""

    def run(text: bytes, *words: str, typed: bool = False, checkpoint: Path = trained) -> Answer:
        source = SimpleNamespace(buffer=io.BytesIO(text), isatty=lambda: typed)
        monkeypatch.setattr(sys, "stdin", source)
        code = main(["translate", str(checkpoint), *words])
        out, err = capfdbinary.readouterr()
        return Answer(code, out.decode(), err.decode())

    return run


def test_translate_writes_a_line_for_each_line(translate: Translate) -> None:
    lines = "einundzwanzig\n\nzwei\r\nneunhundert"
    whole = translate(lines.encode())
    found = whole.out.split("\n")
    assert (whole.code, len(found), found[1], found[-1]) == (0, 5, "", "")
    alone = [translate(line.encode()).out for line in ("einundzwanzig", "zwei", "neunhundert")]
    assert [f"{found[0]}\n", f"{found[2]}\n", f"{found[3]}\n"] == alone
    assert "4/4" in whole.err
    assert translate(b"")[:2] == (0, "")


def test_translate_ends_lines_at_line_feeds_only(translate: Translate) -> None:
    answer = translate("eins\u2028zwei\x0bdrei\rvier\n".encode())
    assert answer.out.count("\n") == 1


def test_translate_writes_in_parts(translate: Translate, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(f"{word}\n" for word in ["eins", "zweiundzwanzig", "drei", "vierzig", "fünf"])
    whole = translate(lines.encode())
    monkeypatch.setattr("nmlightning.commands.translate.LINES_AT_ONCE", 2)
    assert translate(lines.encode()).out == whole.out


def test_translate_answers_a_typed_line_at_once(translate: Translate) -> None:
    piped = translate(b"eins\nzwei\n")
    typed = translate(b"eins\nzwei\n", typed=True)
    assert typed.out == piped.out
    assert "translating" not in typed.err


def test_translate_reports_the_lines_that_were_cut(translate: Translate) -> None:
    answer = translate(b"eins\nneunhundertneunundneunzigtausendelf\n", "--max_length", "3")
    assert answer.code == 0
    assert "1 of 2 lines have more than 3 tokens, and their ends were left out: 2." in answer.err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_translate_runs_in_half(dtype: str, translate: Translate) -> None:
    assert translate(b"eins\nzwei\n", "--dtype", dtype).out.count("\n") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--beam_size 0", "beam_size must be a whole number of at least 1, got 0."),
        ("--length_penalty -1", "length_penalty must be a number of at least 0, got -1.0."),
        ("--tokens_a_batch 0", "tokens_a_batch must be a whole number of at least 1, got 0."),
        ("--device moon", "--device moon: "),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("--beam 3", "unrecognized arguments: --beam 3; nm translate --help"),
    ],
)
def test_translate_reports_bad_options(words: str, message: str, translate: Translate) -> None:
    answer = translate(b"eins\n", *words.split())
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.count("\n") == 1
    assert message in answer.err


def test_translate_names_a_line_that_is_no_text(translate: Translate) -> None:
    answer = translate(b"eins\n\xff\xfe\nzwei\n")
    assert (answer.code, answer.out) == (2, "")
    assert (
        "nm: the input, line 2: byte 1 is not UTF-8 (invalid start byte): convert the text, or"
        in answer.err
    )


def test_translate_refuses_other_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, translate: Translate
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        "there is no checkpoint 'none.ckpt' in" in translate(b"", checkpoint=Path("none.ckpt")).err
    )
    answer = translate(b"eins\n", checkpoint=fit_in(tmp_path, "quickstart", *SMALL) / LAST)
    assert answer.code == 2
    assert "is of ImageClassifier, which does not translate." in answer.err


def test_nm_test_prints_the_bleu_to_publish(trained: Path) -> None:
    words = ["--config", trained.parents[1] / "config.yaml", "--ckpt_path", trained]
    words += ["--trainer.limit_test_batches", 1]
    answer = run_python("-m", "nmlightning", "test", *words, cwd=trained.parents[4])
    assert "Translator: test BLEU " in answer.stdout + answer.stderr


@pytest.mark.slow
def test_quickstart_learns_number_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = "--config translate_quickstart --trainer.logger CSVLogger --trainer.logger.save_dir ."
    assert main(["fit", *words.split()]) == 0
    (file,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(file.read_text("utf-8").splitlines()))
    assert float([row["val/bleu"] for row in rows if row.get("val/bleu")][-1]) > 90


def test_translate_ends_when_its_reader_closes(trained: Path) -> None:
    command = [sys.executable, "-m", "nmlightning", "translate", str(trained)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        process.stdin.write(b"eins\n")
        process.stdin.close()
        error = process.stderr.read().decode()
        assert process.wait() == 141, error  # as SIGPIPE ends a program
    assert "Traceback" not in error


@pytest.mark.filterwarnings("ignore")
def test_export_writes_encoder_and_step(trained: Path, nm: Translate) -> None:
    words = ("export", trained, "--format")
    answer = nm(*words, "torch_export", "-o", "a.pt2")
    assert (answer.code, answer.err) == (0, [])
    assert answer.out[0].startswith(" network     Encoder of Transformer, inputs source N × sequ")
    assert not any("batch norms" in line for line in answer.out)
    assert sum("(random inputs, batches" in line for line in answer.out) == 2
    safe = nm(*words, "torch_export", "-o", "safe.pt2", "--half-safe", "scaled").out
    at = [line.split()[0] for line in safe].index("half-safe")
    assert safe[at].endswith("5 layer and RMS norms swapped to scaled")  # from L1, the same
    assert safe[at + 1].endswith(" of the largest output")
    assert float(safe[at + 1].split()[1]) < 1e-5  # float32 through some layers
    assert answer.out[-1].startswith(" decode      begin with token 1 and a cache of 0 tokens")
    assert sorted(x.name for x in Path().glob("a.*.pt2")) == ["a.encoder.pt2", "a.step.pt2"]
    (line,) = nm(*words, "state_dict").err
    assert line.endswith(" as onnx or torch_export, got Transformer as state_dict.")
