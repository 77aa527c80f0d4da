"""Compiles Triton's CUDA driver module when the image is built: ``python triton_driver.py FOLDER``.

Triton compiles this one C file at its first kernel, on any machine, and all kernels with its own tools after that. So
with the module in the image no compiler has to be. The build has no CUDA driver to link with: an empty library stands
for it, as the module finds its symbols when it is loaded.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from triton.backends.nvidia import driver
from triton.runtime.build import _build

NAME = "cuda_utils"


def build(folder: Path) -> Path:
    """The compiled module in ``folder``. CalledProcessError where the compiler fails."""
    source = Path(driver.dirname) / "driver.c"
    with tempfile.TemporaryDirectory() as place:
        empty = Path(place) / "libcuda.so.1"
        subprocess.run(
            ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(empty), "-x", "c", "/dev/null"], check=True
        )
        made = _build(
            NAME,
            str(source),
            place,
            [driver.libdevice_dir, place],
            driver.include_dirs,
            driver.libraries,
            [],
        )
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(made, folder))


if __name__ == "__main__":
    sys.stdout.write(f"{build(Path(sys.argv[1]))}\n")
