"""`nm`: a thin dispatcher that imports a command only when it is asked for.

`nm --help` and `nm --version` import neither torch nor Lightning. Whatever goes wrong with what the
user gave ends here as one line on stderr and exit code 2; any other exception keeps its traceback.
"""

import errno
import io
import os
import re
import select
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import nmlightning
from nmlightning.commands.argument_parser import BAD_INPUT, INTERRUPTED, UNREAD, print_words
from nmlightning.commands.files import CONFIG_GROUPS, RunPaths, config_group, shipped_configs
from nmlightning.errors import InputError, cut, input_error_in, nearest

COMMANDS = {
    "fit": "train, and validate after every epoch",
    "validate": "evaluate a checkpoint on the validation data",
    "test": "evaluate a checkpoint on the test data",
    "predict": "run a checkpoint on images, for a BasePredictionWriter to keep",
    "probe": "test whether a network survives half precision, or 8 bits",
    "doctor": "print versions and the backend of each layer, and check them",
    "compare": "print a table of runs, and write a page with their curves and norms",
    "dashboard": "start TensorBoard on runs",
    "kernels": "build the norms' kernels for this CPU, show or remove them",
    "export": "write a checkpoint's network for plain torch, ONNX or torch.export",
    "shard": "write a folder of images as shards, to copy and to stream",
    "translate": "translate lines of text with a checkpoint",
}
# Every other command is a module of its own, with a parser of its own.
LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")
# These take class paths: of the user's own classes, too, in the current folder.
CLASS_COMMANDS = (*LIGHTNING_COMMANDS, "probe", "export", "translate")
# The options of the symbol listers of binutils, LLVM and macOS, which are called nm, too.
_OPTION_OF_OTHERS = re.compile(r"@.|-(?!c$)\w+$|--(?!config|data|model|trainer)[a-z-]*(=|$)")
_OUR_SUFFIXES = (".yaml", ".yml", ".ckpt")
_TRIED = "NMLIGHTNING_TRIED"  # in the environment: programs that have led back here, as shims do
# Where torchrun, SLURM and Lightning, in this order, say which of several processes this one is.
_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REPORT = (
    "unexpected error, a bug unless it comes from your own code; please report it with the lines "
    "above and the output of nm doctor."
)


def main(argv: list[str] | None = None) -> int:
    """Run one `nm` command, by default the words that the program was started with.

    Returns:
        The exit code, of those in `docs/security.md`.

    Examples:
        >>> main(["--version"])
        nmlightning 0.2.0
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # of names that are no UTF-8
    failed: list[Any] = []  # in a thread, such as that which writes TensorBoard's events
    hook = threading.excepthook
    threading.excepthook = lambda x: (failed.append if _line_for_file(x.exc_value) else hook)(x)
    try:
        if any("\0" in word for word in arguments):
            raise InputError("a NUL character is in the command line, which no name can have.")
        with warnings.catch_warnings():
            warnings.showwarning = partial(show_warning, warnings.showwarning)
            is_named_nm = argv is None and Path(sys.argv[0]).name == "nm"
            if is_named_nm and arguments and _is_for_others(arguments[0]):
                _run_other_nm(arguments)
            code = _run(arguments)
        if failed:
            raise failed[0].exc_value
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _close_unread_output():
            raise
        return UNREAD
    except KeyboardInterrupt:
        fate = "; no checkpoint exists yet" if arguments[0] == "fit" else ""
        print_words(f"{_name()}: interrupted{fate}.", sys.stderr)
        return INTERRUPTED
    except Exception as error:
        bad_input = input_error_in(error) or _line_for_file(error)
        if not bad_input:
            sys.excepthook = _ask_for_report
            raise
        print_words(f"{_name()}: {' '.join(str(bad_input).split())}", sys.stderr)
        return BAD_INPUT
    finally:
        threading.excepthook = hook


def _close_unread_output() -> bool:
    """Return whether nobody, such as a `head` that has enough, reads stdout, which then ends."""
    output = select.poll()
    output.register(sys.stdout, 0)  # errors are told without being asked for
    is_unread = bool(output.poll(0))
    if is_unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_unread


def _run(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print_words(_help())
        return 0
    if command in ("-V", "--version"):
        print(f"nmlightning {nmlightning.__version__}")
        return 0
    if command not in COMMANDS:
        hint = nearest(command, COMMANDS)
        raise InputError(f"there is no command {cut(command)}.{hint} nm --help lists them.")
    is_safe = getattr(sys.flags, "safe_path", False) or os.environ.get("PYTHONSAFEPATH")
    if command in CLASS_COMMANDS and "" not in sys.path and not is_safe:
        sys.path.append("")  # last, so that nothing in the current folder stands for another module
    if command not in LIGHTNING_COMMANDS:
        module = import_module(f"nmlightning.commands.{command}")
        return int(module.run(arguments[1:]))
    paths = RunPaths(arguments)
    from nmlightning.commands.fit import run

    return run(arguments, paths)


def _is_for_others(word: str) -> bool:
    """Return whether another nm is meant: by an option of its, or by the name of a file."""
    if word in COMMANDS or word in ("-h", "--help", "help", "-V", "--version"):
        return False
    path = Path(word)
    is_path = ("." in word or "/" in word or path.is_file()) and not path.is_dir()
    is_ours = word.startswith("-") or path.suffix in _OUR_SUFFIXES
    return bool(_OPTION_OF_OTHERS.match(word)) or (is_path and not is_ours)


def _run_other_nm(arguments: list[str]) -> None:
    """Become the first nm on PATH that is not this package's, if there is one."""
    tried = os.environ.get(_TRIED, "").split(os.pathsep)
    for nm in (Path(folder, "nm") for folder in os.get_exec_path()):
        if str(nm) in tried or not (nm.is_file() and os.access(nm, os.X_OK)):
            continue
        if b"nmlightning" not in nm.read_bytes()[:4096]:  # as is in the scripts that pip writes
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
                signal.signal(number, signal.SIG_DFL)
            environment = os.environ | {_TRIED: os.pathsep.join([*tried, str(nm)])}
            os.execve(nm, ["nm", *arguments], environment)


