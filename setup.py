"""Builds smt_ext._C: CPU kernels always, CUDA kernels where nvcc is found.

The extension uses torch's stable ABI (torch 2.10 and newer) and Python's limited API, so one binary
serves many versions of both. torch is not a build requirement: its headers are taken from the
torch that is installed, found without importing it, so that a plain `pip install .` does not
download another torch for the build.

    SMT_EXT_CUDA        auto (default): CUDA kernels if nvcc is there; 1: required; 0: never
    SMT_EXT_CUDA_ARCHS  default "80;86;89;90;100;120+PTX"
    CXX, CXXFLAGS       the C++ compiler; more flags for it, also where it links
    MAX_JOBS            parallel compiler processes

Objects stay in build/objects. Ninja compiles anew what a changed command or a changed file, headers
of torch and CUDA included, asks for, and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
OBJECTS = ROOT.resolve() / "build" / "objects"
TORCH_TARGET_VERSION = "0x020a000000000000"  # torch 2.10
PYTHON_LIMITED_API = "0x030A0000"  # Python 3.10
DEFAULT_CUDA_ARCHS = "80;86;89;90;100;120+PTX"
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
# Kernels: no errno from sqrt and no traps, which would forbid vector code; NaN and inf stay exact.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]
NVCC_FLAGS += ["--compress-mode=size", "-Werror", "all-warnings", "--expt-relaxed-constexpr"]


def torch_root() -> Path:
    """The installed torch, from the environment that runs pip or from this one."""
    prefixes = [os.environ.get("VIRTUAL_ENV"), sys.prefix, sys.base_prefix]
    for entry in [*sys.path, *(p for p in map(site_packages, prefixes) if p)]:
        root = Path(entry) / "torch"
        if (root / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return root
    # With build isolation sys.path holds the build requirements alone; pip itself runs outside.
    outside = subprocess.run(
        [
            shutil.which("python") or sys.executable,
            "-Ic",
            "import sys; print(*sys.path, sep='\\n')",
        ],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.splitlines()
    for entry in [*outside, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]:
        root = Path(entry) / "torch"
        if (root / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return root
    sys.exit(
        "smt_ext: torch 2.10 or newer must be installed before smt_ext is built, and was not found "
        f"for {sys.executable}.\nInstall it first (pip install 'torch>=2.10'), then run this again; "
        "or use pip install --no-build-isolation ."
    )


def site_packages(prefix: str | None) -> str | None:
    if not prefix:
        return None
    return sysconfig.get_path("purelib", vars={"base": prefix, "platbase": prefix})


def find_nvcc() -> str | None:
    """nvcc for this build, or None for a build without CUDA kernels."""
    wanted = os.environ.get("SMT_EXT_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"smt_ext: SMT_EXT_CUDA is {wanted!r}, expected 0, 1 or auto.")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:  # what the user names is meant: no other toolkit takes its place
        candidates = [str(Path(home) / "bin" / "nvcc")]
    else:
        candidates = [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    found = next((path for path in candidates if path and os.access(path, os.X_OK)), None)
    if found is None and wanted == "1":
        sys.exit(
            "smt_ext: SMT_EXT_CUDA=1 asks for CUDA kernels, but nvcc was not found: looked for "
            f"{' and '.join(filter(None, candidates))}.\nInstall the CUDA toolkit (12.8 or newer), or "
            "set CUDA_HOME to where it is; SMT_EXT_CUDA=0 builds the CPU kernels alone."
        )
    return found


def toolkit_of(nvcc: str) -> Path:
    """The toolkit's folder as nvcc itself sees it: nvcc on PATH may be a link or a wrapper script."""
    dry = subprocess.run(
        [nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False
    )
    for line in dry.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    sys.exit(f"smt_ext: {nvcc} --dryrun did not name its toolkit:\n{dry.stderr}")


def folder_with(toolkit: Path, folder: str, file: str) -> Path:
    """The toolkit's folder with a file; toolkits keep them at the top, under targets/, or both."""
    for match in sorted(
        [*toolkit.glob(f"{folder}/{file}"), *toolkit.glob(f"targets/*/{folder}/{file}")]
    ):
        return match.parent
    sys.exit(f"smt_ext: the CUDA toolkit in {toolkit} has no {file}; install it whole.")


def cuda_sources() -> list[Path]:
    return sorted((ROOT.resolve() / "csrc" / "kernels" / "cuda").glob("*.cu"))


def gencode_flags() -> list[str]:
    """nvcc's flags for SMT_EXT_CUDA_ARCHS, such as "80;90+PTX"."""
    flags = []
    for arch in os.environ.get("SMT_EXT_CUDA_ARCHS", DEFAULT_CUDA_ARCHS).split(";"):
        number = arch.removesuffix("+PTX")
        if not number.rstrip("af").isdigit():
            sys.exit(
                f"smt_ext: SMT_EXT_CUDA_ARCHS has {arch!r}, expected numbers such as 80 or 90+PTX, "
                "separated by semicolons."
            )
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))


