#!/bin/bash
# Written by `python -m trainer submit`; Slurm keeps a copy. `sbatch` of this file does the same again.
{% for option in options %}
#SBATCH {{ option }}
{% endfor %}
{% for line in before %}
{{ line }}
(($? == 0)) || { printf '%s\n' {{ ("UsageError: --before failed: " ~ line) | quote }} "  It prepares the shell at each start. Mend it, or end it with || true if it may fail."; exit 2; }
{% endfor %}
set -u # not before: what users load may read variables that are not set
python=({{ python }})
run={{ run | quote }}
job=$SLURM_JOB_ID
start="$run/slurm/job-$job-start-${SLURM_RESTART_COUNT:-0}"
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it from the job
used=$SLURM_JOB_NUM_NODES excluded=
newest() { ls "$run/checkpoints" 2>/dev/null | sort | tail -n 1; }
say() { printf '%(%F %T)T  %s\n' -1 "$*"; }
began_at=$(newest)
say "job $job, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"
{% if exclude_after %}

# Nodes that have failed that often take no part.
failing=$("${python[@]}" -c '
import sys
from trainer.log import nodes
print(*nodes.failing(sys.argv[1], int(sys.argv[2])))' "$run" {{ exclude_after }})
for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    [[ " $failing " != *" $node "* ]] || { excluded+="${excluded:+,}$node" used=$((used - 1)); }
done
if [[ -n $excluded ]]; then
    say "excluded after {{ exclude_after }} failures or more: $excluded"
    if ((used < {{ fewest if elastic else "$SLURM_JOB_NUM_NODES" }})); then
        say "  Too few nodes are left. Submit again with --slurm exclude=$excluded"
        exit 76
    fi
fi
{% endif %}
on_each_node=(srun --nodes="$used" ${excluded:+--exclude="$excluded"} --ntasks-per-node=1 --kill-on-bad-exit=0 --mpi=none --input=none{{ " --no-kill" if elastic }})

# The meeting point of the agents is a process of this script, so it outlives every node but this one. The others reach
# this node where Slurm does. A name may mean another address here, so the store of a name listens at all of them.
address=$(scontrol show node --oneliner "$SLURMD_NODENAME" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
((SLURM_JOB_NUM_NODES > 1)) || address=127.0.0.1
[[ $address =~ ^[0-9.]+$ ]] && listen=$address || listen=0.0.0.0
"${python[@]}" -m trainer rendezvous --listen "$listen:0" >"$start-rendezvous.txt" 2>&1 &
rendezvous=$!
trap 'kill "$rendezvous" 2>/dev/null' EXIT

# From here on a notice (time limit, preemption) asks the agents to save and leave.
agents= notice=
trap 'notice=yes; [[ -z $agents ]] || kill -USR1 "$agents" 2>/dev/null' USR1 TERM

touch "$start-seen"
"${on_each_node[@]}" "${python[@]}" -c '
import importlib.util, os, pathlib, sys
import trainer.cli
if importlib.util.find_spec("torch") is None:
    sys.exit("no module torch")
sys.exit(0 if pathlib.Path(sys.argv[1]).exists() else print(
    "UsageError: node {} does not see {}.\n  All nodes write to the run directory. Give a --run on a file system that "
    "they share, or --nodes 1.".format(os.environ["SLURMD_NODENAME"], pathlib.Path(sys.argv[1]).parents[1])) or 66)
' "$start-seen"
case $? in
    66) exit 2 ;;
    1 | 2 | 13 | 126 | 127) # srun has 2 where a program is not there, 13 where it may not be run
        say "Python on a node does not start, or has no toprope (see above)."
        say "  Give submit --python, the command that starts Python there, or --before, a line that prepares the shell."
        exit 2 ;;
esac
rm -f "$start-seen"

until port=$(sed -n 's/.*:\([0-9]*\) listens$/\1/p' "$start-rendezvous.txt") && [[ -n $port ]]; do
    kill -0 "$rendezvous" 2>/dev/null || { cat "$start-rendezvous.txt"; exit 1; }
    sleep 0.1
done

status=75
if [[ -z $notice ]]; then
    # Each node names its file after itself: for srun two nodes of one host have one name.
    "${on_each_node[@]}" bash -c 'exec "$@" >>"$0-$SLURMD_NODENAME.txt" 2>&1' "$start" \
        "${python[@]}" -m trainer.launch.torchrun \
        --nnodes={{ fewest if elastic else "$used" }}{{ ":$used" if elastic }} --nproc-per-node={{ ranks }} \
        --rdzv-backend=c10d --rdzv-endpoint="$address:$port" --rdzv-id="$job.${SLURM_RESTART_COUNT:-0}" \
        --rdzv-conf={{ rendezvous }} --max-restarts={{ restarts }} --shutdown-timeout={{ shutdown_seconds }} \
        -m {{ command }} &
    agents=$!
    [[ -z $notice ]] || kill -USR1 "$agents"
    while wait "$agents"; status=$?; kill -0 "$agents" 2>/dev/null; do :; done # a notice interrupts the wait
fi

# A lost node leaves srun with an error, also where the others finished. The run's log knows.
if ((status != 0 && status != 75)); then
    "${python[@]}" -c 'import sys, trainer; sys.exit(trainer.open_run(sys.argv[1]).status != "finished")' "$run" && status=0
fi
while read -r state nodes <<<"$(squeue --noheader --jobs="$job" --format="%T %D")"; [[ $state == RESIZING || $state == SIGNALING ]]; do
    sleep 0.5 # a running job that Slurm is taking a lost node out of, or sending a notice to
done
if ((status != 0 && status != 75)) && [[ ${nodes:-$SLURM_JOB_NUM_NODES} -lt $SLURM_JOB_NUM_NODES ]]; then
    say "nodes were lost: $nodes of $SLURM_JOB_NUM_NODES are left"
    status=75
fi
# A notice may also reach agents that cannot leave in good order yet, or no more.
[[ -n $notice && $status != [02] && $status != 76 ]] && status=75
say "ends with status $status, the job is ${state:-gone}"
((status == 75)) || exit "$status"

in_vain=$(cat "$run/slurm/job-$job-in-vain" 2>/dev/null || echo 0)
[[ $(newest) == "$began_at" ]] && in_vain=$((in_vain + 1)) || in_vain=0
echo "$in_vain" >"$run/slurm/job-$job-in-vain"
if ((in_vain >= {{ starts_in_vain }})); then
    say "$in_vain starts in a row have saved no checkpoint: the job would only use up its nodes."
    say "  Give submit a longer --time, or set a smaller checkpoint.every_steps."
    exit 1
fi
# Only a running job: one that was cancelled, or that Slurm itself puts back, is completing by now.
if [[ $state == RUNNING ]]; then
    say "goes back into the queue, to resume from its newest checkpoint"
    trap '' USR1 TERM
    scontrol requeue "$job" && sleep 60 # Slurm ends this script
    say "Slurm has not put the job back (see above)."
    say "  The run is saved. The same submit resumes it."
fi
exit 75
