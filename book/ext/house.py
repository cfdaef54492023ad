"""What the book adds to Jupyter Book: buttons, offline MathJax, unique identifiers, clean downloads, marked claims."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst.states import Inliner
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx_proof.nodes import proof_node

CLAIM = re.compile(r"✔ claim (?P<name>\S+) ")
MATHJAX = Path("_vendor/mathjax/es5/tex-mml-chtml.js")


def set_buttons(app: Sphinx, config: Config) -> None:
    """Show the repository and Colab buttons only if ``repository.url`` is set."""
    options = config.html_theme_options
    if options.get("repository_url"):
        options.update(use_repository_button=True, use_issues_button=True)
    else:
        for key in ("repository_url", "launch_buttons"):
            options.pop(key, None)


def set_mathjax(app: Sphinx, config: Config) -> None:
    """Serve MathJax from the book itself if it has been fetched; otherwise Sphinx's default, a CDN, stays."""
    if (Path(app.srcdir) / MATHJAX).is_file():
        config.html_static_path.append(MATHJAX.parts[0])
        config.mathjax_path = MATHJAX.relative_to(MATHJAX.parts[0]).as_posix()


def name_once(app: Sphinx, doctree: nodes.document) -> None:
    """Theorem boxes and proofs all come with the same two identifiers; a page may hold each only once."""
    for section in doctree.findall(nodes.section):
        if section["ids"] == ["proof-content"]:
            section["ids"] = [f"{section.parent['ids'][0]}-content"]
    for proof in doctree.findall(proof_node):
        proof[0]["ids"].clear()


def mark_claims(app: Sphinx, doctree: nodes.document) -> None:
    """Turn the printed line of a checked claim into a paragraph of its own, which the ledger links to."""
    for block in list(doctree.findall(nodes.literal_block)):
        lines = block.astext().splitlines()
        if "stream" not in block["classes"] or not any(CLAIM.match(line) for line in lines):
            continue
        parts: list[nodes.Element] = []
        for line in lines:
            if match := CLAIM.match(line):
                name = match["name"]
                parts.append(nodes.paragraph(line, line, ids=[f"claim-{name}"], classes=["icl-claim"]))
            elif parts and isinstance(parts[-1], nodes.literal_block):
                text = f"{parts[-1].astext()}\n{line}"
                parts[-1] = nodes.literal_block(text, text, **block.non_default_attributes())
            else:
                parts.append(nodes.literal_block(line, line, **block.non_default_attributes()))
        block.replace_self(parts)


def claim_role(
    role: str, rawtext: str, name: str, line: int, inliner: Inliner, options: object = None, content: object = None
) -> tuple[list[nodes.Node], list[nodes.system_message]]:
    """The role ``claim``: a link to the cell that asserts a claim, wherever it is."""
    settings = inliner.document.settings
    root = Path(settings.env.srcdir)
    homes = [path for path in root.glob("notebooks/*.md") if f'run.claim("{name}"' in path.read_text(encoding="utf-8")]
    if len(homes) != 1:
        message = inliner.reporter.warning(f"claim {name} is asserted in {len(homes)} chapters, expected 1", line=line)
        return [nodes.literal(rawtext, name)], [message]
    up = "../" * settings.env.docname.count("/")
    uri = f"{up}notebooks/{homes[0].stem}.html#claim-{name}"
    return [nodes.reference(rawtext, name, refuri=uri, internal=True, classes=["icl-claim-link"])], []


def twin(app: Sphinx, page: str) -> Path:
    """Path of the notebook that belongs to a page, whether or not there is one."""
    return Path(app.srcdir) / f"{page}.ipynb"


def offer_notebook(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Let the download menu of a chapter offer the notebook that Colab shows."""
    if twin(app, page).is_file():
        context["ipynb_source"] = f"{page}.ipynb"


def copy_notebooks(app: Sphinx, exception: Exception | None) -> None:
    """Put the notebooks where the download menu looks for them."""
    if exception is None and app.builder.name == "html":
        for page in filter(lambda page: twin(app, page).is_file(), app.env.found_docs):
            target = Path(app.outdir) / "_sources" / f"{page}.ipynb"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(twin(app, page), target)


def dress_claims(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Load style and script of the tables of claims, the script before MathJax rewrites what its filters search."""
    if page in ("book/ledger", "book/map"):
        app.add_css_file("ledger.css")
        app.add_js_file("ledger.js", priority=400, loading_method="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the functions above to Sphinx's events."""
    app.add_role("claim", claim_role)
    app.connect("config-inited", set_buttons, priority=100)
    app.connect("config-inited", set_mathjax, priority=100)
    app.connect("doctree-read", name_once)
    app.connect("doctree-read", mark_claims)
    app.connect("html-page-context", offer_notebook, priority=100)
    app.connect("html-page-context", dress_claims)
    app.connect("build-finished", copy_notebooks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
