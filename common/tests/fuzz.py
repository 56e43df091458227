"""What reads files, given files that nobody would write: valid ones damaged, rearranged, and made of odd values.

    python -m common.tests.fuzz --minutes 60        # or make fuzz MINUTES=60; prints inputs, crashes and hangs

Anything but success or the reader's named error is a crash, and so is a small file that takes long or much memory.
``test_fuzz.py`` runs a few hundred inputs of the same readers, always the same ones.
"""

import argparse
import collections
import contextlib
import copy
import faulthandler
import gzip
import io
import json
import logging
import os
import pickle
import pickletools
import resource
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import timm
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from PIL import Image
from safetensors.torch import save
from torch import nn
from torch._weights_only_unpickler import _get_allowed_globals

import leanvit
from common.data.datasets import build_dataset
from common.hosts.__main__ import methods as read_methods
from common.hosts.files import KEY
from common.hosts.network import make_method
from common.ledger import evidence, results, tables
from common.run.checkpoint import (
    CheckpointError,
    TrainingState,
    load_safely,
    load_strict,
    plain,
    save_atomic,
    save_described,
    select_state,
)
from common.run.errors import DataError, UsageError
from common.run.flags import make_parser, positive_float
from common.tests.fake_paper import TABLE, write_paper
from common.tests.forks import run_forked
from scala.loading import load_trained
from scala.models_scala import VisionTransformer_scala
from scala.standalone import METADATA_KEY, describe, load_standalone, standalone_state
from uvc.compact_files import KEY as COMPACT
from uvc.compact_files import load_compact, save_compact
from uvc.loading import load_masked
from uvc.removal import compress
from uvc.tests.random_structures import random_network

SLOW_S, HANG_S, LARGE_MB = 5, 60, 1500
"""Processor time of one input that counts as a crash, time after which the process is ended, memory that is a crash."""

TEXT = st.text(max_size=8) | st.sampled_from(
    ["", "..", "é\n", "0", "-1", "true", "{}", "{x", "a/b/1/c", "1e999", "-" * 9000 + "1", "(" * 150]
)
NUMBERS = (
    st.integers(-3, 40)
    | st.sampled_from([2**31, 2**63 - 1, -(2**63), 10**12, 10**400])
    | st.floats()
    | st.sampled_from([0.0, 0.5, 1.5, float("nan"), float("inf"), 1e308, 5e-324])
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)


EXTREMES = [b"\xff" * 8, bytes(8), b"[" * 9000, b'{"a":' * 9000, b"-" * 9000 + b"1", b"9" * 5000]

# -------------------------------------------------- what happens to a valid input


@st.composite
def damaged(draw: st.DrawFn, content: bytes, *, most: int = 4) -> bytes:
    """Bytes with a few places replaced, removed, repeated, filled in, or with the end cut off."""
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.integers(0, 24)))
        how = draw(st.sampled_from(["replace", "flip", "remove", "insert", "repeat", "move", "cut"]))
        if how == "cut":
            content = content[:at]
        elif how == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
        elif how == "repeat":
            content = content[:end] + content[at:]
        elif how == "move":
            to = draw(st.integers(0, len(content)))
            content = content[:to] + content[at:end] + content[to:]
        else:
            new = b"" if how == "remove" else draw(st.binary(max_size=24) | st.sampled_from(EXTREMES))
            content = content[:at] + new + content[at if how == "insert" else end :]
    return content


