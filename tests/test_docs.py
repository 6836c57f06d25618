"""The documentation tells the truth: its code runs, its commands parse, its configs are valid, its links lead on.

Fenced blocks of a page are read in order, as a reader would. A block whose first line is `# name.ext` is also
a file; `text` after `python` is what the Python printed; `console` holds commands after `$ ` and what they print.
"""

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxdist.cli import main, parse
from jaxdist.config.errors import UserError
from jaxdist.config.load import load
from jaxdist.config.schema import Config
from jaxdist.config.shipped import shipped_configs
from jaxdist.config.yaml_file import parse_yaml

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
RUN_PYTHON = [
    DOCS / name
    for name in ("own_model.md", "data.md", "compression.md", "pruning.md", "partition.md", "robust_aggregation.md")
]
RUN_COMMANDS = [DOCS / name for name in ("config.md", "data.md", "own_model.md", "partition.md")]
RUN_WORDS = ("config", "data")  # the commands that take no time; train, eval and generate only have to parse


@dataclass(frozen=True)
class Fenced:
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The name that the first line gives."""
        named = re.match(r"# ([\w.]+\.(?:py|yaml))\n", self.text)
        return named[1] if named else None


def fenced(page: Path) -> list[Fenced]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Fenced(language, text) for language, text in found]


def commands(block: Fenced) -> Iterator[list[str]]:
    """Arguments of each `jaxdist` in a block of shell lines."""
    if block.language not in ("bash", "console"):
        return
    for line in block.text.splitlines():
        if block.language == "console" and not line.startswith("$ "):
            continue
        for command in line.removeprefix("$ ").split(" && "):
            words = shlex.split(command, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words and Path(words[0]).name == "jaxdist":
                yield words[1:]


def console_steps(block: Fenced) -> Iterator[tuple[list[str], str]]:
    """(arguments, expected output) of each `$ jaxdist ...` in a console block."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        words = shlex.split(command)
        if words[0] == "jaxdist":
            yield words[1:], expected


def matches(expected: str, printed: str) -> bool:
    """`...` stands for any lines where it is a line, else for anything within one."""
    pattern = "".join(
        r"(?:.*\n)*?" if line == "..." else ".*".join(map(re.escape, line.rstrip().split("..."))) + r" *\n"
        for line in expected.splitlines()
    )
    return re.fullmatch(pattern, printed.rstrip("\n") + "\n") is not None


def is_whole_config(text: str) -> bool:
    keys = re.findall(r"^(\w+):", text, re.MULTILINE)
    return "base" in keys or {"model", "data", "optimizer"} <= set(keys)


def run_blocks(page: Path, python: bool) -> None:
    """Everything on a page, in order, in the working directory. Raises AssertionError with the block."""
    namespace: dict[str, object] = {"__name__": page.stem}
    printed = ""
    for block in fenced(page):
        if block.file is not None:
            Path(block.file).write_text(block.text)
        if block.language == "python" and python:
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(block.text, f"{page.name}: {block.text.splitlines()[0]}", "exec"), namespace)
            printed = output.getvalue()
        elif block.language == "text" and python and printed:
            assert matches(block.text, printed), f"{page.name} says\n{block.text}\nbut this is printed\n{printed}"
            printed = ""
        elif block.language == "yaml" and is_whole_config(block.text) and "broken" not in str(block.file):
            load(block.file or parse_yaml(block.text, page.name))
        elif block.language == "console" and page in RUN_COMMANDS:
            for arguments, expected in console_steps(block):
                if arguments[0] in RUN_WORDS:
                    assert_prints(arguments, expected)


def assert_prints(arguments: list[str], expected: str) -> None:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        main(arguments)
    assert matches(expected, output.getvalue()), (
        f"jaxdist {shlex.join(arguments)}: the page says\n{expected}\nbut it prints\n{output.getvalue()}"
    )


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.file for b in fenced(p))], ids=lambda p: p.name)
def test_a_page_runs_as_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    try:
        run_blocks(page, python=page in RUN_PYTHON)
    finally:
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
                del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_on_a_page_is_one_that_jaxdist_takes(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {block.file: block for block in fenced(page) if block.file}
    for name, block in files.items():
        Path(name).write_text(block.text)
    for block in fenced(page):
        for arguments in commands(block):
            try:
                parsed = parse(arguments)
                if parsed.launched:
                    parsed = parse(parsed.launched)
            except SystemExit:
                pytest.fail(f"{page.name}: jaxdist {shlex.join(arguments)} does not parse")
            config = getattr(parsed, "config", None)
            if config in shipped_configs() or (config in files and "broken" not in config):
                check_config(config, parsed.overrides, page)


def check_config(config: str, overrides: list[str], page: Path) -> None:
    """Valid, or wrong on purpose: then the page shows the error."""
    try:
        load(config, overrides)
    except UserError as error:
        problem = str(error).splitlines()[-1]
        shown = any(problem in block.text for block in fenced(page))
    else:
        shown = True
    assert shown, f"{page.name}: {config} {shlex.join(overrides)} is not valid"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_relative_link_leads_to_a_file_and_a_heading_that_exist(page):
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?^```$", "", page.read_text(), flags=re.S | re.M))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert ROOT in target.parents, f"{page.name}: {link} leaves the repository"
        if anchor and target.name != "config.md":
            assert anchor in anchors(target), f"{page.name}: {link}; headings: {anchors(target)}"


def anchors(page: Path) -> list[str]:
    """GitHub's names of a page's headings, which MyST gives them too."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles]


def test_every_page_is_in_the_table_of_contents():
    tree = (DOCS / "index.md").read_text().partition("```{toctree}")[2].partition("```")[0]
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")} - {"index"}
    assert pages <= set(tree.split())


def test_the_reference_has_every_field_of_every_block(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import config_reference

    text = config_reference.fill((DOCS / "reference" / "config.md").read_text())
    for name, block in Config.model_json_schema()["$defs"].items():
        section = re.search(rf"^\(config-{name.lower()}\)=\n(.*?)(?=^\(config-|^## |\Z)", text, re.M | re.S)
        assert section, f"no section for {name}"
        for field, about in block["properties"].items():
            if "const" not in about:
                assert f"| `{field}` |" in section[1], f"{name}.{field}"
                assert about.get("description", "") in re.sub(r"\\([<|])", r"\1", section[1]), f"{name}.{field}"


def test_no_page_names_a_path_of_somebodys_machine():
    for page in [*PAGES, *DOCS.rglob("*.py")]:
        assert not re.search(r"/(work|root|home|tmp|Users)/", page.read_text()), page.name
