"""How well a purchase fulfils a goal: WebShop's score.

    score = r_type * (attributes met + options met + [price <= limit]) / (|attributes| + |options| + 1)

After princeton-nlp/WebShop (MIT, web_agent_site/engine/goal.py: get_reward; engine/normalize.py: COLOR_SET), and
thefuzz 0.19, with which it compares strings: rapidfuzz's ratio after the same preparation and rounding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

from atod_fast.envs.webshop.catalogue import Product
from atod_fast.envs.webshop.goals import Goal
from atod_fast.envs.webshop.nouns import Nouns
from atod_fast.errors import UserError

ALIKE = 85  # percent; strings that are more similar mean the same
COLOURS = tuple(
    """
    alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel camo
    caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream
    crystal dark denim eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey heather
    indigo ivory ivy khaki lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha
    multicolor mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal
    rust sand sapphire seashell silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise
    violet walnut wheat white wine yellow
    """.split()
)

_LATIN_1 = dict.fromkeys(range(128, 256))
_SYMBOLS = re.compile(r"\W")


def matcher() -> Callable[[object, object], bool]:
    """Return a function that tells whether two strings mean the same. Raise UserError without rapidfuzz.

    They do if thefuzz's token_set_ratio, rounded, is above `ALIKE`.
    """
    try:
        from rapidfuzz.fuzz import token_set_ratio
    except ImportError as error:
        raise UserError(f"env.name='webshop' needs rapidfuzz ({error}); pip install 'atod_fast[search]'") from error

    def alike(one: object, other: object) -> bool:
        return round(token_set_ratio(_plain(one), _plain(other))) > ALIKE

    return alike


def score(
    goal: Goal,
    bought: Product,
    price: float,
    options: Mapping[str, str],
    nouns: Nouns,
    alike: Callable[[object, object], bool],
) -> float:
    """Return WebShop's score of `goal` for buying `bought` at `price` dollars with the chosen `options`; in [0, 1].

    nouns: from `nouns.tagger`. alike: from `matcher`.
    """
    met = (
        attributes_met(goal.attributes, bought, alike)
        + options_met(goal.options, options.values(), alike)
        + (price <= goal.price_upper)
    )
    return met / (len(goal.attributes) + len(goal.options) + 1) * type_reward(goal.product, bought, nouns)


def type_reward(wanted: Product, bought: Product, nouns: Nouns) -> float:
    """Return 1 for products of the same kind; 0.5, 0.1 or 0 if queries, categories and titles say otherwise."""
    wanted_nouns = nouns(wanted.title)
    # A share of the goal's nouns, repeats included, as in WebShop.
    shared = len(set(wanted_nouns) & set(nouns(bought.title))) / len(wanted_nouns) if wanted_nouns else 0.2
    if shared == 0:
        return 0.0
    if shared < 0.1:
        return 0.1
    same = wanted.query == bought.query or len(_categories(wanted) & _categories(bought)) >= 2
    return 1.0 if same or shared > 0.2 else 0.5


def attributes_met(wanted: Collection[str], bought: Product, alike: Callable[[object, object], bool]) -> int:
    """Return how many of the `wanted` are like an attribute of the product or occur in its text."""
    texts = (bought.title.lower(), " ".join(bought.bullets).lower(), bought.description.lower())
    return sum(
        any(alike(has, want) for has in bought.attributes) or any(want in text for text in texts) for want in wanted
    )


def options_met(
    wanted: Mapping[str, str] | Collection[str], chosen: Collection[str], alike: Callable[[object, object], bool]
) -> int:
    """Return how many of the `wanted` are like a chosen value; colours are replaced by their base colour."""
    # If names are known, WebShop compares (name, value) pairs as printed, and finds a base colour only where the value
    # is just that.
    pairs = wanted.items() if isinstance(wanted, Mapping) else wanted
    values = [_base_colour(value) for value in chosen]
    return sum(any(alike(value, want) for value in values) for want in map(_base_colour, pairs))


def _base_colour(option: str | tuple[str, str]) -> str | tuple[str, str]:
    return next((colour for colour in COLOURS if colour in option), option)


def _categories(product: Product) -> set[str]:
    return {part.strip() for part in product.product_category.split("›")}


def _plain(value: object) -> str:
    return _SYMBOLS.sub(" ", str(value).translate(_LATIN_1)).lower().strip()
