"""Clients that train without rounds, on a virtual clock: FedBuff and FedAsync."""
