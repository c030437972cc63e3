"""Hostile and broken files: each through the command that reads it, in a process of its own.

``python -m tests.reliability.hostile [EVERY]`` prints what went wrong, and the figures; with EVERY
only each such case is tried. A case is a small study that is whole but for one file.
"""

import gzip
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[2]
SECONDS, BYTES = 10, 1 << 30
"""What a case may take, and how much more memory than the warm process."""
EACH = 30
"""Cases of each kind of file, at least: what is listed first, then seeded damage."""
BAD = "000009"
"""The subject whose file is hostile, where it is one subject's."""
SHAPE, AFFINE = (22, 23, 24), np.diag([8.0, 8, 8, 1])


class Bomb:
    """What unpickling would run: it leaves a file."""

    def __init__(self, marker: str = "beside/executed"):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


# --------------------------------------------------------------------------------- honest files


def volume(seed: int, shape=SHAPE) -> np.ndarray:
    values = np.random.default_rng(seed).uniform(0.1, 0.9, shape).astype(np.float32)
    values[:3] = 0
    return values


def nifti(values: np.ndarray, affine=AFFINE) -> bytes:
    return nib.Nifti1Image(values, affine).to_bytes()


def packed(content: bytes) -> bytes:
    return gzip.compress(content, 1, mtime=0)


