"""Generate catalogues in WebShop's file formats, so that nothing has to be downloaded: for the demo and for tests.

Every product belongs to one of twelve kinds, whose products share attributes and options: a search finds several
similar products, and the goal's attributes, options and price tell them apart. A catalogue is a pure function of its
arguments.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

SCALES = ("small", "full")
ASKED_FOR = 0.9  # share of the products that have an instruction


class Kind(NamedTuple):
    department: str
    query: str
    category: str
    noun: str
    attributes: tuple[str, ...]
    options: tuple[str, ...]  # names of option groups


KINDS = (
    Kind(
        "beauty",
        "shampoos",
        "Beauty & Personal Care › Hair Care › Shampoo",
        "Shampoo",
        ("tea tree", "sulfate free", "cruelty free", "natural ingredients", "dry hair"),
        ("Scent", "Volume"),
    ),
    Kind(
        "beauty",
        "makeup brushes",
        "Beauty & Personal Care › Tools › Makeup Brushes",
        "Makeup Brush",
        ("easy carry", "high quality", "rose gold", "synthetic hair", "eye shadow"),
        ("Color",),
    ),
    Kind(
        "electronics",
        "headphones",
        "Electronics › Headphones › Over-Ear Headphones",
        "Headphones",
        ("noise cancelling", "wireless bluetooth", "hands free", "stereo sound", "fast charging"),
        ("Color",),
    ),
    Kind(
        "electronics",
        "power banks",
        "Electronics › Accessories › Power Banks",
        "Power Bank",
        ("fast charging", "high capacity", "quick release", "carrying case", "usb port"),
        ("Color", "Capacity"),
    ),
    Kind(
        "electronics",
        "tripods",
        "Electronics › Camera & Photo › Tripods",
        "Tripod",
        ("quick release", "carbon fiber", "light weight", "heavy duty", "carrying case"),
        ("Height",),
    ),
    Kind(
        "fashion",
        "sneakers",
        "Clothing, Shoes & Jewelry › Shoes › Sneakers",
        "Sneaker",
        ("rubber sole", "arch support", "slip resistant", "memory foam", "lace closure"),
        ("Color", "Size"),
    ),
    Kind(
        "fashion",
        "t-shirts",
        "Clothing, Shoes & Jewelry › Clothing › Shirts",
        "T-Shirt",
        ("machine washable", "short sleeve", "long sleeve", "pure cotton", "relaxed fit"),
        ("Color", "Size"),
    ),
    Kind(
        "fashion",
        "backpacks",
        "Clothing, Shoes & Jewelry › Luggage › Backpacks",
        "Backpack",
        ("water resistant", "light weight", "high capacity", "adjustable strap", "easy clean"),
        ("Color",),
    ),
    Kind(
        "garden",
        "table lamps",
        "Home & Kitchen › Lighting › Table Lamps",
        "Table Lamp",
        ("solid wood", "living room", "touch control", "glass shade", "brushed nickel"),
        ("Color", "Height"),
    ),
    Kind(
        "garden",
        "curtains",
        "Home & Kitchen › Window Treatments › Curtains",
        "Curtain",
        ("machine washable", "living room", "super soft", "heavy duty", "energy saving"),
        ("Color", "Width"),
    ),
    Kind(
        "grocery",
        "trail mixes",
        "Grocery & Gourmet Food › Snack Foods › Trail Mix",
        "Trail Mix",
        ("gluten free", "non gmo", "low sugar", "plant based", "keto friendly"),
        ("Flavor", "Pack"),
    ),
    Kind(
        "grocery",
        "green teas",
        "Grocery & Gourmet Food › Beverages › Green Tea",
        "Green Tea",
        ("usda organic", "non gmo", "caffeine free", "individually wrapped", "natural ingredients"),
        ("Flavor", "Pack"),
    ),
)
VALUES = {
    "Scent": ("Lemon", "Lavender", "Rose", "Coconut", "Unscented"),
    "Volume": ("100 ml", "250 ml", "500 ml", "1 l"),
    "Color": ("Black", "White", "Red", "Blue", "Green", "Navy/Grey", "Dark Brown", "Silver"),
    "Capacity": ("5000 mah", "10000 mah", "20000 mah"),
    "Height": ("12 inch", "18 inch", "24 inch", "60 inch"),
    "Size": ("Small", "Medium", "Large", "X-Large", "XX-Large"),
    "Width": ("52 inch", "84 inch", "108 inch"),
    "Flavor": ("Original", "Honey", "Peanut Butter", "Cranberry", "Ginger Peach"),
    "Pack": ("1 Count (Pack of 1)", "6 Count (Pack of 2)", "12 Count (Pack of 3)"),
}
SYLLABLES = ("va", "lo", "ri", "ne", "to", "ka", "mi", "su", "del", "bran", "fen", "quo")
PHRASES = (
    "made for daily use",
    "a gift for friends and family",
    "tested by our team",
    "easy to store",
    "with a one year warranty",
    "loved by our customers",
)


@dataclass(frozen=True)
class Files:
    """The contents of WebShop's three data files."""

    products: list[dict[str, Any]]
    attributes: dict[str, dict[str, Any]]
    human: dict[str, list[dict[str, Any]]]

    def write(self, folder: str | Path) -> tuple[Path, Path, Path]:
        """Write the files into `folder`, under WebShop's names; return their paths in the order of the fields."""
        folder = Path(folder)
        paths = folder / "items_shuffle.json", folder / "items_ins_v2.json", folder / "items_human_ins.json"
        for path, content in zip(paths, (self.products, self.attributes, self.human), strict=True):
            path.write_text(json.dumps(content), encoding="utf-8")
        return paths


