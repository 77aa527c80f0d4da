# preStop of a worker: tell Ray that this node goes away, then wait for the checkpoint that Ray Train's workers write.
set -u
wait_seconds=${1:-90}
node=${2:-} # of this pod's raylet, found below

of_this_cluster() { # does the process in folder $1 know our token?
  local variables
  mapfile -d '' -t variables 2>/dev/null <"$1/environ" || return 1
  [[ " ${variables[*]} " == *" RAY_AUTH_TOKEN=$RAY_AUTH_TOKEN "* ]]
}

trains() {
  local folder words
  for folder in /proc/[0-9]*; do
    mapfile -d '' -t words 2>/dev/null <"$folder/cmdline" || continue
    [[ ${words[0]:-} == ray::*TrainWorker* ]] && of_this_cluster "$folder" && return 0
  done
  return 1
}

for folder in /proc/[0-9]*; do
  mapfile -d '' -t words 2>/dev/null <"$folder/cmdline" || continue
  [[ -z $node && ${words[0]:-} == */raylet ]] && of_this_cluster "$folder" || continue
  for word in "${words[@]}"; do
    [[ $word == --node_id=* ]] && node=${word#--node_id=}
  done
done

ray drain-node --address "$RAY_ADDRESS" --node-id "$node" --deadline-remaining-seconds "$wait_seconds" \
  --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the pod is terminating" || exit 0 # no head, nothing to do
while trains && ((SECONDS < wait_seconds)); do
  sleep 1
done
