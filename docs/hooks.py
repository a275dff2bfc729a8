"""MkDocs hooks: pages from outside docs/, the notebook as a page, and formulas as MathML, which needs no script."""

import json
import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")  # [text](../path) of a page in docs/
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files, config):
    """Adds the studies, the project's own pages, what pages link to outside of docs/, and the notebook."""
    wanted = {*PAGES, *(str(path.relative_to(ROOT)) for path in (ROOT / "experiments").glob("*/*") if path.is_file())}
    for page in (ROOT / "docs").glob("*.md"):
        wanted |= {path for path in OUTSIDE.findall(page.read_text(encoding="utf-8")) if (ROOT / path).is_file()}
    for path in sorted(wanted):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    tour = (ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8")
    files.append(File.generated(config, "tour.md", content=notebook_page(json.loads(tour))))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to where those files stand in the site, which has docs/ at its top."""
    if page.file.src_uri in PAGES:
        markdown = markdown.replace("](docs/", "](")
    elif page.file.src_uri.startswith("experiments/"):
        markdown = markdown.replace("](../../docs/", "](../../")
    else:
        markdown = OUTSIDE.sub(r"](\1", markdown)
    return re.sub(r"\]\(([\w/]*)tour\.ipynb", r"](\1tour.md", markdown)


def on_page_content(html, page, config, files):
    """Formulas as MathML."""
    return FORMULA.sub(lambda found: mathml(found[3], display=found[2] == "["), html)


def mathml(formula: str, *, display: bool) -> str:
    return convert(unescape(formula).strip(), display="block" if display else "inline")


def notebook_page(notebook: dict) -> str:
    """A notebook with its outputs as Markdown; pictures within the page."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})")
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"
