"""Writes the modules of gRPC's messages: python deploy/protos.py [FOLDER], the root of this project by default.

They come with a descriptor pool of their own: in the common one, every other module that defines the same public
messages, a client's for one, would clash with them.
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent.parent
PROTOS = ("server/grpc/inference.proto", "server/grpc/health.proto")


def generate(folder: Path) -> None:
    """Write server/grpc/*_pb2.py under `folder`."""
    well_known = resources.files("grpc_tools") / "_proto"
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", f"--python_out={folder}", *PROTOS]):
        raise SystemExit("protoc failed")
    for proto in PROTOS:
        path = folder / proto.replace(".proto", "_pb2.py")
        made = path.read_text()
        path.write_text(made.replace("_descriptor_pool.Default()", "_descriptor_pool.DescriptorPool()"))


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
