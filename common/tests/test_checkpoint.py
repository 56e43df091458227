import argparse
import collections
import contextlib
import hashlib
import http.client
import http.server
import json
import logging
import multiprocessing
import os
import pathlib
import pickle
import signal
import socket
import struct
import threading
import time
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.data.memory import download
from common.run.checkpoint import (
    CheckpointError,
    CheckpointManager,
    TrainingState,
    fetch,
    fetching,
    keep_own_heads,
    list_key_differences,
    load_safely,
    load_strict,
    locate,
    plain,
    read_description,
    save_atomic,
    save_described,
    select_state,
)
from common.run.errors import DataError, OutputError, UsageError
from common.run.files import check_files, replacing
from common.tests.forks import run_forked

# ---------------------------------------------------------------------------------------------------------------------
# Reading safely


@pytest.mark.parametrize("new_format", [True, False])
def test_reads_what_official_files_hold(tmp_path: Path, new_format: bool) -> None:
    weights = nn.Linear(2, 3).state_dict()
    args = argparse.Namespace(
        output_dir=pathlib.PosixPath("/data/run"),
        lr=np.float64(0.5),
        seed=np.int64(4),
        flag=np.bool_(True),
        name=np.str_("vit"),
        matrix=np.arange(6, dtype=np.float32).reshape(2, 3),
        columns=np.asfortranarray(np.arange(6).reshape(2, 3)),
        big_endian=np.arange(3, dtype=">i4"),
        kind=np.dtype("float16"),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        shape=torch.Size([1, 2]),
        table=collections.defaultdict(dict, {1: {2: 3}}),
        counts=collections.Counter("aab"),
        random=np.random.get_state(),
        nested=[{"x": (np.float32(1.5), [np.int8(3)])}],
    )
    file = tmp_path / "a.pth"
    content = {"model": weights, "args": args, "epoch": 3}
    torch.save(content, file, _use_new_zipfile_serialization=new_format)
    loaded = load_safely(file)
    assert loaded["epoch"] == 3
    assert all(torch.equal(loaded["model"][key], weights[key]) for key in weights)
    found = loaded["args"]
    assert isinstance(found, argparse.Namespace)
    assert found.output_dir == pathlib.PurePosixPath("/data/run")
    assert (found.lr, type(found.lr)) == (0.5, np.float64)
    assert (found.seed, found.flag, found.name, found.kind) == (4, True, "vit", np.dtype("float16"))
    for key in ("matrix", "columns", "big_endian"):
        np.testing.assert_array_equal(getattr(found, key), getattr(args, key))
        assert getattr(found, key).dtype == getattr(args, key).dtype
    assert found.dtype is torch.bfloat16
    assert (found.device, tuple(found.shape)) == (torch.device("cpu"), (1, 2))
    assert found.table == {1: {2: 3}}
    assert found.counts["a"] == 2
    np.testing.assert_array_equal(found.random[1], args.random[1])
    assert found.nested == [{"x": (1.5, [3])}]
    np.random.RandomState().set_state(found.random)


def rename_global(file: Path, old: str, new: str) -> None:
    """Rewrite a legacy file as if another version of a library had written it: globals are lines of text there."""
    content = file.read_bytes()
    before, after = ("c" + "\n".join(name.rsplit(".", 1)) + "\n" for name in (old, new))
    changed = content.replace(before.encode(), after.encode())
    assert changed != content
    file.write_bytes(changed)


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_reads_both_numpy_spellings(tmp_path: Path, core: str) -> None:
    file = tmp_path / "a.pth"
    torch.save({"x": np.float64(2.5), "y": np.ones(3)}, file, _use_new_zipfile_serialization=False)
    other = "numpy._core" if b"numpy._core" in file.read_bytes() else "numpy.core"
    if core != other:
        rename_global(file, f"{other}.multiarray.scalar", f"{core}.multiarray.scalar")
        rename_global(file, f"{other}.multiarray._reconstruct", f"{core}.multiarray._reconstruct")
    assert core.encode() in file.read_bytes()
    loaded = load_safely(file)
    assert loaded["x"] == 2.5
    np.testing.assert_array_equal(loaded["y"], np.ones(3))


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("name", ["PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"])
def test_reads_paths_of_any_platform_and_python(tmp_path: Path, module: str, name: str) -> None:
    file = tmp_path / "a.pth"
    torch.save({"p": pathlib.PurePosixPath("c", "x")}, file, _use_new_zipfile_serialization=False)
    written = "pathlib._local" if b"pathlib._local" in file.read_bytes() else "pathlib"
    if (module, name) != (written, "PurePosixPath"):
        rename_global(file, f"{written}.PurePosixPath", f"{module}.{name}")
    path = load_safely(file)["p"]
    assert path.parts == ("c", "x")
    assert isinstance(path, pathlib.PureWindowsPath) == ("Windows" in name)


