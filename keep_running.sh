#!/usr/bin/env bash
# Starts a run again and again until it has ended, each time from its newest checkpoint.
#
#   bash keep_running.sh FOLDER COMMAND...
#   bash keep_running.sh runs/two torchrun --standalone --nproc_per_node 2 run_clm.py \
#       --parallel ddp --corpus_path my_text.txt --out_dir runs/two
#
# FOLDER is the --out_dir of the command. It gives up after three starts in a row that saved nothing
# new: then something is wrong that another start does not mend.
set -uo pipefail
if [ $# -lt 2 ] || [[ $1 == -* ]]; then
    echo "usage: bash keep_running.sh FOLDER COMMAND..., FOLDER being the command's --out_dir" >&2
    exit 2
fi
folder="$1"
shift
arguments=("$@")
set --
for argument in "${arguments[@]}"; do # it is added here
    [ "$argument" = --resume ] || set -- "$@" "$argument"
done

newest() { # the step of the newest checkpoint, or nothing
    find "$folder/checkpoints" -maxdepth 1 -name 'step-*' ! -name '*.*' 2>/dev/null | sort | tail -1
}

child=
stop() { # the run saves and leaves; so does this script
    trap '' TERM INT
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
    wait "$child"
    exit 143
}
trap stop TERM INT

idle=0
while true; do
    before="$(newest)"
    if [ -n "$before" ]; then "$@" --resume & else "$@" & fi
    child=$!
    wait "$child"
    status=$?
    [ $status -ne 0 ] || exit 0
    [ $status -ne 2 ] || exit 2 # a mistake in the command
    if [ "$(newest)" = "$before" ]; then idle=$((idle + 1)); else idle=0; fi
    if [ $idle -ge 3 ]; then
        echo "keep_running.sh: three starts in a row saved nothing new; the last exit status is $status" >&2
        exit "$status"
    fi
    echo "keep_running.sh: exit status $status; starting again from ${before:-the beginning}" >&2
    sleep 1
done
