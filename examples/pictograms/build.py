# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Make the pictogram sheets from the npm packages `emoji-datasource-google` and `emoji-datasource-twitter`.

    npm install emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python -m examples.pictograms.build node_modules

Both packages have pictograms for the same keys, in the styles of two vendors. The script writes one sheet per vendor,
with one RGBA tile of 64 x 64 pixels per category, row by row in the order of `categories.txt`.
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from . import COLUMNS, TILE, read_categories

FOLDER = Path(__file__).resolve().parent


def build_sheet(node_modules: Path, vendor: str, package: str) -> None:
    """Write the sheet of a vendor from a folder of npm packages."""
    catalogue = {
        entry["short_name"]: entry for entry in json.loads((node_modules / package / "emoji.json").read_text())
    }
    categories = read_categories()
    rows = -(-len(categories) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * TILE, rows * TILE))
    for index, category in enumerate(categories):
        path = node_modules / package / "img" / vendor / "64" / catalogue[category.key]["image"]
        tile = Image.open(path).convert("RGBA").resize((TILE, TILE), Image.Resampling.LANCZOS)
        sheet.paste(tile, (index % COLUMNS * TILE, index // COLUMNS * TILE))
    sheet.save(FOLDER / f"{vendor}.webp", lossless=True, quality=100, method=6)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.pictograms.build", description="Make the sheets of pictograms from two npm packages."
    )
    parser.add_argument("node_modules", type=Path, help="Folder in which npm has installed the packages.")
    args = parser.parse_args()
    build_sheet(args.node_modules, "google", "emoji-datasource-google")
    build_sheet(args.node_modules, "twitter", "emoji-datasource-twitter")


if __name__ == "__main__":
    main()