class Command:
    """Runs a shell command when unpickled carelessly."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.file}",)


class Evaluated(Command):
    def __reduce__(self) -> tuple:
        return eval, (f"open({str(self.file)!r}, 'w')",)


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle", "pickle0"])
@pytest.mark.parametrize(("kind", "named"), [(Command, "system"), (Evaluated, "eval")])
def test_hostile_files_are_refused_and_not_run(tmp_path: Path, kind: type[Command], named: str, writer: str) -> None:
    trace, file = tmp_path / "hacked", tmp_path / "evil.pth"
    content = {"model": kind(trace)}
    if writer in ("zip", "legacy"):
        torch.save(content, file, _use_new_zipfile_serialization=writer == "zip")
    else:
        file.write_bytes(pickle.dumps(content, protocol=0 if writer == "pickle0" else None))
    with pytest.raises(CheckpointError) as caught:
        load_safely(file)
    assert not trace.exists()
    assert str(file) in str(caught.value)
    if writer != "pickle0":
        assert named in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's own advice is to load unsafely


def test_numpy_objects_and_callables_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    for content in (np.array([{}, []], dtype=object), np.float64, len):
        torch.save({"x": content}, file)
        with pytest.raises(CheckpointError, match=r"a\.pth"):
            load_safely(file)


def truncated(new_format: bool) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save({"model": torch.randn(5000)}, buffer, _use_new_zipfile_serialization=new_format)
    return buffer.getvalue()[:9000]


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (b"", "empty file"),
        (truncated(True), "truncated"),
        (truncated(False), "truncated or damaged"),
        (b"<!DOCTYPE html>\n<html>404 Not Found</html>", "web page"),
        (b"Access denied\n", "text file of 14 bytes that begins with 'Access denied"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "Git LFS"),
        (bytes(range(256)) * 10, "no readable checkpoint"),
        (b"PK\x03\x04" + bytes(100), "truncated"),
        (pickle.dumps({"a": 1}), "Python pickle"),
    ],
)
def test_files_that_are_no_checkpoint_are_described(tmp_path: Path, content: bytes, finding: str) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=finding) as caught:
        load_safely(file)
    assert str(file) in str(caught.value)
    assert "download or copy the file again" in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_safely(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="found a folder"):
        load_safely(tmp_path)


def test_a_checkpoint_is_looked_for_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "there.pth").write_bytes(b"")
    check_files("", None, "auto", "https://host/net.pth", tmp_path / "there.pth")
    with pytest.raises(CheckpointError, match=r"none\.pth: no such file"):
        check_files("auto", str(tmp_path / "none.pth"))
    with pytest.raises(CheckpointError, match="found a folder"):
        check_files(tmp_path)


def test_other_archives_are_described(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.ones(2))
    with pytest.raises(CheckpointError, match="zip archive without"):
        load_safely(tmp_path / "a.npz")


def test_reads_safetensors(tmp_path: Path) -> None:
    weights = {"w": torch.randn(4, 3), "b": torch.zeros(2)}
    save_file(weights, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / "named.bin")  # known by its content too
    loaded = load_safely(tmp_path / "named.bin")
    for key in weights:
        assert torch.equal(loaded[key], weights[key])
    # a header of 0x0380 bytes: its length begins like a pickle's protocol
    for filler in range(400, 1000):
        save_file(weights, tmp_path / "b.safetensors", metadata={"note": "x" * filler})
        if (tmp_path / "b.safetensors").read_bytes()[:2] == b"\x80\x03":
            break
    assert torch.equal(load_safely(tmp_path / "b.safetensors")["w"], weights["w"])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "named.bin").read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        load_safely(tmp_path / "cut.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def test_saved_files_hold_plain_values_only(tmp_path: Path) -> None:
    content = {
        "args": argparse.Namespace(path=Path("x"), lr=np.float32(1.5)),
        "array": np.arange(3),
        "model": nn.BatchNorm1d(2).state_dict(),
    }
    save_atomic(content, tmp_path / "deep" / "a.pth")
    loaded = torch.load(tmp_path / "deep" / "a.pth", weights_only=True)  # without any allow-list
    assert loaded["args"] == {"path": "x", "lr": 1.5}
    assert torch.equal(loaded["array"], torch.arange(3))
    assert loaded["model"]._metadata == content["model"]._metadata


def test_values_that_are_not_plain_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"checkpoint\['a'\]\[1\] is a builtins.function"):
        save_atomic({"a": [1, lambda: 0]}, tmp_path / "a.pth")
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save_atomic({"x": 1}, tmp_path / "a.pth")

    def full(content: object, target: Any) -> None:
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match=r"a\.pth.*No space left"):
        save_atomic({"x": 2}, file)
    assert load_safely(file) == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def sealed_files(folder: Path) -> Iterator[tuple[Path, Any]]:
    """A file of each kind that is written here, and what it holds."""
    content = {"bias": torch.zeros(2), "weight": torch.arange(6.0)}
    yield save_atomic({"model": content, "epoch": 3}, folder / "net.pth"), {"model": content, "epoch": 3}
    save_described(folder / "net.safetensors", content, "uvc", json.dumps({"format": "here"}))
    yield folder / "net.safetensors", content


def test_no_flipped_bit_is_read(tmp_path: Path) -> None:
    for path, content in sealed_files(tmp_path):
        assert str(load_safely(path)) == str(content)
        whole = path.read_bytes()
        wrong = [(place, 1 << place % 8) for place in range(0, len(whole), 5)]
        wrong += [(place, 1 << bit) for place in range(len(whole) - 120, len(whole)) for bit in range(8)]
        wrong += [(place, 1 << bit) for place in range(40) for bit in range(8)]
        damaged = path.with_name(f"damaged{path.suffix}")
        for place, bit in wrong:
            damaged.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            with pytest.raises(CheckpointError, match=rf"damaged{path.suffix}: .*(again|anew)"):
                load_safely(damaged)
        for cut in range(1, 200):
            damaged.write_bytes(whole[:-cut])
            with pytest.raises(CheckpointError):
                load_safely(damaged)
        middle = len(whole) * 3 // 4
        damaged.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        with pytest.raises(CheckpointError, match="its SHA-256 is not the one that it was written with: it is damaged"):
            load_safely(damaged)


def test_a_flipped_bit_in_a_description_is_not_read(tmp_path: Path) -> None:
    *_, (path, _) = sealed_files(tmp_path)
    assert read_description(path, "uvc") == {"format": "here"}
    path.write_bytes(path.read_bytes().replace(b"here", b"hero"))
    with pytest.raises(CheckpointError, match=r"net.safetensors: its SHA-256 is not .* make the file anew"):
        read_description(path, "uvc")


def test_other_programs_read_our_files_and_we_theirs(tmp_path: Path) -> None:
    (ours, content), (described, weights) = sealed_files(tmp_path)
    assert str(torch.load(ours, weights_only=True)) == str(torch.load(ours, weights_only=True, mmap=True))
    assert str(torch.load(ours, weights_only=True)) == str(content)
    assert str(load_file(described)) == str(weights)
    assert zipfile.ZipFile(ours).testzip() is None
    torch.save(content, tmp_path / "theirs.pth")
    save_file(weights, tmp_path / "theirs.safetensors", {"format": "pt"})
    for name in ("theirs.pth", "theirs.safetensors"):
        assert b"sha256" not in (tmp_path / name).read_bytes()
        load_safely(tmp_path / name)


def test_kill_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    file = save_atomic({"x": 1}, tmp_path / "last.pth")

    def die() -> None:
        original = torch.save

        def save(content: object, target: Any) -> None:
            original(content, target)
            target.truncate(target.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        torch.save = save
        save_atomic({"x": 2}, file)

    (ended,) = run_forked(die)
    assert ended.status == -signal.SIGKILL
    assert load_safely(file) == {"x": 1}
    assert len(list(tmp_path.iterdir())) == 2  # the half-written one beside it
    CheckpointManager(tmp_path).lock()
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]


def test_a_folder_is_one_run_s_until_it_ends_or_dies(tmp_path: Path) -> None:
    inside, ended = multiprocessing.Pipe(duplex=False)

    def hold() -> None:
        manager = CheckpointManager(tmp_path)
        manager.lock()
        (tmp_path / ".last.pth.0123.tmp").write_bytes(b"half of a file")
        ended.send(os.getpid())
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    assert inside.poll(30)
    owner = inside.recv()
    try:
        with pytest.raises(UsageError, match=rf"in use by another run \(process {owner} on .* since 20"):
            CheckpointManager(tmp_path).lock()
        assert (tmp_path / ".last.pth.0123.tmp").exists()
    finally:
        process.kill()
        process.join()
    manager = CheckpointManager(tmp_path)
    manager.lock()
    assert not (tmp_path / ".last.pth.0123.tmp").exists()
    manager.unlock()

    def take() -> None:
        CheckpointManager(tmp_path).lock()

    (free,) = run_forked(take)
    assert free.status == 0


def test_temporary_names_cannot_be_guessed(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        with replacing(tmp_path / "x"):
            names |= {path.name for path in tmp_path.glob(".x.*.tmp")}
    assert len(names) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Fetching


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, dict[str, bytes], list[str]]]:
    """A local web server: its address, its files, and the requests it saw. A name with ``cut`` is sent in part."""
    files: dict[str, bytes] = {}
    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            body = files.get(self.path.lstrip("/"))
            how, *_ = self.path.strip("/").partition("-")
            if how in ("reset", "chunks", "short", "busy") and seen.count(self.path) < 3:
                self.fail(how)
                return
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write((body or b"")[: 10 if "cut" in self.path else None])

        def fail(self, how: str) -> None:
            if how == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif how == "busy":
                self.send_error(503)
            else:
                self.send_response(200)
                self.send_header(*(("Transfer-Encoding", "chunked") if how == "chunks" else ("Content-Length", "900")))
                self.end_headers()
                self.wfile.write(b"100\r\ncut" if how == "chunks" else b"cut")
                self.wfile.flush()
            self.connection.close()

        def log_message(self, *unused: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_address[1]}", files, seen
        web.shutdown()


def test_fetch_downloads_once_and_checks_the_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, dict[str, bytes], list[str]]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    address, files, seen = server
    body = b"weights" * 1000
    digest = hashlib.sha256(body).hexdigest()
    name = f"net-{digest[:8]}.pth"
    files[name] = body
    path = fetch(f"{address}/{name}", progress=False)
    assert path == tmp_path / "home" / "hub" / "checkpoints" / name
    assert path.read_bytes() == body
    assert fetch(f"{address}/{name}", progress=False) == path
    assert len(seen) == 2  # its size, and itself
    path.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="Delete it to download it again"):
        fetch(f"{address}/{name}", progress=False)
    files["other-00000000.torch"] = files["other.torch"] = body
    with pytest.raises(CheckpointError, match=f"SHA-256 is {digest}, expected 00000000"):
        fetch(f"{address}/other-00000000.torch", progress=False)
    assert fetch(f"{address}/other.torch", progress=False).read_bytes() == body
    assert locate(f"{address}/other.torch").name == "other.torch"
    assert locate("some/file.pth") == Path("some/file.pth")


def test_fetch_remembers_a_file_whose_hash_nobody_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, dict[str, bytes], list[str]]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    address, files, _ = server
    files["vit.torch"] = body = b"weights" * 1000
    path = fetch(f"{address}/vit.torch", progress=False)
    record = path.with_name("vit.torch.sha256")
    assert record.read_text() == f"{hashlib.sha256(body).hexdigest()}  vit.torch\n"
    path.write_bytes(body[:-1] + b"t")
    with pytest.raises(CheckpointError, match=r"vit.torch: its SHA-256 .*; if it was .* delete .*torch.sha256"):
        fetch(f"{address}/vit.torch", progress=False)
    path.unlink()
    assert fetch(f"{address}/vit.torch", progress=False).read_bytes() == body
    path.unlink()
    files["vit.torch"] = b"others" * 1000
    with pytest.raises(CheckpointError, match=r"the download's SHA-256 is .* or delete .*vit.torch.sha256"):
        fetch(f"{address}/vit.torch", progress=False)
    assert [file.name for file in path.parent.iterdir()] == [record.name]
    record.unlink()
    path.write_bytes(b"from elsewhere")  # put there by hand, recorded when it is first used
    assert fetch(f"{address}/vit.torch", progress=False) == path
    assert record.read_text().startswith(hashlib.sha256(b"from elsewhere").hexdigest())
    record.write_text("no digest")
    with pytest.raises(CheckpointError, match=r"vit.torch.sha256 holds no SHA-256"):
        fetch(f"{address}/vit.torch", progress=False)


def test_a_cache_that_may_only_be_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "vit.torch"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")

    def refuse(*unused: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    assert fetch("http://127.0.0.1:9/vit.torch") == path
    assert [file.name for file in path.parent.iterdir()] == ["vit.torch"]


@pytest.mark.parametrize("how", ["reset", "chunks", "short", "busy"])
def test_a_download_that_breaks_off_is_tried_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    server: tuple[str, dict[str, bytes], list[str]],
    how: str,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(fetching.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(fetching.logger, "parent", logging.getLogger())
    address, files, seen = server
    body = b"weights" * 1000
    files[name := f"{how}-{hashlib.sha256(body).hexdigest()}.pth"] = body
    assert fetch(f"{address}/{name}", progress=False).read_bytes() == body
    assert "broke off" in caplog.text
    assert name in caplog.text
    seen[:] = []
    monkeypatch.setattr(fetching, "ATTEMPTS", 1)
    with pytest.raises(CheckpointError, match=f"cannot download {how}-net.pth from {address}/{how}-net.pth: "):
        fetch(f"{address}/{how}-net.pth", progress=False)
    assert [file.name for file in (tmp_path / "hub" / "checkpoints").iterdir()] == [name]


def test_a_data_set_that_breaks_off_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fetching.time, "sleep", lambda seconds: None)
    failures: list[Exception] = [http.client.IncompleteRead(b"cut"), ConnectionResetError("reset")]

    def get() -> str:
        if failures:
            raise failures.pop()
        return "images"

    assert download("cifar10", tmp_path, get) == "images"
    failures[:] = [http.client.IncompleteRead(b"cut")] * 3
    with pytest.raises(DataError, match=r"cannot download cifar10 to .* .IncompleteRead: .*3 bytes read"):
        download("cifar10", tmp_path, get)
    failures[:] = [RuntimeError("File not found or corrupted.")]
    with pytest.raises(DataError, match=r"cifar10 .*corrupted"):
        download("cifar10", tmp_path, get)


def test_fetch_explains_failures_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, dict[str, bytes], list[str]]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    kept = tmp_path / "hub" / "checkpoints"
    address, files, _ = server
    files["cut.pth"] = b"x" * 1000
    for url, reason in (
        (f"{address}/cut.pth", "10 of 1000|Incomplete"),
        (f"{address}/gone.pth", "404|Not Found"),
        ("http://127.0.0.1:9/offline.pth", "refused"),
        ("http://127.0.0.1:port/net.pth", "nonnumeric port"),
        ("http://exa mple/net.pth", "control characters"),
        ("http://[::1/net.pth", "Invalid IPv6"),
        ("http:///net.pth", "no host"),
        ("http://%s.org/net.pth" % ("x" * 70), "too long"),
    ):
        with pytest.raises(CheckpointError, match=reason) as caught:
            fetch(url, progress=False, timeout_s=5)
        for part in (url, str(kept), "put it at"):
            assert part in str(caught.value)
    assert list(kept.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Strict loading


def test_all_differences_are_listed_and_nothing_is_loaded() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {
        "0.weight": torch.ones(3, 2),
        "0.bias": torch.ones(5),
        "1.weight": torch.ones(9, 3),
        "extra": torch.ones(1),
    }
    with pytest.raises(CheckpointError) as caught:
        load_strict(model, state, source="file.pth")
    text = str(caught.value)
    for part in (
        "file.pth does not fit Sequential",
        "missing, in the model but not in the file (1)",
        "1.bias",
        "unexpected, in the file but not in the model (1)",
        "extra",
        "different shape (2)",
        "0.bias: model [3], file [5]",
        "1.weight: model [4, 3], file [9, 3]",
    ):
        assert part in text
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert not list_key_differences(model, before)


def test_tolerated_differences_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    state = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3), "old.mask": torch.ones(1)}
    found = load_strict(model, state, allow_missing=["1.*"], allow_unexpected=["*.mask"], source="f")
    assert found.tolerated == ("1.weight", "1.bias", "old.mask")
    assert torch.equal(model[0].weight, torch.ones(3, 2))
    assert "1.weight, 1.bias, old.mask" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"1\.bias"):
        load_strict(model, state, allow_missing=["1.weight"], allow_unexpected=["*.mask"])


def test_a_model_without_storage_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="meta device"):
        load_strict(model, nn.Linear(2, 2).state_dict())


def with_lists_filled_later(levels: int = 40) -> bytes:
    made = b"".join(b"]q%c0" % level for level in range(levels))
    return (
        b"\x80\x02"
        + made
        + b"".join(b"h%c(h%ch%ce" % (n + 1, n, n) for n in range(levels - 1))
        + b"h%c." % (levels - 1)
    )


WITHOUT_END = "its values lie in each other or share parts without end"
BOMBS = {
    "shared tuples": (b"\x80\x02)q\0" + b"h\0h\0\x86q\0" * 40 + b"}h\0K\1s.", WITHOUT_END),
    "shared lists": (b"\x80\x02]q\0" + b"](h\0h\0eq\0" * 40 + b".", WITHOUT_END),
    "lists filled later": (with_lists_filled_later(), WITHOUT_END),
    "a list in itself": (b"\x80\x02]q\0h\0a.", WITHOUT_END),
    "deep tuples": (b"\x80\x02})" + b"\x85" * 200_000 + b"K\1s.", WITHOUT_END),
    "a long name": (b"\x80\x02ccollections" + b"a" * 200_000 + b"\nb\n.", "it names something of 2000"),
    "no ASCII": (b"\x80\x02c" + "é".encode() * 200_000 + b"\nb\n.", "it names something with letters that no name has"),
    "a text as a function": (b"\x80\x02X\0\0\4\0" + b"a" * 2**18 + b")R.", "it calls what is no function"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("form", ["zip", "zip, with another", "legacy", "legacy, before a zip"])
@pytest.mark.parametrize("name", BOMBS)
def test_values_without_end_are_refused_at_once(tmp_path: Path, name: str, form: str) -> None:
    """Also where another reader of archives would see something harmless."""
    bomb, message = BOMBS[name]
    path = tmp_path / "bomb.pth"
    torch.save({}, tmp_path / "harmless.pth")
    torch.save({}, path, _use_new_zipfile_serialization=form.startswith("zip"))
    if form.startswith("legacy"):
        content = path.read_bytes()
        empty = b"\x80\x02}q\x00."
        assert content.count(empty) == 1
        more = (tmp_path / "harmless.pth").read_bytes() if "before" in form else b""
        path.write_bytes(content.replace(empty, bomb) + more)
    else:
        with zipfile.ZipFile(path) as archive:
            parts = {entry: archive.read(entry) for entry in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for entry, content in parts.items():
                if entry.endswith("data.pkl"):
                    for each in [content, bomb] if "another" in form else [bomb]:
                        archive.writestr(entry, each)
                else:
                    archive.writestr(entry, content)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=rf"bomb\.pth: {message}"):
        load_safely(path)
    assert time.monotonic() - started < 5


def test_shared_tuples_of_a_usual_size_are_read(tmp_path: Path) -> None:
    shared = (1, (2, 3))
    torch.save({"a": [shared, shared], "b": (shared, shared), ("k", shared): 1}, tmp_path / "shared.pth")
    found = load_safely(tmp_path / "shared.pth")
    assert found == {"a": [shared, shared], "b": (shared, shared), ("k", shared): 1}


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.pth"
    torch.save({"x": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in parts.items():
            archive.writestr(entry, content)
    with pytest.raises(CheckpointError, match=r"small\.pth: found a compressed archive"):
        load_safely(path)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda state: state | {"weight": state["weight"].to(torch.complex64)}, r"weight \(complex64\)"),
        (lambda state: state | {"weight": state["weight"].to_sparse()}, r"weight \(sparse_coo\)"),
        (lambda state: state | {"weight": state["weight"].to("meta")}, r"weight \(without data\)"),
        (lambda state: state | {"bias": state["bias"] * float("nan")}, r"bias \(not finite\)"),
        (lambda state: state | {"bias": torch.ones(1).expand(2)}, r"bias \(one value in many places\)"),
        (lambda state: state | {7: state["bias"]}, r"7 \(the name is a int\)"),
    ],
)
def test_tensors_that_are_no_weights_are_named(change: Any, finding: str) -> None:
    with pytest.raises(CheckpointError, match=rf"f holds tensors that are no weights: {finding}"):
        select_state(change(dict(nn.Linear(2, 2).state_dict())), source="f")


def test_whole_numbers_for_weights_are_named() -> None:
    state = {key: value.to(torch.int8) for key, value in nn.Linear(2, 2).state_dict().items()}
    with pytest.raises(CheckpointError, match=r"different kind of numbers \(2\):\n  weight: model float32, file int8"):
        load_strict(nn.Linear(2, 2), state, source="f")
    halves = {key: value.half() for key, value in nn.Linear(2, 2).state_dict().items()}
    load_strict(nn.Linear(2, 2), halves, source="f")


def test_weights_are_found_in_the_usual_places() -> None:
    weights = nn.Linear(2, 2).state_dict()
    assert select_state(weights).keys() == weights.keys()
    assert select_state({"model": weights, "epoch": 1}).keys() == weights.keys()
    wrapped = {f"module._orig_mod.{key}": value for key, value in weights.items()}
    assert select_state({"state_dict": wrapped, "args": None}).keys() == weights.keys()
    assert select_state({"state_dict_ema": weights}, ["state_dict_ema"]).keys() == weights.keys()
    with pytest.raises(CheckpointError, match="found the keys epoch, args"):
        select_state({"epoch": 1, "args": {}}, source="f")
    with pytest.raises(CheckpointError, match="found a list"):
        select_state([1])


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def make_state(**parts: Any) -> TrainingState:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return TrainingState(model, optimizer, **parts)


def test_manager_keeps_last_and_best(tmp_path: Path) -> None:
    manager, state = CheckpointManager(tmp_path), make_state()
    improved = []
    for epoch, accuracy in enumerate((50.0, 70.0, 70.0, float("nan"), 60.0), start=1):
        state.progress.epoch = epoch
        improved.append(manager.save(state, {"top1_percent": accuracy}))
    assert improved == [True, True, False, False, False]
    assert load_safely(manager.best)["progress"]["epoch"] == 2
    last = load_safely(manager.last)
    assert (last["progress"]["epoch"], last["progress"]["best"], last["epoch"]) == (5, 70.0, 4)
    lower = CheckpointManager(tmp_path / "loss", metric="loss", higher_is_better=False)
    assert lower.improves(1.0, 2.0)
    assert not lower.improves(2.0, 1.0)
    with pytest.raises(KeyError, match="top1_percent"):
        manager.save(state, {"loss": 1.0})


def test_resume_says_what_a_file_lacks(tmp_path: Path) -> None:
    state = make_state()
    manager = CheckpointManager(tmp_path)
    assert manager.resume(state, "auto") is False
    with pytest.raises(CheckpointError, match="no such file"):
        manager.resume(state, tmp_path / "x.pth")
    save_atomic({"weights": 1}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="expected the key 'model', found weights"):
        manager.resume(state, tmp_path / "x.pth")
    save_atomic({"model": state.model.state_dict()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="lacks optimizer"):
        manager.resume(state, tmp_path / "x.pth")
    for key, odd in (("progress", {"epochs": 1}), ("ranks", 5), ("extra", None)):
        whole = make_state(extra={"optimizer": state.optimizer}).state_dict()
        save_atomic({**whole, key: odd}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=r"x\.pth: cannot resume from it: its content is damaged, or another"):
            manager.resume(make_state(extra={"optimizer": state.optimizer}), tmp_path / "x.pth")
    manager.save(state)
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="does not fit Sequential"):
        manager.resume(TrainingState(other, torch.optim.AdamW(other.parameters())))
    wide = torch.optim.AdamW([{"params": [weight]} for weight in state.model.parameters()])
    with pytest.raises(CheckpointError, match="optimizer does not fit"):
        manager.resume(TrainingState(state.model, wide))
    with pytest.raises(CheckpointError, match="extra state 'duals'"):
        manager.resume(make_state(extra={"duals": torch.optim.SGD([torch.zeros(1, requires_grad=True)])}))


def test_resume_of_an_official_file_starts_at_its_next_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official = make_state()
    assert isinstance(official.optimizer, torch.optim.AdamW)
    content = {
        "model": official.model.state_dict(),
        "optimizer": official.optimizer.state_dict(),
        "epoch": 6,
        "scaler": {},
        "args": argparse.Namespace(output_dir=Path("/checkpoint"), lr=1.0),
    }
    torch.save(content, tmp_path / "checkpoint.pth")
    state = make_state()
    CheckpointManager(tmp_path).resume(state, tmp_path / "checkpoint.pth")
    assert state.progress.epoch == 7
    assert torch.equal(state.model.weight, official.model.weight)  # pyright: ignore[reportArgumentType]
    assert "continuing at epoch 7" in capsys.readouterr().err


def test_another_number_of_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = make_state()
    content = state.state_dict()
    content["ranks"] = content["ranks"] * 2
    make_state().load_state_dict(content, source="f")
    assert "written by 2 processes and is resumed by 1" in capsys.readouterr().err
    content["progress"]["batch"] = 3
    with pytest.raises(CheckpointError, match="within an epoch of 2 processes"):
        make_state().load_state_dict(content, source="f")


def test_changed_arguments_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(make_state(arguments={"lr": 1.0, "out": Path("a")}))
    manager.resume(make_state(arguments={"lr": 2.0, "out": Path("a")}))
    err = capsys.readouterr().err
    assert "lr 1.0 -> 2.0" in err
    assert "out" not in err.split("changed")[1].splitlines()[0]


def test_plain_keeps_shared_weights_and_order() -> None:
    weights = nn.Linear(2, 2).state_dict()
    copy = plain({"a": weights, "b": weights})
    assert list(copy["a"]) == list(weights)
    assert copy["a"]["weight"].data_ptr() == copy["b"]["weight"].data_ptr()


def test_a_head_for_other_classes_stays_the_models_own(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("common"), "propagate", True)
    model = nn.Sequential()
    model.add_module("head", nn.Linear(3, 2))
    kept = keep_own_heads(model, {"head.weight": torch.ones(5, 3), "head.bias": torch.ones(2)}, source="f.pth")
    assert torch.equal(kept["head.weight"], model.state_dict()["head.weight"])
    assert torch.equal(kept["head.bias"], torch.ones(2))
    assert "f.pth: head.weight is for 5 classes, the network has 2" in caplog.text


@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt, OSError])
def test_what_interrupts_the_writing_of_a_checkpoint_is_what_is_raised(raised, tmp_path, monkeypatch):
    """A handler of a signal may end the process in the middle of torch's writer, which then complains of its own."""
    path = tmp_path / "state.pth"
    save_atomic({"x": torch.zeros(3)}, path)
    before = path.read_bytes()

    @contextlib.contextmanager
    def interrupted(path):
        with replacing(path) as file:
            write = file.write

            def fail(content):
                if file.tell() > 10_000:
                    raise raised("in between")
                return write(content)

            yield types.SimpleNamespace(
                **{name: getattr(file, name) for name in ("tell", "seek", "read", "flush")}, write=fail
            )

    monkeypatch.setattr("common.run.checkpoint.writing.replacing", interrupted)
    with pytest.raises(raised, match="in between"):
        save_atomic({f"w{n}": torch.randn(1000) for n in range(20)}, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["state.pth"]
