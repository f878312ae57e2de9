"""A reader of pickles that builds inert records, and nothing else.

A pickle is a program for a small stack machine. This one has its data opcodes. A class or function
that the program names is looked up in no module: a short list (`fewstep.pickles.meanings`) says
what the few names of tensors and plain containers mean, other classes become records, and
everything else ends the reading. Bytes stay in the file.

Source: the opcodes of Python's pickletools, protocols 0 to 5.
"""

from __future__ import annotations

import codecs
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from fewstep.pickles.meanings import Meanings
from fewstep.pickles.records import Bytes, Name, Record, Skipped
from fewstep.records import shown

__all__ = ["Machine", "Stream"]

MOST_OPCODES = 4_000_000
MOST_MEMO = 1_000_000
MOST_MARKS = 200  # levels of open containers
LONGEST_TEXT = 4096  # bytes; a longer text is no setting
LONGEST_LINE = 1024
LONGEST_INTEGER = 64  # bytes
KEYS = (str, int, float, bool, type(None), Name)
CUT = "it is cut short"


@dataclass
class Budget:
    """What the reading of one file may still take.

    memory: bytes of all its records together
    opcodes: of all its pickles together
    """

    memory: int
    opcodes: int = MOST_OPCODES

    def spend(self, size: int) -> None:
        """Errors: ValueError where the records take more memory than a file of this size may."""
        self.memory -= size
        if self.memory < 0:
            raise ValueError("its records take more memory than a file of its size needs")


class Stream:
    """A part of a file, read forwards."""

    def __init__(self, file: BinaryIO, start: int, end: int, budget: Budget) -> None:
        self.file, self.at, self.end, self.budget = file, start, end, budget
        self.spend = budget.spend
        file.seek(start)

    def read(self, count: int) -> bytes:
        """Errors: ValueError where there are no more."""
        if count < 0 or count > self.end - self.at:
            raise ValueError(CUT)
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError(CUT)
        self.at += count
        return data

    def line(self) -> str:
        data = self.file.readline(min(LONGEST_LINE, self.end - self.at))
        if not data.endswith(b"\n"):
            raise ValueError(f"a line in it is cut short, or longer than {LONGEST_LINE}")
        self.at += len(data)
        return data[:-1].removesuffix(b"\r").decode("utf-8")

    def leave(self, count: int) -> Bytes:
        """The next bytes, which stay where they are."""
        if count < 0 or count > self.end - self.at:
            raise ValueError(CUT)
        place = Bytes(self.at, count)
        self.seek(self.at + count)
        return place

    def peek(self, place: Bytes, most: int) -> bytes:
        """The bytes of a place, as far as they are few."""
        if place.length > most:
            raise ValueError(f"it has {place.length} bytes where {most} would do")
        self.file.seek(place.start)
        data = self.file.read(place.length)
        self.file.seek(self.at)
        return data

    def seek(self, at: int) -> None:
        self.at = at
        self.file.seek(at)


