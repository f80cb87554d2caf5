"""Compiles the extension modules with ninja; the metadata is in pyproject.toml.

fastmargin._C     CPU operators, stable LibTorch ABI: one build serves every torch from 2.11 on
fastmargin._cuda  CUDA operators; apart, so that _C loads with a CPU build of torch
fastmargin._host  build info, reader of records (pybind11, no torch)
torch is not imported, only its headers and libraries are used, and no GPU is asked about.
FASTMARGIN_EXTENSION=0 compiles nothing; FASTMARGIN_CUDA=0/1 leaves CUDA out / insists on it
(default: where nvcc is found); TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX"), CXX, CUDA_HOME, MAX_JOBS.
"""

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from importlib import metadata
from importlib.util import find_spec
from os import environ
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
FLAGS = "-std=c++20 -O3 -DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11, the oldest to run with
HOST_FLAGS = "-fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wno-psabi"
CUDA_FLAGS = "-DUSE_CUDA -Xcompiler=-fPIC,-fvisibility=hidden"  # torch's headers ask for USE_CUDA
ISA_FLAGS = {"avx2": "-mavx2 -mfma", "avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma"}


def torch_dir() -> Path:
    spec = find_spec("torch")
    version = metadata.version("torch") if spec else "none"
    if not spec or tuple(map(int, re.findall(r"\d+", version)[:2])) < (2, 11):
        raise SystemExit(
            f"fastmargin compiles against torch >= 2.11, found {version}. Install torch first and "
            "repeat with --no-build-isolation, or set FASTMARGIN_EXTENSION=0 to compile nothing."
        )
    return Path(spec.origin).parent


def sources(*patterns: str) -> list[str]:
    return sorted(file for pattern in patterns for file in glob(f"csrc/{pattern}"))


def find_nvcc() -> str | None:
    """nvcc, if CUDA is wanted and there is something for it to compile."""
    wish = environ.get("FASTMARGIN_CUDA", "auto")
    path = [f"{environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", environ.get("PATH", "")]
    nvcc = (
        shutil.which("nvcc", path=":".join(path)) if wish != "0" and sources("cuda/*.cu") else None
    )
    if wish == "1" and nvcc is None:
        raise SystemExit("FASTMARGIN_CUDA=1, but there is no nvcc in CUDA_HOME or on PATH")
    return nvcc


def cuda_flags(nvcc: str) -> tuple[str, str, list[str]]:
    """CUDA release, architectures, and their -gencode flags."""
    known, about = (subprocess.getoutput(f"'{nvcc}' {f}") for f in ("--list-gpu-arch", "--version"))
    default = "8.0;9.0a" + ";10.0+PTX" * ("compute_100" in known)
    archs = re.split(r"[ ;,]+", environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,") or default)
    found = [re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch) for arch in archs]
    if not all(found):
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST: want items like 8.0, 9.0a, 9.0+PTX, got {archs}")
    names = [(hit[1] + hit[2], f",compute_{hit[1]}{hit[2]}" * bool(hit[3])) for hit in found]
    flags = [f"-gencode=arch=compute_{n},code=[sm_{n}{ptx}]" for n, ptx in names]
    return re.search(r"release ([\d.]+)", about)[1], ";".join(archs), flags


class Ninja(build_ext):
    """Objects stay in build/, so that a second install compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        torch, nvcc, module = torch_dir(), find_nvcc(), ext.name.rpartition(".")[2]
        release, archs, gencode = cuda_flags(nvcc) if nvcc else ("", "", [])
        cxx = environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
        include = ROOT / "csrc", torch / "include", sysconfig.get_path("include")
        flags = [*FLAGS.split(), "-DFASTMARGIN_MODULE=" + module, *map("-I{}".format, include)]
        link = ["-shared", *["-undefined", "dynamic_lookup"] * (sys.platform == "darwin")]
        if module == "_host":
            flags.insert(0, "-I" + __import__("pybind11").get_include())  # torch has an old one
            flags += [f'-DCUDA_RELEASE="{release}"', f'-DCUDA_ARCHS="{archs}"']
        else:
            gpu = module == "_cuda" and any((torch / "lib").glob("*torch_cuda.*"))
            flags += ["-DPy_LIMITED_API=0x030A0000"]
            link += [f"-L{torch / 'lib'}", "-ltorch_cpu", *["-ltorch_cuda"] * gpu]
        text = f"""rule cpp
  command = {cxx} {shlex.join(flags)} {HOST_FLAGS} $isa -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
rule cu
  command = {nvcc} {shlex.join([*flags, *gencode])} {CUDA_FLAGS} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
rule link
  command = {nvcc if module == "_cuda" else cxx} $in -o $out {shlex.join(link)}
"""
        for source in ext.sources:  # x_avx2.cpp and the like are for one instruction set only
            stem, suffix = source.split(".")
            isa = ISA_FLAGS.get(stem.split("_")[-1], "") if "x86_64" in self.plat_name else ""
            text += f"build {source}.o: {suffix} ../../../{source}\n  isa = {isa}\n"
        text += f"build module.so: link {'.o '.join([*ext.sources, ''])}\n"
        work = ROOT / "build" / f"{self.plat_name}-{sys.implementation.cache_tag}" / module
        self.mkpath(str(work))
        (work / "build.ninja").write_text(text)
        ninja = [sys.executable, "-m", "ninja", "-j", environ.get("MAX_JOBS") or "8", "--quiet"]
        if subprocess.run([*ninja, "-C", str(work)]).returncode:
            raise SystemExit(f"{ext.name} failed to compile; FASTMARGIN_EXTENSION=0 leaves it out")
        self.mkpath(str(Path(self.get_ext_fullpath(ext.name)).parent))
        self.copy_file(str(work / "module.so"), self.get_ext_fullpath(ext.name))


cpu = Extension("fastmargin._C", sources("library.cpp", "cpu/*.cpp"), py_limited_api=True)
host = Extension("fastmargin._host", sources("host.cpp", "records.cpp"))
gpu = sources("library.cpp", "cuda/*.cpp", "cuda/*.cu")
cuda = [Extension("fastmargin._cuda", gpu, py_limited_api=True)] * bool(find_nvcc())
wanted = environ.get("FASTMARGIN_EXTENSION") != "0"
setup(ext_modules=[cpu, host, *cuda] * wanted, cmdclass={"build_ext": Ninja})
