"""The committed stubs: generate them from protos/, or with ``--check`` compare them with what would be generated.

They are committed so that installing needs no compiler of protos. The comparison generates into a directory of its own, so it
neither changes the working tree nor asks git about it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "server"
VALIDATE = "buf/validate/validate.proto"
STUB = "*_pb2*.py*"


def generate(target: Path) -> None:
    """Write all stubs below ``target``."""
    bindir = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bindir}{os.pathsep}{os.environ['PATH']}"}
    protoc = [sys.executable, "-m", "grpc_tools.protoc", "-Iprotos", "-Ithird_party/protos"]
    messages = [f"--python_out={target}", f"--mypy_out=quiet:{target}"]
    services = [f"--grpc_python_out={target}", f"--mypy_grpc_out=quiet:{target}"]
    ours = sorted(str(path.relative_to(ROOT / "protos")) for path in (ROOT / "protos").rglob("*.proto"))
    for command in ([*protoc, *messages, VALIDATE], [*protoc, *messages, *services, *ours]):
        subprocess.run(command, cwd=ROOT, env=environment, check=True)


def find_differences() -> list[str]:
    """The stubs that are missing, left over or not what protos/ makes, by path below server/."""
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        expected = _read_stubs(Path(directory))
    committed = _read_stubs(SERVER / "aftertouch" / "v1", SERVER) | _read_stubs(SERVER / "buf", SERVER)
    return sorted(name for name in expected.keys() | committed.keys() if expected.get(name) != committed.get(name))


def _read_stubs(directory: Path, base: Path | None = None) -> dict[str, bytes]:
    return {
        str(path.relative_to(base or directory)): path.read_bytes() for path in directory.rglob(STUB) if path.suffix != ".pyc"
    }


if __name__ == "__main__":
    if sys.argv[1:] != ["--check"]:
        generate(SERVER)
    elif differences := find_differences():
        sys.exit("not what protos/ makes; run `make protos`:\n" + "\n".join(f"  server/{name}" for name in differences))
    else:
        print("the stubs are what protos/ makes")
