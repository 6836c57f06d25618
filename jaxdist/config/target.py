"""From `package.module:Name` to the object it names."""

import importlib
import inspect
import os
import sys
from typing import Any

from jaxdist.config.base import Target
from jaxdist.config.errors import UserError

CALLER = "__caller__"  # in place of a module: an object that came from Python


def resolve(target: str) -> Any:
    """Import what `package.module:Name` names; the working directory is searched too.

    Raises:
      UserError: naming the module or the attribute that was not found, or why the module does not import.
    """
    module_name, _, name = target.partition(":")
    if module_name == CALLER:
        raise UserError(
            f"{name}: was given from Python and is not recorded in the config; from Python, give it again "
            f"(jaxdist.trained.evaluate_run(directory, task=..., data=...)), or name it by a target of your own"
        )
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        which = "module" if module_name.startswith(missing) else f"module {missing}, which {module_name} imports,"
        raise UserError(
            f"target {target}: {which} not found (searched the working directory {here} and the installed "
            f"packages); start in the directory that holds it, or put it on PYTHONPATH"
        ) from error
    except Exception as error:
        raise UserError(f"target {target}: importing {module_name} raised {error!r}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = ", ".join([n for n in dir(found) if not n.startswith("_")][:20])
            raise UserError(f"target {target}: {module_name} has no {part!r}; it has {public or 'nothing'}")
        found = getattr(found, part)
    return found


def call(block: Target, where: str, **offered: Any) -> Any:
    """Call what a `target:` block names with its arguments, and with those offered that it accepts.

    Raises:
      UserError: naming `where` in the config, if the arguments do not fit or the call itself fails.
    """
    named = resolve(block.target)
    if not callable(named):
        raise UserError(f"{where}.target: {block.target} is no function or class but a {type(named).__name__}")
    # A class's own constructor: the metaclass of an nnx.Module shows (*args, **kwargs) in its place.
    parameters = dict(inspect.signature(named.__init__ if isinstance(named, type) else named).parameters)  # type: ignore[misc]
    parameters.pop("self", None)
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in block.arguments if name not in parameters and not open_ended]
    if unknown:
        raise UserError(
            f"{where}: {block.target} takes no {', '.join(unknown)}; it takes {', '.join(parameters) or 'nothing'}"
        )
    accepted = {name: value for name, value in offered.items() if name in parameters}
    try:
        return named(**{**accepted, **block.arguments})
    except TypeError as error:
        raise UserError(f"{where}: calling {block.target} failed: {error}") from error
