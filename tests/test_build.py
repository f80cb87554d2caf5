"""setup.py and what it makes: toggles, messages, symbols, and life without compiled code."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

from fastmargin.backends import _extension
from fastmargin.build_info import build_info

ROOT = Path(__file__).resolve().parent.parent

needs_extension = pytest.mark.skipif(
    _extension.reason() is not None, reason=str(_extension.reason())
)


def run_setup(monkeypatch, **environment) -> tuple[list[str], dict]:
    """Names of the extensions that setup.py would build, and its globals."""
    for name in ("FASTMARGIN_CUDA", "FASTMARGIN_EXTENSION", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked = {}
    monkeypatch.setattr(setuptools, "setup", asked.update)
    monkeypatch.chdir(ROOT)
    names = runpy.run_path("setup.py", run_name="__main__")
    return [extension.name.partition(".")[2] for extension in asked["ext_modules"]], names


def fake_nvcc(tmp_path: Path, archs: str = "compute_80\ncompute_90\ncompute_100") -> Path:
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "release 13.1, V13.1.2" || echo "{archs}"\n'
    )
    nvcc.chmod(0o755)
    return nvcc


def test_setup_is_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 120


def test_toggles(monkeypatch, tmp_path):
    fake_nvcc(tmp_path)
    home = {"CUDA_HOME": str(tmp_path)}
    assert run_setup(monkeypatch, **home)[0] == ["_C", "_host", "_cuda"]
    assert run_setup(monkeypatch, FASTMARGIN_CUDA="0", **home)[0] == ["_C", "_host"]
    assert run_setup(monkeypatch, FASTMARGIN_EXTENSION="0", **home)[0] == []
    assert run_setup(monkeypatch, CUDA_HOME="/nowhere", PATH="/nowhere")[0] == ["_C", "_host"]
    with pytest.raises(SystemExit, match="there is no nvcc"):
        run_setup(monkeypatch, FASTMARGIN_CUDA="1", CUDA_HOME="/nowhere", PATH="/nowhere")


@pytest.mark.parametrize(
    ("listed", "flags"),
    [
        ("", "80,code=[sm_80] 90a,code=[sm_90a] 100,code=[sm_100,compute_100]"),
        ("9.0a", "90a,code=[sm_90a]"),
        ("8.0;9.0+PTX", "80,code=[sm_80] 90,code=[sm_90,compute_90]"),
        ("7.5 12.0f, 10.3", "75,code=[sm_75] 120f,code=[sm_120f] 103,code=[sm_103]"),
    ],
)
def test_architectures(monkeypatch, tmp_path, listed, flags):
    nvcc = fake_nvcc(tmp_path)
    _, names = run_setup(monkeypatch, TORCH_CUDA_ARCH_LIST=listed)
    release, _, found = names["cuda_flags"](str(nvcc))
    assert release == "13.1"
    assert found == [f"-gencode=arch=compute_{flag}" for flag in flags.split()]


def test_old_nvcc_gets_what_it_knows(monkeypatch, tmp_path):
    nvcc = fake_nvcc(tmp_path, "compute_80\ncompute_90")
    _, names = run_setup(monkeypatch)
    assert names["cuda_flags"](str(nvcc))[1] == "8.0;9.0a"


def test_bad_architecture_is_named(monkeypatch, tmp_path):
    nvcc = fake_nvcc(tmp_path)
    _, names = run_setup(monkeypatch, TORCH_CUDA_ARCH_LIST="8.0;Hopper")
    with pytest.raises(SystemExit, match="Hopper"):
        names["cuda_flags"](str(nvcc))


def build_with(code: str, tmp_path: Path) -> subprocess.CompletedProcess:
    """``setup.py build_ext`` in a process where ``code`` ran before."""
    arguments = ["setup.py", "build_ext", "--build-lib", str(tmp_path)]
    code += f"; import sys, runpy; sys.argv = {arguments}; runpy.run_path('setup.py')"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_without_torch_the_message_says_what_to_do(tmp_path):
    done = build_with("import sys; sys.modules['torch'] = None", tmp_path)
    assert done.returncode != 0
    assert "torch >= 2.11, found none" in done.stderr
    assert "--no-build-isolation" in done.stderr and "FASTMARGIN_EXTENSION=0" in done.stderr


def test_old_torch_is_refused(tmp_path):
    old = "import importlib.metadata as m; m.version = lambda name: '2.10.1'"
    done = build_with(old, tmp_path)
    assert done.returncode != 0 and "torch >= 2.11, found 2.10.1" in done.stderr


def test_a_failing_compiler_names_the_way_out(tmp_path):
    project = tmp_path / "project"
    (project / "csrc").mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", project)
    for name in ("library.cpp", "host.cpp"):
        (project / "csrc" / name).write_text("this is no C++;\n")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode != 0
    assert "FASTMARGIN_EXTENSION=0" in done.stderr


HIDDEN = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in ("fastmargin._C", "fastmargin._cuda", "fastmargin._host", "triton"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
"""


