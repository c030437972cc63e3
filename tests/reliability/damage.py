"""Hostile contents of the files that a user brings, and seeded damage of whole ones.

Each generator takes a whole file's content. It yields what is bad about another one, and this or,
where it is large, a function that makes it.
"""

import gzip
import io
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch

from tests.test_archives import STORED, zipped

Cases = Iterator[tuple[str, bytes | Callable[[], bytes]]]
OUTSIDE = ("../../beside/evil", "/tmp/brainsex_evil", "..", "a\\..\\b")
"""Paths, from the folder of results, to what nothing may write."""


class Bomb:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return open, ("beside/executed", "w")


PICKLE = pickle.dumps(Bomb())


def pack(content: bytes) -> bytes:
    return gzip.compress(content, 1, mtime=0)


def save_bytes(save: Callable, value: object, **options: object) -> bytes:
    """Return what `torch.save`, or `np.save` or `np.savez`, writes of a value."""
    buffer = io.BytesIO()
    save(*((value, buffer) if save is torch.save else (buffer, value)), **options)
    return buffer.getvalue()


@cache
def deflate(content: bytes) -> bytes:
    """Return a block of a deflate stream, after and before which there may be others."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    return stream.compress(content) + stream.flush(zlib.Z_FULL_FLUSH)


def deflate_zeros(gigabytes: float, start: bytes = b"") -> bytes:
    """Make a deflate stream of `start` and zeros, of a thousandth of their size, at once."""
    return deflate(start) + deflate(bytes(1 << 24)) * round(gigabytes * 64) + b"\3\0"


def gzip_bomb(gigabytes: float, start: bytes) -> Callable[[], bytes]:
    """Zeros after `start`; their checksum is wrong, which only the end shows."""
    return lambda: b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + deflate_zeros(gigabytes, start) + bytes(8)


def lying_zip(name: str, data: bytes, *, size=None, stored=None, method=8, flags=0, copies=1):
    """Make an archive whose headers say what they are told; its members share their bytes."""
    filename = name.encode()
    size, stored = (len(data) if number is None else number for number in (size, stored))
    fields = (flags, method, 0, 33, 0, stored & 0xFFFFFFFF, size & 0xFFFFFFFF, len(filename), 0)
    local = b"PK\3\4" + struct.pack("<5H3I2H", 20, *fields)
    head = struct.pack("<6H3I5H2I", 20, 20, *fields, 0, 0, 0, 0, 0)
    central, body = copies * (b"PK\1\2" + head + filename), local + filename + data
    end = (0, 0, copies & 0xFFFF, copies & 0xFFFF, len(central), len(body), 0)
    return body + central + b"PK\5\6" + struct.pack("<4H2IH", *end)


def zips(whole: bytes) -> Cases:
    fa, name, link = pack(whole[:4000]), "FA.nii.gz", zipfile.ZipInfo("FA.nii.gz")
    yield "no zip", b"<html>Please log in</html>"
    yield "empty archive", zipped([])
    for path in OUTSIDE:
        yield f"member {path}", zipped([(f"{path}_FA.nii.gz", fa)])
        yield f"inner {path}", zipped([(f"{path}.zip", zipped([(f"{path}_FA.nii.gz", fa)]))])
    link.create_system, link.external_attr = 3, 0o120777 << 16
    yield "link", zipped([(link, "/etc/passwd")])
    yield "encrypted", lying_zip(name, fa, flags=1, method=0)
    yield "strongly encrypted", lying_zip(name, fa, flags=0x41, method=99)
    yield "patched", lying_zip(name, fa, flags=0x20, method=0)
    for method in (1, 9, 12, 14, 93, 65535):
        yield f"method {method}", lying_zip(name, fa, method=method)
    yield "NUL in a name", lying_zip("FA.nii.gz\0.exe", fa, method=0)
    yield "long name", zipped([("a" * 60000 + "_FA.nii.gz", fa)])
    for gigabytes in (1, 1.9, 3.9):
        zeros, size = deflate_zeros(gigabytes), round(gigabytes * 64) << 24
        yield f"bomb of {gigabytes} GB", lying_zip(name, zeros, size=size)
        yield f"hidden bomb of {gigabytes} GB", lying_zip(name, zeros, size=4000)
        yield f"inner bomb of {gigabytes} GB", lying_zip("in.zip", zeros, size=size)
        bomb = lying_zip("FA.nii", zeros, size=size, stored=0xFFFFFFF0)
        yield f"bomb of {gigabytes} GB that says it is stored large", bomb
    yield "copies of a bomb", lying_zip("in.zip", deflate_zeros(0.9), size=58 << 24, copies=500)
    yield "many members", lying_zip("x.txt", b"", method=0, copies=65535)
    yield "many archives", lying_zip("in.zip", zipped([(name, b"")]), method=0, copies=20000)
    yield "member beyond the end", lying_zip(name, fa, stored=1 << 31, method=0)
    yield "negative size", lying_zip(name, fa, size=0xFFFFFFFF, method=0)
    deep = zipped([(name, fa)])
    for _ in range(50):
        deep = zipped([("in.zip", deep)])
    yield "archive fifty deep", deep
    for place in range(-18, 0, 2):  # the last 18 bytes say where the members are
        content = bytearray(zipped([(name, fa)]))
        content[place : place + 2 or None] = b"\xff\xff"
        yield f"end record, byte {place}", bytes(content)


NIFTI_FIELDS = (  # of a header: the byte, the type, and what is hostile there
    (0, "i", (-1, 540, 2**31 - 1)),
    (40, "h", (-1, 0, 2, 5, 8, 32767)),
    (40, "4h", ((3, 0, 5, 4), (3, -22, 5, 4), (3, 512, 512, 512), (3, 32767, 32767, 32767))),
    (70, "h", (0, 32, 128, 1536, 2048, -1, 77)),
    (72, "h", (-1, 1, 32767)),
    (80, "f", (0, np.nan, np.inf, 1e30)),
    (108, "f", (0, -352, np.nan, np.inf, 1e9, 1e30)),
    (112, "f", (np.nan, np.inf, 1e38)),
    (116, "f", (np.inf, -1e38)),
    (252, "hh", ((0, 0), (99, 99))),
    (280, "12f", ([0.0] * 12, [1.0] * 12, [np.nan] * 12)),
    (344, "4s", (b"ni1\0", b"n+2\0", b"\0\0\0\0")),
    (348, "ii", ((1, -1), (1, 7), (1, 2**31 - 1))),
)


def niftis(whole: bytes) -> Cases:
    whole = gzip.decompress(whole)
    for place, form, values in NIFTI_FIELDS:
        for value in values:
            content = bytearray(whole)
            fields = value if isinstance(value, tuple | list) else [value]
            struct.pack_into("<" + form, content, place, *fields)
            yield f"header, byte {place}: {value}", pack(bytes(content))
    for value in (np.nan, np.inf, -1e30):
        yield f"all {value}", pack(whole[:352] + struct.pack("<f", value) * (len(whole) // 4 - 88))
    yield "header only", pack(whole[:352])
    yield "half a header", pack(whole[:200])
    yield "not gzipped", whole
    yield "gzip in gzip", pack(pack(whole))
    yield "zip named gz", zipped([("x.nii", whole)])
    yield "zeros after", pack(whole) + bytes(1000)
    yield "bomb of 2 GB behind a header", gzip_bomb(2, whole)
    content = bytearray(whole)
    struct.pack_into("<f", content, 108, 352 - len(whole) - 1)
    content[344:348] = b"ni1\0"
    yield "bomb behind a negative offset", gzip_bomb(2, bytes(content))
    content = bytearray(whole[:352])
    for side, code, bits in ((500, 2, 8), (506, 16, 32), (320, 64, 64), (320, 1536, 128)):
        struct.pack_into("<4h", content, 40, 3, side, side, side)
        struct.pack_into("<2h", content, 70, code, bits)
        bomb = gzip_bomb(side**3 * bits / 8 / 2**30, bytes(content))
        yield f"bomb of {side} voxels a side, type {code}", bomb
    struct.pack_into("<5h", content, 40, 4, 400, 400, 400, 300)
    yield "bomb in 4D", gzip_bomb(3, bytes(content))


def tables(whole: bytes) -> Cases:
    text, mark = whole.decode(), "\t" if b"\t" in whole else ","
    rows = [line.split(mark) for line in text.splitlines()]
    cell = rows[1][0]

    def join(rows: list[list[str]]) -> bytes:
        return "\n".join(map(mark.join, rows)).encode()

    for encoding in ("utf-16", "utf-32", "utf-8-sig", "cp037"):
        yield encoding, text.encode(encoding)
    yield "Latin letters", text.replace(cell, "Müller").encode("latin-1")
    yield "NULs only", bytes(5000)
    yield "open quote", text.replace(cell, '"' + cell).encode()
    yield "quoted header", ('"' + text).encode()
    yield "no header", join(rows[1:])
    yield "header only", join(rows[:1])
    yield "separators only", (mark.encode() * 1000 + b"\n") * 100
    yield "one endless line", lambda: b"a" * (90 << 20)
    yield "million columns in the header", join([rows[0] + ["x"] * 1_000_000, *rows[1:]])
    yield "million columns", lambda: join([row + ["1"] * 1_000_000 for row in rows])
    yield "million names", lambda: join([row + list(map(str, range(1_000_000))) for row in rows])
    yield "million rows", lambda: join([rows[0], *rows[1:2] * 300_000])
    yield "cell of 20 MB", lambda: text.replace(cell, "9" * (20 << 20)).encode()
    yield "same twice", join([*rows, rows[1]])
    yield "columns twice", join([row * 2 for row in rows])
    yield "cells missing", join([rows[0], *(row[:1] for row in rows[1:])])
    yield "cells too many", join([rows[0], *(row + ["x"] * 9 for row in rows[1:])])
    for name in (*OUTSIDE, "x" * 300, "", "nan", "\0", "\x1b[2J", "=1+1", "𝟙𝟚", "<script>"):
        yield f"ID {name[:18]!r}", text.replace(cell, name).encode()
    for column in range(len(rows[0])):
        yield f"no column {column}", join([row[:column] + row[column + 1 :] for row in rows])
        for value in ("", "x", "1e400", "-1", "9" * 400):
            changed = [[*row[:column], value, *row[column + 1 :]] for row in rows[1:]]
            yield f"column {column}: {value[:9]}", join([rows[0], *changed])
    yield "pickle", PICKLE


def texts(whole: bytes) -> Cases:
    words = whole.decode().split()
    yield "no text", b"\xff\xfe\0\0" * 10
    yield "utf-16", whole.decode().encode("utf-16")
    yield "many words", lambda: b"1 " * (20 << 20)
    yield "one endless line", lambda: b"x" * (20 << 20)
    for word in ("\0", "nan", "inf", "-1", "1e400", "x", *OUTSIDE[:2], "0x1", "٣"):
        yield f"first {word}", whole.replace(words[0].encode(), word.encode(), 1)
        yield f"only {word}", " ".join(word for _ in words).encode()
        yield f"lines of {word}", "\n".join(word for _ in words).encode()
    yield "pickle", PICKLE


NPY_HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (8,)}"
NPY_SHAPES = ("(8, 99999, 99999, 99999)", "(-8, 22, 23, 24)", "(2**70,)", f"({'9' * 60},)", "None")


def arrays(whole: bytes) -> Cases:
    values = np.lib.format.read_array(io.BytesIO(whole))
    kinds = ("f8", "i1", "c8", "U3", "S3", "?", "M8[s]", ">f4", "f2")
    contents = [np.array([Bomb()] * len(values), object), np.array(1.0), np.asfortranarray(values)]
    contents += [np.zeros(values.shape, "f4, i4"), values[:-1], values[:0], values[..., None]]
    contents += [np.full(values.shape, value) for value in (2, -1, 9**9, np.nan, np.inf, -1e30)]
    contents += [values.astype(kind) for kind in kinds]
    for number, content in enumerate(contents):
        yield f"array {number}: {content.dtype} {content.shape}", save_bytes(np.save, content)
    yield "archive of pickles", save_bytes(np.savez, contents[0])
    headers = [NPY_HEADER.replace("(8,)", shape) for shape in NPY_SHAPES]
    headers += [NPY_HEADER.replace("'<f4'", kind) for kind in ("'|O'", "__import__('os')")]
    for header in (*headers, "(" * 3000, "-" * 8000 + "1"):
        text = header.encode() + b"\n"
        yield f"header {header[-20:]}", b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text
    for version in (b"\0\0", b"\2\0", b"\x09\0"):
        yield f"version {version[0]}", whole[:6] + version + whole[8:]
    yield "header of 4 GB", b"\x93NUMPY\2\0\xff\xff\xff\xff" + b" " * 1000
    yield "pickle", PICKLE


def weights(whole: bytes) -> Cases:
    state = torch.load(io.BytesIO(whole), weights_only=True)
    name, scalar = next(iter(state)), torch.zeros(1)
    wide = {"convolution.weight": scalar.expand(4000, 3, 3, 3)}
    contents = [Bomb(), state | {"more": Bomb()}, torch.nn.Linear(2, 2), None, "x", [], {}]
    contents += [{"state_dict": {"state_dict": state}}, {1: scalar}, wide]
    contents += [wide | {"_extra_state": torch.ones(5)}]
    contents += [{"convolution.weight": scalar.expand(1, 10**9, 3, 3)}]
    values = [state[name].to(torch.complex64), state[name].to_sparse(), state[name].to("meta")]
    values += [state[name] * torch.nan, "x", scalar.expand(10**12), scalar.expand(3000, 1, 3, 3, 3)]
    contents += [state | {name: value} for value in values] + [{name: value} for value in values]
    for number, content in enumerate(contents):
        for new in (True, False):
            file = save_bytes(torch.save, content, _use_new_zipfile_serialization=new)
            yield f"content {number}, {'new' if new else 'old'} format", file
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    zeros = {name: 2**31 * name.endswith("data/0") for name in files}
    yield "inflating", lambda: zipped([(n, c + bytes(zeros[n])) for n, c in files.items()])
    for name in files:
        yield f"pickle as {name}", zipped([*(files | {name: PICKLE}).items()], STORED)
    yield "pickle", PICKLE


def damage(whole: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Damage a file, or what is gzipped in it, as disks, networks and hands do."""
    if whole[:2] == b"\x1f\x8b" and draw.random() < 0.6:
        how, content = damage(gzip.decompress(whole), draw)
        return f"{how} within gzip", pack(content)
    place = draw.randrange(min(len(whole), draw.choice([400, len(whole)])))
    length, content = draw.randrange(1, 200), bytearray(whole)
    start, rest = whole[:place], whole[place + length :]
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        byte = draw.choice([draw.randrange(len(whole)), draw.randrange(min(len(whole), 400))])
        content[byte] ^= 1 << draw.randrange(8)
    contents = {
        "bits": bytes(content),
        "cut": start,
        "missing": start + rest,
        "more": start + draw.randbytes(length) + whole[place:],
        "zeros": start + bytes(length) + rest,
        "twice": whole * 2,
        "other": draw.choice([b"\x89PNG\r\n\x1a\n" + whole, b"%PDF-1.7" + whole, b"", b"\n"]),
        "noise": draw.randbytes(length * 10),
    }
    how = draw.choice(["bits", "bits", "bits", *contents])
    return how, contents[how]