@st.composite
def changed(draw: st.DrawFn, value: Any, *, odd: st.SearchStrategy[Any] = JSON, most: int = 3) -> Any:
    """Nested lists and dicts with a few values replaced, removed, renamed, copied elsewhere or put a level deeper."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        holder, key = {"": value}, ""
        inner: Any = value
        while isinstance(inner, (dict, list)) and inner and draw(st.integers(0, 7)):
            holder, key = inner, draw(st.sampled_from(list(inner) if isinstance(inner, dict) else range(len(inner))))
            inner = holder[key]
        if holder == {"": value} or not holder:
            continue
        how = draw(st.sampled_from(["replace"] * 4 + ["remove", "rename", "copy", "wrap", "repeat"]))
        if how == "replace":
            holder[key] = draw(odd)
        elif how == "remove":
            del holder[key]
        elif how == "wrap":
            holder[key] = draw(st.sampled_from([[inner], {"x": inner}, str(inner)]))
        elif how == "copy":
            holder[key] = copy.deepcopy(holder[draw(st.sampled_from(list(holder)))] if isinstance(holder, dict)
                                        else draw(st.sampled_from(holder)))  # fmt: skip
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(inner))
        else:
            holder[draw(TEXT)] = holder.pop(key) if how == "rename" else copy.deepcopy(inner)
    return value


# -------------------------------------------------- the readers


@dataclass(frozen=True)
class Reader:
    """Something that reads: ``read(data, folder)`` draws an input, writes it into the empty folder and reads it."""

    read: Callable[[st.DataObject, Path], None]
    errors: tuple[type[Exception], ...]
    examples: int
    """inputs in the suite"""


READERS: dict[str, Reader] = {}


def reader(*errors: type[Exception], examples: int) -> Callable[[Callable[[st.DataObject, Path], None]], Any]:
    def add(read: Callable[[st.DataObject, Path], None]) -> Any:
        READERS[read.__name__] = Reader(read, errors, examples)
        return read

    return add


def attempt(which: Reader, data: st.DataObject) -> None:
    """One input. An error that is not the reader's own goes through."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "here")
        folder.mkdir()
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with contextlib.suppress(*which.errors):
            which.read(data, folder)
        seconds = time.process_time() - started
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert seconds < SLOW_S, f"took {seconds:.1f} s"
    assert memory < LARGE_MB, f"took {memory:.0f} MB"


def made(write: Callable[[Path], Any]) -> bytes:
    """The bytes of a file that ``write`` makes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "made")
        return Path(write(path) or path).read_bytes()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of reading a file says which."""
    try:
        yield
    except CheckpointError as error:
        if str(path) not in str(error):
            raise AssertionError(f"does not name the file: {error}") from error
        raise


def weights() -> dict[str, Any]:
    return {"weight": torch.arange(6.0).reshape(3, 2), "bias": torch.zeros(3)}


@cache
def checkpoints() -> Mapping[str, bytes]:
    """A small file of each kind."""
    args = argparse.Namespace(lr=np.float32(0.5), out=Path("runs"), table=np.arange(4), dtype=torch.float16, n=None)
    official = {"model": weights(), "args": args, "epoch": 3, "d": collections.defaultdict(list, {1: [2]})}
    return {
        "ours.pth": made(lambda path: save_atomic({"model": weights(), "epoch": 1}, path) and None),
        "zip.pth": made(partial(torch.save, official)),
        "legacy.pth": made(partial(torch.save, official, _use_new_zipfile_serialization=False)),
        "pickle.pth": pickle.dumps({"epoch": 1, "args": (1, 2.5, "x")}, protocol=2),
        "net.safetensors": save(weights(), {"format": "pt"}),
        "described.safetensors": made(lambda path: save_described(path, weights(), "key", '{"a": 1}')),
    }


def use_weights(path: Path) -> None:
    with naming(path):
        state = select_state(load_safely(path), source=str(path))
        load_strict(nn.Linear(2, 3), state, source=path)


@reader(CheckpointError, examples=150)
def checkpoint(data: st.DataObject, folder: Path) -> None:
    name = data.draw(st.sampled_from(list(checkpoints())))
    path = folder / name
    path.write_bytes(data.draw(damaged(checkpoints()[name])))
    use_weights(path)


@cache
def operations(content: bytes) -> Sequence[bytes]:
    """The operations of a pickle."""
    places = [place or 0 for *_, place in pickletools.genops(content)]
    return [content[one:other] for one, other in zip(places, [*places[1:], len(content)], strict=True)]


