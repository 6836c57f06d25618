"""Optional packages."""

import importlib
from types import ModuleType

from jaxdist.config.errors import UserError


def require(module: str, extra: str, what: str) -> ModuleType:
    """Import an optional package.

    Raises:
      UserError: saying which extra brings it, when it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what} needs the package {error.name}, which is not installed; pip install 'jaxdist[{extra}]'"
        ) from error
