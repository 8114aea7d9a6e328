"""Count the files that a load and a prompt pass through: how much a reader has to know.

    python tools/files_passed.py [--json]

Loads the embedded model once, answers one prompt, then traces a second load and a second prompt and
lists the files of the package in which a function was called in each, with the lines that they
have. What happens at import does not count.
"""

import argparse
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import thinslice
from thinslice import LLM, SamplingParams

PACKAGE = Path(thinslice.__file__).resolve().parent
PARAMS = SamplingParams(temperature=0, max_tokens=8)


def files_of(action: Callable[[], object]) -> dict[str, int]:
    """The package's files in which ``action`` calls a function, and their lines."""
    seen: set[str] = set()

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            seen.add(frame.f_code.co_filename)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    files = sorted(Path(file) for file in seen if Path(file).is_relative_to(PACKAGE))
    return {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    settings = {"memory": "1GiB", "context": 1024}
    llm = LLM("smollm2", **settings)
    for _ in llm.stream("Hello", PARAMS):
        pass
    passed = {
        "prompt": files_of(lambda: list(llm.stream("Name a river.", PARAMS))),
        "load": files_of(lambda: LLM("smollm2", **settings)),
    }
    if options.json:
        print(json.dumps(passed))
        return
    for what, files in passed.items():
        print(f"{what}: {len(files)} files, {sum(files.values()):,} lines")
        for file, num_lines in files.items():
            print(f"  {num_lines:5}  {file}")


if __name__ == "__main__":
    main()
