"""Archives to one volume a subject: every way HCP packs them, bad ones, and interrupted runs."""

import errno
import io
import os
import random
import re
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from brainsex import archives, layouts
from brainsex.archives import extract
from tests.conftest import NO_RESULT

ROOT = Path(__file__).parents[1]
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
FA = "900001/T1w/Diffusion/900001_FA.nii.gz"


def volume(seed, size=4000):
    """Return bytes that compress to about half."""
    return bytes(random.Random(seed).choices(range(16), k=size))


def zipped(files, method=DEFLATED):
    """Make a zip archive of `files` (pairs of name and content, so that names may repeat)."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return content.getvalue()


def nested(data, inner=DEFLATED, outer=STORED, name=FA):
    """Make the study's form: an archive that holds an archive that holds the volume."""
    within = zipped([("T1w/readme.txt", b"text" * 40), (name, data)], inner)
    return zipped([("release-notes/notes.txt", b"notes" * 40), ("packed.zip", within)], outer)


def save(folder, **files):
    """Write archives, ``900001_x.zip`` for the keyword `_900001_x`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name.removeprefix('_')}.zip").write_bytes(content)
    return folder


def contents(folder):
    """Return all that a run left but its record and its list of the rejected."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in NO_RESULT}


@pytest.fixture
def cohort(source):
    """Twelve subjects, packed in turn in each way; the fifth is damaged."""
    ways = [(STORED, STORED), (STORED, DEFLATED), (DEFLATED, STORED)]
    for number in range(12):
        content = nested(volume(number), *ways[number % 3], f"{900000 + number}_FA.nii.gz")
        save(source, **{f"_{900000 + number}_x": content[:-300] if number == 4 else content})
    return source


@pytest.mark.parametrize("inner", [STORED, DEFLATED])
@pytest.mark.parametrize("outer", [STORED, DEFLATED])
def test_nested_archive_gives_the_bytes_that_were_put_in(source, target, inner, outer):
    save(source, _900001_3T_Diffusion_preproc=b"a stub" + nested(volume(1), inner, outer))
    empty = zipped([("x.txt", b"")])
    save(source, _900003=zipped([("1.zip", empty), ("2.zip", empty), ("3.zip", direct)], outer))
    table = extract(source, target)
    assert table.values.tolist() == [["900001", "extracted", ""], ["900003", "extracted", ""]]
    assert contents(target) == dict.fromkeys(["900001.nii.gz", "900003.nii.gz"], volume(1))
    assert (target / "rejected.csv").read_text().split() == ["Subject,reason"]


def test_names_of_packages_and_members_old_and_new(source, target):
    save(source, _900001_3T_Diffusion_preproc=nested(volume(1)))
    save(source / "2025", _900002_Diffusion3TRecommended=zipped([("a/FA.nii.gz", volume(2))]))
    save(source, _900003=zipped([("dti_FA.nii", volume(3))]))
    save(source, _000004_x=zipped([("a\\fa.NII.GZ", volume(4))]))
    (source / "900005-y.ZIP").write_bytes(nested(volume(5)))
    (source / "._900001.zip").write_bytes(b"what macOS leaves on foreign disks")
    (source / "900006.zip").mkdir()
    table = extract(source, target)
    assert table["Subject"].tolist() == ["000004", "900001", "900002", "900003", "900005"]
    assert set(table["status"]) == {"extracted"}
    expected = {f"90000{number}.nii.gz": volume(number) for number in (1, 2, 5)}
    assert contents(target) == expected | {"000004.nii.gz": volume(4), "900003.nii": volume(3)}


def test_two_archives_of_a_subject_count_as_one(source, target):
    structural = zipped([("900001/T1w/T1w_acpc_dc_restore_brain.nii.gz", volume(0))])
    save(source, _900001_3T_Structural_preproc=structural)
    save(source, _900001_3T_Diffusion_preproc=nested(volume(1)))
    assert extract(source, target)["status"].tolist() == ["extracted"]
    assert contents(target) == {"900001.nii.gz": volume(1)}
    extract(source, target / "t1w", "T1w_acpc_dc_restore_brain.nii.gz")
    assert contents(target / "t1w") == {"900001.nii.gz": volume(0)}
    with pytest.raises(ValueError, match=r"fa: expected results of extract with member = .*T1w"):
        extract(source, target, "T1w*.gz")


def test_a_pattern_of_a_path_chooses_among_files_of_one_name(source, target):
    """As UK Biobank's packages have them."""
    files = [("dMRI/dMRI/dti_FA.nii.gz", volume(1)), ("dMRI/TBSS/FA/dti_FA.nii.gz", volume(2))]
    save(source, _1000001_20250_2_0=zipped(files))
    assert extract(source, target)["status"].tolist() == ["rejected"]
    extract(source, target, "dmri/DMRI/dti_FA.nii.gz", overwrite=True)
    assert contents(target) == {"1000001.nii.gz": volume(1)}
    (command,) = {layouts.PACKAGES[kind][-1] for kind in layouts.find_volumes(source)["kind"]}
    assert command.endswith("extract {0} {0}/fa --member dMRI/dMRI/dti_FA.nii.gz")


