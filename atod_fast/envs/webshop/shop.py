"""A shop: catalogue, goals and search engine, loaded once and shared by all episodes, splits and clones of a process.

Loading takes about 0.4 ms and 6.4 kB a product: half a second for the 1,000-product set, and for the whole set of 1.18
million about 8 minutes and 8 GB in each process.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

from atod_fast.envs.webshop.catalogue import Catalogue, load, parse_facts, parse_product
from atod_fast.envs.webshop.generator import generate_files
from atod_fast.envs.webshop.goals import Goals, load_human
from atod_fast.envs.webshop.search import SearchEngine

# Seed of the prices within ranges and of the price limits. The draws and their order are WebShop's after
# random.seed(PRICE_SEED).
PRICE_SEED = 233
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shop:
    """A loaded shop; read-only."""

    catalogue: Catalogue
    goals: Goals
    engine: SearchEngine


@dataclass(frozen=True)
class Source:
    """Which files make up a shop, and how much of them."""

    products: Path
    attributes: Path
    human_goals: Path | None
    num_products: int | None
    malformed: int

    def open(self) -> Shop:
        """Load the shop, or return it if its files have not changed. Raise UserError if a file cannot be used."""
        files = [file for file in (self.products, self.attributes, self.human_goals) if file is not None]
        return _open(self, tuple(file.stat().st_mtime_ns if file.exists() else 0 for file in files))


@lru_cache(maxsize=2)
def _open(source: Source, versions: tuple[int, ...]) -> Shop:
    started, random = time.monotonic(), Random(PRICE_SEED)
    catalogue = load(
        source.products, source.attributes, random, num_products=source.num_products, malformed=source.malformed
    )
    human = None if source.human_goals is None else load_human(source.human_goals, source.malformed)
    shop = Shop(catalogue, Goals(catalogue, human, random), SearchEngine(catalogue.products))
    _log.info(
        "WebShop: %d products, %d goals, loaded in %.1f s",
        len(catalogue.products),
        len(shop.goals),
        time.monotonic() - started,
    )
    return shop


@lru_cache(maxsize=2)
def generated(count: int, seed: int, scale: str) -> Shop:
    """Return a made-up shop; see generator.py."""
    files, random = generate_files(count, seed, scale), Random(PRICE_SEED)
    facts = dict(map(parse_facts, files.attributes.items()))
    catalogue = Catalogue((parse_product(entry, facts) for entry in files.products), facts, random)
    return Shop(catalogue, Goals(catalogue, None, random), SearchEngine(catalogue.products))
