#!/usr/bin/env bash
# Written by
#   jaxdist launch ssh --render --hosts=host0,host1 --gpus-per-node=8 --venv=/shared/venv -- train gpt2_124m run.dir=/shared/runs/gpt2_124m
# Run it on a machine that reaches the hosts by ssh without a password: `bash FILE`, or with other hosts and another
# command:
#   HOSTS="host0 host1" bash FILE train CONFIG a.b=value
# It ends when all hosts have; Ctrl-C stops them in good order. Nothing runs on if this script or a connection dies.
set -uo pipefail
if [ $# -eq 0 ]; then
  set -- train gpt2_124m run.dir=/shared/runs/gpt2_124m
fi
read -ra hosts <<<"${HOSTS:-host0 host1}"
read -ra ssh <<<"${SSH:-ssh}"
port=9476 # of process 0, on the first host
grace=120 # seconds for the last checkpoint
max_restarts=10

# What a host runs: bash -c "$rank" rank LABEL GRACE ARGUMENTS...
rank=$(
  cat <<'RANK'
label=$1 grace=$2
shift 2
source /shared/venv/bin/activate
# NCCL says why it fails; its default is silence.
# https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-debug
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Collectives run beside the computation; XLA's default is off, for the sake of compile time.
# https://docs.jax.dev/en/latest/gpu_performance_tips.html
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
# JAX takes 75% of a GPU's memory by default. NCCL and cuDNN need some too: 0.8 if they run out.
# https://docs.jax.dev/en/latest/201/gpu-memory.html
export XLA_CLIENT_MEM_FRACTION="${XLA_CLIENT_MEM_FRACTION:-0.9}"
# Hosts with several networks: the interface that the hosts reach each other by; see `ip address`.
# https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-socket-ifname
# export NCCL_SOCKET_IFNAME=eth0
# A rank that aborts would leave a core file of its whole memory.
ulimit -c 0
export PYTHONUNBUFFERED=1 # lines come when they are printed
labelled() {
  trap '' PIPE TERM INT HUP # a rank that saves must not fail because nobody reads its output any more
  while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$label" "$line" 2>/dev/null; done
}
exec 3<&0 # a line a second for as long as the job is wanted
jaxdist "$@" </dev/null 3<&- > >(labelled 3<&-) 2>&1 &
rank=$!
(
  while read -r -t 30 -u 3 _; do :; done
  kill -TERM "$rank" # it saves a checkpoint
  for ((second = 0; second < grace; second++)); do
    sleep 1
    kill -0 "$rank" || exit
  done
  kill -KILL "$rank"
) >/dev/null 2>&1 &
watchdog=$!
wait "$rank"
status=$?
kill "$watchdog"
exit "$status"
RANK
)

state=$(mktemp -d)
trap 'rm -rf "$state"' EXIT
stopped=
trap 'stopped=1; touch "$state/stop"' INT TERM HUP

signs_of_life() { # $$ is this script, in its subshells too
  while [ ! -e "$state/stop" ] && kill -0 $$ 2>/dev/null; do
    echo
    sleep 1
  done
}

quoted() { # for the host's login shell, whichever it is
  local word
  for word; do printf "'%s' " "${word//\'/\'\\\'\'}"; done
}

# Runs `jaxdist ARGUMENTS` on all hosts; the exit status of the first that failed goes to `status`.
ranks() {
  local i code pids=()
  rm -f "$state/stop"
  status=0 unreachable=
  for i in "${!hosts[@]}"; do
    # A host that is silent for 30 s counts as lost; by then its own watchdog has noticed too.
    "${ssh[@]}" -T -o BatchMode=yes -o ServerAliveInterval=10 -o ServerAliveCountMax=3 "${hosts[i]}" "$(
      quoted env "JAXDIST_COORDINATOR=${hosts[0]}:$port" "JAXDIST_NUM_PROCESSES=${#hosts[@]}" \
        "JAXDIST_PROCESS_ID=$i" bash -c "$rank" rank "$i ${hosts[i]}" "$grace" "$@"
    )" < <(signs_of_life) &
    pids+=($!)
  done
  while [ ${#pids[@]} -gt 0 ]; do
    sleep 1
    for i in "${!pids[@]}"; do
      if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
      wait "${pids[i]}"
      code=$?
      unset "pids[i]"
      if [ "$code" -eq 255 ]; then unreachable=1; fi # ssh itself failed
      if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
        status=$code
        echo "${hosts[i]} ended with $code; ending the others" >&2
        touch "$state/stop"
      fi
    done
  done
}

doctor=(doctor --timeout 300 --expect-devices 8)
if [ "$1" = train ]; then # the doctor takes its CONFIG and overrides too, but not its options
  for word in "${@:2}"; do [[ $word == -* ]] || doctor+=("$word"); done
fi
for ((restart = 0; ; restart++)); do
  ranks "${doctor[@]}"
  if [ "$status" -eq 1 ]; then
    echo "jaxdist doctor found what must be mended first" >&2
    exit 1
  fi
  if [ "$status" -eq 0 ] && [ -z "$stopped" ]; then ranks "$@"; fi
  case $status in 0 | 2 | 3) exit "$status" ;; esac # done, a mistake in the command, a plan that does not fit
  if [ -n "$stopped" ] || [ "$restart" -ge "$max_restarts" ]; then exit "$status"; fi
  pause=5
  if [ -n "$unreachable" ]; then # a rank there may live until its own watchdog ends it
    pause=$((30 + grace))
  fi
  echo "restart $((restart + 1)) of at most $max_restarts in $pause s" >&2
  sleep "$pause" &
  wait $!
  if [ -n "$stopped" ]; then exit "$status"; fi
done
