"""The user's side of a cluster: the launcher of local processes, scripts for other launchers, the doctor.

`launcher.py` starts and restarts processes on this machine; `render.py` and its targets write what starts them by
SLURM, Kubernetes, SSH or Open MPI; `doctor/` says what is wrong. Each process then finds the others by
`runtime/resolve_cluster.py`.
"""
