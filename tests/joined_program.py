"""A program that joins `jax.distributed` by itself and then trains: run by every process of the job.

Arguments: address of JAX's coordinator, number of processes, this one's number, the config's file.
"""

import sys

import jax

import jaxdist

if __name__ == "__main__":
    address, count, process, config = sys.argv[1:]
    jax.distributed.initialize(address, int(count), int(process))
    run = jaxdist.train(config)
    print("status", run.summary.get("status"))