def find_ninja() -> str:
    own = Path(sys.executable).parent
    found = shutil.which("ninja", path=f"{own}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        sys.exit("smt_ext: the build needs ninja: pip install ninja, then run this again.")
    return found


def compile_all(commands: list[list[str]], folder: Path) -> list[Path]:
    """Run compiler commands whose last word is the source; their objects in folder, in order.

    An object's name tells its command: builds of several kinds lie side by side. What the compiler
    said is beside it, in NAME.o.log.
    """
    objects = {}
    for command in commands:
        objects[folder / f"{Path(command[-1]).name}-{digest(command)}.o"] = command
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / f"{digest(map(str, objects))}.ninja"
    plan.write_text(ninja_file(objects, folder), encoding="utf-8")
    command = [find_ninja(), "-f", str(plan), "-j", str(jobs())]
    if subprocess.run(command, check=False, stdout=2).returncode:  # progress is no result
        sys.exit("smt_ext: a file did not compile; the compiler's message is above.")
    return list(objects)


def digest(words: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]


def ninja_file(commands: dict[Path, list[str]], log_folder: Path) -> str:
    """Ninja's build file for object -> compiler command.

    Without "deps = gcc": the dependencies stay in files of their own, since ninja's own record forgets
    what the latest build file does not name.
    """
    lines = [
        f"builddir = {ninja_path(str(log_folder))}",
        "rule compile",
        "  command = $compiler -MD -MF $out.d -o $out 2> $out.log || { cat $out.log >&2; exit 1; }",
        "  depfile = $out.d",
        "  description = $in",
    ]
    for target, command in commands.items():
        lines.append(f"build {ninja_path(str(target))}: compile {ninja_path(command[-1])}")
        lines.append(f"  compiler = {shlex.join(command).replace('$', '$$')}")
    return "\n".join([*lines, ""])


def ninja_path(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def nvcc_command(nvcc: str, source: Path) -> list[str]:
    """With the account of registers and spills that tools/cuda_report reads from the log."""
    archs = gencode_flags()
    own = [f"--threads={min(jobs(), len(archs))}", "--resource-usage"]
    return [nvcc, *NVCC_FLAGS, *archs, *own, "-c", str(source)]


class BuildExt(build_ext):
    """Compiles all files in parallel with g++ and nvcc, then links them."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        include = torch_root() / "include"
        cxx = shlex.split(os.environ.get("CXX", "c++"))
        more = shlex.split(os.environ.get("CXXFLAGS", ""))
        defines = [
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            f"-DPy_LIMITED_API={PYTHON_LIMITED_API}",
        ]
        system = ["-isystem", str(include), "-isystem", sysconfig.get_path("include")]
        home = toolkit_of(nvcc) if nvcc else None
        if home:
            archs = os.environ.get("SMT_EXT_CUDA_ARCHS", DEFAULT_CUDA_ARCHS)
            defines += [f'-DSMT_EXT_CUDA_ARCHS="{archs}"']
            system += ["-isystem", str(folder_with(home, "include", "cuda_runtime.h"))]
        compile_lines = []
        if nvcc:  # first: the largest takes longest of all
            compile_lines += [nvcc_command(nvcc, source) for source in cuda_sources()]
        for name in ext.sources:
            if home or not Path(name).name.startswith("cuda_"):
                kernel = KERNEL_FLAGS if "kernels/cpu" in name else []
                source = str(ROOT.resolve() / name)
                flags = [*CXX_FLAGS, *kernel, *more, *defines, *system]
                compile_lines.append([*cxx, *flags, "-c", source])
        objects = compile_all(compile_lines, OBJECTS)
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        lib = torch_root() / "lib"
        link = [*cxx, *more, "-shared", *map(str, objects), "-o", str(output), f"-L{lib}"]
        # CUDA builds of torch resolve the stream function only if both libraries stay linked.
        link += ["-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch", "-Wl,--as-needed"]
        if home:
            libraries = folder_with(home, "lib*", "libcudart_static.a")
            link += [f"-L{libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        self.spawn([*link, "-Wl,--exclude-libs,ALL"])


class BdistWheel(bdist_wheel):
    """One wheel for every Python from 3.10 on."""

    def finalize_options(self) -> None:
        self.py_limited_api = "cp310"
        super().finalize_options()


def cxx_sources() -> list[str]:
    csrc = ROOT / "csrc"
    sources = [*csrc.glob("*.cpp"), *csrc.glob("ops/*.cpp"), *csrc.glob("kernels/cpu/*.cpp")]
    return sorted(str(path.relative_to(ROOT)) for path in sources)


if __name__ == "__main__":  # tools/cuda_report imports the flags
    setup(
        ext_modules=[Extension("smt_ext._C", cxx_sources(), py_limited_api=True)],
        cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel},
    )
