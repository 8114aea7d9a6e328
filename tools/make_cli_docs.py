"""Write docs/cli.md from the command line's own help; --check only compares."""

import sys
from pathlib import Path

from thinslice.cli.commands import make_app

TARGET = Path(__file__).parent.parent / "docs" / "cli.md"
HEADER = "<!-- Made from the help texts by tools/make_cli_docs.py; change those and run it. -->\n\n"


def main() -> int:
    text = HEADER + make_app().generate_docs().rstrip() + "\n"
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
        print("docs/cli.md is not what the help says; run python tools/make_cli_docs.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
