"""PTX text, of the kind that LLVM and Triton write, into a program."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import numpy as np

from .layout import INSTRUCTION
from .operands import Operands
from .program import Array, Param, Program, Unsupported
from .statements import Code, Statement

_ENTRY = re.compile(r"\.entry\s+([\w$]+)")
_PARAM = re.compile(r"\.param\s+\.(\w)(\d+)(?:\s+\.ptr)?(?:\s+\.\w+)*?(?:\s+\.align\s+\d+)?\s+([\w$]+)(?=\s*[,)\n])")
_NUM_THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)")
_SHARED = re.compile(r"\.extern\s+\.shared.*?\s([\w$]+)\[\]")
_ARRAY = re.compile(r"\.shared\s+\.align\s+\d+\s+\.b(\d+)\s+([\w$]+)\[(\d+)\]\s*;")
_LABEL = re.compile(r"([$\w]+):\s*")
_DECLARATION = re.compile(r"\.reg\s+\.(\w+)\s+(.*)")
_SHARED_ALIGNMENT = 128
_MEMORY_DECLARATIONS = (".shared", ".local", ".global", ".const")


@functools.lru_cache(maxsize=1024)
def parse(ptx: str) -> Program:
    """Read a module of one kernel.

    Raises:
        Unsupported: for what is not modelled.
    """
    return _Parser(ptx).parse()


class _Parser:
    def __init__(self, ptx: str) -> None:
        self._ptx = ptx
        entry = _ENTRY.search(ptx)
        end = re.search(r"^\}", ptx[entry.end() :], re.M) if entry else None
        if not entry or not end:
            raise Unsupported("PTX without a kernel")
        self._name = entry[1]
        self._begin = ptx.index("{", entry.end()) + 1
        self._end = entry.end() + end.start()
        head = ptx[entry.end() : self._begin]
        threads = _NUM_THREADS.search(head)
        if not threads:
            raise Unsupported("a kernel that does not say how many threads it has")
        self._num_threads = int(threads[1])
        self._params = list(_params(head))
        symbols = {param.name: param.offset for param in self._params}
        # Shared memory of the kernel itself comes first, then what the launch gives.
        self._own_shared = 0
        for bits, name, length in _ARRAY.findall(ptx):
            symbols[name] = self._own_shared
            self._own_shared += -(-int(bits) // 8 * int(length) // _SHARED_ALIGNMENT) * _SHARED_ALIGNMENT
        symbols |= dict.fromkeys(_SHARED.findall(ptx), self._own_shared)
        self._operands = Operands(self._num_threads, symbols)
        self._code = Code(self._operands)

    def parse(self) -> Program:
        source, unfinished = "", ""
        first_line = self._ptx.count("\n", 0, self._begin) + 1
        for number, line in enumerate(self._ptx[self._begin : self._end].split("\n"), first_line):
            text, _, comment = line.partition("//")
            text = (unfinished + text).strip()
            unfinished = ""
            if text.split(maxsplit=1)[:1] == [".loc"]:
                source = comment.strip() or source
            elif text and not text.startswith(".pragma"):
                unfinished = self._line(text, number, source)
        self._code.finish()
        return self._program()

    def _line(self, text: str, number: int, source: str) -> str:
        """Read what is in a line; returns the begin of a statement that goes on in the next one."""
        while text:
            label = _LABEL.match(text) if ":" in text else None
            if label:
                self._code.label(label[1])
                text = text[label.end() :]
            elif text[0] == "{":
                self._operands.open_scope()
                text = text[1:].lstrip()
            elif text[0] == "}":
                self._operands.close_scope()
                text = text[1:].lstrip()
            else:
                statement, semicolon, text = text.partition(";")
                if not semicolon:
                    return statement + " "
                if statement:
                    self._statement(" ".join(statement.split()), number, source)
                text = text.lstrip()
        return ""

    def _statement(self, text: str, number: int, source: str) -> None:
        if not text.startswith("."):
            self._code.add(Statement(text, number, source))
        elif declaration := _DECLARATION.match(text):
            self._operands.declare(declaration[1], declaration[2])
        elif text.startswith(_MEMORY_DECLARATIONS) and not _ARRAY.match(text + ";"):
            raise Unsupported(text)

    def _program(self) -> Program:
        frame, variables_size = self._operands.frame()
        code = np.array(self._code.rows, INSTRUCTION)
        places = np.array([*self._operands.places_of_constants(variables_size), 0], np.int32)
        for field in ("guard", "a", "b", "c", "e", "d", "parts"):
            _place_constants(code[field], places)
        origins = self._code.origins
        return Program(
            name=self._name,
            code=code,
            texts=[origin.text for origin in origins],
            lines=[origin.line for origin in origins],
            sources=[origin.source for origin in origins],
            frame=frame,
            variables_size=variables_size,
            specials=self._operands.specials(),
            params=self._params,
            num_threads=self._num_threads,
            own_shared=self._own_shared,
            ptx=self._ptx,
        )


def _place_constants(operands: Array, places: Array) -> None:
    constant = operands <= -2
    operands[constant] = places[-2 - operands[constant]]


def _params(head: str) -> Iterator[Param]:
    end = 0
    for _, bits, name in _PARAM.findall(head):
        size = int(bits) // 8
        offset = -(-end // size) * size
        end = offset + size
        yield Param(name, offset, size)
