import copyreg
import io
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nmlightning.errors import InputError
from nmlightning.weights.official_pickle import StandIn, load_inert


class Thing(StandIn):
    pass


STAND_INS = {"library.Thing": Thing}
THING = b"clibrary\nThing\n"


def load(content: bytes) -> Any:
    return load_inert(io.BytesIO(content), STAND_INS)


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.reduction = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.reduction


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values(protocol: int) -> None:
    value = {"a": [1, -2.5, None, True], "b": ((1,), "é", 2**70), "c": [float("inf")]}
    assert load(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "argument"),
    [(os.system, "touch {}"), (os.mkdir, "{}"), (eval, "open('{}', 'w').close()")],
)
def test_nothing_else_is_called(
    tmp_path: Path, function: Callable[..., object], argument: str, protocol: int
) -> None:
    made = tmp_path / "made"
    content = pickle.dumps([Call(function, argument.format(made))], protocol)
    with pytest.raises(InputError, match=r"^nmlightning refuses to load '\w+\.\w+'$"):
        load(content)
    assert not made.exists()
    pickle.loads(content)
    assert made.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"(S'true'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'true'\no.",  # OBJ
        b"cos\nsystem\n)\x81.",  # NEWOBJ
        b"cos\nsystem\n)}\x92.",  # NEWOBJ_EX
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL
        b"\x80\x04\x8c\x07library\x8c\x0fThing.__class__\x93.",  # a way through an allowed name
        b"\x80\x04\x8c\x07library\x8c\x0eThing.__init__\x93.",
        b"cLibrary\nThing\n.",
    ],
)
def test_every_way_to_a_global_is_guarded(content: bytes) -> None:
    with pytest.raises(InputError, match="refuses to load"):
        load(content)


def test_an_extension_does_not_come_from_the_cache() -> None:
    copyreg.add_extension("os", "getcwd", 240)
    try:
        content = b"\x80\x02\x82\xf0)R."
        assert pickle.loads(content) == os.getcwd()
        with pytest.raises(InputError, match="refuses to load an extension of copyreg"):
            load(content)
    finally:
        copyreg.remove_extension("os", "getcwd", 240)
        copyreg.clear_extension_cache()  # type: ignore[attr-defined]


def test_what_it_refuses_cannot_fill_the_screen() -> None:
    with pytest.raises(InputError) as caught:
        load(b"c\x1b[2J" + 9999 * b"x" + b"\ny\n.")
    assert len(str(caught.value)) < 150
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "args", "state"),
    [
        (THING + b")R.", (), None),
        (THING + b")\x81.", (), None),
        (THING + b"(K\x01K\x02tR.", (1, 2), None),
        (THING + b"(K\x01K\x02t\x81K\x07b.", (1, 2), 7),
        (THING + b")R}S'args'\nK\x01sb.", (), {"args": 1}),
        (THING + b")R(}S'args'\nK\x01s}S'state'\nK\x01stb.", (), ({"args": 1}, {"state": 1})),
        (b"(K\x01ilibrary\nThing\n.", (1,), None),
        (THING + THING + b"\x85R.", (Thing,), None),
    ],
)
def test_a_stand_in_keeps_what_it_is_given(content: bytes, args: object, state: object) -> None:
    thing = load(content)
    assert type(thing) is Thing
    assert vars(thing) == {"args": args, "state": state}


@pytest.mark.parametrize(
    "content",
    [
        THING + b"}S'__setstate__'\nNsb.",  # a state for the class itself
        THING + b")R)R.",  # an instance that is called
        THING + b")}S'name'\nK\x01s\x92.",  # keywords
        THING + b")RK\x01K\x02s.",  # items
        THING + b")RK\x01a.",  # an element
        THING + b"K\x01R.",  # arguments that are no tuple
        b"K\x01)R.",
        b"K\x01}b.",
        b"h\x07.",
        b"",
        b".",
        b"not a pickle",
        pickle.dumps([1.0, 2.0])[:-1],
    ],
)
def test_damage(content: bytes) -> None:
    with pytest.raises(InputError, match=r"^it is truncated or no pickle \(\w+\)$"):
        load(content)
    assert Thing.__setstate__ is StandIn.__setstate__


@pytest.mark.parametrize(
    "content",
    [
        b"K\x01r\xff\xff\xff\x00.",  # LONG_BINPUT of the memo's entry 2^24 - 1
        b"K\x01p4000000\n.",  # PUT
        b"\x8e" + (2**40).to_bytes(8, "little") + b".",  # BINBYTES8
        b"\x96" + (2**40).to_bytes(8, "little") + b".",  # BYTEARRAY8
        b"\x8b\xff\xff\xff\x7f.",  # LONG4
        b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"K\x01.",  # FRAME
    ],
)
def test_no_memory_is_taken_for_what_is_not_there(content: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"^it is (damaged|truncated)"):
            load(content)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"", b"\x85"), (THING, b"\x85R"), (THING + b")R", b"b")],
    ids=["tuples", "args", "states"],
)
def test_deep_nesting(before: bytes, after: bytes) -> None:
    """Neither making it nor letting go of it needs a stack."""
    assert load(100_000 * before + b"N" + 100_000 * after + b".")


def test_one_pickle_after_the_other() -> None:
    stream = io.BytesIO(pickle.dumps([1], 2) + pickle.dumps({}, 4) + b"rest")
    assert [load_inert(stream, {}) for _ in range(2)] == [[1], {}]
    assert stream.read() == b"rest"


def test_what_is_stored_elsewhere() -> None:
    assert load(b"Pname\n.") == "name"
    assert load(THING + b"K\x01\x86Q.") == (Thing, 1)
