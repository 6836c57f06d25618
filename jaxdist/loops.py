"""Whether what is traced runs inside a compiled loop, for operations that XLA's CPU back end runs slowly there.

Only who writes the loop knows: it says so here, and a model asks. (A function that is jitted by itself keeps its
first trace, wherever that was.)
"""

import contextlib
import contextvars
from collections.abc import Iterator

_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("inside_loop", default=True)


@contextlib.contextmanager
def loop(inside: bool) -> Iterator[None]:
    """What is traced in this context runs inside a loop, or certainly outside of any."""
    token = _inside.set(inside)
    try:
        yield
    finally:
        _inside.reset(token)


def maybe_in_loop() -> bool:
    """True unless the nearest caller that knows said otherwise."""
    return _inside.get()