def zipped(*files: tuple, method=zipfile.ZIP_DEFLATED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return content.getvalue()


def array(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, values, allow_pickle=True)
    return content.getvalue()


def saved(values) -> bytes:
    import torch

    content = io.BytesIO()
    torch.save(values, content)
    return content.getvalue()


def series(seed: int) -> dict[str, bytes]:
    """A diffusion series of 13 volumes."""
    draw = np.random.default_rng(seed)
    bvals = np.array([5.0, *[1000.0] * 12])
    bvecs = draw.normal(size=(13, 3))
    bvecs /= np.linalg.norm(bvecs, axis=1, keepdims=True)
    data = draw.uniform(200, 900, (6, 5, 4, 13)).astype(np.float32)
    texts = [" ".join(f"{x:.7f}" for x in row) for row in (bvals, *bvecs.T)]
    return {
        "data.nii.gz": packed(nifti(data)),
        "bvals": texts[0].encode(),
        "bvecs": "\n".join(texts[1:]).encode(),
        "nodif_brain_mask.nii.gz": packed(nifti(np.ones((6, 5, 4), np.uint8))),
        "grad_dev.nii.gz": packed(nifti(np.full((6, 5, 4, 9), 0.01, np.float32))),
    }


def table(rows: list[str], header: str) -> bytes:
    return "\n".join([header, *rows, ""]).encode()


PEOPLE = [*(f"00000{n}" for n in range(1, 9)), BAD]
SEX = dict(zip(PEOPLE, "FMFMFMFMF"))


def study(folder: Path) -> None:
    """Files of every kind, all whole, but for what commands make of them (`finish`)."""
    files = {
        "archives/000001.zip": zipped(("000001/FA.nii.gz", packed(nifti(volume(1))))),
        f"archives/{BAD}.zip": zipped(
            ("notes.txt", b"notes"),
            ("inner.zip", zipped((f"{BAD}/T1w/{BAD}_FA.nii.gz", packed(nifti(volume(9)))))),
        ),
        "packages/000001_3T_Diffusion_preproc.zip": zipped(
            *((f"000001/T1w/Diffusion/{name}", each) for name, each in series(1).items())
        ),
        f"packages/{BAD}_3T_Diffusion_preproc.zip": zipped(
            *((f"{BAD}/T1w/Diffusion/{name}", each) for name, each in series(9).items())
        ),
        "study/unrestricted_behavioral.csv": table(
            [f"{who},{SEX[who]},22-25," for who in PEOPLE], "Subject,Gender,Age,QC_Issue"
        ),
        "study/restricted.csv": table(
            [f"{who},F{n // 2},{22 + n}" for n, who in enumerate(PEOPLE)],
            "Subject,Family_ID,Age_in_Yrs",
        ),
        "study/unrestricted_hcp_freesurfer.csv": table(
            [f"{who},S900,{SEX[who]},{1500000 + n},{n}.5" for n, who in enumerate(PEOPLE)],
            "Subject,Release,Gender,FS_IntraCranial_Vol,FS_L_Thalamus_Vol",
        ),
        "bids/participants.tsv": table(
            [f"sub-{who}\t{SEX[who]}\t30" for who in PEOPLE], "participant_id\tsex\tage"
        ),
        "tbss/stats/all_FA.nii.gz": packed(
            nifti(np.stack([volume(1), volume(2), volume(9)], axis=-1))
        ),
        "tbss/stats/all_FA.txt": f"000001\n000002\n{BAD}\n".encode(),
        "atlas/labels.nii.gz": packed(nifti(np.arange(24, dtype=np.int16).reshape(2, 3, 4) % 3)),
        "atlas/labels.csv": b"label,name\n1,left one\n2,right two\n",
        "atlas/labels.json": b'{"1": "left one", "2": "right two"}',
        "atlas/labels.txt": b"1 left one\n2 right two 10 20 30 0\n",
        "atlas/labels.xml": b"<atlas><header><type>Label</type></header><data>"
        b'<label index="1">left one</label><label index="2">right two</label></data></atlas>',
    }
    files["tbss/unrestricted_behavioral.csv"] = files["study/unrestricted_behavioral.csv"]
    for n, who in enumerate(PEOPLE, 1):
        files[f"study/fa/{who}.nii.gz"] = packed(nifti(volume(n)))
        files[f"bids/sub-{who}/dwi/sub-{who}_FA.nii.gz"] = packed(nifti(volume(n)))
    for who, seed in (("000001", 1), (BAD, 9)):
        for name, content in series(seed).items():
            files[f"series/{who}/T1w/Diffusion/{name}"] = content
    files["cohort/tensors.npy"] = array(np.stack([volume(n) for n in range(1, 9)]))
    files["cohort/labels.npy"] = array(np.arange(8) % 2)
    files["cohort/subjects.csv"] = table(
        [f"{who},{SEX[who]},{n % 2},1500.5,F{n}" for n, who in enumerate(PEOPLE[:8])],
        "Subject,Gender,label,brain_volume_ml,group",
    )
    grid = {"shape": SHAPE, "affine": AFFINE.tolist(), "modality": "fa", "normalised": False}
    files["cohort/grid.json"] = json.dumps({**grid, "key": "0"}).encode()
    for name, content in files.items():
        place = folder / "in" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    for name in ("out", "tmp", "beside"):
        (folder / name).mkdir()
    (folder / "beside" / "mine.txt").write_text("mine")


TRAIN = "train in/cohort out/networks --channels 1 --folds 2 --epochs 1 --workers 1 --milestones"
COMMANDS = {
    "extract": "extract in/archives out/extracted",
    "fit": "fa in/series out/fitted --workers 1",
    "fit packages": "fa in/packages out/unpacked --workers 1",
    "survey": "survey in/study",
    "survey bids": "survey in/bids",
    "convert": "convert in/study --out out/converted",
    "convert bids": "convert in/bids --out out/bids",
    "convert tbss": "convert in/tbss --out out/tbss",
    "check": "check in/cohort out/checked",
    "train": TRAIN,
    "masks": "masks in/cohort out/networks out/masks",
    "predict": f"predict out/networks/fold-0.pt in/study/fa/000001.nii.gz in/study/fa/{BAD}.nii.gz",
}


def readers() -> dict[str, Callable]:
    """What notebooks call."""
    from brainsex import atlases, cohort, networks, tables, tabular

    return {
        "cohort.load": lambda: cohort.load("in/cohort"),
        "tables.read": lambda: tables.read("in/study/unrestricted_behavioral.csv"),
        "tabular.load": lambda: tabular.load("in/study/unrestricted_hcp_freesurfer.csv"),
        "networks.load": lambda: networks.load("out/networks/fold-0.pt", SHAPE),
        **{
            f"atlases.load {end}": lambda end=end: atlases.load(
                "in/atlas/labels.nii.gz", f"in/atlas/labels.{end}"
            )
            for end in ("csv", "json", "txt", "xml")
        },
    }


def finish() -> None:
    """What commands leave for others, in the working folder."""
    run("convert")
    run("train")
    run("masks")
    import torch

    from brainsex import networks

    network = networks.MriNet3d(1, SHAPE)
    optimiser = torch.optim.Adam(network.parameters())
    checkpoint = {"call": "", "history": [], "network": network.state_dict()}
    checkpoint |= {"optimiser": optimiser.state_dict(), "schedule": {}}
    Path("out/networks/.fold-0.checkpoint").write_bytes(saved(checkpoint))


def run(name: str) -> str:
    """The one line that a command or a reader ends with; empty after a success."""
    from brainsex.__main__ import main

    if name in COMMANDS:
        try:
            main(COMMANDS[name].split())
        except SystemExit as stop:
            return str(stop.code)
        return ""
    try:
        readers()[name]()
    except (ValueError, OSError) as error:
        return f"error: {error}"
    return ""


# --------------------------------------------------------------------------------- broken files


def deflated(gigabytes: float, count: int = 0) -> bytes:
    """A deflate stream of zeros, of a thousandth of their size, made at once."""
    step = 1 << 24
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = squeeze.compress(bytes(step)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return block * max(1, round(gigabytes * (1 << 30) / step)) + b"\3\0"


def gzip_bomb(gigabytes: float, start: bytes = b"") -> bytes:
    """`start`, then zeros; its checksum is wrong, which only its end shows."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = squeeze.compress(start) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + head + deflated(gigabytes) + bytes(8)


def member(name: str, data: bytes, *, size=None, stored=None, method=8, flags=0, crc=0, copies=1):
    """An archive whose headers say what they are told; more copies share one member's bytes."""
    given = name.encode()
    size = len(data) if size is None else size
    stored = len(data) if stored is None else stored
    fields = (flags, method, 0, 33, crc, stored & 0xFFFFFFFF, size & 0xFFFFFFFF, len(given), 0)
    local = b"PK\3\4" + struct.pack("<5H3I2H", 20, *fields[:4], *fields[4:])
    head = struct.pack("<6H3I5H2I", 20, 20, *fields[:7], len(given), 0, 0, 0, 0, 0, 0)
    central = copies * (b"PK\1\2" + head + given)
    body = local + given + data
    end = (0, 0, copies & 0xFFFF, copies & 0xFFFF, len(central), len(body), 0)
    return body + central + b"PK\5\6" + struct.pack("<4H2IH", *end)


def link(name: str, to: str) -> bytes:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return zipped((info, to))


def zips() -> Iterator[tuple[str, bytes]]:
    fa = packed(nifti(volume(9)))
    away = os.path.abspath("beside/evil_FA.nii.gz")
    yield "no zip", b"<html>Please log in</html>"
    yield "empty archive", zipped()
    yield "two members of one name", zipped(("FA.nii.gz", fa), ("FA.nii.gz", fa))
    for name in (
        "../" * 3 + "beside/x_FA.nii.gz",
        away,
        "..\\..\\beside\\x_FA.nii.gz",
        "C:\\FA.nii",
    ):
        yield f"member {name[:12]}", zipped((name, fa))
        yield f"inner {name[:12]}", zipped(("../../beside/in.zip", zipped((name, fa))))
    yield "link to a file", link("FA.nii.gz", away)
    yield "link as archive", link("in.zip", "/etc/passwd")
    yield "encrypted", member("FA.nii.gz", fa, flags=1, method=0)
    yield "strongly encrypted", member("FA.nii.gz", fa, flags=0x41, method=99)
    yield "patched", member("FA.nii.gz", fa, flags=0x20, method=0)
    for method in (1, 6, 9, 12, 14, 93, 98, 65535):
        yield f"method {method}", member("FA.nii.gz", fa, method=method)
    yield "NUL in a name", member("FA.nii.gz\0.exe", fa, method=0)
    yield "long name", zipped(("a" * 60000 + "_FA.nii.gz", fa))
    for gigabytes in (1, 1.9):
        data = deflated(gigabytes)
        size = round(gigabytes * 64) << 24
        yield f"declared bomb of {gigabytes} GB", member("FA.nii.gz", data, size=size)
        yield f"hidden bomb of {gigabytes} GB", member("FA.nii.gz", data, size=4000)
        yield f"inner bomb of {gigabytes} GB", member("in.zip", data, size=size)
        lie = {"size": size, "stored": 0xFFFFFFF0}
        yield f"bomb of {gigabytes} GB that says it is stored large", member("FA.nii", data, **lie)
    yield "inner bomb of 3.9 GB", member("in.zip", deflated(3.9), size=0xF9000000)
    yield "copies of a bomb", member("in.zip", deflated(0.9), size=58 << 24, copies=500)
    yield "many members", member("x.txt", b"", method=0, copies=65535)
    yield "many archives", member("in.zip", zipped(("FA.nii", b"")), method=0, copies=20000)
    yield "member said to lie beyond", member("FA.nii.gz", fa, stored=1 << 31, method=0)
    yield "negative size", member("FA.nii.gz", fa, size=0xFFFFFFFF, method=0)
    deep = zipped(("FA.nii.gz", fa))
    for _ in range(50):
        deep = zipped(("in.zip", deep))
    yield "archive fifty deep", deep
    for at in range(4, 22, 2):
        whole = bytearray(zipped(("FA.nii.gz", fa)))
        end = whole.rindex(b"PK\5\6")
        whole[end + at : end + at + 2] = b"\xff\xff"
        yield f"end record, byte {at}", bytes(whole)


FIELDS = (  # of a NIfTI header: where, how, and what is hostile in them
    (0, "i", (0, -1, 349, 540, 1543569408, 2**31 - 1)),
    (40, "h", (-1, 0, 1, 2, 4, 5, 7, 8, 32767)),
    (42, "h", (-22, 0, 1, 32767)),
    (44, "h", (-23, 0, 1, 32767)),
    (70, "h", (0, 1, 32, 128, 255, 1536, 1792, 2048, 2304, -1, 77)),
    (72, "h", (0, -1, 1, 8, 32767)),
    (76, "f", (0, np.nan, 5)),
    (80, "f", (0, -8, np.nan, np.inf, 1e-30, 1e30)),
    (108, "f", (0, -352, np.nan, np.inf, -np.inf, 1e9, 1e30, 351.5)),
    (112, "f", (0, np.nan, np.inf, -1, 1e38, 1e-45)),
    (116, "f", (np.nan, np.inf, 1e38, -1e38)),
    (252, "h", (-1, 3, 99)),
    (254, "h", (-1, 0, 99)),
    (256, "f", (np.nan, np.inf, 2)),
    (280, "f", (0, np.nan, np.inf, 1e38, 1e-38)),
    (344, "4s", (b"ni1\0", b"n+2\0", b"\0\0\0\0", b"NIFT")),
    (348, "4s", (b"\1\0\0\0", b"\xff\xff\xff\xff")),
    (352, "i", (-1, 7, 16, 2**31 - 1)),
)


def headers(whole: bytes) -> Iterator[tuple[str, bytes]]:
    for at, form, values in FIELDS:
        for value in values:
            changed = bytearray(whole)
            if at == 352:
                changed[348] = 1
            struct.pack_into("<" + form, changed, at, value)
            yield f"header, byte {at}: {value}", bytes(changed)
    huge = bytearray(whole)
    struct.pack_into("<4h", huge, 40, 3, 32767, 32767, 32767)
    yield "terabytes", bytes(huge)
    struct.pack_into("<4h", huge, 40, 3, 512, 512, 512)
    yield "half a gigabyte", bytes(huge)
    flat = bytearray(whole)
    struct.pack_into("<12f", flat, 280, *[1.0] * 12)
    yield "singular affine", bytes(flat)
    swapped = bytearray(whole)
    swapped[40:44] = swapped[40:44][::-1]
    yield "mixed byte orders", bytes(swapped)


def niftis(whole: bytes, *, gz: bool = True) -> Iterator[tuple[str, bytes]]:
    """`whole` is not gzipped."""
    end = packed if gz else bytes
    yield from ((how, end(content)) for how, content in headers(whole))
    for bad in (np.nan, np.inf, -1e30, 255):
        yield f"all {bad}", end(whole[:352] + struct.pack("<f", bad) * (len(whole) // 4 - 88))
    yield "header only", end(whole[:352])
    yield "half a header", end(whole[:200])
    if not gz:
        return
    yield "not gzipped", whole
    yield "gzip in gzip", packed(packed(whole))
    yield "two gzip members", packed(whole[:500]) + packed(whole[500:])
    yield "zip named gz", zipped(("x.nii", whole))
    yield "zeros after", packed(whole) + bytes(1000)
    honest, paired = bytearray(whole[:352]), bytearray(whole)
    yield "bomb of 2 GB behind a header", gzip_bomb(2, whole)
    struct.pack_into("<f", paired, 108, 352 - len(whole) - 1)
    paired[344:348] = b"ni1\0"
    yield "bomb behind a negative offset", gzip_bomb(2, bytes(paired))
    for side, kind, bits in ((500, 2, 8), (506, 16, 32), (320, 64, 64), (320, 1536, 128)):
        struct.pack_into("<4h", honest, 40, 3, side, side, side)
        struct.pack_into("<2h", honest, 70, kind, bits)
        size = side**3 * bits / 8 / (1 << 30)
        yield f"bomb of {side} voxels a side, type {kind}", gzip_bomb(size, bytes(honest))
    struct.pack_into("<5h", honest, 40, 4, 400, 400, 400, 300)
    yield "bomb in 4D", gzip_bomb(3, bytes(honest))


def csvs(whole: bytes) -> Iterator[tuple[str, bytes]]:
    lines = whole.decode().splitlines()
    lines = lines if len(lines) > 1 else [*lines, "000010,no reason"]
    text, cell = "\n".join(lines) + "\n", lines[1].replace("\t", ",").split(",")[0]
    mark = "\t" if "\t" in lines[0] else ","
    for encoding in ("utf-16", "utf-32", "utf-8-sig", "cp037"):
        yield encoding, text.encode(encoding)
    yield "Latin letters", text.replace(cell, "Müller").encode("latin-1")
    yield "NUL bytes", text.replace(cell, cell[:3] + "\0" + cell[3:]).encode()
    yield "NULs only", bytes(5000)
    yield "open quote", text.replace(cell, '"' + cell).encode()
    yield "quotes", text.replace(cell, f'"a""{mark}""\n"').encode()
    yield "quoted header", ('"' + text).encode()
    yield "no header", "\n".join(lines[1:]).encode()
    yield "header only", lines[0].encode()
    yield "blank lines", b"\n" * 100_000
    yield "separators only", (mark.encode() * 1000 + b"\n") * 100
    yield "one endless line", b"a" * (90 << 20)
    yield (
        "million columns",
        lambda: text.replace("\n", mark.join(["", *"x" * 1_000_000]) + "\n", 1).encode(),
    )
    ones = mark + mark.join("1" * 1_000_000)
    yield "million columns in all rows", lambda: "\n".join(line + ones for line in lines).encode()

    def names() -> bytes:
        return "\n".join(mark.join([line, *map(str, range(1_000_000))]) for line in lines).encode()

    yield "million names", names
    yield "million rows", "\n".join([lines[0], *lines[1:2] * 300_000]).encode()
    yield "cell of 20 MB", text.replace(cell, "9" * (20 << 20)).encode()
    yield "same twice", "\n".join([*lines, lines[1]]).encode()
    yield "columns twice", "\n".join(mark.join([line] * 2) for line in lines).encode()
    yield (
        "cells missing",
        "\n".join([lines[0], *(line.split(mark)[0] for line in lines[1:])]).encode(),
    )
    yield (
        "cells too many",
        "\n".join([lines[0], *(line + mark * 9 + "x" for line in lines[1:])]).encode(),
    )
    yield "script", text.replace(cell, "<script>alert(1)</script>").encode()
    for name in (
        "../../beside/evil",
        os.path.abspath("beside/evil"),
        "..",
        ".",
        "a\\..\\b",
        "x" * 300,
    ):
        yield f"ID {name[:12]}", text.replace(cell, name).encode()
    for name in ("", "nan", "\x1b[2J", "=1+1", "𝟙𝟚", "0x10"):
        yield f"ID {name!r}", text.replace(cell, name).encode()
    for column in range(lines[0].count(mark) + 1):
        parts = [line.split(mark) for line in lines]
        yield (
            f"no column {column}",
            "\n".join(mark.join(row[:column] + row[column + 1 :]) for row in parts).encode(),
        )
        for value in ("", "x", "1e400", "-1", "nan", "inf", "9" * 400, "0.5"):
            rows = [[*row[:column], value, *row[column + 1 :]] for row in parts[1:]]
            changed = [parts[0], *rows]
            yield f"column {column}: {value[:9]}", "\n".join(map(mark.join, changed)).encode()
    yield "pickle", pickled()


def jsons(whole: bytes) -> Iterator[tuple[str, bytes]]:
    content = json.loads(whole)
    yield "nothing", b""
    for text in ("null", "[]", "{}", "1", '"a"', "NaN", "[[[", '{"a": 1', "{'a': 1}"):
        yield text, text.encode()
    yield "nested", b"[" * 200_000 + b"]" * 200_000
    yield "nested objects", b'{"grid": ' * 100_000 + b"1" + b"}" * 100_000
    yield "digits", b'{"shape": ' + b"9" * 100_000 + b"}"
    yield "utf-16", whole.decode().encode("utf-16")
    yield "no text", b"\xff\xfe\0"
    yield "endless", b'{"a": "' + b"x" * (80 << 20) + b'"}'
    yield "pickle", pickled()
    for name, inner in [*content.items(), *(content.get("grid") or {}).items()]:
        for value in (None, "x", -1, 1e400, [[]], [10**6] * 3, 10**400):
            text = json.dumps(content).replace(
                f"{json.dumps(name)}: {json.dumps(inner)}",
                f"{json.dumps(name)}: {json.dumps(value)}",
            )
            yield f"{name}: {str(value)[:12]}", text.encode()
        yield f"no {name}", json.dumps({k: v for k, v in content.items() if k != name}).encode()


def pickled() -> bytes:
    import pickle

    return pickle.dumps(Bomb())


def npys(whole: bytes) -> Iterator[tuple[str, bytes]]:
    values = np.lib.format.read_array(io.BytesIO(whole))
    yield "pickle", pickled()
    yield "array of pickles", array(np.array([Bomb()] * len(values), object))
    yield "archive of pickles", npz(volume=np.array([Bomb()], object))
    for kind in ("f8", "i1", "c8", "U3", "S3", "?", "M8[s]", ">f4", "f2", "V4"):
        bare = np.zeros(values.shape, kind) if kind == "V4" else values.astype(kind)
        yield f"type {kind}", array(bare)
    yield "fields", array(np.zeros(values.shape, [("a", "f4"), ("b", "i4")]))
    yield "Fortran order", array(np.asfortranarray(values))
    yield "fewer", array(values[:-1])
    yield "none", array(values[:0])
    yield "number", array(np.array(1.0))
    yield "more dimensions", array(values[..., None])
    if values.ndim > 1:
        for bad in (np.nan, np.inf, -1e30, 0):
            yield f"all {bad}", array(np.full_like(values, bad))
        flecked = values.copy()
        flecked[..., 5, 5, 5] = np.nan
        yield "a NaN each", array(flecked)
    for label in (2, -1, 9**9):
        yield f"values {label}", array(np.full_like(values, label))
    for header in (
        "{'descr': '<f4', 'fortran_order': False, 'shape': (8, 99999, 99999, 99999)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-8, 22, 23, 24)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (8, 1e3)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (8,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2**70,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (9" + "9" * 60 + ",)}",
        "{'descr': __import__('os'), 'fortran_order': False, 'shape': (8,)}",
        "(" * 3000,
        "-" * 8000 + "1",
        "[" * 90 + "]" * 90,
        "{" * 8000,
        "'a' " * 2000,
    ):
        text = header.encode() + b"\n"
        yield f"header {header[:20]}", b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text
    for version in (b"\0\0", b"\2\0", b"\3\0", b"\x09\0"):
        yield f"version {version[0]}", whole[:6] + version + whole[8:]
    yield "header of 4 GB", b"\x93NUMPY\2\0\xff\xff\xff\xff" + b" " * 1000


def npz(**arrays) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def states(whole: bytes) -> Iterator[tuple[str, bytes]]:
    import torch

    state = torch.load(io.BytesIO(whole), weights_only=True)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    yield "pickle", pickled()
    yield "pickle in a checkpoint", saved(Bomb())
    yield "pickle beside weights", saved({**state, "more": Bomb()})
    old = io.BytesIO()
    torch.save({**state, "more": Bomb()}, old, _use_new_zipfile_serialization=False)
    yield "pickle, old format", old.getvalue()
    old = io.BytesIO()
    torch.save(state, old, _use_new_zipfile_serialization=False)
    for cut in (10, 200, len(old.getvalue()) // 2, -4):
        yield f"old format, cut at {cut}", old.getvalue()[:cut]
    yield "whole network", saved(torch.nn.Linear(2, 2))
    for value in (None, 1, "x", [], {}, {"state_dict": 1}, {"state_dict": {"state_dict": state}}):
        yield f"a {type(value).__name__} {str(value)[:14]}", saved(value)
    yield "numbers as names", saved({1: torch.zeros(1)})
    for name in list(tensors)[:3]:
        part = state[name]
        for kind in (torch.float64, torch.int8, torch.complex64, torch.bool):
            yield f"{name} {kind}", saved({**state, name: part.to(kind)})
        yield f"{name} NaN", saved({**state, name: torch.full_like(part.float(), torch.nan)})
        yield f"{name} sparse", saved({**state, name: part.to_sparse()})
        yield f"{name} meta", saved({**state, name: part.to("meta")})
        yield f"{name} text", saved({**state, name: "x"})
        wide = torch.zeros(1).expand(3000, 1, 3, 3, 3)
        yield f"{name} wide", saved({**state, name: wide})
        yield f"{name} alone and wide", saved({name: wide})
        yield f"{name} endless", saved({**state, name: torch.zeros(1).expand(10**12)})
        yield f"{name} missing", saved({key: one for key, one in state.items() if key != name})
    both = {
        "convolution.weight": torch.zeros(1).expand(4000, 3, 3, 3),
        "_extra_state": torch.ones(1),
    }
    yield "slabs, wide", saved(both)
    both["_extra_state"] = torch.ones(5)
    yield "slabs, five axes", saved(both)
    yield "depth of 10**9", saved({"convolution.weight": torch.zeros(1).expand(1, 10**9, 3, 3)})
    with zipfile.ZipFile(io.BytesIO(whole)) as source:
        files = [(info.filename, source.read(info)) for info in source.infolist()]

    def inflating() -> bytes:
        swollen = [(n, d + bytes(2000 << 20) * n.endswith("data/0")) for n, d in files]
        return zipped(*swollen)

    yield "weights that inflate", inflating
    for at, (name, data) in enumerate(files):
        for how, change in (("cut", data[: len(data) // 2]), ("pickle", pickled()), ("empty", b"")):
            changed = [*files[:at], (name, change), *files[at + 1 :]]
            yield f"{name} {how}", zipped(*changed, method=zipfile.ZIP_STORED)


def xmls(whole: bytes) -> Iterator[tuple[str, bytes]]:
    laughs = '<!DOCTYPE a [<!ENTITY l0 "lol">' + "".join(
        f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10)
    )
    yield "billion laughs", f'<?xml version="1.0"?>{laughs}]><a>&l9;</a>'.encode()
    yield (
        "file from outside",
        (
            b'<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]>'
            b'<a><label index="1">&e;</label></a>'
        ),
    )
    yield "nested", b"<a>" * 200_000 + b"</a>" * 200_000
    for index in ("x", "", "nan", "inf", "1e400", "-1", "9" * 400):
        yield f"index {index[:9]}", whole.replace(b'"1"', f'"{index}"'.encode())
    yield "no names", b'<a><label index="1"/><label/></a>'
    yield "other encoding", b'<?xml version="1.0" encoding="ebcdic-x"?><a/>'


def texts(whole: bytes) -> Iterator[tuple[str, bytes]]:
    yield "nothing", b""
    yield "no text", b"\xff\xfe\0\0" * 10
    yield "NUL bytes", whole.replace(b"0", b"\0")
    yield "utf-16", whole.decode().encode("utf-16")
    yield "endless", b"1 " * (20 << 20)
    yield "one line", b"x" * (20 << 20)
    for word in ("nan", "inf", "-1", "1e400", "x", "../../beside/evil", "0x1", "1_0", "٣"):
        yield f"word {word}", " ".join([word, *whole.decode().split(" ")[1:]]).encode()
        yield f"only {word}", " ".join(word for _ in whole.split()).encode()
        yield f"lines of {word}", "\n".join(word for _ in whole.split()).encode()
    yield "pickle", pickled()


def damaged(whole: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Damage of the kinds that disks, networks and hands do, to one layer of a file."""
    if whole[:2] == b"\x1f\x8b" and draw.random() < 0.6:
        how, content = damaged(gzip.decompress(whole), draw)
        return f"{how} within gzip", packed(content)
    at = draw.randrange(min(len(whole), draw.choice([400, len(whole)])))
    some = draw.randrange(1, 200)
    kinds = {
        "cut": lambda: whole[:at],
        "bytes missing": lambda: whole[:at] + whole[at + some :],
        "bytes more": lambda: whole[:at] + draw.randbytes(some) + whole[at:],
        "zeros": lambda: whole[:at] + bytes(some) + whole[at + some :],
        "twice": lambda: whole * 2,
        "of another type": lambda: draw.choice(
            [b"\x89PNG\r\n\x1a\n" + whole, b"%PDF-1.7" + whole, b"\x7fELF" + whole, b"", b"\n"]
        ),
        "noise": lambda: draw.randbytes(some * 10),
    }
    how = draw.choice(["bits", "bits", "bits", "bits", *kinds])
    if how != "bits":
        return how, kinds[how]()
    changed = bytearray(whole)
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        place = draw.choice([draw.randrange(len(whole)), draw.randrange(min(len(whole), 400))])
        changed[place] ^= 1 << draw.randrange(8)
    return how, bytes(changed)


ODD = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to nothing": lambda place: place.symlink_to("nowhere"),
    "a link to itself": lambda place: place.symlink_to(place.name),
    "an endless device": lambda place: place.symlink_to("/dev/zero"),
}
"""What may stand in a file's place, and is none."""


@dataclass(frozen=True)
class Kind:
    """A kind of file: where it lies, what is hostile in it, what reads it, what must stay whole."""

    place: str
    listed: Callable[[bytes], Iterator[tuple[str, bytes]]]
    runs: tuple[str, ...]
    kept: tuple[str, ...] = ()  # files of the other subjects, as they are without the bad one


def image(whole: bytes) -> Iterator[tuple[str, bytes]]:
    return niftis(gzip.decompress(whole))


FIT = f"in/series/{BAD}/T1w/Diffusion"
FITTED = ("out/fitted/000001.nii.gz", "out/fitted/000001.json")
KINDS = {
    "archives": Kind(
        f"in/archives/{BAD}.zip", lambda _: zips(), ("extract",), ("out/extracted/000001.nii.gz",)
    ),
    "diffusion packages": Kind(
        f"in/packages/{BAD}_3T_Diffusion_preproc.zip",
        lambda _: zips(),
        ("fit packages",),
        tuple(name.replace("fitted", "unpacked") for name in FITTED),
    ),
    "FA volumes": Kind(f"in/study/fa/{BAD}.nii.gz", image, ("convert", "predict"), ("tensors",)),
    "diffusion series": Kind(f"{FIT}/data.nii.gz", image, ("fit",), FITTED),
    "masks of the brain": Kind(f"{FIT}/nodif_brain_mask.nii.gz", image, ("fit",), FITTED),
    "gradient deviations": Kind(f"{FIT}/grad_dev.nii.gz", image, ("fit",), FITTED),
    "bvals": Kind(f"{FIT}/bvals", texts, ("fit",), FITTED),
    "bvecs": Kind(f"{FIT}/bvecs", texts, ("fit",), FITTED),
    "tables of people": Kind(
        "in/study/unrestricted_behavioral.csv", csvs, ("survey", "convert", "tables.read")
    ),
    "participants.tsv": Kind("in/bids/participants.tsv", csvs, ("survey bids", "convert bids")),
    "restricted.csv": Kind("in/study/restricted.csv", csvs, ("survey", "tabular.load")),
    "FreeSurfer's tables": Kind(
        "in/study/unrestricted_hcp_freesurfer.csv", csvs, ("survey", "tabular.load")
    ),
    "4D files": Kind("in/tbss/stats/all_FA.nii.gz", image, ("convert tbss",)),
    "lists of IDs": Kind("in/tbss/stats/all_FA.txt", texts, ("convert tbss",)),
    "tensors.npy": Kind("in/cohort/tensors.npy", npys, ("check", "train", "masks", "cohort.load")),
    "labels.npy": Kind("in/cohort/labels.npy", npys, ("check", "train", "masks", "cohort.load")),
    "subjects.csv": Kind("in/cohort/subjects.csv", csvs, ("check", "train", "masks")),
    "grid.json": Kind("in/cohort/grid.json", jsons, ("check", "train", "masks", "cohort.load")),
    "fold-K.pt": Kind("out/networks/fold-0.pt", states, ("predict", "masks", "networks.load")),
    "checkpoints": Kind("out/networks/.fold-0.checkpoint", states, ("train",)),
    "run.json": Kind("out/networks/run.json", jsons, ("predict", "train")),
    "fold-K.json": Kind("out/networks/fold-0.json", jsons, ("train",)),
    "folds.csv": Kind("out/networks/folds.csv", csvs, ("masks",)),
    "masks.csv": Kind("out/masks/masks.csv", csvs, ("masks",)),
    "masks": Kind("out/masks/000001.nii.gz", image, ("masks",)),
    "grid.json of a convert before": Kind("out/converted/grid.json", jsons, ("convert",)),
    "labels.npy of a convert before": Kind("out/converted/labels.npy", npys, ("convert",)),
    "rejected.csv of a convert before": Kind("out/converted/rejected.csv", csvs, ("convert",)),
    "parts of a convert": Kind(
        "out/parts/000001.npz", lambda _: npys(array(volume(1))), ("convert",)
    ),
    "label volumes": Kind("in/atlas/labels.nii.gz", image, ("atlases.load csv",)),
    "label tables, CSV": Kind("in/atlas/labels.csv", csvs, ("atlases.load csv",)),
    "label tables, JSON": Kind("in/atlas/labels.json", jsons, ("atlases.load json",)),
    "label tables, text": Kind("in/atlas/labels.txt", texts, ("atlases.load txt",)),
    "label tables, XML": Kind("in/atlas/labels.xml", xmls, ("atlases.load xml",)),
}


# -------------------------------------------------------------------------- each in its own process


def cases(kind: Kind, whole: bytes) -> Iterator[tuple[str, bytes | Callable]]:
    """How a file is bad, and its content, or what puts something else into its place."""
    yield from kind.listed(whole)
    yield from ODD.items()
    for seed in range(EACH):
        yield damaged(whole, random.Random(f"{kind.place} {seed}"))


def child(work: Callable[[], None]) -> tuple[int, resource.struct_rusage]:
    """The wait status and the use of a forked process that does some work, killed if it hangs."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    end = time.monotonic() + 6 * SECONDS  # of the wall, where others use the cores
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return ended[1:]


def watch(root: Path, events: list[str]) -> None:
    """Note what reading a file must not do: run what is in it, or write anywhere but in out."""
    allowed = tuple(str(root / name) for name in ("out", "tmp"))

    def hook(event: str, arguments: tuple) -> None:
        if event == "subprocess.Popen" and arguments[0] == "git":
            return  # the commit, for the record
        if event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec"):
            events.append(f"{event} {arguments[:2]}")
        elif event == "open" and isinstance(arguments[0], (str, bytes, Path)):
            path, mode, flags = arguments
            writes = set(mode or "") & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR)
            if writes and not os.path.abspath(os.fsdecode(path)).startswith((*allowed, "/dev/")):
                events.append(f"writes {path}")

    sys.addaudithook(hook)


def held(what: str) -> int:
    """Bytes of this process, of a line of Linux's ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


def attempt(root: Path, runs: tuple[str, ...], record: Path) -> None:
    """Run commands in a folder; to the record goes how they ended and what they printed."""
    os.chdir(root)
    os.environ["TMPDIR"] = tempfile.tempdir = str(root / "tmp")
    limit = held("VmData") + 3 * BYTES  # not to harm the machine
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS,) * 2)
    events, endings, said, before = [], {}, io.StringIO(), held("VmRSS")
    watch(root, events)
    with redirect_stdout(said), redirect_stderr(said):
        for name in runs:
            try:
                endings[name] = run(name)
            except BaseException:
                endings[name] = traceback.format_exc()
    content = {"endings": endings, "said": said.getvalue()[-20000:], "events": events}
    content["bytes"] = held("VmHWM") - before
    record.write_text(json.dumps(content))


def snapshot(root: Path) -> dict[str, bytes]:
    """What lies in the folders that nothing may write to."""
    paths = [p for name in ("in", "beside") for p in (root / name).rglob("*")]
    found = {str(path): path.read_bytes() for path in paths if path.is_file()}
    made = (*root.iterdir(), *(root / "tmp").iterdir())
    made = (path for path in made if not path.name.startswith("torchinductor"))  # torch's own
    return found | {str(path): b"" for path in made}


def kept(root: Path, kind: Kind) -> dict[str, bytes]:
    """What was made of the subjects whose files are whole."""
    found = {}
    for name in kind.kept:
        if name == "tensors":
            who = pd.read_csv(root / "out/converted/subjects.csv", dtype=str)["Subject"]
            tensors = np.load(root / "out/converted/tensors.npy")
            found |= {n: one.tobytes() for n, one in zip(who, tensors) if n != BAD}
        else:
            found[name] = (root / name).read_bytes()
    return found


def judge(root: Path, kind: Kind, record: dict, before: dict, alone: dict) -> Iterator[str]:
    """What is wrong with how a case ended."""
    place = Path(kind.place)
    names = (
        place.name,
        place.name.split(".")[0],
        place.parent.name,
        str(Path(*place.parts[:2])),
        "families",
    )
    for name, ending in record["endings"].items():
        if "Traceback" in ending or not (ending == "" or ending.startswith("error: ")):
            yield f"{name}: {ending[-1500:]}"
        elif kind.kept and ending:
            yield f"{name}: the others are not done: {ending}"
        elif ending and not any(part in ending + record["said"] for part in names):
            yield f"{name}: does not name the file: {ending}"
        elif len(ending) > 2000 or "\n" in ending:
            yield f"{name}: no line: {ending[:300]}"
    if "Traceback" in record["said"]:
        yield f"a traceback: {record['said'][-1500:]}"
    yield from record["events"]
    if (after := snapshot(root)) != before:
        names = {name for name in {*before, *after} if before.get(name) != after.get(name)}
        yield f"changed: {sorted(names)}"
    if partial := [str(path) for path in (root / "out").rglob("*.partial")]:
        yield f"left behind: {partial}"
    if kind.kept:
        try:
            found = kept(root, kind)
        except OSError as error:
            yield f"the others are not there: {error}"
        else:
            if found != alone:
                yield "the others are not what they are alone"
        folder = root / kind.kept[0].replace("tensors", "out/converted/x")
        made = (*folder.parent.glob(f"{BAD}.nii*"), *folder.parent.glob("tensors.npy"))
        rows = pd.read_csv(folder.with_name("rejected.csv"), dtype=str)
        reason = rows.set_index("Subject")["reason"].get(BAD, "")
        if not made and not reason:
            yield "neither made nor rejected"
        if "Error:" in reason:
            yield f"the reason is none: {reason}"


@dataclass(frozen=True)
class Outcome:
    """A case: how its file was bad, what was wrong then, and what it took."""

    kind: str
    how: str
    problems: list[str]
    seconds: float  # of the processor, all threads
    bytes: int  # more than the process had before


def outcomes(every: int = 1, only: str = "") -> Iterator[Outcome]:
    """Try every case, or each so many-th."""
    import torch

    from brainsex import __main__, diffusion  # noqa: F401  warm: what is forked has them

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world, alone = (Path(folder, name) for name in ("world", "alone"))
        study(world)
        study(alone)
        for path in alone.rglob(f"*{BAD}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        good = ("extract", "fit", "fit packages", "convert")
        record = Path(folder, "record.json")
        child(lambda: attempt(alone, good, record))
        assert set(json.loads(record.read_text())["endings"].values()) == {""}, record.read_text()
        child(lambda: (os.chdir(world), redirect_stdout(io.StringIO()).__enter__(), finish()))
        assert (world / "out/masks/masks.csv").is_file()
        count = 0
        for name, kind in KINDS.items():
            if only not in name:
                continue
            store = Path(folder, "cases")

            def prepare(kind=kind, count=count, store=store) -> None:
                os.chdir(world)
                place = Path(kind.place)
                whole = place.read_bytes() if place.is_file() else npz(volume=volume(1))
                store.mkdir()
                names = []
                for number, (how, content) in enumerate(cases(kind, whole), count):
                    names.append(how)
                    if number % every == 0 and how not in ODD:
                        (store / str(number)).write_bytes(
                            content() if callable(content) else content
                        )
                (store / "names").write_text(json.dumps(names))

            assert child(prepare)[0] == 0
            names = json.loads((store / "names").read_text())
            chosen = [(n, how) for n, how in enumerate(names, count) if n % every == 0]
            count += len(names)
            expected = kept(alone, kind)
            work = partial(_outcome, world, store, name, expected)
            with multiprocessing.get_context("fork").Pool() as pool:
                yield from pool.imap(work, chosen)
            shutil.rmtree(store)


def _outcome(world: Path, store: Path, name: str, alone: dict, case: tuple[int, str]) -> Outcome:
    """Put a file in place in a copy of the study, and run what reads it."""
    kind, (number, how) = KINDS[name], case
    content, root, record = (store / f"{number}{what}" for what in ("", " root", " record"))
    shutil.copytree(world, root, symlinks=True)
    place = root / kind.place
    if name == "parts of a convert":
        key = json.loads((root / "out/converted/grid.json").read_text())["key"]
        place = root / f"out/converted/.convert-{key[:16]}" / place.name
        place.parent.mkdir()
        (root / "out/converted/tensors.npy").unlink()
    place.unlink(missing_ok=True)
    ODD[how](place) if how in ODD else shutil.move(content, place)
    before = snapshot(root)
    status, used = child(lambda: attempt(root, kind.runs, record))
    seconds, more = used.ru_utime + used.ru_stime, 0
    problems = [f"killed: wait status {status}"]
    if record.is_file():
        ended = json.loads(record.read_text())
        more, problems = ended["bytes"], list(judge(root, kind, ended, before, alone))
        if how in ODD and place.name.endswith((".zip", "data.nii.gz")):  # and so no subject
            problems = [said for said in problems if said != "neither made nor rejected"]
    if seconds > SECONDS:
        problems.append(f"{seconds:.0f} s of the processor, at most {SECONDS}")
    if more > BYTES:
        problems.append(f"{more / 1e6:.0f} MB, at most {BYTES / 1e6:.0f}")
    shutil.rmtree(root)
    return Outcome(name, how, problems, seconds, more)


def figures(every: int = 1) -> list[tuple[str, str]]:
    """What README's table on reliability says of hostile files; of any case that fails, that."""
    command = [sys.executable, "-m", __name__, str(every)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if not done.stdout.strip():
        raise RuntimeError(done.stderr)
    *problems, rows = done.stdout.splitlines()
    print(*problems, sep="\n", file=sys.stderr)
    return [tuple(row) for row in json.loads(rows)]


def main(every: int, only: str = "") -> None:
    found = []
    for outcome in outcomes(every, only):
        found.append(outcome)
        for problem in outcome.problems:
            print(f"{outcome.kind}: {outcome.how}: {problem}", flush=True)
    failed = sum(bool(each.problems) for each in found)
    rows = [("hostile and broken files tried", f"{len(found)}"), ("… of which failed", f"{failed}")]
    kinds = pd.Series([each.kind for each in found]).value_counts(sort=False)
    rows.append(("… by kind", ", ".join(f"{kind} {count}" for kind, count in kinds.items())))
    for what, name, scale, unit in (("time", "seconds", 1, "s"), ("memory", "bytes", 1e6, "MB")):
        worst = max(found, key=lambda each: getattr(each, name))
        value = getattr(worst, name) / scale
        rows.append((f"… worst {what}", f"{value:.3g} {unit} ({worst.kind}: {worst.how})"))
    print(json.dumps(rows))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1, *sys.argv[2:3])
