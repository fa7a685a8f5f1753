"""The settings of Sphinx, which executes this file. python -m tests.site starts it."""

from __future__ import annotations

import itertools
import re
from importlib.metadata import version as version_of

import mermaidx
from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

project = "ipsecgate"
version = release = version_of("ipsecgate")
root_doc = "index"
extensions = ["myst_parser"]
myst_heading_anchors = 4  # the same anchors as the forge's
myst_fence_as_directive = ["mermaid"]
highlight_language = "text"
smartquotes = False  # they make a dash of the -- before an option

html_theme = "furo"
html_title = f"ipsecgate {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = html_show_sphinx = html_show_copyright = False
html_use_index = False
html_theme_options: dict[str, list[str]] = {"top_of_page_buttons": []}
pygments_dark_style = "github-dark"

SCALE = 0.65  # of a diagram's letters, which are 16 px high


class Mermaid(Directive):  # type: ignore[misc]
    """A diagram, drawn when the site is built: its page needs no script and no network."""

    has_content = True
    _numbers = itertools.count()

    def run(self) -> list[nodes.Node]:
        """Return the diagram as SVG in the page."""
        name = f"diagram-{next(self._numbers)}"
        drawing = mermaidx.render("\n".join(self.content)).svg().replace("my-svg", name)
        # Not as wide as the page, where the letters would be too small to read.
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', drawing)[1]) * SCALE  # type: ignore[index]
        drawing = re.sub(
            r'width="100%"(.*?)max-width: [\d.]+px', rf'width="{width:.0f}"\1', drawing, count=1
        )
        return [nodes.raw("", f'<div class="diagram">{drawing}</div>', format="html")]


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("mermaid", Mermaid)
