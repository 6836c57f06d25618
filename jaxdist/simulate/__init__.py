"""A cluster that is not there: how long its devices compute and its links send, on a virtual clock; and discrete
events, networks and faults for programs that send messages."""
