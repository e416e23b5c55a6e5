"""What mkdocs adds to the pages of docs/: files of the repository as pages, links between them, equations, the keys.

README.md, CHANGELOG.md, kernels/README.md and bench/results/ are pages of the site without a second copy in docs/.
Links are written as GitHub reads them, relative to the file. On the site a link to a file that is no page becomes its
text, or a link into the repository where mkdocs.yml names one as `repo_url`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

Schema = Mapping[str, Any]  # JSON schema
ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "kernels/README.md": "kernels.md"}  # file -> page
# Code, which is left alone, or a link: (mark, text, target, anchor).
_TARGET = r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]+)(#[^()\s]*)?\)"
_LINK = re.compile(rf"^```.*?^```|{_TARGET}|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def on_config(config):
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": equation})
    return config


def equation(source: str, *_, **__) -> str:
    """The LaTeX of a ```math fence as MathML, which browsers draw by themselves."""
    return f"<p>{convert(source.strip(), display='block')}</p>"


def on_files(files, config):
    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    for path in sorted((ROOT / "bench" / "results").iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    files.append(File.generated(config, "reference/config.md", content=keys_page()))
    return files


def page_of(path: str) -> str | None:
    """The site's page or file of a path in the repository; None if it has none."""
    if path in PAGES:
        return PAGES[path]
    for folder, place in {"docs/": "", "bench/results/": "results/"}.items():
        if path.startswith(folder) and (ROOT / path).is_file():
            return place + path.removeprefix(folder)
    return None


def path_of(page: str) -> str:
    """The inverse of `page_of`."""
    sources = {page: path for path, page in PAGES.items()}
    return sources.get(page) or (f"bench/{page}" if page.startswith("results/") else f"docs/{page}")


def on_page_markdown(markdown: str, page, config, files) -> str:
    here = page.file.src_uri

    def site_link(found: re.Match[str]) -> str:
        mark, text, target, anchor = found.groups(default="")
        if not target:
            return found[0]
        path = os.path.normpath(os.path.join(os.path.dirname(path_of(here)), target))
        if re.match(r"\w+:", target) or not (ROOT / path).exists():
            return found[0]  # another site's, or a generated page's; mkdocs warns about what is none
        if (to := page_of(path)) is not None:
            return f"{mark}[{text}]({os.path.relpath(to, os.path.dirname(here) or '.')}{anchor})"
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{path})" if config.repo_url else text

    return _LINK.sub(site_link, markdown)


def keys_page() -> str:
    """Every configuration key with its default, what it takes and what it means, from the schema of `Config`."""
    sys.path.insert(0, str(ROOT))
    from atod_fast.config import Config

    schema = Config.model_json_schema()
    lines = [
        "# Configuration keys",
        "",
        "The tables are made from the types of `atod_fast.config`.",
        "`python -m atod_fast.train --help` prints the same keys.",
        "The defaults are those of the embedded demo. How files, presets and overrides combine:",
        "[Commands and settings](../commands.md#settings).",
    ]
    for name, section in schema["properties"].items():
        lines += ["", f"## {name}", "", f"{section['description'].capitalize()}.", "", *_HEADING]
        lines += rows(schema["$defs"], name, section, section["default"])
    return "\n".join(lines) + "\n"


_HEADING = ["| key | default | takes | meaning |", "|---|---|---|---|"]


def rows(definitions: Schema, prefix: str, section: Schema, default: Schema) -> Iterator[str]:
    for name, field in definitions[section["$ref"].rpartition("/")[2]]["properties"].items():
        key = f"{prefix}.{name}"
        if "$ref" in field:
            yield from rows(definitions, key, field, default[name])
        else:
            cells = f"`{key}`", f"`{json.dumps(default[name])}`", takes(field), field["description"]
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


_TYPES = {"integer": "integer", "number": "number", "boolean": "`true`, `false`", "string": "text", "object": "table"}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def takes(field: Schema) -> str:
    """What a key takes, in words: `integer ≥ 1`, the choices of an enumeration."""
    if "anyOf" in field:
        return ", ".join(map(takes, field["anyOf"]))
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if field["type"] == "array":
        return f"list of {len(field['prefixItems'])}: {takes(field['prefixItems'][0])} each"
    found = {sign: field[bound] for bound, sign in _BOUNDS.items() if bound in field}
    bounds = [f"{sign} {value:g}" for sign, value in found.items() if abs(value) < 2**32]
    return f"{_TYPES[field['type']]} {' and '.join(bounds)}".strip()
