"""Whether what is traced runs inside a compiled loop, for operations that XLA's CPU back end runs slowly there."""

import contextlib
import contextvars
from collections.abc import Iterator

_outside: contextvars.ContextVar[bool] = contextvars.ContextVar("outside_loops", default=False)


@contextlib.contextmanager
def outside_loops() -> Iterator[None]:
    """What is traced in this context is in no compiled loop; its caller knows, a model cannot."""
    token = _outside.set(True)
    try:
        yield
    finally:
        _outside.reset(token)


def maybe_in_loop() -> bool:
    """True unless the caller said otherwise."""
    return not _outside.get()
