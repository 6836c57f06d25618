"""The configs that come with the package (in the source tree a link to the configs/ beside it)."""

from pathlib import Path

DIRECTORY = Path(__file__).resolve().parent.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Name -> file of every shipped config, sorted by name."""
    return {str(path.relative_to(DIRECTORY).with_suffix("")): path for path in sorted(DIRECTORY.rglob("*.yaml"))}


def description(path: Path) -> str:
    """The first comment line of a config file."""
    first = path.read_text().split("\n", 1)[0]
    return first.lstrip("# ") if first.startswith("#") else ""
