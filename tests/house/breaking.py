"""Check that the protos break no caller of what was merged before.

Compared is with the state of main from which this branch began. Where main is not known, as in a shallow clone, or is itself
what is checked, the merged state is the first parent of HEAD. The last line says what it was compared with.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAIN = ("refs/heads/main", "refs/remotes/origin/main")


def ask_git(*arguments: str) -> str | None:
    """One line of git's; None when there is no such thing.

    Raises:
        RuntimeError: git cannot look, as outside of a clone.
    """
    found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if found.returncode not in (0, 1):
        raise RuntimeError(f"git {' '.join(arguments)} failed: {found.stderr.strip()}")
    return found.stdout.strip() or None


def resolve(reference: str) -> str | None:
    """The commit that a reference names; None when this clone does not know it."""
    return ask_git("rev-parse", "--verify", "--quiet", f"{reference}^{{commit}}")


def choose_base() -> tuple[str, str] | None:
    """What to compare with, as words and as a commit; None when nothing was merged before."""
    head = resolve("HEAD")
    for reference in filter(resolve, MAIN):
        fork = ask_git("merge-base", reference, "HEAD")
        if fork is not None and fork != head:
            return f"{reference.removeprefix('refs/heads/').removeprefix('refs/remotes/')} where this branch began", fork
    parent = resolve("HEAD^1")
    return None if parent is None else ("the first parent of HEAD", parent)


def find_breaks(commit: str) -> str:
    """What buf says against the protos of a commit; empty when nothing breaks."""
    buf = Path(sys.executable).parent / "buf"
    with tempfile.TemporaryDirectory() as directory:
        archive = Path(directory) / "base.zip"
        paths = ("buf.yaml", "protos", "third_party/protos")
        subprocess.run(["git", "archive", "--output", archive, commit, *paths], cwd=ROOT, check=True)
        shutil.unpack_archive(archive, directory)
        checked = subprocess.run([buf, "breaking", "--against", directory], cwd=ROOT, capture_output=True, text=True)
    if checked.returncode not in (0, 100):  # 100 says that it found breaks, anything else that it could not look
        raise RuntimeError(f"buf breaking exited with {checked.returncode}: {checked.stderr}")
    return checked.stdout


def main() -> None:
    """Exit with what breaks."""
    base = choose_base()
    if base is None:
        print("breaking: HEAD has no parent here, so there is nothing to compare with")
        return
    words, commit = base
    if breaks := find_breaks(commit):
        sys.exit(f"{breaks}breaking: these changes break callers of {words} ({commit[:12]})")
    print(f"breaking: no caller of {words} ({commit[:12]}) breaks")


if __name__ == "__main__":
    main()