def test_import_without_anything_compiled():
    code = HIDDEN + (
        "import torch, fastmargin as fm\n"
        "assert not torch.cuda.is_initialized()\n"
        "from fastmargin.build_info import build_info\n"
        "assert build_info() is None\n"
        "reasons = fm.backends.available()\n"
        "assert reasons['reference'] is None\n"
        "assert 'fastmargin._C is not compiled' in reasons['cpu'], reasons\n"
        "assert '--no-build-isolation' in reasons['cpu']\n"
        "x, w = torch.randn(4, 8), torch.randn(5, 8)\n"
        "fm.margin_loss(x, w, torch.arange(4), fm.ArcFace())\n"
        "try:\n"
        "    fm.margin_loss(x, w, torch.arange(4), fm.ArcFace(), backend='cpu')\n"
        "except fm.backends.BackendError as error:\n"
        "    assert 'not compiled' in str(error)\n"
        "else:\n"
        "    raise AssertionError('backend=cpu ran')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_import_is_silent_and_loads_nothing_compiled():
    code = (
        "import sys, torch, fastmargin\n"
        "loaded = [m for m in sys.modules if m in"
        " ('fastmargin._C', 'fastmargin._cuda', 'fastmargin._host', 'triton')]\n"
        "assert not loaded, loaded\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


def test_a_module_that_does_not_load_leaves_its_error(tmp_path):
    code = (
        "import fastmargin\n"
        f"fastmargin.__path__.insert(0, {str(tmp_path)!r})\n"
        "from fastmargin.backends import _extension\n"
        "print(_extension.reason('_broken'))\n"
    )
    (tmp_path / "_broken.py").write_text("raise ImportError('undefined symbol: abc')\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "undefined symbol: abc" in done.stdout and "Reinstall" in done.stdout


@needs_extension
def test_build_info():
    info = build_info()
    assert set(info) == {
        "compiler",
        "cpp_standard",
        "torch_built_against",
        "torch_abi_target",
        "cuda_version",
        "cuda_architectures",
    }
    assert re.match(r"(gcc|clang) \d+\.", info["compiler"])
    assert info["cpp_standard"] >= 202002 and info["torch_abi_target"] == "2.11"
    assert re.match(r"2\.\d+\.\d+", info["torch_built_against"])
    assert (info["cuda_version"] is None) == (info["cuda_architectures"] == [])


@needs_extension
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("name", ["_C", "_cuda"])
def test_only_the_stable_abi_of_torch_is_used(name):
    if _extension.reason(name):
        pytest.skip(_extension.reason(name))
    command = ["nm", "-DC", "--undefined-only", _extension.module(name).__file__]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "aoti_torch" in symbols
    foreign = [line for line in symbols.splitlines() if re.search(r"\b(at|c10|torch)::", line)]
    assert foreign == []


@needs_extension
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_code_for_one_instruction_set_shares_nothing():
    """An inline function compiled for AVX-512 must not be the one that all of the library calls."""
    found = sorted((ROOT / "build").glob("*/_C/csrc/cpu/sweep_*.o"))
    if not found:
        pytest.skip("not built in this tree")
    for path in found:
        command = ["nm", "-C", "--defined-only", "--extern-only", str(path)]
        symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        lines = [line for line in symbols.splitlines() if "_kernels<" not in line]
        assert lines == [], path.name
