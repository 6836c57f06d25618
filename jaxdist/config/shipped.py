"""The configs that come with the package: found in the wheel, or in the source tree beside it."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
DIRECTORY = next((d for d in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if d.is_dir()), None)


def shipped_configs() -> dict[str, Path]:
    """Name -> file of every shipped config, sorted by name."""
    if DIRECTORY is None:
        return {}
    return {str(path.relative_to(DIRECTORY).with_suffix("")): path for path in sorted(DIRECTORY.rglob("*.yaml"))}


def description(path: Path) -> str:
    """The first comment line of a config file."""
    first = path.read_text().split("\n", 1)[0]
    return first.lstrip("# ") if first.startswith("#") else ""
