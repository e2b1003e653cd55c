# How a batch script begins and ends; launch/slurm.py puts it there.

begin_job() { # FOLDER: of the marks, named as the log. Each element of an array has its own.
    local id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    export LMIM_MARKS=$1/${id:-$SLURM_JOB_ID}
    rm -f "$LMIM_MARKS.again" "$LMIM_MARKS.final" "$LMIM_MARKS.ended"
}

use_code() { # FOLDER
    local way="a later submission in the same folder replaces it"
    cd "$1" || end_job 4 0 "the copy of the code is gone; $way"
    export PYTHONPATH=$1${PYTHONPATH:+:$PYTHONPATH}
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # Slurm does not pass it on by itself
}

for_minutes() { # COMMAND...: Slurm's controller may be away
    local tries=30
    until "$@"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || return
        sleep 10
    done
}

# End the job, or have it started again. Slurm's own restart count has preemptions in it, so crashes
# are counted in a file. The processes leave marks too: when they have begun (started), want to be
# started again (again), or fail for good (final).
end_job() { # EXIT_STATUS MAX_RESTARTS [WHY_FOR_GOOD]
    local rc=$1 max_restarts=$2 why=${3:-} again= begun= crashes said
    [ ! -e "$LMIM_MARKS.started" ] || begun=1
    if [ $rc -ne 0 ]; then
        said=($(for_minutes squeue --noheader --array "--jobs=${LMIM_MARKS##*/}" --states=all \
            --Format=State:30,PreemptTime:30))
        # scancel, a requeue, the time limit, preemption without GraceTime: Slurm does the rest.
        [ "${said[0]:-}" != COMPLETING ] || exit $rc
        crashes=$(cat "$LMIM_MARKS.crashes" 2>/dev/null || echo 0)
        if [ -e "$LMIM_MARKS.final" ]; then
            :
        elif [ -e "$LMIM_MARKS.again" ]; then
            again=1
        elif [[ ${said[1]:-} == [0-9]* ]] && { [ ! "$begun" ] || [ $rc -ge 128 ]; }; then
            again=1
            echo "exit status $rc: Slurm preempts this job, which is to be started again"
        elif [ "$why" ]; then
            echo "error: $why"
        elif [ ! "$begun" ] && lacks_python $rc; then
            echo "error: env.python: expected a Python with the packages of requirements.txt," \
                "but exit status $rc came before anything ran"
        elif [ "$crashes" -lt $max_restarts ]; then
            again=1
            echo $((crashes + 1)) >"$LMIM_MARKS.crashes"
            echo "exit status $rc: restart $((crashes + 1)) of $max_restarts"
        fi
    fi
    [ ! "$again" ] || for_minutes scontrol requeue $SLURM_JOB_ID || again=
    [ "$again" ] || touch "$LMIM_MARKS.ended"
    exit $rc
}

lacks_python() { # EXIT_STATUS: no such program (srun: 2, a shell: 126, 127), or no such module
    [ $1 -eq 2 ] || [ $1 -eq 126 ] || [ $1 -eq 127 ] ||
        tail -n 20 "${LMIM_MARKS}_0_log.out" 2>/dev/null | grep -q "No module named"
}

setup_failed() { # EXIT_STATUS LINE_NUMBER DEPTH
    [ $3 -eq 1 ] || return 0 # in a function or a file of the user's, which decides for itself
    trap - ERR
    set +eu
    end_job 2 0 "env.setup: expected lines that succeed, but exit status $1 is that of: $(sed -n "$2p" "$0")"
}
