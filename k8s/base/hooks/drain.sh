# preStop of a worker: have a checkpoint written, tell Ray that the node goes away, and wait for the checkpoint.
set -u
wait_seconds=${1:-90}
node=${2:-} # of this pod's raylet, found below

of_this_cluster() { # does the process in folder $1 know our token?
  local variables
  mapfile -d '' -t variables 2>/dev/null <"$1/environ" || return 1
  [[ " ${variables[*]} " == *" RAY_AUTH_TOKEN=$RAY_AUTH_TOKEN "* ]]
}

words_of() { # the command line of the process in folder $1, into words
  mapfile -d '' -t words 2>/dev/null <"$1/cmdline" && of_this_cluster "$1"
}

busy() { # is there a process that trains, a run's or a trial's?
  local folder words
  for folder in /proc/[0-9]*; do
    words_of "$folder" && [[ ${words[0]:-} == ray::*TrainWorker* || ${words[0]:-} == ray::*Trial* ]] && return 0
  done
  return 1
}

busy || exit 0
touch "$CRYSTALFORMER_LEAVING"
for folder in /proc/[0-9]*; do
  [[ -z $node ]] && words_of "$folder" && [[ ${words[0]:-} == */raylet ]] || continue
  for word in "${words[@]}"; do
    [[ $word == --node_id=* ]] && node=${word#--node_id=}
  done
done
# Ray then starts nothing here any more, and Ray Train does not count the loss as a failure.
ray drain-node --address "$RAY_ADDRESS" --node-id "$node" --deadline-remaining-seconds "$wait_seconds" \
  --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the pod is terminating"
while [[ -e $CRYSTALFORMER_LEAVING ]] && busy && ((SECONDS < wait_seconds)); do
  sleep 1
done
