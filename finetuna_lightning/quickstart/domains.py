"""The quickstart's adapter domains: three texts that every CPython install carries, and that its backbone never read.

Nothing is downloaded, and no stdlib module is run for its text: headers and sources are read as files, bytecode comes
from ``compile()`` alone. What a domain says depends on the Python version that reads it, never on the process (object
addresses, file paths and the hash seed leave no trace).
"""

from __future__ import annotations

import dis
import functools
import hashlib
import importlib.util
import inspect
import io
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType
from typing import NamedTuple

from finetuna_lightning.errors import DataError, one_of

DOMAINS: tuple[str, ...] = ("english", "c_headers", "bytecode")
MAX_DOMAIN_BYTES = 600_000

# Disassembled, so their sources must stay out of what the backbone reads.
BYTECODE_MODULES: tuple[str, ...] = ("email", "http", "json", "logging", "urllib", "wsgiref", "xml")
# Module names; a name stands for its submodules too. test.test_dis quotes listings as dis prints them.
EXCLUDED_FROM_CORPUS: tuple[str, ...] = (*BYTECODE_MODULES, "pydoc_data", "test.test_dis")

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_FILE = re.compile(r', file "[^"]*"')


class DomainNotFoundError(DataError, FileNotFoundError):
    """The files that a domain is read from are not on this machine. The message says which package brings them."""


class _Document(NamedTuple):
    name: str
    text: str


def documents(domain: str) -> list[str]:
    """The texts of a domain, in an order that depends on nothing but their names; about 600 kB at most.

    A document is one topic of the language reference (``english``), one header file (``c_headers``) or one function
    with all that is nested in it (``bytecode``).

    Raises:
        DataError: ``domain`` is none of ``DOMAINS``.
        DomainNotFoundError: what it is read from is not installed.
    """
    return [document.text for document in _read(domain)]


def describe(domain: str) -> str:
    """One line: what the domain is, how much of it there is, and where it was read. Raises as ``documents`` does."""
    read = _read(domain)
    size = sum(len(document.text.encode()) for document in read)
    if domain == "english":
        what, where = "English of the Python language reference", "pydoc_data.topics"
    elif domain == "c_headers":
        what, where = "C header files", str(_header_folder())
    else:
        what, where = f"disassembled functions of {', '.join(BYTECODE_MODULES)}", str(_stdlib())
    return f"{what}: {len(read)} documents, {size / 1000:.0f} kB, Python {platform.python_version()}, from {where}"


def excluded_from_corpus(module: str) -> bool:
    """Whether the backbone must not read this module: a domain is made from it, or quotes it."""
    return any(module == name or module.startswith(name + ".") for name in EXCLUDED_FROM_CORPUS)


def _read(domain: str) -> tuple[_Document, ...]:
    if domain not in DOMAINS:
        raise DataError(one_of("domain", domain, DOMAINS))
    if domain == "english":
        return _cap(_english())
    if domain == "c_headers":
        return _cap(_c_headers(_header_folder()))
    return _bytecode(_stdlib())


def _cap(candidates: Iterable[_Document]) -> tuple[_Document, ...]:
    """Mix the documents by the hash of their names and keep what fits: a cut falls on all sources alike."""
    kept, size = [], 0
    for document in sorted(candidates, key=lambda item: hashlib.sha256(item.name.encode()).digest()):
        size_with = size + len(document.text.encode())
        if size_with <= MAX_DOMAIN_BYTES:
            kept.append(document)
            size = size_with
    return tuple(kept)


def _english() -> Iterator[_Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DomainNotFoundError(
            "domain 'english' is read from the standard library's pydoc_data.topics, which this Python lacks; "
            "install the full standard library (Debian: libpython3-stdlib)"
        ) from error
    for name, text in topics.items():
        if text.strip():
            yield _Document(name, text)


def _header_folder() -> Path:
    """CPython's own headers, else numpy's C headers (numpy is found, not imported)."""
    include = Path(sysconfig.get_path("include"))
    if (include / "Python.h").is_file():
        return include
    spec = importlib.util.find_spec("numpy")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for folder in (Path(root) / "_core" / "include", Path(root) / "core" / "include"):
            if folder.is_dir():
                return folder
    raise DomainNotFoundError(
        f"domain 'c_headers' found neither Python.h in {include} nor numpy's headers; install Python's headers "
        "(Debian and Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel) or numpy"
    )


def _c_headers(folder: Path) -> Iterator[_Document]:
    for path in folder.rglob("*.h"):
        if path.name == "pyconfig.h":  # written by ./configure: differs by machine
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield _Document(path.relative_to(folder).as_posix(), text)


def _stdlib() -> Path:
    stdlib = Path(sysconfig.get_path("stdlib"))
    if not (stdlib / "json" / "__init__.py").is_file():
        raise DomainNotFoundError(
            f"domain 'bytecode' compiles the standard library's sources, and {stdlib} holds none; use a Python "
            "installed with its .py files (Debian: libpython3-stdlib)"
        )
    return stdlib


@functools.lru_cache(maxsize=2)  # a few seconds to disassemble
def _bytecode(stdlib: Path) -> tuple[_Document, ...]:
    return _cap(document for module in BYTECODE_MODULES for document in _module_listings(stdlib, module))


def _module_listings(stdlib: Path, module: str) -> Iterator[_Document]:
    """One listing for each function or method of a package's files, methods of nested classes included."""
    for path in sorted((stdlib / module).rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        # dont_inherit: this file's own __future__ imports would change the code.
        code = compile(path.read_bytes(), name, "exec", dont_inherit=True, optimize=0)
        for function in _functions(code):
            # A conditional or overloaded definition repeats a name: the line keeps them apart.
            key = f"{name}.{function.co_qualname}:{function.co_firstlineno}"
            yield _Document(key, _listing(name, function))


def _functions(code: CodeType) -> Iterator[CodeType]:
    """The functions that a module's code or a class body defines; what is nested in a function stays inside it."""
    for constant in code.co_consts:
        if not isinstance(constant, CodeType):
            continue
        if _is_class_body(constant):
            yield from _functions(constant)
        elif not constant.co_name.startswith("<"):
            yield constant


def _is_class_body(code: CodeType) -> bool:
    return not code.co_flags & inspect.CO_NEWLOCALS and "__qualname__" in code.co_names


def _listing(module: str, function: CodeType) -> str:
    out = io.StringIO()
    dis.dis(_with_sorted_sets(function), file=out)
    text = _FILE.sub("", _ADDRESS.sub("", out.getvalue()))
    lines = (line.rstrip() for line in text.splitlines())
    return f"Disassembly of {module}.{function.co_qualname}:\n" + "\n".join(lines).strip("\n") + "\n"


class _SortedSet(frozenset[object]):
    """A frozenset whose repr does not depend on the hash seed."""

    def __repr__(self) -> str:
        return f"frozenset({{{', '.join(sorted(map(repr, self)))}}})"


def _with_sorted_sets(code: CodeType) -> CodeType:
    def stable(constant: object) -> object:
        if isinstance(constant, CodeType):
            return _with_sorted_sets(constant)
        return _SortedSet(constant) if isinstance(constant, frozenset) else constant

    return code.replace(co_consts=tuple(stable(constant) for constant in code.co_consts))