def generate_files(count: int, seed: int, scale: str = "small") -> Files:
    """Return a catalogue of `count` products.

    scale: "small" has short titles, one bullet point and two or three values per option; "full" has pages as long as
    real ones.
    """
    files = Files([], {}, {})
    for number in range(count):
        random = Random(f"webshop {scale} {seed} {number}")
        asin = f"B{number:09d}"
        kind = random.choice(KINDS)
        product, attributes = _product(random, kind, asin, scale)
        files.products.append(product)
        files.attributes[asin] = {"attributes": attributes}
        if random.random() < ASKED_FOR:
            wanted = random.sample(attributes, 2)
            files.attributes[asin] |= {
                "instruction": f"Find me {', '.join(wanted)} {kind.query}",
                "instruction_attributes": wanted,
            }
            values = [
                random.choice(group)["value"].lower()
                for group in (product["customization_options"] or {}).values()
                if group
            ]
            described = "".join(f", {value}" for value in values)
            asked = f"i am looking for a {kind.noun.lower()}{described} that is {wanted[0]} and {wanted[1]}."
            files.human[asin] = [
                {"asin": asin, "instruction": asked, "instruction_attributes": wanted, "instruction_options": values}
            ]
    return files


def _product(random: Random, kind: Kind, asin: str, scale: str) -> tuple[dict[str, Any], list[str]]:
    """Return a random element of the product file, and its attributes."""
    small = scale == "small"
    attributes = random.sample(kind.attributes, 2 if small else 4)
    brand = "".join(random.sample(SYLLABLES, 2)).title()
    title = f"{brand} {' '.join(attributes).title()} {kind.noun}"
    if not small:
        title += f", {', '.join(random.sample(PHRASES, 2)).title()} – {random.randint(2, 12)} Pieces"
    bullets = [f"{attributes[0].capitalize()}: {random.choice(PHRASES)}. " for _ in range(1 if small else 5)]
    description = " ".join(
        f"{brand}'s {kind.noun.lower()} is {attribute}, {random.choice(PHRASES)}."
        for attribute in attributes * (1 if small else 4)
    )
    options: dict[str, list[dict[str, Any]] | None] = {}
    for name in kind.options:
        values = random.sample(VALUES[name], min(len(VALUES[name]), random.randint(2, 3 if small else 8)))
        options[name] = [
            {"is_selected": not at, "is_available": True, "value": value, "image": None}
            for at, value in enumerate(values)
        ]
    if not small and random.random() < 0.2:
        options["Style"] = None  # as found in the original files
    low = random.randint(400, 9000) / 100
    product = {
        "name": title,
        "asin": asin,
        "full_description": description,
        "small_description": bullets,
        "pricing": f"${low}" if random.random() < 0.7 else f"${low}${round(low * 1.5, 2)}",
        "customization_options": "" if random.random() < 0.1 else options,
        "category": kind.department,
        "query": kind.query,
        "product_category": kind.category,
        "average_rating": "",
        "images": [""],
        "page": 1,
    }
    return product, attributes
