#!/usr/bin/env bash
# Starts a run again while that can help, by what its exit.json says:
#
#     scripts/restart.sh runs/mine daybreak train tiny --name mine
#
# The command makes the run; once it exists, every start is `daybreak train RUN` with the launcher in front of the
# command's `daybreak` (torchrun -m daybreak, srun daybreak). Tried again: 1 (unexpected), 7 (hung) and no exit.json
# (kill -9, lost power), until 3 starts in a row brought no new checkpoint. Everything else is final: 0 done, 75 stopped
# by a signal, and what trying again cannot mend (2 to 6). Exits with that code; 137 where there is none.
#
#     scripts/restart.sh --verdict RUN    only decides, for schedulers: prints again, stopped, failed or done
set -u

newest() { # step of the newest complete checkpoint; none: -1
    local path step=-1
    for path in "$1"/checkpoints/step-*/manifest.json; do
        [ -e "$path" ] && step=$(basename "$(dirname "$path")") && step=${step#step-}
    done
    echo "$step"
}

code() { # of the last attempt; killed: 137
    local said
    said=$(sed -n 's/.*"code": *\([0-9]*\).*/\1/p' "$1/exit.json" 2>/dev/null)
    echo "${said:-137}"
}

verdict() { # what to do; starts without progress are counted in RUN/.restarts, so that it survives the machine
    local run=$1 step last=-2 count=0
    case $(code "$run") in
        0) echo "done" ;;
        75) echo stopped ;;
        1 | 7 | 137)
            step=$(newest "$run")
            [ -e "$run/.restarts" ] && read -r last count <"$run/.restarts"
            if [ "$step" = "$last" ]; then count=$((count + 1)); else count=1; fi
            [ -d "$run" ] && echo "$step $count" >"$run/.restarts"
            if [ "$count" -ge 3 ]; then rm -f "$run/.restarts" && echo failed; else echo again; fi
            ;;
        *) echo failed ;;
    esac
}

if [ "${1:-}" = --verdict ]; then
    verdict "${2:?RUN}"
    exit
fi
[ $# -ge 3 ] || { sed -n '2,12s/^# \?//p' "$0" >&2; exit 2; }
run=$1 && shift
launcher=() && words=("$@")
for i in "${!words[@]}"; do
    [ "${words[$i]}" = train ] && launcher=("${words[@]:0:$i}") && break
done
while true; do
    [ -e "$run/config.toml" ] && set -- "${launcher[@]}" train "$run"
    "$@" &
    child=$!
    trap 'kill -TERM $child 2>/dev/null' TERM INT
    trap 'kill -USR1 $child 2>/dev/null' USR1
    while kill -0 $child 2>/dev/null; do wait $child; done # a trapped signal ends `wait`, not the child
    if [ ! -d "$run" ] || [ "$(verdict "$run")" != again ]; then break; fi
    echo "restart.sh: $run ended with $(code "$run"), starting it again" >&2
    sleep "${RESTART_WAIT:-10}"
done
if [ -d "$run" ]; then exit "$(code "$run")"; fi
wait $child
