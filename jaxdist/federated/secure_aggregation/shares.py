"""Shamir's secret sharing of 32 bytes, by pycryptodome: each half a polynomial over GF(2^128) of its own."""

from collections.abc import Sequence
from typing import Any

from jaxdist.config.errors import UserError
from jaxdist.federated.secure_aggregation.keys import SECRET_BYTES

_HALF = SECRET_BYTES // 2


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares 0 to count - 1, 32 bytes each; `threshold` of them give the secret, fewer say nothing of it."""
    first = _shamir().split(threshold, count, secret[:_HALF])
    second = _shamir().split(threshold, count, secret[_HALF:])
    return [a + b for (_, a), (_, b) in zip(first, second, strict=True)]


def combine(shares: Sequence[tuple[int, bytes]]) -> bytes:
    """The secret of (number of the share, share), exactly `threshold` of them. Of altered ones something else."""
    first = _shamir().combine([(number + 1, share[:_HALF]) for number, share in shares])
    second = _shamir().combine([(number + 1, share[_HALF:]) for number, share in shares])
    return first + second


def _shamir() -> Any:
    try:
        from Crypto.Protocol.SecretSharing import Shamir
    except ImportError as error:
        raise UserError(
            f"secure aggregation needs the package pycryptodome ({error}); pip install 'jaxdist[privacy]'"
        ) from None
    return Shamir