class Machine:
    """Runs one pickle of a stream; `load` may be called again for the next one.

    meanings: what the names in it mean
    persistent: what a persistent identifier stands for
    """

    def __init__(
        self, stream: Stream, meanings: Meanings, persistent: Callable[[Any], Any] | None = None
    ) -> None:
        self.stream, self.meanings, self.persistent = stream, meanings, persistent

    def load(self) -> Any:
        """The value. Errors: ValueError that names the opcode or the global, or says what is
        wrong."""
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: list[Any] = []  # entries are numbered as they come
        self.gaps: dict[int, Any] = {}  # entries of a pickle that was shortened
        stream, budget = self.stream, self.stream.budget
        while True:
            code = stream.read(1)[0]
            budget.opcodes -= 1
            if budget.opcodes < 0:
                raise ValueError(f"it has more than {MOST_OPCODES} opcodes")
            if code == STOP:
                break
            if (step := STEPS.get(code)) is None:
                raise ValueError(
                    f"it has the opcode {OTHER.get(code, hex(code))}, which is no data"
                )
            step(self)
        value = self.pop()
        if self.stack or self.marks:
            raise ValueError("it ends in the middle of a value")
        self.memo, self.gaps = [], {}
        return value

    # -- the stack --------------------------------------------------------------------------

    def push(self, value: Any, size: int = 0) -> None:
        self.stream.spend(size + 8)
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("it takes from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise ValueError("it changes a value that is not there")
        return self.stack[-1]

    def mark(self) -> None:
        if len(self.marks) >= MOST_MARKS:
            raise ValueError(f"it is nested more than {MOST_MARKS} deep")
        self.stream.spend(64)
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError("it closes a container that was not opened")
        items, self.stack = self.stack, self.marks.pop()
        return items

    def pop_once(self) -> None:
        """POP takes a mark off where nothing lies on it."""
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def duplicate(self) -> None:
        self.push(self.top())

    # -- numbers and text -------------------------------------------------------------------

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.stream.read(struct.calcsize(form)))[0]

    def long(self, form: str) -> None:
        if not 0 <= (length := self.number(form)) <= LONGEST_INTEGER:
            raise ValueError(f"it has an integer of {length} bytes")
        self.push(int.from_bytes(self.stream.read(length), "little", signed=True), 96)

    def integer_line(self) -> None:
        text = self.stream.line()
        if text in ("00", "01"):
            self.push(text == "01")
        elif len(text) > LONGEST_INTEGER:
            raise ValueError(f"it has an integer of {len(text)} digits")
        else:
            self.push(int(text.removesuffix("L")), 64)

    def text(self, form: str) -> None:
        length = self.number(form)
        if length > LONGEST_TEXT:
            self.push(Skipped(self.stream.leave(length).length), 64)
        else:
            text = self.stream.read(length).decode("utf-8")
            self.push(text, sys.getsizeof(text))

    def old_text(self, form: str) -> None:
        """A str of Python 2, which may be bytes."""
        length = self.number(form)
        if length < 0 or length > LONGEST_TEXT:
            self.push(self.stream.leave(length), 64)
        else:
            text = self.stream.read(length).decode("latin1")
            self.push(text, sys.getsizeof(text))

    def quoted(self) -> None:
        text = self.stream.line()
        if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
            raise ValueError("a text in it lacks its quotes")
        plain = codecs.escape_decode(text[1:-1].encode("latin1"))[0]
        self.push(bytes(plain).decode("latin1"), 64 + len(plain))

    def leave(self, form: str) -> None:
        self.push(self.stream.leave(self.number(form)), 64)

    # -- containers -------------------------------------------------------------------------

    def close_tuple(self, count: int | None) -> None:
        if count is None:
            items = self.since_mark()
        elif len(self.stack) < count:
            raise ValueError("it takes from an empty stack")
        else:
            items = self.stack[len(self.stack) - count :]
            del self.stack[len(self.stack) - count :]
        self.push(tuple(items), 48 + 8 * len(items))

    def close_list(self) -> None:
        items = self.since_mark()
        self.push(items, 64)

    def close_dict(self) -> None:
        items = self.since_mark()
        self.push({}, 64)
        self.set_items(items)

    def close_frozenset(self) -> None:
        items = self.since_mark()
        self.stream.spend(220 + 64 * len(items))
        self.push(frozenset(self.key(item) for item in items))

    def key(self, value: Any) -> Any:
        """A value that a table can have as a key: one whose hash and comparison are flat."""
        if isinstance(value, KEYS):
            return value
        if isinstance(value, tuple) and all(isinstance(part, KEYS) for part in value):
            return value
        raise ValueError(f"it has a key that is a {type(value).__name__}")

    def set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("it has a key without a value")
        target = self.top()
        table = target.items if isinstance(target, Record) else target
        if type(table) is not dict:
            raise ValueError(f"it sets items of a {type(target).__name__}")
        self.stream.spend(60 * len(items))
        for place in range(0, len(items), 2):
            table[self.key(items[place])] = items[place + 1]

    def set_one(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def append(self, items: list[Any]) -> None:
        target = self.top()
        entries = target.entries if isinstance(target, Record) else target
        if type(entries) is not list:
            raise ValueError(f"it appends to a {type(target).__name__}")
        self.stream.spend(9 * len(items))
        entries.extend(items)

    def add(self) -> None:
        items, target = self.since_mark(), self.top()
        if type(target) is not set:
            raise ValueError(f"it adds to a {type(target).__name__}")
        self.stream.spend(64 * len(items))
        target.update(self.key(item) for item in items)

    # -- the memo ---------------------------------------------------------------------------

    def put(self, index: int) -> None:
        value, count = self.top(), len(self.memo)
        if not 0 <= index < 2**32 or count + len(self.gaps) >= MOST_MEMO or index > MOST_MEMO:
            raise ValueError(f"its memo has an index of {shown(index)}, or too many entries")
        if index == count:
            self.stream.spend(16)
            self.memo.append(value)
        elif index < count:
            self.memo[index] = value
        else:
            self.stream.spend(110)
            self.gaps[index] = value

    def memoize(self) -> None:
        self.put(len(self.memo) + len(self.gaps))

    def get(self, index: int) -> None:
        if 0 <= index < len(self.memo):
            self.push(self.memo[index])
        elif index in self.gaps:
            self.push(self.gaps[index])
        else:
            raise ValueError(f"its memo has no entry {shown(index)}")

    # -- names, and what would be made of them ----------------------------------------------

    def name(self, module: Any, name: Any) -> Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("it names a global by something that is no text")
        self.stream.spend(80 + len(module) + len(name))
        return self.meanings.named(module, name)

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.push(self.name(module, name))

    def line_global(self) -> None:
        module, name = self.stream.line(), self.stream.line()
        self.push(self.name(module, name))

    def make(self, what: Any, args: Any, items: Any = None) -> None:
        if not isinstance(what, Name):
            raise ValueError(f"it calls a {type(what).__name__}, which is no name")
        if not isinstance(args, tuple):
            raise ValueError(f"it calls {what} with a {type(args).__name__}")
        value = self.meanings.made(what, args, self.stream)
        self.push(value, 200 if isinstance(value, Record) else 100)
        if isinstance(items, dict) and isinstance(value, Record):
            value.items.update(items)

    def reduce(self) -> None:
        args, what = self.pop(), self.pop()
        self.make(what, args)

    def new_with_items(self) -> None:
        items, args, what = self.pop(), self.pop(), self.pop()
        self.make(what, args, items)

    def object(self) -> None:
        items = self.since_mark()
        if not items:
            raise ValueError("it makes an object of no class")
        self.make(items[0], tuple(items[1:]))

    def instance(self) -> None:
        module, name = self.stream.line(), self.stream.line()
        self.make(self.name(module, name), tuple(self.since_mark()))

    def build(self) -> None:
        state = self.pop()
        self.meanings.built(self.top(), state)

    def persist(self) -> None:
        if self.persistent is None:
            raise ValueError("it has the opcode BINPERSID outside a file of torch.save")
        self.push(self.persistent(self.pop()), 120)

    def proto(self) -> None:
        if (number := self.stream.read(1)[0]) > 5:
            raise ValueError(f"it is of pickle protocol {number}, which is none that is known")

    def frame(self) -> None:
        if self.number("<Q") > self.stream.end - self.stream.at:
            raise ValueError(CUT)


STOP = ord(".")
Step = Callable[[Machine], None]
STEPS: dict[int, Step] = {
    ord(key): step
    for key, step in {
        "(": Machine.mark,
        "0": Machine.pop_once,
        "1": lambda m: m.since_mark() and None,
        "2": Machine.duplicate,
        "N": lambda m: m.push(None),
        "\x88": lambda m: m.push(True),
        "\x89": lambda m: m.push(False),
        "I": Machine.integer_line,
        "L": Machine.integer_line,
        "J": lambda m: m.push(m.number("<i"), 32),
        "K": lambda m: m.push(m.number("<B"), 32),
        "M": lambda m: m.push(m.number("<H"), 32),
        "\x8a": lambda m: m.long("<B"),
        "\x8b": lambda m: m.long("<i"),
        "F": lambda m: m.push(float(m.stream.line()), 24),
        "G": lambda m: m.push(m.number(">d"), 24),
        "S": Machine.quoted,
        "T": lambda m: m.old_text("<i"),
        "U": lambda m: m.old_text("<B"),
        "V": lambda m: m.push(
            m.stream.line().encode("latin1").decode("raw_unicode_escape"), 4 * LONGEST_LINE
        ),
        "X": lambda m: m.text("<I"),
        "\x8c": lambda m: m.text("<B"),
        "\x8d": lambda m: m.text("<Q"),
        "B": lambda m: m.leave("<I"),
        "C": lambda m: m.leave("<B"),
        "\x8e": lambda m: m.leave("<Q"),
        "\x96": lambda m: m.leave("<Q"),
        ")": lambda m: m.push(()),
        "\x85": lambda m: m.close_tuple(1),
        "\x86": lambda m: m.close_tuple(2),
        "\x87": lambda m: m.close_tuple(3),
        "t": lambda m: m.close_tuple(None),
        "]": lambda m: m.push([], 64),
        "l": Machine.close_list,
        "a": lambda m: m.append([m.pop()]),
        "e": lambda m: m.append(m.since_mark()),
        "}": lambda m: m.push({}, 64),
        "d": Machine.close_dict,
        "s": Machine.set_one,
        "u": lambda m: m.set_items(m.since_mark()),
        "\x8f": lambda m: m.push(set(), 220),
        "\x90": Machine.add,
        "\x91": Machine.close_frozenset,
        "p": lambda m: m.put(int(m.stream.line()[:16])),
        "q": lambda m: m.put(m.number("<B")),
        "r": lambda m: m.put(m.number("<I")),
        "\x94": Machine.memoize,
        "g": lambda m: m.get(int(m.stream.line()[:16])),
        "h": lambda m: m.get(m.number("<B")),
        "j": lambda m: m.get(m.number("<I")),
        "c": Machine.line_global,
        "\x93": Machine.stack_global,
        "R": Machine.reduce,
        "\x81": Machine.reduce,
        "\x92": Machine.new_with_items,
        "o": Machine.object,
        "i": Machine.instance,
        "b": Machine.build,
        "Q": Machine.persist,
        "\x80": Machine.proto,
        "\x95": Machine.frame,
    }.items()
}
OTHER = {
    ord("P"): "PERSID",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
    0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}
