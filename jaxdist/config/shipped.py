"""The configs, comparisons and clusters that come with the package (in the source tree a link to configs/)."""

from pathlib import Path

DIRECTORY = Path(__file__).resolve().parent.parent / "configs"
CLUSTERS = DIRECTORY / "clusters"
STUDIES = DIRECTORY / "compare"
OTHERS = (CLUSTERS, STUDIES)  # what they hold are no configs of runs


def shipped_configs() -> dict[str, Path]:
    """Name -> file of every shipped config, sorted by name."""
    files = _by_name(DIRECTORY)
    return {name: path for name, path in files.items() if not set(OTHERS) & set(path.parents)}


def shipped_clusters() -> dict[str, Path]:
    """Name -> file of every shipped cluster for `simulate:`, sorted by name."""
    return _by_name(CLUSTERS)


def shipped_studies() -> dict[str, Path]:
    """Name -> file of every shipped comparison, sorted by name."""
    return _by_name(STUDIES)


def _by_name(directory: Path) -> dict[str, Path]:
    return {str(path.relative_to(directory).with_suffix("")): path for path in sorted(directory.rglob("*.yaml"))}


def description(path: Path) -> str:
    """The first comment line of a config file."""
    first = path.read_text().split("\n", 1)[0]
    return first.lstrip("# ") if first.startswith("#") else ""
