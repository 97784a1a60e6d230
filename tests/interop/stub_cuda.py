#!/usr/bin/env python3
"""Makes the PyPI build of torch importable on a CPU-only machine without the CUDA packages (about 3 GB).

That build links CUDA libraries even where no GPU is. This script reads which CUDA functions the installed torch asks for
and puts small libraries with those names beside torch's own; every function in them fails with "no device". Nothing of torch
is changed, and nothing on a CPU path calls them. Needs `cc` and `readelf`. Refuses to replace a library that is there.

    stub_cuda.py SITE_PACKAGES
"""

import pathlib
import re
import subprocess
import sys
import tempfile

# Sonames that torch may need and that are CUDA's; the second is how unversioned symbols are told apart, by name.
CUDA = re.compile(r"lib(cudart|cublas|cublasLt|cudnn|cufft|cufile|cupti|cusparse|cusparseLt|cusolver|nccl|nvrtc|nvshmem_host)\.so\.\d+")
BY_NAME = {"libcusparseLt": r"cusparseLt", "libcufile": r"cuFile", "libnccl": r"p?nccl", "libnvshmem_host": r"nvshmem",
           "libcupti": r"cupti", "libcusolver": r"cusolver"}
# CUDA names the version of its symbols after the library, except here.
VERSIONS = {"libnvshmem_host.so.3": "NVSHMEM"}


def readelf(*args):
    return subprocess.run(["readelf", "-W", *args], check=True, capture_output=True, text=True, timeout=120).stdout


def wanted(libraries):
    """(sonames, (name, version or None) of every symbol that no library here defines)."""
    sonames, undefined, defined = set(), set(), set()
    for path in libraries:
        sonames |= {m[0] for m in re.finditer(CUDA, readelf("-d", str(path)))}
        for line in readelf("--dyn-syms", str(path)).splitlines():
            fields = line.split()
            if len(fields) < 8 or not fields[0].endswith(":"):
                continue
            name, _, version = fields[7].partition("@")
            (undefined.add((name, version or None)) if fields[6] == "UND" else defined.add(name))
    return sonames, {s for s in undefined if s[0] not in defined}


def build(soname, symbols, folder):
    """One library: every symbol is a function that returns 100, cudaErrorNoDevice."""
    version = VERSIONS.get(soname, soname)
    versioned = sorted(n for n, v in symbols if v == version)
    prefix = BY_NAME.get(soname.split(".")[0])
    free = sorted(n for n, v in symbols if v is None and prefix and re.match(prefix, n))
    with tempfile.TemporaryDirectory() as scratch:
        source, script = pathlib.Path(scratch, "stub.c"), pathlib.Path(scratch, "stub.map")
        source.write_text("".join(f"long {n}(void) {{ return 100; }}\n" for n in versioned + free) or "int stub_empty;\n")
        flags = ["-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{soname}"]
        if versioned:
            script.write_text(f"{version} {{ global: {' '.join(n + ';' for n in versioned)} }};\n")
            flags.append(f"-Wl,--version-script={script}")
        subprocess.run(["cc", "-fno-builtin", *flags, "-o", str(folder / soname), str(source)], check=True, timeout=120)
    return len(versioned) + len(free)


def main():
    folder = pathlib.Path(sys.argv[1], "torch", "lib")
    sonames, symbols = wanted(sorted(folder.glob("libtorch*.so")) + sorted(folder.glob("libc10*.so")))
    for soname in sorted(sonames):
        if not (folder / soname).exists():
            print(f"stub {soname}: {build(soname, symbols, folder)} functions")


if __name__ == "__main__":
    main()
