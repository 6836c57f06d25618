"""Gradient codecs: what travels in place of a gradient, and the mean of it over a mesh axis.

A codec (`codec.Codec`) makes of an array the arrays that are sent, and back; it is a frozen dataclass of its options.
`compression.Compression` joins codecs, the exchange that each asks for and error feedback into the mean gradient.
"""

from jaxdist.codecs.casts import BF16, FP8, FP16
from jaxdist.codecs.error_feedback import EF21, ErrorFeedback
from jaxdist.codecs.powersgd import PowerSGD
from jaxdist.codecs.quantise import QSGD, Int4, Int8, TernGrad
from jaxdist.codecs.sign import MajorityVote, Sign
from jaxdist.codecs.sparse import BlockTopK, RandomK, Threshold, TopK
from jaxdist.codecs.transform import compressed_mean, worker_specs

__all__ = [
    "BF16",
    "EF21",
    "FP8",
    "FP16",
    "QSGD",
    "BlockTopK",
    "ErrorFeedback",
    "Int4",
    "Int8",
    "MajorityVote",
    "PowerSGD",
    "RandomK",
    "Sign",
    "TernGrad",
    "Threshold",
    "TopK",
    "compressed_mean",
    "worker_specs",
]