def _name() -> str:
    """Return what a line of an error begins with: which process it is, but for the first."""
    rank = next((os.environ[name] for name in _RANKS if name in os.environ), "0")
    return "nm" if rank == "0" else f"nm (rank {rank})"


def _help() -> str:
    commands = "\n".join(f"  {name:<10}{purpose}" for name, purpose in COMMANDS.items())
    ends: dict[str, list[str]] = {start: [] for start in CONFIG_GROUPS}
    for name in shipped_configs():
        start = config_group(name)
        ends[start].append(name.removeprefix(start))
    lines = (
        f"{f'{start}…' if rest[0] else start:<23} {CONFIG_GROUPS[start]}: {' '.join(rest)}"
        for start, rest in ends.items()
    )
    wrap = textwrap.TextWrapper(79, initial_indent="  ", subsequent_indent=" " * 26)
    configs = "\n".join(wrap.fill(line).rstrip(" :") for line in lines)
    return f"""\
nm {nmlightning.__version__}: normalisation in other norms than L2, for PyTorch Lightning

  nm fit --config quickstart              train on the digits in scikit-learn
  nm fit --config study_short_wd_on       VGG-11 on CIFAR-10, in two minutes
  nm fit --config cifar_l1 --data Digits  any config, on other data
  nm probe cifar_l2                       would its norms survive in half?
  nm compare runs                         what differed, and the results

commands (nm <command> --help lists its options)
{commands}

configs (nm fit --config NAME, such as cifar_l1)
{configs}"""


def show_warning(show: Any, message: Any, category: Any, filename: str, *rest: Any) -> None:
    """Print a warning that arises in this package without place and code; others by `show`."""
    if Path(__file__).parent in Path(filename).parents:
        print_words(f"nm: {' '.join(str(message).split())}", sys.stderr)
    else:
        show(message, category, filename, *rest)


def _line_for_file(error: BaseException | None) -> str:
    """Return a line for what the system says of a file, or of a disk that is full; else `""`."""
    if not isinstance(error, OSError) or (error.filename is None and error.errno not in _FULL):
        return ""
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    known = [frame.f_locals.values() for frame, _ in traceback.walk_tb(error.__traceback__)]
    opened = [x for values in known for x in values if isinstance(x, io.IOBase)]
    name = getattr(opened[-1], "name", None) if opened else None
    return f"{name or 'a file'} cannot be written: {error.strerror}."


def _ask_for_report(*error: Any) -> None:
    """Print the traceback of an error that no input accounts for, and whom to tell of it."""
    sys.__excepthook__(*error)
    print_words(f"{_name()}: {_REPORT}", sys.stderr)