# fmt: off
GLOBALS = [
    *sorted(_get_allowed_globals()), "numpy.ndarray", "numpy.dtype", "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar", "argparse.Namespace", "pathlib.PosixPath", "os.system", "builtins.eval",
]
PIECES = (
    st.sampled_from([
        *(bytes([byte]) for byte in b"()}]tldRbsuae021NQ."),
        b"\x85", b"\x86", b"\x87", b"\x88", b"\x81", b"q\0", b"h\0", b"h\1", b"K\0", b"K\1", b"M\xff\xff",
        b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8a\x05\0\0\0\0\1",
        b"G\x7f\xf0\0\0\0\0\0\0", b"X\1\0\0\0x", b"X\3\0\0\0cpu", b"U\1<",
    ])
    | st.sampled_from(GLOBALS).map(lambda name: b"c" + "\n".join(name.rsplit(".", 1)).encode() + b"\n")
    | st.integers(-(2**70), 2**70).map(lambda value: pickle.dumps(value, 2)[2:-1])
    | st.binary(max_size=3)
)
# fmt: on


@st.composite
def rearranged(draw: st.DrawFn, parts: Sequence[bytes]) -> bytes:
    """A pickle with a few operations removed, added, replaced, repeated or taken from elsewhere in it."""
    found = list(parts)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(found) - 1)) if found else 0
        how = draw(st.sampled_from(["replace", "insert", "remove", "move", "repeat"]))
        length = draw(st.integers(1, 4))
        new = [draw(PIECES) for _ in range(length)] if how in ("replace", "insert") else []
        if how == "move":
            to = draw(st.integers(0, len(found)))
            found[to:to] = found[at : at + length]
        elif how == "repeat":
            found[at:at] = found[at : at + length] * draw(st.integers(1, 40))
        else:
            found[at : at if how == "insert" else at + length] = new
    return b"".join(found)


@reader(CheckpointError, examples=250)
def pickled(data: st.DataObject, folder: Path) -> None:
    """Checkpoints whose pickle is another, and the archive around it whole."""
    path = folder / "net.pth"
    with zipfile.ZipFile(io.BytesIO(checkpoints()["zip.pth"])) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            inside = name.partition("/")[2]
            new = data.draw(rearranged(operations(content))) if inside == "data.pkl" else content
            archive.writestr(name, new)
    use_weights(path)


