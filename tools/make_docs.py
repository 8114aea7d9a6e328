"""Write the pages of docs that are made from the code; --check only compares.

docs/cli.md comes from the command line's own help, docs/modules.md from each module's docstring.
"""

import ast
import sys
from pathlib import Path

from thinslice.cli.commands import make_app

ROOT = Path(__file__).parents[1]
NOTE = "<!-- Made by tools/make_docs.py from {}; change those and run it. -->\n\n"


def commands() -> str:
    """The commands and their options."""
    return NOTE.format("the help texts") + make_app().generate_docs().rstrip() + "\n"


def modules() -> str:
    """One line for each module: the first sentence of its docstring."""
    lines = [NOTE.format("the modules' docstrings"), "# Modules\n"]
    package = ROOT / "thinslice"
    rooms = [package, *sorted({path.parent for path in package.rglob("*.py")} - {package})]
    for room in rooms:
        lines.append(f"\n## {room.relative_to(ROOT)}\n\n| module | what is in it |\n|---|---|\n")
        for path in sorted(room.glob("*.py")):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            if docstring is not None and path.name != "__init__.py":
                lines.append(f"| `{path.name}` | {summary_of(docstring)} |\n")
    return "".join(lines)


def summary_of(docstring: str) -> str:
    """The first paragraph on one line, up to its first full stop."""
    text = " ".join(docstring.partition("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".").replace("|", "\\|")


def main() -> int:
    """Write or compare the pages; 1 where one is not what the code says."""
    is_check, code = "--check" in sys.argv[1:], 0
    for name, text in (("cli.md", commands()), ("modules.md", modules())):
        page = ROOT / "docs" / name
        if not is_check:
            page.write_text(text, encoding="utf-8")
        elif not page.exists() or page.read_text(encoding="utf-8") != text:
            print(f"docs/{name} is not what the code says; run python tools/make_docs.py")
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
