"""The digits, read as slowly as a larger model would read them."""

import time

import numpy as np

from jaxdist.data import arrays
from jaxdist.data.source import Rows


class SlowDigits(arrays.Arrays):
    def __init__(self, seconds_per_sample: float):
        plain = arrays.digits()
        super().__init__(plain.fields, classes=plain.classes)
        self.seconds_per_sample = seconds_per_sample

    def get(self, ids: np.ndarray) -> Rows:
        time.sleep(self.seconds_per_sample * len(ids))
        return super().get(ids)
