"""PTX text to instructions with operands, registers and labels, for the kernels that compilers emit (PTX ISA 8)."""

import math
import re
from dataclasses import dataclass, field


class PtxError(AssertionError):
    """A fault of the executed kernel, or PTX that is not understood; names the line and the instruction."""


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Immediate:
    bits: int


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Sink:
    """``_``: a result that nobody wants."""


@dataclass(frozen=True)
class Address:
    base: str
    offset: int


@dataclass(frozen=True)
class Vector:
    items: "tuple[Operand, ...]"


Operand = Register | Immediate | Symbol | Sink | Address | Vector


@dataclass
class Instruction:
    """``@predicate op.modifiers operands``; ``kind`` is the last modifier, mostly the type."""

    op: str
    modifiers: tuple[str, ...]
    operands: list[Operand]
    predicate: str | None
    negated: bool
    text: str
    line: int

    @property
    def kind(self) -> str:
        return self.modifiers[-1]

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers


_PARAMETER = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[a-z]+(\d+)\s+(?:\.ptr[^%,]*?\s)?([\w$]+)\s*(?:\[(\d+)\])?\s*(?:,|$)"
_DECLARATION = r"(\.extern\s+)?\.(shared|local)\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]"


@dataclass
class Kernel:
    """One ``.entry``: parameters and symbols with their addresses, bits of each register, instructions, labels.

    ``target`` is what it was compiled for, "90a" of sm_90a; ``most_threads`` what a block may have.
    """

    text: str
    name: str
    target: str = ""
    most_threads: int = 1024
    parameters: dict[str, int] = field(default_factory=dict)  # offset of each in the memory of parameters
    parameter_bytes: int = 0
    registers: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    static_shared: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0

    def __post_init__(self) -> None:
        text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), self.text, flags=re.S)
        text = re.sub(r"//[^\n]*", "", text)
        entry = re.search(rf"\.entry\s+{re.escape(self.name)}\s*\((.*?)\)", text, re.S)
        if entry is None:
            raise PtxError(f"no entry {self.name}")
        target = re.search(r"\.target\s+sm_(\w+)", text)
        if target is None:
            raise PtxError("no target")
        self.target = target[1]
        for align, bits, name, count in re.findall(_PARAMETER, entry[1].strip()):
            size = int(bits) // 8 * int(count or 1)
            self.parameters[name] = _round_up(self.parameter_bytes, int(align or size))
            self.parameter_bytes = self.parameters[name] + size
        opening = text.index("{", entry.end())
        bound = re.search(r"\.(?:max|req)ntid\s+([\d,\s]+)", text[entry.end() : opening])
        if bound is not None:
            self.most_threads = math.prod(map(int, bound[1].split(",")))
        body = text[opening + 1 : _closing(text, opening)]
        self._find_memory(text, set(re.findall(r"[\w$]+", body)))
        for statement, line in _statements(body, text.count("\n", 0, opening) + 1):
            self._read(statement, line)

    def _find_memory(self, text: str, used: set[str]) -> None:
        """Places the static symbols one after another, and the dynamic one, of unknown size, behind them."""
        dynamic = None
        for external, space, align, name, size in re.findall(_DECLARATION, text):
            if name not in used:
                continue
            if space == "local":
                self.local[name] = _round_up(self.local_bytes, int(align))
                self.local_bytes = self.local[name] + int(size)
            elif external or size in ("", "0"):
                dynamic = name
            else:
                self.shared[name] = _round_up(self.static_shared, int(align))
                self.static_shared = self.shared[name] + int(size)
        if dynamic is not None:
            self.static_shared = _round_up(self.static_shared, 128)
            self.shared[dynamic] = self.static_shared

    def _read(self, statement: str, line: int) -> None:
        if statement.endswith(":"):
            self.labels[statement[:-1]] = len(self.instructions)
        elif statement.startswith(".reg"):
            _, kind, names = statement.split(None, 2)
            bits = 1 if kind == ".pred" else int(re.sub(r"\D", "", kind))
            for name in names.split(","):
                many = re.fullmatch(r"(.+)<(\d+)>", name.strip())
                expanded = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
                self.registers.update(dict.fromkeys(expanded, bits))
        elif not statement.startswith("."):
            self.instructions.append(_instruction(statement, line, self.registers))


def _round_up(size: int, align: int) -> int:
    return -(-size // align) * align


def _closing(text: str, opening: int) -> int:
    depth = 0
    for brace in re.compile("[{}]").finditer(text, opening):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise PtxError("a brace is not closed")


def _statements(body: str, line: int) -> list[tuple[str, int]]:
    """Statements and labels with their lines; braces of nested scopes and debug directives are dropped."""
    statements: list[tuple[str, int]] = []
    rest = ""
    for number, text in enumerate(body.split("\n"), line):
        text = text.strip()
        if not rest and (text in ("{", "}") or text.startswith((".loc", ".file", ".pragma"))):
            continue
        for piece in re.split(r"(;|^[$\w]+:)", text):
            if piece == ";":
                statements.append((rest.strip().lstrip("{} \t"), number))
                rest = ""
            elif re.fullmatch(r"[$\w]+:", piece):
                statements.append((piece, number))
            elif piece.strip() not in ("", "{", "}"):
                rest += " " + piece.strip()
    return [(statement, number) for statement, number in statements if statement]


def _instruction(statement: str, line: int, registers: dict[str, int]) -> Instruction:
    rest, predicate, negated = statement, None, False
    if rest[0] == "@":
        guard, rest = rest[1:].split(None, 1)
        negated, predicate = guard[0] == "!", guard.lstrip("!")
    name, _, arguments = rest.partition(" ")
    op, *modifiers = name.split(".")
    modifiers = [m.strip(":") for m in modifiers]
    operands = [_operand(t, registers) for t in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", arguments)]
    return Instruction(op, tuple(modifiers), operands, predicate, negated, statement, line)


def _operand(text: str, registers: dict[str, int]) -> Operand:
    text = text.strip()
    if text[0] == "{":
        return Vector(tuple(_operand(t, registers) for t in text[1:-1].split(",")))
    if text[0] == "[":
        parts = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if parts is None:
            raise PtxError(f"address {text}")
        return Address(parts[1], int(parts[2] or 0))
    if "|" in text:
        return Vector(tuple(_operand(t, registers) for t in text.split("|")))
    if text == "_":
        return Sink()
    if text[0] == "%" or text in registers:  # inline assembly declares registers of any name
        return Register(text)
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return Immediate(int(text[2:], 16))
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    return Symbol(text)
