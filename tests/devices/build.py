"""Builds the second device once for a version of torch, in torch's folder for extensions, outside of the checkout."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("backend.cpp")
NAME = "mirror"
"""What torch calls devices of this kind."""


def library() -> Path:
    """Where the built device lies, or will."""
    from torch.utils.cpp_extension import get_default_build_root

    content = f"{torch.__version__} {sys.version_info[:2]} {SOURCE.read_text(encoding='utf-8')}"
    name = f"lightning_mtl_device_{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    return Path(get_default_build_root()) / name / f"{name}.so"


def is_built() -> bool:
    return library().is_file() and not (library().parent / "lock").exists()


def build() -> None:
    """Compile the device where it is not there, which takes half a minute.

    Raises:
        RuntimeError: If something is missing that compiling takes.
    """
    if is_built():
        return
    path = library()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja may lie there
    for tool in (os.environ.get("CXX", "c++"), "ninja"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"there is no {tool} to build a second device with")
    from torch.utils.cpp_extension import load

    path.parent.mkdir(parents=True, exist_ok=True)
    load(
        path.stem, [str(SOURCE)], build_directory=str(path.parent), extra_cflags=["-O0", "-g0"], is_python_module=False
    )
