"""Every verb on the processor, where torch and what compiles for a card cannot be imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_llm import write_model

PROGRAM = """
import sys
from importlib.machinery import PathFinder

class Installed:
    find_distributions = PathFinder.find_distributions

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ("torch", "triton", "transformers"):
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
from thinslice.cli.app import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("without") / "tiny.gguf")


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_the_embedded_model_answers(dtype: str, smollm2_path: Path) -> None:
    asked = ("The capital of France is", "--raw", "--temperature", "0", "--max-tokens", "4")
    done = run("run", str(smollm2_path), *asked, "--dtype", dtype, "--memory", "1GiB")
    assert (done.returncode, done.stdout) == (0, " Paris.\n\n\n"), done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "MODEL"),
        ("pack", "MODEL", "--dtype", "int8", "--out", "FOLDER/packed"),
        ("bench", "MODEL", "--prompt-tokens", "8", "--completion-tokens", "2"),
        ("compare", "MODEL", "MODEL", "--text", "FOLDER/text", "--context", "32"),
        ("doctor",),
        ("ls",),
        ("chat", "MODEL", "--max-tokens", "2"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_verb_works(arguments: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a b c d " * 40)
    given = [one.replace("MODEL", str(model)).replace("FOLDER", str(tmp_path)) for one in arguments]
    if arguments[0] not in ("doctor", "ls", "pack"):
        given += ["--memory", "400MiB"]
    done = run(*given, stdin="hi\n")
    assert done.returncode == 0, done.stderr


def test_what_needs_torch_says_so(model: Path) -> None:
    done = run("run", str(model), "--device", "cuda", "hi")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "pip install 'thinslice[cuda]'" in done.stderr
