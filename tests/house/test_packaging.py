"""What is shipped is whole: the image's sources exist, constraints cover what is needed, and no file names where it was made."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from aftertouch.config import load_config

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Spelled in two parts, or this file would name them.
FOREIGN = [
    "pypi" + r"\.org",
    "pythonhosted" + r"\.org",
    "registry\\.npm" + "js",
    "/home" + "/(?!aftertouch\\b)",
    "/work" + "/",
    r"\.\./sha" + "red",
    "/tmp" + "/[a-z]",
    "--index" + "-url",
]


def read_instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined."""
    lines = re.sub(r"\\\n", " ", DOCKERFILE).splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    return [(name, rest) for name, rest in pairs]


INSTRUCTIONS = read_instructions()


def list_committed() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.fixture(scope="module")
def sent_along() -> list[str]:
    """What .dockerignore lets through to the build."""
    return [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]


def test_image_has_what_it_copies(sent_along: list[str]) -> None:
    for name, rest in INSTRUCTIONS:
        if name == "COPY" and not rest.startswith("--from="):
            *sources, _ = rest.split()
            for source in sources:
                assert (ROOT / source).exists()
                assert source in sent_along


def test_image_installs_files_that_exist_with_hashes() -> None:
    commands = [shlex.split(rest) for name, rest in INSTRUCTIONS if name == "RUN" and "pip install" in rest]
    constrained, ours = commands
    assert "--require-hashes" in constrained
    assert (ROOT / constrained[constrained.index("-r") + 1]).is_file()
    assert "--no-deps" in ours
    installed = {word for word in ours if word == "." or word.startswith("plugins/")}
    assert all((ROOT / path / "pyproject.toml").is_file() for path in installed)
    wanted = {name for name in PROJECT["optional-dependencies"]["server"] if name.startswith("aftertouch-")}
    assert {path.removeprefix("plugins/") for path in installed} == {"."} | wanted


def test_image_is_small_and_not_run_as_root() -> None:
    stages = [rest for name, rest in INSTRUCTIONS if name == "FROM"]
    assert len(stages) == 2
    assert stages[0].endswith(" AS build")
    last = [name for name, _ in INSTRUCTIONS][::-1].index("FROM")
    final = INSTRUCTIONS[len(INSTRUCTIONS) - last - 1 :]
    assert [rest for name, rest in final if name == "USER"] == ["aftertouch"]


def test_image_runs_a_command_with_settings_that_exist() -> None:
    entry = next(rest for name, rest in INSTRUCTIONS if name == "ENTRYPOINT")
    assert entry == '["aftertouch"]'
    assert "aftertouch" in PROJECT["scripts"]
    variables = dict(pair.split("=", 1) for name, rest in INSTRUCTIONS if name == "ENV" for pair in shlex.split(rest))
    config = load_config(variables, [])
    ports = {config.grpc_address.rpartition(":")[2], config.http_address.rpartition(":")[2]}
    assert set(next(rest for name, rest in INSTRUCTIONS if name == "EXPOSE").split()) == ports


def test_constraints_cover_every_dependency() -> None:
    pinned = {
        match[1].lower().replace("_", "-")
        for match in re.finditer(r"^([\w.-]+)==", (ROOT / "constraints" / "server.txt").read_text(), re.MULTILINE)
    }
    projects = [ROOT / "pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml")]
    for project in projects:
        read = tomllib.loads(project.read_text())["project"]
        for dependency in [*read["dependencies"], *read.get("optional-dependencies", {}).get("server", [])]:
            name = re.split(r"[\[<>=~! ]", dependency)[0].lower()
            assert name.startswith("aftertouch") or name in pinned, f"{project}: {dependency}"


@pytest.mark.parametrize("pattern", FOREIGN)
def test_no_committed_file_names_where_it_was_made(pattern: str) -> None:
    found = []
    for path in list_committed():
        if re.search(pattern, path.read_bytes().decode("utf-8", "replace")):
            found.append(str(path.relative_to(ROOT)))
    assert not found
