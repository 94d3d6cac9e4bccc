"""How are the cartoon faces of the `avatars` set drawn?

A script for a process of its own: `python avatars.py PACKAGES OUT.zip COUNT`. PACKAGES is a folder with
python-avatars and resvg-py. The choice of parts is ours (python-avatars' own draws on global random state),
so face `i` is the same on every machine. One style and plain backgrounds; faces that show eyes and mouth.
"""

from __future__ import annotations

import hashlib
import sys
import zipfile
from importlib import import_module
from typing import Any

SIZE = 128
SKIN = ("TANNED", "PALE", "LIGHT", "BROWN", "DARK_BROWN", "BLACK")
HAIR_COLOURS = (
    "AUBURN",
    "BLACK",
    "BLONDE",
    "BLONDE_GOLDEN",
    "BROWN",
    "BROWN_DARK",
    "PLATINUM",
    "RED",
    "SILVER_GRAY",
)
HAIR = (
    "BIG_HAIR", "BOB", "BUN", "CAESAR", "CAESAR_SIDE_PART", "CURLY", "CURVY", "DREADS", "FRIZZLE", "FRO",
    "LONG_NOT_TOO_LONG", "MIA_WALLACE", "SHAGGY", "SHAGGY_MULLET", "SHORT_CURLY", "SHORT_FLAT", "SHORT_ROUND",
    "SHORT_WAVED", "SIDES", "STRAIGHT_STRAND",
)  # fmt: skip
EYES = ("DEFAULT", "HAPPY", "SIDE", "SQUINT", "WINK", "SURPRISED")
EYEBROWS = ("DEFAULT", "DEFAULT_NATURAL", "RAISED_EXCITED", "RAISED_EXCITED_NATURAL", "FLAT_NATURAL")
MOUTHS = ("DEFAULT", "SMILE", "TWINKLE", "SERIOUS")
BEARDS = ("NONE", "NONE", "NONE", "NONE", "BEARD_LIGHT", "BEARD_MEDIUM", "MOUSTACHE_FANCY")
GLASSES = ("NONE", "NONE", "NONE", "NONE", "ROUND", "SUNGLASSES", "WAYFARERS")
CLOTHES = (
    "BLAZER_SHIRT",
    "BLAZER_SWEATER",
    "COLLAR_SWEATER",
    "HOODIE",
    "OVERALL",
    "SHIRT_CREW_NECK",
    "SHIRT_V_NECK",
)
CLOTHES_COLOURS = ("BLACK", "HEATHER", "PASTEL_BLUE", "PASTEL_GREEN", "PASTEL_ORANGE", "PINK", "RED", "WHITE")
BACKGROUND = "#E6F2FA"


def choice(number: int, part: str, options: tuple[str, ...]) -> str:
    """The option for `part` of face `number`."""
    digest = hashlib.sha256(f"potluck avatar {number} {part}".encode()).digest()
    return options[int.from_bytes(digest[:8], "big") % len(options)]


def draw(number: int, av: Any, resvg_py: Any) -> bytes:
    """Face `number` as a PNG."""

    def pick(kind: Any, part: str, options: tuple[str, ...]) -> Any:
        return kind[choice(number, part, options)]

    hair = pick(av.HairColor, "hair colour", HAIR_COLOURS)
    svg = av.Avatar(
        style=av.AvatarStyle.TRANSPARENT,
        background_color=BACKGROUND,
        top=pick(av.HairType, "hair", HAIR),
        hair_color=hair,
        facial_hair_color=hair,
        eyebrows=pick(av.EyebrowType, "eyebrows", EYEBROWS),
        eyes=pick(av.EyeType, "eyes", EYES),
        nose=av.NoseType.DEFAULT,
        mouth=pick(av.MouthType, "mouth", MOUTHS),
        facial_hair=pick(av.FacialHairType, "beard", BEARDS),
        skin_color=pick(av.SkinColor, "skin", SKIN),
        accessory=pick(av.AccessoryType, "glasses", GLASSES),
        clothing=pick(av.ClothingType, "clothes", CLOTHES),
        clothing_color=pick(av.ClothingColor, "clothes colour", CLOTHES_COLOURS),
    ).render()
    png = resvg_py.svg_to_bytes(svg_string=svg, background=BACKGROUND, width=SIZE, skip_system_fonts=True)
    return bytes(png)


def main(packages: str, out: str, count: int) -> None:
    sys.path.insert(0, packages)
    python_avatars, resvg_py = import_module("python_avatars"), import_module("resvg_py")

    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as zipped:
        for number in range(count):
            # a fixed date, so that the archive's bytes depend on the drawing alone
            zipped.writestr(zipfile.ZipInfo(f"{number:06}.png"), draw(number, python_avatars, resvg_py))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