def test_what_is_no_volume_never_matches(source, target):
    names = ["__MACOSX/x_FA.nii.gz", "a/._x_FA.nii.gz", "FA.nii.gz/", "x_FA.nii.gz.json", "xFA.nii"]
    files = [(name, b"") for name in names] + [("__MACOSX/._packed.zip", b"no archive")]
    save(source, _900001=zipped([*files, (FA, volume(1))]))
    save(source, _900002=zipped([("outer.zip", nested(volume(1)))]))  # two levels deep
    table = extract(source, target, ["*_FA.nii*", "FA.nii.gz"])
    assert contents(target) == {"900001.nii.gz": volume(1)}
    assert table["status"].tolist() == ["extracted", "rejected"]


def test_present_volumes_are_not_looked_at_again(cohort, target):
    extract(cohort, target, workers=1)
    before = contents(target)
    for path in cohort.iterdir():
        path.write_bytes(b"garbage")
    save(cohort, _900004_x=nested(volume(4)))  # repaired
    table = extract(cohort, target)
    assert table["status"].tolist() == 4 * ["present"] + ["extracted"] + 7 * ["present"]
    assert contents(target) == before | {"900004.nii.gz": volume(4)}
    assert len(pd.read_csv(target / "rejected.csv")) == 0


def test_overwrite_replaces_all_volumes_of_the_subjects_and_no_other_file(source, target):
    save(source, _900001=nested(volume(1)), _900002=nested(volume(2)))
    extract(source, target)
    for name in ("900003.nii.gz", "900001.txt"):
        (target / name).write_bytes(b"a user's")
    save(source, _900001=zipped([("FA.nii", volume(3))]), _900002=b"garbage")
    table = extract(source, target, "FA.nii", overwrite=True)
    assert table["status"].tolist() == ["extracted", "rejected"]
    unchanged = {"900003.nii.gz": b"a user's", "900001.txt": b"a user's"}
    assert contents(target) == unchanged | {"900001.nii": volume(3)}


def with_header(content, offset, form, value):
    """Overwrite a field of the only member's local and central headers."""
    content = bytearray(content)
    for start in (0, content.rindex(b"PK\1\2") + 2):
        struct.pack_into(form, content, start + offset, value)
    return bytes(content)


