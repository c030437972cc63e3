"""Hostile files after a whole one: what is bad about each, and its content or what makes it."""

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
OUTSIDE = ("../../beside/evil", "/tmp/brainsex_evil", "..", "a\\..\\b")  # of the results' folder


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
def deflate_zeros(gigabytes: float, start: bytes = b"") -> bytes:
    """Make a deflate stream of `start` and zeros, of a thousandth of their size, at once."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = stream.compress(start) + stream.flush(zlib.Z_FULL_FLUSH)
    block = stream.compress(bytes(1 << 24)) + stream.flush(zlib.Z_FULL_FLUSH)
    return head + block * round(gigabytes * 64) + b"\3\0"


def gzip_bomb(gigabytes: float, start: bytes) -> Callable[[], bytes]:
    """Zeros after `start`; their checksum is wrong, which only the end shows."""
    return lambda: b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + deflate_zeros(gigabytes, start) + bytes(8)


def lying_zip(name: str, data: bytes, *, size=None, method=8, flags=0, copies=1):
    """Make an archive whose headers say what they are told; its members share their bytes."""
    filename = name.encode()
    size = len(data) if size is None else size
    fields = (flags, method, 0, 33, 0, len(data), size, len(filename), 0)
    local = b"PK\3\4" + struct.pack("<5H3I2H", 20, *fields)
    head = struct.pack("<6H3I5H2I", 20, 20, *fields, 0, 0, 0, 0, 0)
    central, body = copies * (b"PK\1\2" + head + filename), local + filename + data
    end = (0, 0, copies & 0xFFFF, copies & 0xFFFF, len(central), len(body), 0)
    return body + central + b"PK\5\6" + struct.pack("<4H2IH", *end)


def zips(whole: bytes) -> Cases:
    fa, name = pack(whole[:4000]), "FA.nii.gz"
    for path in OUTSIDE:
        yield f"member {path}", zipped([(f"{path}_FA.nii.gz", fa)])
        yield f"inner {path}", zipped([(f"{path}.zip", zipped([(f"{path}_FA.nii.gz", fa)]))])
    yield "encrypted", lying_zip(name, fa, flags=1, method=0)
    for method in (1, 9, 12, 14, 93, 99, 65535):
        yield f"method {method}", lying_zip(name, fa, method=method)
    for gigabytes in (1, 1.9, 3.9):
        zeros, size = deflate_zeros(gigabytes), round(gigabytes * 64) << 24
        yield f"bomb of {gigabytes} GB", lying_zip(name, zeros, size=size)
        yield f"hidden bomb of {gigabytes} GB", lying_zip(name, zeros, size=4000)
    yield "copies of a bomb", lying_zip("in.zip", deflate_zeros(0.9), size=58 << 24, copies=500)
    yield "many members", lying_zip("x.txt", b"", method=0, copies=65535)
    yield "many archives", lying_zip("in.zip", zipped([(name, b"")]), method=0, copies=20000)


NIFTI_FIELDS = (  # of a header: the byte, the type, and what is hostile there
    (0, "i", (-1, 540, 2**31 - 1)),
    (40, "h", (-1, 0, 2, 5, 8, 32767)),
    (40, "4h", ((3, 0, 5, 4), (3, -22, 5, 4), (3, 512, 512, 512), (3, 32767, 32767, 32767))),
    (70, "h", (0, 32, 128, 1536, 2048, -1, 77)),
    (80, "f", (0, np.nan, np.inf, 1e30)),
    (108, "f", (0, -352, np.nan, np.inf, 1e9, 1e30)),
    (112, "2f", ((np.nan, 0), (np.inf, 0), (1e38, 0), (1, np.inf), (1, -1e38))),
    (280, "12f", ([0.0] * 12, [1.0] * 12, [np.nan] * 12)),
    (344, "4s", (b"ni1\0", b"n+2\0", b"\0\0\0\0")),
)


def put(content: bytes, place: int, form: str, values: object) -> bytes:
    """Return a content with values packed into it."""
    changed = bytearray(content)
    struct.pack_into(f"<{form}", changed, place, *np.atleast_1d(np.array(values, object)))
    return bytes(changed)


def niftis(whole: bytes) -> Cases:
    whole = gzip.decompress(whole)
    for place, form, choices in NIFTI_FIELDS:
        for values in choices:
            yield f"header, byte {place}: {values}", pack(put(whole, place, form, values))
    yield "header only", pack(whole[:352])
    yield "not gzipped", whole
    yield "bomb of 2 GB behind a header", gzip_bomb(2, whole)
    for side, code, bits in ((500, 2, 8), (506, 16, 32), (320, 64, 64), (320, 1536, 128)):
        header = put(put(whole[:352], 40, "4h", (3, side, side, side)), 70, "2h", (code, bits))
        bomb = gzip_bomb(side**3 * bits / 8 / 2**30, header)
        yield f"bomb of {side} voxels a side, type {code}", bomb
    yield "bomb in 4D", gzip_bomb(3, put(whole[:352], 40, "5h", (4, 400, 400, 400, 300)))


def tables(whole: bytes) -> Cases:
    text, mark = whole.decode(), "\t" if b"\t" in whole else ","
    rows = [line.split(mark) for line in text.splitlines()]

    def join(rows: list[list[str]]) -> bytes:
        return "\n".join(map(mark.join, rows)).encode()

    yield from ((encoding, text.encode(encoding)) for encoding in ("utf-16", "utf-8-sig", "cp037"))
    yield from (("no header", join(rows[1:])), ("header only", join(rows[:1])))
    yield "one endless line", lambda: b"a" * (90 << 20)
    yield "million columns", lambda: join([row + ["1"] * 1_000_000 for row in rows])
    yield "million rows", lambda: join([rows[0], *rows[1:2] * 300_000])
    yield "cell of 20 MB", lambda: text.replace(rows[1][0], "9" * (20 << 20)).encode()
    yield "cells too many", join([rows[0], *(row + ["x"] * 9 for row in rows[1:])])
    for name in (*OUTSIDE, "x" * 300, "", "nan", "\0", '"', "\x1b[2J", "=1+1", "𝟙𝟚", "<script>"):
        yield f"ID {name[:18]!r}", text.replace(rows[1][0], name).encode()
    for column in range(len(rows[0])):
        yield f"no column {column}", join([row[:column] + row[column + 1 :] for row in rows])
        for value in ("", "x", "1e400", "-1", "9" * 400):
            changed = [[*row[:column], value, *row[column + 1 :]] for row in rows[1:]]
            yield f"column {column}: {value[:9]}", join([rows[0], *changed])


def texts(whole: bytes) -> Cases:
    words = whole.split()
    yield "many words", lambda: b"1 " * (20 << 20)
    yield "one endless line", lambda: b"x" * (20 << 20)
    for word in ("\0", "nan", "inf", "-1", "1e400", "x", *OUTSIDE[:2], "0x1", "٣"):
        yield f"first {word}", whole.replace(words[0], word.encode(), 1)
        yield f"only {word}", b" ".join([word.encode()] * len(words))


def arrays(whole: bytes) -> Cases:
    values = np.lib.format.read_array(io.BytesIO(whole))
    contents = [np.array([Bomb()] * len(values), object), np.array(1.0), np.asfortranarray(values)]
    contents += [np.zeros(values.shape, "f4, i4"), values[:-1], values[:0], values[..., None]]
    contents += [np.full(values.shape, value) for value in (2, -1, 9**9, np.nan, np.inf, -1e30)]
    contents += map(values.astype, ("f8", "i1", "c8", "U3", "S3", "?", "M8[s]", ">f4", "f2"))
    for number, content in enumerate(contents):
        yield f"array {number}: {content.dtype} {content.shape}", save_bytes(np.save, content)
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (8,)}"
    shapes = ("(8, 99999, 99999, 99999)", "(-8, 22, 23, 24)", "(2**70,)", f"({'9' * 60},)")
    headers = [header.replace("(8,)", shape) for shape in shapes] + ["(" * 3000, "-" * 8000 + "1"]
    for text in headers:
        start = b"\x93NUMPY\1\0" + struct.pack("<H", len(text) + 1)
        yield f"header {text[-20:]}", start + text.encode() + b"\n"
    yield "pickle", PICKLE


def weights(whole: bytes) -> Cases:
    state = torch.load(io.BytesIO(whole), weights_only=True)
    name, wide = next(iter(state)), torch.zeros(1).expand(10**12)
    contents = [Bomb(), state | {"more": Bomb()}, torch.nn.Linear(2, 2), {1: wide}, {name: wide}]
    contents += [state | {name: value} for value in (wide, "x", {}, state[name].to("meta"))]
    for number, content in enumerate(contents):
        for new in (True, False):
            file = save_bytes(torch.save, content, _use_new_zipfile_serialization=new)
            yield f"content {number}, {'new' if new else 'old'} format", file
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    for name in files:
        yield f"pickle as {name}", zipped((files | {name: PICKLE}).items(), STORED)


def damage(whole: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Damage a file, or what is gzipped in it, as disks, networks and hands do."""
    if whole[:2] == b"\x1f\x8b" and draw.random() < 0.6:
        how, content = damage(gzip.decompress(whole), draw)
        return f"{how} within gzip", pack(content)
    place = draw.randrange(min(len(whole), draw.choice([400, len(whole)])))
    length = draw.randrange(200)
    flipped = bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]
    how = draw.choice(["bit", "bit", "bit", "cut", "missing", "more", "zeros", "twice", "noise"])
    rest, noise = whole[place + length :], draw.randbytes(1 + length)
    ends = {"bit": flipped, "cut": b"", "missing": rest, "more": noise + rest, "noise": noise}
    ends |= {"zeros": bytes(length) + rest, "twice": whole[place:] + whole}
    return how, whole[:place] + ends[how]
