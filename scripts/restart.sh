#!/usr/bin/env bash
# Starts a run again while that can help, by what its exit.json says:
#
#     scripts/restart.sh runs/mine daybreak train tiny --name mine
#
# The command makes the run; once it exists, every start is `daybreak train RUN` with the launcher in front of the
# command's `daybreak` (torchrun -m daybreak, srun daybreak). Tried again: 1 (unexpected), 7 (hung, or ranks did not meet)
# and no exit.json (kill -9, lost power), until 3 starts in a row brought no new checkpoint. Everything else is final: 0
# done, 75 stopped by a signal, and what trying again cannot mend (2 to 6). Exits with that code; 137 where there is none.
#
#     scripts/restart.sh --once RUN COMMAND   one start by the same rule: COMMAND, or its launcher and `train RUN`
#     scripts/restart.sh --verdict RUN        only decides, for schedulers: prints again, stopped, failed or done. It counts
#                                             a start, so call it once after each; to look only, read exit.json
#
# The decision is made by verdict.py beside this file, with $PYTHON (python3).
set -u

verdict() { # sets what and code. Python reads the folder's files; nothing in them ever reaches this shell but two words
    read -r what code < <("${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/verdict.py" "$1") || what=failed code=1
}

if [ "${1:-}" = --verdict ]; then
    verdict "${2:?RUN}"
    echo "$what"
    exit
fi
once=${1:-} && [ "$once" = --once ] && shift
[ $# -ge 3 ] || { sed -n '2,16s/^# \?//p' "$0" >&2; exit 2; }
run=$1 && shift
stop() { # also between two starts. srun would kill its tasks at once; Slurm can pass the signal on to them, so that they save
    stopping=yes
    case "${SLURM_JOB_ID:+${launcher[*]}}" in
        *srun*) scancel --signal=TERM "$SLURM_JOB_ID" ;;
        *) kill -TERM $child 2>/dev/null ;;
    esac
}

launcher=() && words=("$@") stopping=""
for i in "${!words[@]}"; do
    [ "${words[$i]}" = train ] && launcher=("${words[@]:0:$i}") && break
done
[ -e "$run/config.toml" ] && echo "restart.sh: $run exists and is resumed as its config.toml says; other flags of the" \
    "command are not used" >&2
while true; do
    [ -e "$run/config.toml" ] && set -- "${launcher[@]}" train "$run"
    [ "$once" = --once ] && exec "$@"
    "$@" &
    child=$!
    trap stop TERM INT
    case "${launcher[*]}" in
        *torchrun* | *torch.distributed*) trap : USR1 ;; # it would die of it, and leave its workers alone
        *) trap 'kill -USR1 $child 2>/dev/null' USR1 ;;
    esac
    while kill -0 $child 2>/dev/null; do wait $child; done # a trapped signal ends `wait`, not the child
    wait $child
    status=$?
    verdict "$run" # says so if there is no such folder
    [ -d "$run" ] || exit "$status"
    [ "$what" = again ] || exit "$code"
    case "$code $status" in "137 "[2-6]) exit "$status" ;; esac # refused before it could write exit.json
    said="ended with $code" && [ "$code" = 137 ] && said="left no exit.json, as after a kill"
    echo "restart.sh: $run $said, and is started again" >&2
    [ -n "$stopping" ] || { sleep "${RESTART_WAIT:-10}" & wait $!; } # a signal ends `wait` at once
    [ -z "$stopping" ] || { echo "restart.sh: stopped by a signal; the same command resumes $run" >&2; exit 75; }
done