direct, stored = zipped([(FA, volume(1))]), zipped([(FA, volume(1))], STORED)
flipped = stored.replace(volume(1)[1000:1050], volume(1)[1000:1049] + b"\xff")
bomb = zipped([(FA, bytes(3_000_000))])
lie = bytearray(bomb)
struct.pack_into("<I", lie, bomb.rindex(b"PK\1\2") + 20, 1_000_000)
BAD = {
    "truncated": (direct[:-40], "expected a whole zip archive.*download it again"),
    "no member": (
        zipped([("900001/T1w/Diffusion/data.nii.gz", b"")]),
        r"expected one file named like \*_FA.nii.gz.*found none.*HCP has no FA: use fa",
    ),
    "two members": (
        zipped([("a/x_FA.nii.gz", b""), ("in.zip", zipped([("FA.nii", b"")]))]),
        "expected one file.*found 900001_x.zip/a/x_FA.nii.gz, 900001_x.zip/in.zip/FA.nii$",
    ),
    "flipped, in place": (zipped([("in.zip", flipped)], STORED), "in.zip/900001.*Bad CRC-32"),
    "no zip": (zipped([("in.zip", b"text")]), "900001_x.zip/in.zip: .*not a zip file"),
    "encrypted": (with_header(direct, 6, "<H", 1), "encrypted"),
    "declares too much": (with_header(direct, 22, "<I", 1 << 31 | 1), "found 2147483649 declared"),
    "inflates a thousandfold": (bomb, r"at most \d+ bytes \(\d+ are stored\), found 3000000"),
    "says it is stored large": (bytes(lie), "are stored.*found 3000000"),
    "inner declares more": (
        with_header(zipped([("in.zip", direct)]), 22, "<I", 9_000_000),
        "900001_x.zip/in.zip: .*found 9000000 declared",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_archive_is_rejected_with_its_reason_and_the_rest_goes_on(source, target, case):
    content, message = BAD[case]
    save(source, _900001_x=content, _900002_x=nested(volume(2)))
    table = extract(source, target)
    assert table["status"].tolist() == ["rejected", "extracted"]
    reason = table["reason"][0]
    assert reason.startswith("900001_x.zip")
    assert re.search(message, reason), reason
    assert contents(target) == {"900002.nii.gz": volume(2)}
    rejected = pd.read_csv(target / "rejected.csv", dtype=str)
    assert rejected.values.tolist() == [["900001", reason]]


def test_a_vanished_archive_and_any_fault_reject_one_subject(source, target, monkeypatch):
    find = archives.find_members

    def fail_to_find(file, label, *rest):
        if label == "900001.zip":
            file.unlink()
        elif label == "900002.zip":
            raise MemoryError("no 9 GB")
        return find(file, label, *rest)

    with pytest.raises(FileNotFoundError, match=r"<ID>.*found none.*DATA_ACCESS.md"):
        extract(source, target)
    save(source, _900001=direct, _900002=direct, _900003=nested(volume(3)))
    monkeypatch.setattr(archives, "find_members", fail_to_find)
    table = extract(source, target)
    assert table["status"].tolist() == ["rejected", "rejected", "extracted"]
    assert re.match("900001: FileNotFoundError: .*900001.zip", table["reason"][0])
    assert table["reason"][1] == "900002: MemoryError: no 9 GB"


def test_sizes_are_bounded(source, target, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBER", 3999)
    save(source, _900001=direct)
    assert "at most 3999 bytes" in extract(source, target)["reason"][0]
    monkeypatch.setattr(archives, "MAX_MEMBER", 4000)
    monkeypatch.setattr(archives, "MAX_INNER", 1000)
    save(source, _900002=nested(volume(2), STORED, DEFLATED))
    table = extract(source, target)
    assert table["status"].tolist() == ["extracted", "rejected"]
    assert "900002.zip/packed.zip: expected at most 1000 bytes" in table["reason"][1]


def fail(code):
    raise OSError(code, os.strerror(code))


def test_a_full_disk_raises_and_the_next_run_goes_on(cohort, target, monkeypatch):
    def chunks(member, original=archives._read_chunks):
        for number, chunk in enumerate(original(member)):
            yield fail(code) if number == 3 and "900007_FA" in member[0] else chunk

    with monkeypatch.context() as patch:
        patch.setattr(archives, "CHUNK", 1000)
        patch.setattr(archives, "_read_chunks", chunks)
        for workers, code in ((4, errno.ENOSPC), (1, errno.EIO)):
            with pytest.raises(OSError, match=r"900007") as caught:
                extract(cohort, target / str(workers), workers=workers)
            assert caught.value.errno == code
    expected = {f"90000{n}.nii.gz": volume(n) for n in (0, 1, 2, 3, 5, 6)}
    assert contents(target / "1") == expected  # nobody is tried in vain after it
    status = extract(cohort, target / "1")["status"].tolist()
    assert status == 4 * ["present"] + ["rejected"] + 2 * ["present"] + 5 * ["extracted"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_files_behind_links_are_found_once(tmp_path):
    """The download folder is a link, two subjects link to one folder, and a link leads up."""
    disk, source = tmp_path / "disk", tmp_path / "source"
    save(disk, **{"sub-03": zipped([("FA.nii.gz", b"volume")])})
    (disk / "data.nii.gz").touch()
    (disk / ".git").mkdir()
    (disk / ".git/data.nii.gz").touch()
    (disk / "back").symlink_to(source)
    source.mkdir()
    for name in ("sub-01", "sub-02"):
        (source / name).symlink_to(disk)
    (path,) = layouts.find_files(source, ".nii.gz")
    assert path == source / "sub-01/data.nii.gz"
    assert extract(source, tmp_path / "fa").values.tolist() == [["03", "extracted", ""]]
    assert (tmp_path / "fa/03.nii.gz").read_bytes() == b"volume"


SHELLS = {"take_fa.sh": ["bash"], "take_fa.ps1": ["pwsh", "-NoProfile", "-File"]}


@pytest.mark.parametrize("name", SHELLS)
def test_scripts_for_machines_without_python_do_the_same(source, target, name):
    for program in [SHELLS[name][0]] + ["unzip"] * (name == "take_fa.sh"):
        if not shutil.which(program):
            pytest.skip(f"no {program} on this machine")
    save(source / "old [1]", _900010=nested(volume(0), STORED), _900018=nested(volume(8)))
    save(source, _000003_3T_Structural=zipped([("T1w.nii.gz", b"")]))
    save(source, _000003_3T_Diffusion=zipped([("a [b]*/dti_fa.nii", volume(3))]))
    save(source, _900004=zipped([("__MACOSX/._x_FA.nii.gz", b""), ("xFA.nii", b"")]))
    save(source, _900005=zipped([("a/FA.nii", b""), ("in.zip", zipped([("FA.nii", b"")]))]))
    save(source, _900006=direct[:-40])
    expected = {"900010.nii.gz": volume(0), "900018.nii.gz": volume(8), "000003.nii": volume(3)}
    for _ in range(2):  # the second run keeps what is there
        subprocess.run(
            [*SHELLS[name], ROOT / "data" / name, source, target], check=True, timeout=100
        )
        assert contents(target) == expected
        rejected = pd.read_csv(target / "rejected.csv", dtype=str)
        assert rejected["Subject"].tolist() == ["900004", "900005", "900006"]
