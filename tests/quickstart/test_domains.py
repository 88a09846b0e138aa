"""The adapter domains: the same on every run, clean of the machine they were read on, unseen by the backbone."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from finetuna_lightning.errors import DataError
from finetuna_lightning.quickstart import domains, pretrain

ROOT = Path(__file__).resolve().parents[2]

STDLIB_FILE = """
class Outer:
    class Inner:
        def method(self, x):
            return x in {"alpha", "beta", "gamma", "delta", "epsilon"}

def annotated():
    def nested(x: SomeType): ...
    return [nested, lambda: 1]

too_short_to_learn_from = lambda: 2

raise SystemExit("a domain must not run what it reads")
"""


def digest(domain: str) -> str:
    return hashlib.sha256("\0".join(domains.documents(domain)).encode()).hexdigest()


def use_paths(monkeypatch: pytest.MonkeyPatch, **folders: Path) -> None:
    real = sysconfig.get_path
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folders[name]) if name in folders else real(name))


@pytest.fixture
def fake_stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text(STDLIB_FILE)
    use_paths(monkeypatch, stdlib=tmp_path)
    return tmp_path


@pytest.mark.parametrize("domain", domains.DOMAINS)
def test_documents_do_not_depend_on_the_process(domain: str) -> None:
    program = (
        "import hashlib; from finetuna_lightning.quickstart import domains; "
        f"print(hashlib.sha256('\\0'.join(domains.documents({domain!r})).encode()).hexdigest())"
    )
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        child = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        assert child.stdout.strip() == digest(domain)


@pytest.mark.parametrize("domain", domains.DOMAINS)
def test_domains_are_large_enough_to_train_on_and_capped(domain: str) -> None:
    documents = domains.documents(domain)
    size = sum(len(text.encode()) for text in documents)
    assert 300_000 < size <= domains.MAX_DOMAIN_BYTES
    assert len(documents) > 50 and all(text.strip() for text in documents)
    assert max(len(text.encode()) for text in documents) < size / 4


def test_bytecode_has_no_addresses_and_no_paths() -> None:
    text = "".join(domains.documents("bytecode"))
    assert "<code object" in text  # the constants that would show both
    assert " at 0x" not in text and 'file "' not in text and sysconfig.get_path("stdlib") not in text


def test_the_cap_falls_on_all_packages_alike() -> None:
    headings = [text.partition("\n")[0] for text in domains.documents("bytecode")]
    packages = [heading.removeprefix("Disassembly of ").partition(".")[0] for heading in headings]
    assert set(packages) == set(domains.BYTECODE_MODULES)
    assert len(set(packages[:20])) > 2  # mixed, not one package after another


def test_bytecode_compiles_without_running_and_lists_nested_functions_once(fake_stdlib: Path) -> None:
    texts = {text.partition("\n")[0]: text for text in domains.documents("bytecode")}
    assert set(texts) == {"Disassembly of json.Outer.Inner.method:", "Disassembly of json.annotated:"}
    assert "<lambda>" in texts["Disassembly of json.annotated:"]


def test_bytecode_ignores_the_future_imports_of_the_reader(fake_stdlib: Path) -> None:
    (text,) = [text for text in domains.documents("bytecode") if "annotated" in text.partition("\n")[0]]
    assert "'SomeType'" not in text  # a string would mean postponed annotations


def test_sets_are_listed_in_sorted_order(fake_stdlib: Path) -> None:
    assert "frozenset({'alpha', 'beta', 'delta', 'epsilon', 'gamma'})" in "".join(domains.documents("bytecode"))


def test_bytecode_without_sources_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_paths(monkeypatch, stdlib=tmp_path)
    with pytest.raises(FileNotFoundError, match="libpython3-stdlib"):
        domains.documents("bytecode")


def test_english_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FileNotFoundError, match="libpython3-stdlib"):
        domains.documents("english")


def test_headers_are_read_recursively_without_what_differs_by_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpython").mkdir()
    (tmp_path / "Python.h").write_text("one\n")
    (tmp_path / "cpython" / "deep.h").write_text("two\n")
    (tmp_path / "pyconfig.h").write_text("machine\n")
    (tmp_path / "latin.h").write_bytes(b"\xe9\n")
    (tmp_path / "empty.h").write_text("\n")
    (tmp_path / "notes.txt").write_text("no header\n")
    use_paths(monkeypatch, include=tmp_path)
    assert sorted(domains.documents("c_headers")) == ["one\n", "two\n"]
    assert str(tmp_path) in domains.describe("c_headers")


def test_without_python_headers_numpys_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.h").write_text("a pip package left this in an include folder without Python.h\n")
    use_paths(monkeypatch, include=tmp_path)
    spec = importlib.util.find_spec("numpy")
    assert spec is not None and spec.origin is not None
    folder = str(Path(spec.origin).parent)
    assert folder in domains.describe("c_headers")
    assert any("NPY_" in text for text in domains.documents("c_headers"))


def test_without_any_headers_the_error_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_paths(monkeypatch, include=tmp_path / "absent")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(domains.DomainNotFoundError, match="python3-dev") as caught:
        domains.documents("c_headers")
    assert isinstance(caught.value, FileNotFoundError) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("domain", domains.DOMAINS)
def test_describe_is_one_line_with_the_count(domain: str) -> None:
    line = domains.describe(domain)
    assert "\n" not in line and f"{len(domains.documents(domain))} documents" in line


def test_an_unknown_domain_names_the_nearest() -> None:
    with pytest.raises(DataError, match="did you mean 'bytecode'"):
        domains.documents("bytecodes")
    with pytest.raises(DataError, match="english, c_headers, bytecode"):
        domains.describe("french")


def test_the_corpus_leaves_out_what_the_domains_are_made_of() -> None:
    files = pretrain.collect_corpus()
    modules = {".".join(Path(file.path).with_suffix("").parts).removesuffix(".__init__") for file in files}
    assert {"argparse", "asyncio.events", "xmlrpc.client"} <= modules  # xmlrpc is not xml
    tops = {module.partition(".")[0] for module in modules}
    assert not tops & {*domains.BYTECODE_MODULES, "pydoc_data", "site-packages", "msilib"}
    assert not any(domains.excluded_from_corpus(module) for module in modules)
    # Named, not left to the size limit that happens to stop them too.
    assert domains.excluded_from_corpus("pydoc_data.topics") and domains.excluded_from_corpus("test.test_dis")
    # What matters is the text: no topic of the language reference is quoted in the corpus at length.
    corpus = "".join(file.text for file in files)
    topics = [text for text in domains.documents("english") if len(text) > 2000]
    assert not any(text[1000:1200] in corpus for text in topics)
