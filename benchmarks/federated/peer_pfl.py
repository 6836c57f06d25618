"""FedAvg in Apple's pfl on its TensorFlow back end: one of `peers.py`'s contenders, in pfl's own environment.

    python peer_pfl.py DATA ROUNDS WARM WEIGHTS

DATA: a directory of x.npy, y.npy, offsets.npy. Prints one line of JSON; leaves the model in WEIGHTS.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ["TF_USE_LEGACY_KERAS"] = "1"  # pfl 0.6 is written for Keras 2
import numpy as np
import tensorflow as tf
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.tensorflow import TFTensorDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.tensorflow import TFModel
from setting import BATCH, CLIENTS, COHORT, FEATURES, HIDDEN, RATE


class Clock(TrainingProcessCallback):
    """`ends`: when each round was done, (wall clock, CPU seconds)."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        self.ends.append((time.perf_counter(), time.process_time()))
        return False, Metrics()


def main() -> None:
    directory, rounds, warm, weights = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    begin = time.perf_counter()
    x, y, offsets = (np.load(directory / f"{name}.npy") for name in ("x", "y", "offsets"))
    users = [
        TFTensorDataset(features=tf.convert_to_tensor(x[a:b]), labels=tf.convert_to_tensor(y[a:b]), user_id=str(i))
        for i, (a, b) in enumerate(zip(offsets, offsets[1:], strict=False))
    ]
    draw = np.random.default_rng(0)
    cohorts = iter([c for _ in range(warm + rounds) for c in draw.permutation(CLIENTS)[:COHORT]])
    data = FederatedDataset(lambda user: users[user], lambda: int(next(cohorts, 0)))
    keras = tf.keras.Sequential([tf.keras.layers.Dense(HIDDEN, "relu"), tf.keras.layers.Dense(10)])
    keras.build((None, FEATURES))
    keras.compile(
        loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True), optimizer=tf.keras.optimizers.SGD(RATE)
    )
    model = TFModel(keras, {}, tf.keras.optimizers.SGD(1.0))
    backend = SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()])
    clock = Clock()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=warm + rounds,
            evaluation_frequency=warm + rounds,  # at the first, which is not timed
            train_cohort_size=COHORT,
            val_cohort_size=0,
        ),
        backend,
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=RATE, local_batch_size=BATCH),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    (wall, cpu), (last_wall, last_cpu) = clock.ends[warm - 1], clock.ends[-1]
    np.savez(weights, **dict(zip(("w1", "b1", "w2", "b2"), keras.get_weights(), strict=True)))
    print(
        json.dumps(
            {
                "rounds_per_second": rounds / (last_wall - wall),
                "cpu_ms_per_round": 1e3 * (last_cpu - cpu) / rounds,
                "seconds_before": wall - begin,
                "load": os.getloadavg()[0],
            }
        )
    )


if __name__ == "__main__":
    main()
