"""The setting in which the engine is compared: plain numbers, for programs of other environments too."""

RATE, COHORT, BATCH, CLIENTS, FEATURES, HIDDEN = 0.1, 10, 20, 100, 784, 200
WARM = 5  # rounds that are not timed
