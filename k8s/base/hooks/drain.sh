# preStop of a worker: tell Ray that this node goes away, then wait for the checkpoint that Ray Train's workers write.
set -u
wait_seconds=${1:-90}

trains() {
  local folder words
  for folder in /proc/[0-9]*; do
    mapfile -d '' -t words 2>/dev/null <"$folder/cmdline" || continue
    [[ ${words[0]:-} == ray::*TrainWorker* ]] && return 0
  done
  return 1
}

ray drain-node --address "$RAY_ADDRESS" --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "pod is terminating" \
  --deadline-remaining-seconds "$wait_seconds" || exit 0 # no head any more: nothing to wait for
while trains && ((SECONDS < wait_seconds)); do
  sleep 1
done
