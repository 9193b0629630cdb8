#!/bin/bash
# One run of a ladder, or one case of a campaign. Written by `python -m trainer … --on slurm`.
{% for option in options %}
#SBATCH {{ option }}
{% endfor %}
leave() { cd {{ directory | quote }} && echo "$1" >exit-status.partial && mv exit-status.partial exit-status; exit "$1"; }
{% for line in before %}
{{ line }}
(($? == 0)) || { printf '%s\n' {{ ("UsageError: --before failed: " ~ line) | quote }} "  It prepares the shell at each start. Mend it, or end it with || true if it may fail."; leave 2; }
{% endfor %}
set -u # not before: what users load may read variables that are not set
{% for name, value in environment.items() %}
export {{ name }}={{ value | quote }}
{% endfor %}
python=({{ python }})

# A notice (time limit, preemption) asks the run to save and leave.
worker= notice=
trap 'notice=yes; [[ -z $worker ]] || kill -USR1 "$worker" 2>/dev/null' USR1 TERM
"${python[@]}" -m {% for word in command %}{{ word | quote }} {% endfor %}&
worker=$!
[[ -z $notice ]] || kill -USR1 "$worker"
while wait "$worker"; status=$?; kill -0 "$worker" 2>/dev/null; do :; done # a notice interrupts the wait
# A notice may also reach a worker that does not listen yet, which it ends.
[[ -n $notice && $status -gt 128 ]] && status=75

# Only a running job: one that was cancelled, or that Slurm itself puts back, is completing by now.
while state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T); [[ $state == SIGNALING ]]; do
    sleep 0.5 # a running job that Slurm is still sending the notice to
done
if [[ $status == 75 && -n $notice && $state == RUNNING ]]; then
    trap '' USR1 TERM
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # Slurm ends this script
fi
leave "$status"
