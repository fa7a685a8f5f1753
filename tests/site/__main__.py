"""Build the site and check it: python -m tests.site FOLDER. FOLDER is replaced."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.site import links, source

HERE = Path(__file__).parent


def main(folder: Path) -> int:
    """Return 0 if the site is whole. Its problems go to stderr."""
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="ipsecgate-site-") as work:
        pages, state = Path(work) / "pages", Path(work) / "state"
        pages.mkdir()
        source.lay(pages)
        sphinx = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--nitpicky",
                  "--quiet", "-b", "html", "-c", str(HERE), "-d", str(state)]  # fmt: skip
        built = subprocess.run([*sphinx, str(pages), str(folder)], cwd=source.ROOT, check=False)
    if built.returncode:
        return 1
    wrong = links.problems(folder)
    wrong += [f"{page}: no link from the index leads here" for page in links.unreachable(folder)]
    sys.stderr.writelines(f"{each}\n" for each in wrong)
    if wrong:
        return 1
    pages_built = [links.parse(file) for file in folder.rglob("*.html")]
    count = sum(len(page.links) for page in pages_built)
    sys.stdout.write(f"{folder}/index.html: {len(pages_built)} pages; {count} links are whole\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
