"""What a comparison needs on this machine: the peers, built in an environment of their own, and its own C programs.

Each part that cannot be had raises `Missing` with the reason; the others go on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.report import Missing

HERE = Path(__file__).resolve().parent
# One source of llama.cpp that package indexes carry: the C++ tree inside llama-cpp-python's sdist, built as it stands.
LLAMA_CPP_PYTHON = "llama-cpp-python==0.3.36"
CONVERTER = ("gguf==0.19.0", "safetensors==0.8.0", "numpy==2.4.6")
GENAI = (
    "torch==2.13.0",
    "transformers==5.23.0",
    "onnxruntime==1.32.0",
    "onnxruntime-genai==0.18.0",
    "onnx-ir==1.1.0",
    "sentencepiece==0.2.3",  # the builder reads a tokenizer
    "protobuf==7.36.2",
)
_BUILD_S = 4 * 3600


@dataclass
class Peers:
    """Where the peers' programs are; a text instead of a path says why one is missing."""

    python: Path
    llama_cpp: Path | str
    converter: Path | str
    genai: Path | str = "not asked for"
    server: Path | str = "not asked for"


def call(command: Sequence[object], *, timeout_s: float = 3600, cwd: Path | None = None) -> str:
    """Run a program and return its standard output.

    Raises:
        Missing: it fails; with the last line that it wrote.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, cwd=cwd, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{Path(words[0]).name}: {error}") from None
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise Missing(f"{' '.join(words[:4])}: exit code {done.returncode}: {lines[-1] if lines else 'no output'}")
    return done.stdout


def say(text: str) -> None:
    """Tell what is going on, on standard error."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def compile_c(source: str, target: Path, *options: object) -> Path:
    """Compile one of our C programs for this very machine."""
    target.parent.mkdir(parents=True, exist_ok=True)
    call([os.environ.get("CC", "cc"), "-O3", "-march=native", HERE / source, "-o", target, "-pthread", *options])
    return target


def machine_facts() -> dict[str, object]:
    """Name the processor, the cores that we may use, the memory, and the commit that is measured."""
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith(("model name", "CPU part"))),
        "unknown",
    )
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    git = ["git", "-C", str(HERE)]
    try:
        commit = call([*git, "rev-parse", "--short", "HEAD"]).strip()
        commit += " with changes" if call([*git, "status", "--porcelain", "--untracked-files=no"]).strip() else ""
    except Missing:
        commit = "unknown"
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e6, 1),
        "kernel": os.uname().release,
        "load average at the start": round(os.getloadavg()[0], 1),
        "commit": commit,
    }


def build_peers(folder: Path, cores: int) -> Peers:
    """Make what `make bench` needs, or what is missing of it. llama.cpp compiles for ten minutes on two cores."""
    peers = _llama_peers(folder, cores)
    peers.genai = _part(lambda: _install(peers.python, folder, "genai", GENAI))
    return peers


def build_server_peers(folder: Path, cores: int) -> Peers:
    """Make what `make bench-server` needs, in the same folder: llama.cpp's server takes ten minutes more."""
    peers = _llama_peers(folder, cores)
    peers.server = _part(lambda: _llama_server(peers.python, folder, cores))
    return peers


def _llama_peers(folder: Path, cores: int) -> Peers:
    python = folder / "bin" / "python"
    if not python.exists():
        call([sys.executable, "-m", "venv", folder])
    converter = _part(lambda: _install(python, folder, "converter", CONVERTER))
    return Peers(python, _part(lambda: _llama_cpp(python, folder, cores)), converter)


def _part(make: Callable[[], Path]) -> Path | str:
    try:
        return make()
    except Missing as error:
        return str(error)


def _install(python: Path, folder: Path, name: str, packages: Sequence[str]) -> Path:
    stamp = folder / f".{name}"
    if not stamp.exists() or json.loads(stamp.read_text()) != list(packages):
        say(f"installing {', '.join(packages)}")
        call([python, "-m", "pip", "install", "-q", *packages], timeout_s=_BUILD_S)
        stamp.write_text(json.dumps(list(packages)))
    return python


def _llama_cpp(python: Path, folder: Path, cores: int) -> Path:
    """Build llama.cpp's library from its source as llama.cpp's own CMake files have it, and our driver with it."""
    source, libraries = _llama_target(python, folder, cores, "llama")
    includes = [f"-I{source}/include", f"-I{source}/ggml/include"]
    links = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lllama", "-lggml", "-lggml-base"]
    return compile_c("llamacpp.c", folder / "bin" / "llamacpp", *includes, *links)


def _llama_server(python: Path, folder: Path, cores: int) -> Path:
    """Build llama.cpp's server beside its library, from the same objects; without its page, which comes from the network."""
    return _llama_target(python, folder, cores, "llama-server")[1] / "llama-server"


def _llama_target(python: Path, folder: Path, cores: int, target: str) -> tuple[Path, Path]:
    """Build one of llama.cpp's targets, once; return the sources, and the folder of what was built."""
    place = folder / "llama.cpp"
    version = LLAMA_CPP_PYTHON.rpartition("=")[2]
    source = place / f"llama_cpp_python-{version}" / "vendor" / "llama.cpp"
    build = place / f"build-{version}"
    stamp = build / ("done" if target == "llama" else f"{target}-done")
    if not stamp.exists():
        say(f"building {target} of {LLAMA_CPP_PYTHON}")
        if not source.exists():
            download = ["download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", "-d", place, LLAMA_CPP_PYTHON]
            call([python, "-m", "pip", *download], timeout_s=_BUILD_S)
            with tarfile.open(next(place.glob(f"llama_cpp_python-{version}.tar.gz"))) as archive:
                archive.extractall(place, filter="data")
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=ON", "-DLLAMA_OPENSSL=OFF"]
        options += [f"-DLLAMA_BUILD_{part}=ON" for part in ("COMMON", "TOOLS", "SERVER")]
        options += [f"-DLLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "APP", "UI")]
        options += ["-DLLAMA_USE_PREBUILT_UI=OFF"]
        cmake = Path(sys.executable).with_name("cmake")
        cmake = cmake if cmake.exists() else Path("cmake")
        call([cmake, "-S", source, "-B", build, *options])
        call([cmake, "--build", build, "--target", target, "-j", cores], timeout_s=_BUILD_S)
        stamp.touch()
    return source, build / "bin"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
