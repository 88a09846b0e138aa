"""What holds for every test: no network, no user's cache, no window, an empty folder to work in, and as many threads as
this worker's share of the cores. Environment variables are set here, before any test imports torch or transformers, so
that programs started by a test inherit them."""

from __future__ import annotations

import atexit
import gc
import ipaddress
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest

_hub = tempfile.mkdtemp(prefix="finetuna-hub-")
atexit.register(shutil.rmtree, _hub, ignore_errors=True)

os.environ.update(
    HF_HOME=_hub,
    FINETUNA_CACHE=os.path.join(_hub, "finetuna"),
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, share // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))


def pytest_collection_finish() -> None:
    """What the imports left, some 600,000 objects, stays to the end. A full collection that looks at all of them takes
    a part of a second, and every fit begins with one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def frozen() -> Any:
    """A fit freezes what there is when it begins, and thaws everything at its end: here the imports stay frozen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test starts in an empty folder of its own, so that relative paths that it writes stay out of the tree."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Any:
    """A connection to anything but this machine is an error that names the address."""

    def guarded(connect: Any) -> Any:
        def wrapper(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(str(address[0])):
                raise AssertionError(f"a test tried to reach {address[0]}:{address[1]}; tests run without a network")
            return connect(self, address)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
        yield


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host in ("", "localhost")
