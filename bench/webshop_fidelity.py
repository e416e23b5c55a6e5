"""Measure how closely WebShop's search agrees with Lucene's, and its noun heuristic with spaCy's, on 1,000 products.

    pip install spacy && python -m spacy download en_core_web_sm
    python bench/webshop_fidelity.py items_shuffle_1000.json items_ins_v2_1000.json \\
        --anserini anserini-0.14.3-fatjar.jar --spacy en_core_web_sm

The jar is in the wheel of pyserini 0.17, which WebShop requires; it needs a JDK. Queries are titles, WebShop's
instructions, the products' own queries and three random words of titles; every third is used. A part whose tool is not
given is left out. Writes bench/results/webshop_fidelity.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from atod_fast.envs.webshop.catalogue import Product
from atod_fast.envs.webshop.env import WebShop
from atod_fast.envs.webshop.nouns import heuristic
from atod_fast.envs.webshop.reward import type_reward
from atod_fast.envs.webshop.search import document

RESULTS = Path(__file__).parent / "results" / "webshop_fidelity.json"
SEARCHER = """
import io.anserini.search.SimpleSearcher;
import java.io.*;
public class Searcher {
  public static void main(String[] a) throws Exception {
    SimpleSearcher searcher = new SimpleSearcher(a[0]);
    BufferedReader in = new BufferedReader(new InputStreamReader(System.in, "UTF-8"));
    PrintStream out = new PrintStream(new FileOutputStream(a[1]), false, "UTF-8");
    for (String query; (query = in.readLine()) != null; out.println())
      for (SimpleSearcher.Result hit : searcher.search(query, 50)) out.print(hit.docid + " ");
    out.close();
  }
}
"""


def queries(products: Iterable[Product], goals: Iterable[str], seed: int = 1) -> list[str]:
    rng, found = Random(seed), list(goals)
    for product in products:
        words = product.title.split()
        found += [product.title, product.query, " ".join(rng.sample(words, min(len(words), 3)))]
    return [text for query in found[::3] if (text := " ".join(query.lower().split()))]


def lucene(jar: Path, products: Iterable[Product], asked: list[str]) -> list[list[str]]:
    """Return the identifiers of at most 50 hits for each query, from Anserini with its defaults."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "documents").mkdir()
        lines = (json.dumps({"id": product.asin, "contents": document(product).lower()}) for product in products)
        (folder / "documents" / "all.jsonl").write_text("\n".join(lines), encoding="utf-8")
        (folder / "Searcher.java").write_text(SEARCHER)
        options = (
            "-collection JsonCollection -input documents -index index -generator DefaultLuceneDocumentGenerator "
            "-threads 1"
        )
        java = ["java", "-Xmx1g", "-cp", str(jar.resolve())]
        subprocess.run(
            [*java, "io.anserini.index.IndexCollection", *options.split()], cwd=folder, check=True, capture_output=True
        )
        text = "".join(f"{query}\n" for query in asked).encode()
        subprocess.run(
            [*java, "Searcher.java", "index", "hits"], cwd=folder, check=True, capture_output=True, input=text
        )
        return [line.split() for line in (folder / "hits").read_text(encoding="utf-8").splitlines()]


def ranking(env: WebShop, jar: Path) -> dict:
    products = env.shop.catalogue.products
    asked = queries(products, (goal.instruction for goal in env.shop.goals))
    totals: Counter[str] = Counter()
    for query, theirs in zip(asked, lucene(jar, products, asked), strict=True):
        ours = [products[row].asin for row in env.shop.engine.search(query, Random(0))]
        totals["first_hit"] += ours[:1] == theirs[:1]
        for most in (10, 50):
            a, b = set(ours[:most]), set(theirs[:most])
            totals[f"first_{most}_hits"] += len(a & b) / len(b) if b else not a
    return {"queries": len(asked)} | {name: total / len(asked) for name, total in totals.items()}


def nouns(products: list[Product], model: str, pairs: int = 20_000) -> dict:
    import spacy

    parse = spacy.load(model)
    tagged = {
        product.title: tuple(token.text.lower() for token in parse(product.title) if token.pos_ in ("NOUN", "PROPN"))
        for product in products
    }
    both = [(Counter(tagged[product.title]), Counter(heuristic(product.title))) for product in products]
    right, theirs, ours = (
        (sum(sum(part(a, b).values()) for a, b in both))
        for part in (lambda a, b: a & b, lambda a, b: a, lambda a, b: b)
    )

    def same(some: list[tuple[Product, Product]], spacys: Callable[[str], tuple[str, ...]]) -> float:
        return sum(type_reward(a, b, spacys) == type_reward(a, b, heuristic) for a, b in some) / len(some)

    rng, together = Random(0), defaultdict(list)
    for product in products:
        together[product.query].append(product)
    random_pairs = [(rng.choice(products), rng.choice(products)) for _ in range(pairs)]
    near_pairs = [(a, b) for group in together.values() for a in group for b in group if a is not b]
    agreement = {
        "type_reward_random_pairs": same(random_pairs, tagged.__getitem__),
        "type_reward_pairs_of_a_query": same(near_pairs, tagged.__getitem__),
    }
    return {
        "model": f"{parse.meta['name']} {parse.meta['version']}",
        "precision": right / ours,
        "recall": right / theirs,
    } | agreement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("products", type=Path)
    parser.add_argument("attributes", type=Path)
    parser.add_argument("--anserini", type=Path, metavar="JAR")
    parser.add_argument("--spacy", default="", metavar="MODEL", help="such as en_core_web_sm")
    args = parser.parse_args()
    env = WebShop(products=args.products, attributes=args.attributes, nouns="heuristic")
    found = {"products": len(env.shop.catalogue.products)}
    if args.anserini:
        found["search"] = ranking(env, args.anserini)
    if args.spacy:
        found["nouns"] = nouns(env.shop.catalogue.products, args.spacy)
    print(json.dumps(found, indent=1))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
