# preStop of a head: SIGTERM to the crystalformer commands of this Ray cluster, then wait for their checkpoints.
# Ray's token tells them from any other process. The kubelet's own SIGTERM reaches the container's first process alone.
set -u
wait_seconds=${1:-120}

commands() {
  local folder words variables
  for folder in /proc/[0-9]*; do
    mapfile -d '' -t words 2>/dev/null <"$folder/cmdline" || continue
    [[ ${words[1]:-} == */crystalformer ]] || continue
    mapfile -d '' -t variables 2>/dev/null <"$folder/environ" || continue
    [[ " ${variables[*]} " == *" RAY_AUTH_TOKEN=$RAY_AUTH_TOKEN "* ]] && echo "${folder#/proc/}"
  done
}

for pid in $(commands); do
  kill -TERM "$pid"
done
until [[ -z $(commands) ]] || ((SECONDS >= wait_seconds)); do
  sleep 1
done
# The operator asks for the job's state every few seconds: it should see it fail before the head is gone.
sleep "${2:-10}"