def with_header(content: bytes, header: Any) -> bytes:
    """A safetensors file with another header before its numbers."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :]


def header_of(content: bytes) -> Any:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


@reader(CheckpointError, examples=100)
def safetensors(data: st.DataObject, folder: Path) -> None:
    content = checkpoints()["net.safetensors"]
    path = folder / "net.safetensors"
    path.write_bytes(with_header(content, data.draw(changed(header_of(content)))))
    use_weights(path)


@cache
def training_state() -> TrainingState:
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    return TrainingState(model, optimizer, scheduler, arguments={"lr": 1.0}, extra={"duals": optimizer})


@reader(CheckpointError, examples=100)
def resumed(data: st.DataObject, folder: Path) -> None:
    """The state of a training run."""
    odd = JSON | st.sampled_from([torch.zeros(3), torch.ones(2, 2, dtype=torch.int8), torch.tensor(float("nan"))])
    state = copy.deepcopy(training_state())
    path = folder / "last.pth"
    save_atomic(data.draw(changed(plain(state.state_dict()), odd=odd)), path)
    with naming(path):
        state.load_state_dict(load_safely(path), source=str(path))
        state.restore_random()


def described(data: st.DataObject, path: Path, content: bytes, key: str) -> None:
    """Write a file of weights with its own description changed, without the checksum that would give it away."""
    header = header_of(content)
    text = header["__metadata__"][key]
    header["__metadata__"] = {key: data.draw(
        changed(json.loads(text)).map(json.dumps)
        | damaged(text.encode()).map(lambda text: text.decode(errors="replace"))
    )}  # fmt: skip
    path.write_bytes(with_header(content, header))


@cache
def lean_files() -> Sequence[bytes]:
    """A lean network of each library."""
    from torchvision.models import VisionTransformer

    nets: list[Any] = [
        timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=3, num_heads=2, num_classes=5),
        VisionTransformer(32, 8, 3, 2, 32, 64, num_classes=5),
    ]
    with contextlib.suppress(ModuleNotFoundError):
        from transformers import ViTConfig, ViTModel

        nets.append(ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
                                       image_size=32, patch_size=8)))  # fmt: skip
    return [
        made(lambda path, net=net: leanvit.save(leanvit.lean(net.eval(), "tome", r=1, verify=False), path))
        for net in nets
    ]


@reader(CheckpointError, UsageError, examples=40)
def lean_file(data: st.DataObject, folder: Path) -> None:
    """What ``leanvit.save`` writes."""
    path = folder / "fast.safetensors"
    described(data, path, data.draw(st.sampled_from(lean_files())), KEY)
    with naming(path):
        leanvit.load(path, verify=False)


@reader(CheckpointError, UsageError, examples=40)
def slice_file(data: st.DataObject, folder: Path) -> None:
    """A width of a Scala network."""
    path = folder / "slice.safetensors"
    described(data, path, slice_bytes(), METADATA_KEY)
    with naming(path):
        load_standalone(path)


@cache
def slice_bytes() -> bytes:
    net = VisionTransformer_scala(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    text = describe(net, 0.5).to_json()
    return made(lambda path: save_described(path, standalone_state(net, 0.5), METADATA_KEY, text))


@reader(CheckpointError, UsageError, examples=40)
def compact_file(data: st.DataObject, folder: Path) -> None:
    """A compressed network of UVC."""
    path = folder / "small.safetensors"
    described(data, path, compact_bytes(), COMPACT)
    with naming(path):
        load_compact(path)


@cache
def compact_bytes() -> bytes:
    small = {"img_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return made(lambda path: save_compact(compress(random_network(1, **small)[0]), path)[0])


def arguments_changed(data: st.DataObject, path: Path, state: Any, arguments: dict[str, Any]) -> None:
    """Write a checkpoint of a run whose recorded arguments, now and then its weights, are others."""
    odd = data.draw(changed({"args": arguments}))
    weights = data.draw(st.just(state) | changed(dict(state), odd=st.sampled_from([torch.zeros(2), torch.ones(3, 3)])))
    torch.save({"model": weights, **odd} if isinstance(odd, dict) else odd, path)


@cache
def sliced_network() -> Any:
    return VisionTransformer_scala(img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=5)


@reader(CheckpointError, UsageError, examples=30)
def scala_run(data: st.DataObject, folder: Path) -> None:
    """A checkpoint of Scala, which says by its arguments what to build."""
    path = folder / "last.pth"
    bound = {"smallest_ratio": 0.25, "largest_ratio": 1.0, "granularity": 0.25, "epochs": 3}
    sizes = {"input_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
    known = {"model": "deit_so_tiny_patch16_224_scala", **bound, **sizes}
    arguments_changed(data, path, sliced_network().state_dict(), known)
    with naming(path):
        load_trained(load_safely(path), str(path))


@cache
def masked_network() -> Any:
    return random_network(1, img_size=16, embed_dim=32, depth=2, num_heads=2)[0]


@reader(CheckpointError, UsageError, examples=30)
def uvc_run(data: st.DataObject, folder: Path) -> None:
    """A checkpoint of UVC."""
    path = folder / "last.pth"
    known = {"model_type": "deit_desk", "patch_mode": "soft", "enable_jumping": 0}
    arguments_changed(data, path, masked_network().state_dict(), known)
    with naming(path):
        load_masked(path)


IMAGE = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)


@cache
def images() -> Mapping[str, bytes]:
    """A small image of each format that Pillow writes, and of the odd kinds of numbers."""
    found = {}
    grey = IMAGE[..., 0]
    kinds = {"rgb": IMAGE, "grey": grey, "deep": grey.astype(np.uint16) * 257, "float": grey.astype(np.float32) / 255}
    for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "JPEG2000", "AVIF", "DDS"):
        for kind, values in kinds.items():
            buffer = io.BytesIO()
            with contextlib.suppress(OSError, ValueError, KeyError):
                Image.fromarray(values).save(buffer, form)
                found[f"{kind}.{form.lower()}"] = buffer.getvalue()
    return found


NAMES = st.sampled_from(
    ["a.png", "b.JPEG", "c.tif", ".png", "d.txt", "-e.gif", "n\n.png", "\udcff.png", "f" * 250 + ".png"]
) | st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=6).map(
    "{}.png".format
)


@reader(DataError, examples=60)
def image_folder(data: st.DataObject, folder: Path) -> None:
    """Class folders with images, damaged ones, links, pipes, folders called like images, and odd names."""
    for split in data.draw(st.sampled_from([[], ["val"], ["train", "val"]])) or ["."]:
        for place in data.draw(
            st.lists(st.sampled_from(["a", "b", "a/inner", "é ", "c.png", "."]), min_size=1, max_size=3)
        ):
            inside = folder / split / place
            inside.mkdir(parents=True, exist_ok=True)
            for _ in range(data.draw(st.integers(0, 3))):
                put(data, folder, inside / data.draw(NAMES))
    name, how = data.draw(st.sampled_from(["folder", "imagenet"])), data.draw(st.sampled_from(["raise", "skip"]))
    use_images(build_dataset(name, folder, "val", None, on_bad_image=how), how)


def put(data: st.DataObject, folder: Path, path: Path) -> None:
    """Something at a place, unless something is there."""
    if os.path.lexists(path):
        return
    kind = data.draw(st.sampled_from(["image", "image", "damaged", "damaged", "empty", "folder", "link", "pipe"]))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(
            data.draw(st.sampled_from([folder, path.parent, path, Path("nowhere"), Path("a.png"), Path("/dev/zero")]))
        )
    else:
        content = images()[data.draw(st.sampled_from(list(images())))]
        path.write_bytes(b"" if kind == "empty" else data.draw(damaged(content)) if kind == "damaged" else content)


def use_images(dataset: Any, how: str) -> None:
    for index in range(len(dataset)):
        sample = dataset[index]
        assert sample is not None or how == "skip"
        assert sample is None or (sample[0].mode == "RGB" and min(sample[0].size) > 0)


@cache
def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("a/1.png", "b/2.jpg"):
            content = images()["rgb.png"]
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@reader(DataError, examples=60)
def tar_file(data: st.DataObject, folder: Path) -> None:
    """Images in a tar file, whose head is damaged with the checksum of the head put right, or any byte of it."""
    (folder / "val.tar").write_bytes(data.draw(damaged(archive())))
    how = data.draw(st.sampled_from(["raise", "skip"]))
    use_images(build_dataset("tar", folder, "val", None, on_bad_image=how), how)


@reader(DataError, examples=60)
def idx_files(data: st.DataObject, folder: Path) -> None:
    """Fashion-MNIST, compressed or not."""
    files = {
        "images-idx3": b"\0\0\x08\3\0\0\0\2\0\0\0\x1c\0\0\0\x1c" + bytes(2 * 784),
        "labels-idx1": b"\0\0\x08\1\0\0\0\2\1\2",
    }
    for kind, content in files.items():
        packed = data.draw(st.booleans())
        content = data.draw(st.just(content) | damaged(content))
        content = data.draw(st.just(gzip.compress(content)) | damaged(gzip.compress(content))) if packed else content
        (folder / f"t10k-{kind}-ubyte{'.gz' * packed}").write_bytes(content)
    use_images(build_dataset("fashion_full", folder, "val", None), "raise")


INAT = {
    "categories.json": [{"kingdom": "A", "name": "n0"}, {"kingdom": "B", "name": "n1"}],
    "train2018.json": {"annotations": [{"category_id": 1}, {"category_id": 0}]},
    "val2018.json": {"images": [{"file_name": "train_val2018/A/0/t0.png"}, {"file_name": "train_val2018/B/1/t1.png"}]},
}


@reader(DataError, examples=80)
def inaturalist(data: st.DataObject, folder: Path) -> None:
    """The JSON lists."""
    for name, content in data.draw(changed(INAT) | st.just(INAT)).items():
        text = json.dumps(content).encode()
        with contextlib.suppress(OSError, ValueError):  # a name that no file can have
            (folder / name).write_bytes(data.draw(st.just(text) | damaged(text)))
    dataset: Any = build_dataset(
        "inat18", folder, "val", None, inat_category=data.draw(st.sampled_from(["name", "kingdom"]))
    )
    for index in range(len(dataset)):
        with contextlib.suppress(DataError):
            dataset[index]


# -------------------------------------------------- tables and records


def toml(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value) if isinstance(value, (str, bool)) else '""' if value is None else f"{value}"


@reader(tables.TableError, examples=100)
def table(data: st.DataObject, folder: Path) -> None:
    """A published table: its values changed, or its text."""
    path = write_paper(folder)
    if data.draw(st.booleans()):
        content = data.draw(changed(tables.tomllib.loads(TABLE)))
        path.write_text("\n".join(f"{json.dumps(str(key))} = {toml(value)}" for key, value in content.items()))
    else:
        path.write_bytes(data.draw(damaged(TABLE.encode())))
    for found in tables.load_tables("fakepaper", root=folder):
        for row in found.rows:
            assert all(row.command(name) for name in row.published if not row.cited)
            assert all(found.columns and value.is_finite() for value in row.published.values())


CLAIM = dict.fromkeys(("id", "claim", "source", "published", "measured"), "x")
CLAIMS = {"claims": [{**CLAIM, "comparisons": [{"label": "x", "arm": ["a"], "against": ["b"]}]}]}
SEED = {
    "paper": "fakepaper",
    "seed": 1,
    "runs": {"run": {"arms": {"a": {"top1_percent": 1.0}, "b": {"top1_percent": 2}}}},
}


@reader(tables.TableError, examples=80)
def claims(data: st.DataObject, folder: Path) -> None:
    """Claims, and the measurements that speak for or against them."""
    write_paper(folder)
    content = data.draw(changed(CLAIMS))
    text = "\n".join(f"{json.dumps(str(key))} = {toml(value)}" for key, value in content.items()).encode(
        errors="replace"
    )
    (folder / "fakepaper/tables/claims.toml").write_bytes(data.draw(st.just(text) | damaged(text)))
    seeds = [evidence.record_file("fakepaper", number, root=folder) for number in range(2)]
    seeds[0].parent.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(seeds):
        path.write_text(json.dumps(data.draw(changed({**SEED, "seed": number}))))
    found = evidence.recorded("fakepaper", root=folder)
    for claim in evidence.load_claims("fakepaper", root=folder):
        for comparison in claim.comparisons:
            evidence.judge(comparison, found)


ORIGIN = {
    "created": "2026-01-02T03:04:05+00:00", "commit": "0123", "command": "make gpu", "part": "p",
    "device": {"name": "H200", "type": "cuda", "torch": "2"}, "left_out": ["x"], "programs": {"fakepaper/x": {"a": 1}},
}  # fmt: skip
RECORD = results.Record(
    "fakepaper", "main", "half", "fps", 41.5, "dense", 20.0, 2.07, "float32", 1, 512, spread_percent=1
)


@reader(results.RecordError, examples=100)
def record(data: st.DataObject, folder: Path) -> None:
    """Measurements made elsewhere: what is accepted is filed, and read again as it was."""
    write_paper(folder)
    content = {"format": 1, **ORIGIN, "records": [RECORD.as_dict()]}
    text = json.dumps(data.draw(changed(content))).encode()
    path = folder / "part.json"
    path.write_bytes(data.draw(st.just(text) | damaged(text)))
    results.add(path, root=folder)
    results.add(path, root=folder)
    for filed in results.load_records("fakepaper", root=folder):
        assert filed.origin.text
        assert str(filed)
        assert filed.value > 0


# -------------------------------------------------- methods in words


@reader(argparse.ArgumentTypeError, UsageError, examples=100)
def method_words(data: st.DataObject, folder: Path) -> None:
    """What ``python -m common.hosts --methods`` takes."""
    del folder
    text = data.draw(
        st.sampled_from(
            ["tome:r=1|2,prop_attn=false", "hourglass:layer=3,clusters=(4,4)+evit:layers=(6,9)", "evit:keep=0.5"]
        )
    )
    odd = data.draw(damaged(text.encode())).decode(errors="replace")
    for wanted in read_methods(data.draw(st.sampled_from([odd, odd + ",a=1|2" * 30]))):
        for name, values in wanted.methods:
            make_method(name, values)


# -------------------------------------------------- the long form


@dataclass
class Outcome:
    """What a part of the long form found."""

    inputs: int = 0
    crashes: dict[str, str] = field(default_factory=dict)
    """place and kind -> traceback"""


def explore(name: str, number: int, seconds: float) -> Outcome:
    """Inputs of one reader for some time; a hang ends the process."""
    outcome, end = Outcome(), time.monotonic() + seconds
    logging.disable()
    warnings.simplefilter("ignore")
    faulthandler.enable()

    def one(data: st.DataObject) -> None:
        outcome.inputs += 1
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        attempt(READERS[name], data)

    while time.monotonic() < end:
        number += 1
        run = settings(max_examples=500, deadline=None, database=None, phases=[Phase.generate],
                       suppress_health_check=list(HealthCheck))(given(st.data())(one))  # fmt: skip
        try:
            seed(number)(run)()
        except Exception as error:
            for each in error.exceptions if isinstance(error, ExceptionGroup) else [error]:
                last = traceback.extract_tb(each.__traceback__)[-1]
                lines = "".join(traceback.format_exception(each, chain=False)).splitlines()
                text = "\n".join(line[:300] for line in lines)  # one may hold a whole input
                outcome.crashes.setdefault(f"{name}: {type(each).__name__} at {last.filename}:{last.lineno}", text)
    faulthandler.cancel_dump_traceback_later()
    return outcome


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog="python -m common.tests.fuzz")
    parser.add_argument("--minutes", type=positive_float, default=60.0, help="for all readers together (default: 60)")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS), help="(default: all)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="(default: the time)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 1 if anything was found."""
    args = parse_args(argv)
    counts, crashes, hangs = collections.Counter[str](), dict[str, str](), 0
    rounds = max(1, round(args.minutes / (len(args.readers) * 0.5)))  # of half a minute for each reader
    seconds = args.minutes * 60 / (rounds * len(args.readers))
    for turn in range(rounds):
        for name in args.readers:
            start = args.seed + 1_000_000 * turn
            (ended,) = run_forked(partial(explore, name, start, seconds), timeout_s=10 * seconds + 10 * HANG_S)
            if ended.result is None:
                hangs += (hung := "Timeout (" in ended.output or ended.status == -9)
                crashes |= {} if hung else {f"{name}: ended with {ended.status}": ""}
                print(f"{name}, seed {start}: {'hung' if hung else 'died'}\n{ended.output}", flush=True)
                continue
            counts[name] += ended.result.inputs
            for place in ended.result.crashes.keys() - crashes.keys():
                print(f"{place} (seed {start})\n{ended.result.crashes[place]}", flush=True)
            crashes |= ended.result.crashes
    print(", ".join(f"{name} {count:,}" for name, count in counts.items()))
    print(f"inputs {counts.total():,}, crashes {len(crashes)}, hangs {hangs}")
    return int(bool(crashes or hangs))


if __name__ == "__main__":
    from common.tests import fuzz  # under its own name, by which other processes find it

    sys.exit(fuzz.main())
