"""What the book adds to Jupyter Book: buttons, scripts, identifiers, downloads, claims, dates, costs, light pages."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst.states import Inliner
from PIL import Image
from sphinx.application import ENV_PICKLE_FILENAME, Sphinx
from sphinx.config import Config
from sphinx_proof.nodes import proof_node

CLAIM = re.compile(r"✔ claim (?P<name>\S+) ")
# Styles and scripts of single pages.
OF_CLAIMS = ("ledger.css", "ledger.js")
DRESS = {
    "book/ledger": OF_CLAIMS,
    "book/map": OF_CLAIMS,
    "book/explore": ("explore.css", "explore-twin.js", "explore-modes.js", "explore.js"),
}
VENDOR = "_vendor"
MATHJAX = "mathjax/es5/tex-mml-chtml.js"
TIPPY = ["popper/dist/umd/popper.min.js", "tippy.js/dist/tippy-bundle.umd.min.js"]
SPARE = re.compile(r'<link rel="preload" as="font"[^>]*>\s*|<script src="[^"]*/fontawesome/.*?</script>\s*')


def set_buttons(app: Sphinx, config: Config) -> None:
    """Show the repository and Colab buttons only if ``repository.url`` is set."""
    options = config.html_theme_options
    if options.get("repository_url"):
        options.update(use_repository_button=True, use_issues_button=True)
    else:
        for key in ("repository_url", "launch_buttons"):
            options.pop(key, None)


def fetched(app: Sphinx, *scripts: str) -> bool:
    """Whether scripts have been fetched, so that the book can serve them itself."""
    return all((Path(app.srcdir) / VENDOR / script).is_file() for script in scripts)


def set_scripts(app: Sphinx, config: Config) -> None:
    """Serve what has been fetched: MathJax, else Sphinx's default, a CDN, stays; and previews, else there are none."""
    if (Path(app.srcdir) / VENDOR).is_dir():
        config.html_static_path.append(VENDOR)
    if fetched(app, MATHJAX):
        config.mathjax_path = MATHJAX
    if fetched(app, *TIPPY):
        config.tippy_js = TIPPY
        config.tippy_enable_mathjax = True
        config.tippy_enable_doitips = config.tippy_enable_wikitips = False
        config.tippy_tip_selector = "figure, p, div.admonition, div.citation"
        config.tippy_anchor_parent_selector = "article.bd-article"
        config.tippy_props = {"maxWidth": 560, "delay": [300, 0]}


def name_once(app: Sphinx, doctree: nodes.document) -> None:
    """Theorem boxes, proofs and exercises all come with the same identifiers; a page may hold each only once."""
    for section in doctree.findall(nodes.section):
        if section["ids"] in (["proof-content"], ["exercise-content"]):
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


def changed(app: Sphinx, page: str) -> str:
    """When a page, or a file that it shows, was last changed; nothing where git does not know."""
    files = [app.env.doc2path(page), *app.env.dependencies.get(page, ())]
    try:
        command = ["git", "log", "-1", "--format=%cs", "--", *files]
        date = subprocess.run(command, cwd=app.srcdir, capture_output=True, text=True).stdout.strip()
    except OSError:
        date = ""
    return f"Last changed {date}." if date else ""


def cost(app: Sphinx, page: str) -> str:
    """What a chapter takes at each scale, as far as it has been measured."""
    path = Path(app.srcdir) / "book" / "costs.json"
    known = json.loads(path.read_text())["chapters"].get(Path(page).name, {}) if path.is_file() else {}
    parts = []
    for scale, measured in known.items() if page.startswith("notebooks/") else ():
        seconds = measured["seconds"]
        time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        parts.append(f"{time} and {measured['peak_bytes'] / 1e9:.1f} GB at scale {scale}")
    return f"On one processor core this chapter takes {', '.join(parts)}." if parts else ""


def show_facts(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Say at the foot of a page when it was last changed, and what it costs to run."""
    facts = " ".join(filter(None, [cost(app, page), changed(app, page)])) if doctree else ""
    if facts:
        context["theme_extra_footer"] = f"<p>{facts}</p>\n<p>{context.get('theme_extra_footer', '')}</p>"


def lighten(head: str) -> str:
    """Drop a script of 1.5 MB that draws the icons a second time, and fonts loaded before anything asks for them."""
    return SPARE.sub("", head)


def mend_markup(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Let templates call :func:`lighten`; read folded code out by its own words, and references not as a list."""
    context["lighten"] = lighten
    for spare in (' aria-label="Toggle hidden content"', 'role="list" '):
        context["body"] = context.get("body", "").replace(spare, "")


def spare_previews(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Let previews load their pictures when they open, and not with the page."""
    previews = getattr(app.env, "tippy_data", {"pages": {}})["pages"].get(page, {}).get("id_to_html", {})
    for place, text in previews.items():
        previews[place] = text.replace("<img ", '<img loading="lazy" ')


def copy_notebooks(app: Sphinx, exception: Exception | None) -> None:
    """Put the notebooks where the download menu looks for them."""
    if exception is None and app.builder.name == "html":
        for page in filter(lambda page: twin(app, page).is_file(), app.env.found_docs):
            target = Path(app.outdir) / "_sources" / f"{page}.ipynb"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(twin(app, page), target)


def shrink_pictures(app: Sphinx, exception: Exception | None) -> None:
    """Figures have some thousand shades; with 256, none off by more than eyes can see, they weigh a third."""
    for path in Path(app.outdir, "_images").glob("*.png") if exception is None else ():
        picture = Image.open(path)
        if picture.mode != "P":
            few = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            few.save(path, optimize=True)


def dress(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Load styles and scripts of single pages, the scripts before MathJax rewrites what the ledger's filters search."""
    for name in DRESS.get(page, ()):
        if name.endswith(".css"):
            app.add_css_file(name)
        else:
            app.add_js_file(name, priority=400, loading_method="defer")


def keep_previews(app: Sphinx, exception: Exception | None) -> None:
    """sphinx-tippy knows the pages of this build alone: keep what it knows for the next, and drop outdated files."""
    if exception is None and hasattr(app.env, "tippy_data"):
        written = {data["js_path"] for data in app.env.tippy_data["pages"].values()}
        for path in set(Path(app.outdir, "_static", "tippy").rglob("*.js")) - written:
            path.unlink()
        with open(Path(app.doctreedir) / ENV_PICKLE_FILENAME, "wb") as file:
            pickle.dump(app.env, file, pickle.HIGHEST_PROTOCOL)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the functions above to Sphinx's events."""
    app.add_role("claim", claim_role)
    if fetched(app, *TIPPY):
        app.setup_extension("sphinx_tippy")
    app.connect("config-inited", set_buttons, priority=100)
    app.connect("config-inited", set_scripts, priority=100)
    app.connect("doctree-read", name_once)
    app.connect("doctree-read", mark_claims)
    app.connect("html-page-context", offer_notebook, priority=100)
    app.connect("html-page-context", dress)
    app.connect("html-page-context", spare_previews, priority=460)  # sphinx-tippy collects them at 450
    app.connect("html-page-context", show_facts)
    app.connect("html-page-context", mend_markup)
    app.connect("build-finished", copy_notebooks)
    app.connect("build-finished", shrink_pictures)
    app.connect("build-finished", keep_previews, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
