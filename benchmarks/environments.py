"""Other people's software, each in a virtual environment of its own, made by pip with pinned versions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Some has to be compiled.
INSTALL_SECONDS = 1800


class NotInstalled(Exception):
    """Why, in pip's last words."""


def environment(home: Path, packages: Sequence[str]) -> Path:
    """The Python of the environment `home`, made with `packages` if they are not what is in it. Raises NotInstalled."""
    python = home / "bin" / "python"
    done = home / "installed"
    wanted = "\n".join(packages)
    if done.exists() and done.read_text() == wanted:
        return python
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True, capture_output=True, text=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-input", *packages]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.CalledProcessError as error:
        last = [line for line in error.stderr.splitlines() if line.strip()][-1:]
        raise NotInstalled(f"{' '.join(packages)} cannot be installed here: {' '.join(last)}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(f"{' '.join(packages)} cannot be installed here: {error}") from error
    done.write_text(wanted)
    return python


def site_packages(python: Path) -> Path:
    """Where an environment's packages lie."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    printed = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    return Path(printed.stdout.strip())
