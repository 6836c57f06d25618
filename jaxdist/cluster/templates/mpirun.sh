#!/usr/bin/env bash
# Written by
#   @@{launch_line}
# Run it on one of the hosts: `bash FILE`, or with other hosts and another command:
#   HOSTS="--host host0:1,host1:1" bash FILE train CONFIG a.b=value
# Open MPI starts the processes and ends them together; what they send goes through NCCL, not MPI.
set -uo pipefail
if [ $# -eq 0 ]; then
  set -- @@{command}
fi
max_restarts=@@{max_restarts}
# shellcheck disable=SC2206 # HOSTS is several words
mpirun=(
  mpirun
  ${HOSTS:-@@{hosts}} --map-by ppr:@@{processes}:node
  # Open MPI ties a process to a core or socket by default; one that feeds GPUs needs its host's cores.
  # https://docs.open-mpi.org/en/main/man-openmpi/man1/mpirun.1.html
  --bind-to none
)

# What a process runs: bash -c "$rank" rank COORDINATOR ARGUMENTS...
rank=$(
  cat <<'RANK'
export JAXDIST_COORDINATOR=$1 JAXDIST_NUM_PROCESSES=$OMPI_COMM_WORLD_SIZE JAXDIST_PROCESS_ID=$OMPI_COMM_WORLD_RANK
shift
@@{local_devices}
@@{setup}
@@{settings}
# A rank that aborts would leave a core file of its whole memory.
ulimit -c 0
export PYTHONUNBUFFERED=1 # lines come when they are printed
exec jaxdist "$@" > >(cat) # not on the terminal that mpirun makes for it
RANK
)

# mpirun passes SIGUSR1 on: the ranks save a checkpoint and exit with 75. SIGTERM would leave them a second.
stopped=
running=
trap 'if [ -z "$stopped" ] && [ -n "$running" ]; then kill -USR1 "$running"; fi; stopped=1' INT TERM HUP

# Runs `jaxdist ARGUMENTS` on all hosts; mpirun's exit status, that of the first rank that failed, goes to `status`.
ranks() {
  set -m # a process group of its own: Ctrl-C reaches this script alone
  "${mpirun[@]}" --tag-output bash -c "$rank" rank "$coordinator" "$@" </dev/null &
  running=$!
  set +m
  wait "$running"
  status=$?
  while kill -0 "$running" 2>/dev/null; do # a signal ended the wait, not mpirun
    wait "$running"
    status=$?
  done
  running=
}

doctor=(doctor --timeout 300@@{expected})
if [ "$1" = train ]; then # the doctor takes its CONFIG and overrides too, but not its options
  for word in "${@:2}"; do [[ $word == -* ]] || doctor+=("$word"); done
fi
for ((restart = 0; ; restart++)); do
  # Rank 0 need not be on the first host: Open MPI begins with the one where mpirun runs.
  # shellcheck disable=SC2016 # the ranks expand it
  first=$("${mpirun[@]}" bash -c 'if [ "$OMPI_COMM_WORLD_RANK" = 0 ]; then hostname; fi') || exit
  coordinator=$first:@@{port}
  ranks "${doctor[@]}"
  if [ "$status" -eq 1 ]; then
    echo "jaxdist doctor found what must be mended first" >&2
    exit 1
  fi
  if [ "$status" -eq 0 ] && [ -z "$stopped" ]; then ranks "$@"; fi
  case $status in 0 | 2 | 3) exit "$status" ;; esac # done, a mistake in the command, a plan that does not fit
  if [ -n "$stopped" ] || [ "$restart" -ge "$max_restarts" ]; then exit "$status"; fi
  echo "ended with $status: restart $((restart + 1)) of at most $max_restarts in 5 s" >&2
  sleep 5 &
  wait $!
  if [ -n "$stopped" ]; then exit "$status"; fi
done
