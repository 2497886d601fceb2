"""Write the demo pictures of the package: Fluent Emoji 3D composed on white, 256 x 256 RGB PNG.

First fetch and unpack the two npm packages: npm pack @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource-google@16.0.0
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

from PIL import Image

OUT = Path(__file__).resolve().parents[1] / "src/diffmorpher/assets/demo"
TARBALL_SHA256 = "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"  # @lobehub/fluent-emoji-3d 1.1.0
SIZE = (256, 256)
NAMES = """
    dog face, cat face, wolf face, fox face, lion face, tiger face,
    red apple, tangerine, pear, bus, automobile, rose, tulip, hamburger
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, help="folder that @lobehub/fluent-emoji-3d was unpacked to")
    parser.add_argument("names", type=Path, help="emoji.json of emoji-datasource-google")
    parser.add_argument("--tarball", type=Path, help="check this file's sha256 first")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()

    if args.tarball and (digest := hashlib.sha256(args.tarball.read_bytes()).hexdigest()) != TARBALL_SHA256:
        sys.exit(f"{args.tarball} has sha256 {digest}, not {TARBALL_SHA256}.")

    codes = {entry["name"].lower(): entry["unified"].lower() for entry in json.loads(args.names.read_text("utf-8"))}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in (part.strip() for part in NAMES.split(",")):
        with Image.open(args.package / "assets" / f"{codes[name]}.webp") as source:
            if source.size != SIZE:
                sys.exit(f"{source.filename} is {source.size}, not {SIZE}.")
            picture = Image.alpha_composite(Image.new("RGBA", SIZE, "white"), source.convert("RGBA")).convert("RGB")
        picture.save(args.out / f"{name.replace(' ', '-')}.png", optimize=True)


if __name__ == "__main__":
    main()
