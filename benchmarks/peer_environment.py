"""The peers, set up in a folder of their own: a virtual environment, and llama.cpp from source.

What is there is used again; what was interrupted goes on where it stopped.
"""

import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

from harness import RunError, console, run_process

DEFAULT_FOLDER = Path("~/.cache/thinslice/peers").expanduser()
# torch first and alone, so that what follows takes the one that is there.
TORCH = "torch==2.13.0"
PACKAGES = (
    "transformers==5.23.0",
    "accelerate==1.15.0",
    "airllm==4.0.0",
    "openvino-genai==2026.4.1.0",
    "gguf==0.19.0",
)
# Its source distribution holds the whole of llama.cpp.
LLAMA_PYTHON = "llama-cpp-python==0.3.36"
LLAMA_PROGRAMS = (
    "llama-bench",
    "llama-batched-bench",
    "llama-cli",
    "llama-completion",
    "llama-quantize",
    "llama-server",
)
# With GGML_NATIVE the compiler's -march=native decides, and GGML_AMX_TILE and GGML_AMX_INT8 are not
# even read. All of ggml's AMX code, which crashes on some processors, stands under __AMX_INT8__.
# AVX-512 VNNI stays.
WITHOUT_AMX = "-U__AMX_INT8__"
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DGGML_CCACHE=OFF",
    f"-DCMAKE_C_FLAGS={WITHOUT_AMX}",
    f"-DCMAKE_CXX_FLAGS={WITHOUT_AMX}",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


class PeerEnvironment:
    """Where the peers are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._venv = folder / "venv"
        self._build = folder / "build-llama"

    @property
    def python(self) -> list[Path | str]:
        """The command of their Python. -P: a script's folder is no place to import from."""
        return [self._venv / "bin" / "python", "-P"]

    def llama(self, program: str) -> Path:
        """One of LLAMA_PROGRAMS."""
        return self._build / "bin" / program

    def set_up(self) -> None:
        """Install and build what is missing; minutes, the first time. Errors: RunError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._set_up_packages()
        self.set_up_llama()

    def set_up_llama(self) -> None:
        """llama.cpp alone. Errors: RunError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not all(self.llama(program).exists() for program in LLAMA_PROGRAMS):
            self._build_llama(self._llama_source())

    def versions(self) -> dict[str, str]:
        """What was measured against."""
        pinned = dict(package.split("==") for package in (TORCH, *PACKAGES))
        return {**pinned, f"llama.cpp of {LLAMA_PYTHON}": "GGML_NATIVE, without AMX"}

    def _set_up_packages(self) -> None:
        """Errors: RunError."""
        wanted = "\n".join((TORCH, *PACKAGES))
        stamp = self._venv / ".installed"
        if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
            return
        console.print(f"installing {', '.join((TORCH, *PACKAGES))} in {self._venv}")
        run_process([sys.executable, "-m", "venv", self._venv])
        pip = [self._venv / "bin" / "python", "-m", "pip", "install", "--quiet"]
        run_process([*pip, TORCH])
        run_process([*pip, TORCH, *PACKAGES])
        stamp.write_text(wanted, encoding="utf-8")

    def _llama_source(self) -> Path:
        """The unpacked source, fetched if it is not there. Errors: RunError."""
        folder = self.folder / "src"
        name = LLAMA_PYTHON.replace("-", "_").replace("==", "-")
        source = folder / name / "vendor" / "llama.cpp"
        if (source / "CMakeLists.txt").exists():
            return source
        console.print(f"fetching the source of {LLAMA_PYTHON}")
        archive = folder / f"{name}.tar.gz"
        if not archive.exists():
            package = re.split("==", LLAMA_PYTHON)[0]
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            run_process([*pip, "--no-binary", package, "--dest", folder, LLAMA_PYTHON])
        part = folder / ".part"
        shutil.rmtree(part, ignore_errors=True)
        with tarfile.open(archive) as opened:
            opened.extractall(part, filter="data")
        os.replace(part / name, folder / name)
        return source

    def _build_llama(self, source: Path) -> None:
        """Errors: RunError."""
        if shutil.which("cmake") is None:
            raise RunError("cmake is needed to build llama.cpp")
        console.print(f"building llama.cpp in {self._build}; this takes a while")
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        run_process(["cmake", "-S", source, "-B", self._build, *generator, *CMAKE_OPTIONS])
        jobs = str(len(os.sched_getaffinity(0)))
        build = ["cmake", "--build", self._build, "--parallel", jobs, "--target"]
        run_process([*build, *LLAMA_PROGRAMS], timeout_s=3 * 3600)
