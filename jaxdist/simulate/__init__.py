"""A cluster that is not there: how long its devices compute and its links send, on a virtual clock."""
