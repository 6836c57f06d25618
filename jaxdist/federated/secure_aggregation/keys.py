"""Keys of a round: X25519 agreements, HKDF-SHA256, sealed shares (ChaCha20-Poly1305), signatures (Ed25519).

Every key that is derived is bound to the round, to what it is for, and to the public keys of both ends.
"""

import hashlib
import os
from collections.abc import Callable

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from jaxdist.federated.secure_aggregation.rules import ProtocolError

Entropy = Callable[[int], bytes]  # so many bytes that nobody can foresee: os.urandom
SECRET_BYTES = 32
_NAME = b"jaxdist secure aggregation 1 "


class KeyPair:
    """X25519, of one round. `secret` are its 32 bytes, `public` the other 32."""

    def __init__(self, secret: bytes):
        self.secret = secret
        self._key = X25519PrivateKey.from_private_bytes(secret)
        self.public = self._key.public_key().public_bytes_raw()

    def agree(self, other: bytes, purpose: bytes, round_id: bytes) -> bytes:
        """32 bytes that only the two ends know. Raises ProtocolError for what is no public key."""
        try:
            shared = self._key.exchange(X25519PublicKey.from_public_bytes(other))
        except ValueError as error:  # not 32 bytes, or a point of low order, whose agreements all can foresee
            raise ProtocolError(f"no public key: {error}") from None
        ends = b"".join(sorted((self.public, other)))
        return HKDF(SHA256(), SECRET_BYTES, salt=round_id, info=_NAME + purpose + b" " + ends).derive(shared)


def check_public(key: bytes, round_id: bytes) -> None:
    """Raises ProtocolError for what cannot be agreed with."""
    KeyPair(os.urandom(SECRET_BYTES)).agree(key, b"check", round_id)


def direction(purpose: bytes, sender: int, receiver: int) -> bytes:
    """A purpose of one direction: what a sealed share says cannot be sent back to who wrote it."""
    return purpose + _number(sender) + _number(receiver)


def seal(key: bytes, text: bytes) -> bytes:
    """Encrypted and authenticated; a key seals once, so that the nonce can be zero."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), text, None)


def unseal(key: bytes, sealed: bytes) -> bytes:
    """Raises ProtocolError if it was altered, or sealed by or for somebody else, or in another round."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, None)
    except InvalidTag:
        raise ProtocolError("a sealed share was forged, altered, or is of another round") from None


def mask_seed(own_seed: bytes, round_id: bytes) -> bytes:
    """Of the mask that is a client's own."""
    return HKDF(SHA256(), SECRET_BYTES, salt=round_id, info=_NAME + b"own mask").derive(own_seed)


def commitment(own_seed: bytes, round_id: bytes) -> bytes:
    """Tells whether a seed was put together rightly, and nothing of it before."""
    return hashlib.sha256(_NAME + b"commitment" + round_id + own_seed).digest()


def signed_keys(round_id: bytes, client: int, mask_key: bytes, share_key: bytes) -> bytes:
    """What a client signs of its public keys."""
    return _NAME + b"keys" + _number(len(round_id)) + round_id + _number(client) + mask_key + share_key


def signed_survivors(round_id: bytes, survivors: tuple[int, ...]) -> bytes:
    """What a client signs of the list of survivors that it was shown."""
    return _NAME + b"survivors" + _number(len(round_id)) + round_id + b"".join(map(_number, survivors))


def sign(identity: Ed25519PrivateKey, text: bytes) -> bytes:
    return identity.sign(text)


def verify(identity: Ed25519PublicKey, signature: bytes, text: bytes, whose: str) -> None:
    """Raises ProtocolError."""
    try:
        identity.verify(signature, text)
    except InvalidSignature:
        raise ProtocolError(f"{whose}: the signature is wrong") from None


def _number(value: int) -> bytes:
    return value.to_bytes(8, "big")
