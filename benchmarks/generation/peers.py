"""Other people's engines, each in an environment of its own, made by pip with pinned versions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PACKAGES = {
    "onnxruntime-genai": ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0"),
    "llama-cpp-python": ("llama-cpp-python[server]==0.3.36",),
}
# llama.cpp may have to be compiled.
INSTALL_SECONDS = 1800


class NotInstalled(Exception):
    """Why, in pip's last words."""


def environment(name: str, folder: Path) -> Path:
    """The Python of the peer's environment, made in `folder` if it is not there. Raises NotInstalled."""
    home = folder / name
    python = home / "bin" / "python"
    done = home / "installed"
    wanted = "\n".join(PACKAGES[name])
    if done.exists() and done.read_text() == wanted:
        return python
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True, capture_output=True, text=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-input", *PACKAGES[name]]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.CalledProcessError as error:
        last = [line for line in error.stderr.splitlines() if line.strip()][-1:]
        raise NotInstalled(f"{' '.join(PACKAGES[name])} cannot be installed here: {' '.join(last)}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(f"{' '.join(PACKAGES[name])} cannot be installed here: {error}") from error
    done.write_text(wanted)
    return python


def site_packages(python: Path) -> Path:
    """Where an environment's packages lie."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    printed = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    return Path(printed.stdout.strip())
