#!/usr/bin/env bash
# cluster.sh up | down: a throw-away Slurm with two nodes on this machine, for the tests; a third, of partition
# nameless, has a name that does not resolve.
# cluster.sh preempt_send_user_signal on | off: whether preemption first sends the signal of `sbatch --signal`; off
# after each `up`, as is Slurm's default.
#
# Needs root on Debian or Ubuntu; installs Slurm with apt if it is missing. It has a folder, ports
# and a munged of its own, so another Slurm on the machine is not touched: `up` prints the path of
# the file to source to reach this one. The nodes' processors, memory and GPUs are only claimed.
set -euo pipefail

DIR=${LMIM_SLURM_DIR:-/var/lib/lmim-slurm}
PORT=${LMIM_SLURM_PORT:-17917} # and the three after it
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$DIR/slurm.conf

fail() {
    echo "cluster.sh: $*" >&2
    tail -n 5 "$DIR"/*.log >&2 2>/dev/null || true
    exit 1
}

[ "$(id -u)" = 0 ] || fail "needs root: slurmd starts jobs as their users"
mkdir -p -m 755 "$DIR"
if [ "${LMIM_SLURM_LOCKED:-}" != "$DIR" ]; then # one at a time; -o: daemons do not inherit the lock
    LMIM_SLURM_LOCKED=$DIR exec flock -o -w 300 "$DIR/lock" bash "$0" "$@"
fi

until_true() { # SECONDS COMMAND...
    local end=$((SECONDS + $1))
    until "${@:2}" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.1
    done
}

install_packages() {
    local tool missing= policy=/usr/sbin/policy-rc.d
    for tool in slurmctld slurmd sbatch munged; do command -v $tool >/dev/null || missing=1; done
    [ "$missing" ] || return 0
    if [ ! -e $policy ]; then # its exit code keeps packages from starting their services
        trap "rm -f $policy" EXIT
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy
    fi
    local get="env DEBIAN_FRONTEND=noninteractive apt-get -qy -o DPkg::Lock::Timeout=120"
    local install="$get install --no-install-recommends slurmctld slurmd slurm-client munge"
    { $install || { $get update && $install; }; } </dev/null >"$DIR/apt.log" 2>&1 ||
        fail "apt-get could not install Slurm"
}

set_hosts() { # [LINE]: the only one of ours in /etc/hosts, which may be a mount: written in place
    local others
    others=$(grep -sv "# for $DIR\$" /etc/hosts) || true
    printf '%s\n' "$others" ${1:+"$1 # for $DIR"} >/etc/hosts
}

configure() {
    mkdir -p "$DIR"/{gpu,state,spool/lmim0,spool/lmim1,spool/lmim2}
    # Only a slurmd from 23.02 on can do without cgroups; v1 is the plugin that asks for nothing.
    local cgroup=disabled network= version
    version=$(slurmd -V | tr -dc 0-9.)
    [ "${version%%.*}" -ge 23 ] || cgroup=cgroup/v1
    echo "CgroupPlugin=$cgroup" >"$DIR/cgroup.conf"
    # slurmd wants character devices; the links' numbers end up in CUDA_VISIBLE_DEVICES.
    for i in {0..7}; do ln -sfn /dev/null "$DIR/gpu/gpu$i"; done
    echo "Name=gpu Type=fake File=$DIR/gpu/gpu[0-7]" >"$DIR/gres.conf"
    # Where loopback has the only IPv4 address, slurmctld finds nothing to listen on without IPv6.
    hostname -I 2>/dev/null | grep -q '[0-9]\.' || network=CommunicationParameters=EnableIPv6
    # cred_expire: as long, a requeued job waits before it starts again (by default two minutes).
    # FirstJobId: no number may come back, since submitit names files after it.
    local node="NodeHostname=localhost NodeAddr=127.0.0.1 CPUs=64 RealMemory=500000 Gres=gpu:fake:8"
    cat >"$SLURM_CONF" <<END
ClusterName=lmim
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge.socket,cred_expire=5
FirstJobId=$(($(date +%s) % 60000000))
KillWait=2
MinJobAge=3600
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
#SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd-%n.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/slurmd-%n.log
$network
GresTypes=gpu
NodeName=lmim0 Port=$((PORT + 1)) $node
NodeName=lmim1 Port=$((PORT + 2)) $node
NodeName=lmim2 Port=$((PORT + 3)) $node
PartitionName=DEFAULT Nodes=lmim[0-1] DefMemPerCPU=100 MaxTime=INFINITE
PartitionName=debug Default=YES PriorityTier=10
PartitionName=scavenge PriorityTier=1 GraceTime=30
PartitionName=scavenge-at-once PriorityTier=1 GraceTime=0
PartitionName=short MaxTime=60
PartitionName=nameless Nodes=lmim2
END
    printf 'export SLURM_CONF=%q\n' "$SLURM_CONF" >"$DIR/env.sh"
    set_hosts "127.0.0.1 lmim0 lmim1" # MASTER_ADDR is the name of a node
}

running_pid() { # slurmctld | slurmd-NODE | munged
    local pid
    pid=$(cat "$DIR/$1.pid" 2>/dev/null) && grep -qsa "^${1%-*}" "/proc/$pid/cmdline" || return
    echo "$pid"
}

is_ready() { # -r: only nodes that answer. A client whose slurmctld is gone would try for long.
    local states=idle,mix,alloc,comp
    running_pid slurmctld &&
        [ "$(timeout 5 sinfo -h -N -r -p debug -t $states -o %N 2>/dev/null | wc -l)" = 2 ]
}

start() {
    (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null &&
        fail "port $PORT is taken: set LMIM_SLURM_PORT"
    [ -s "$DIR/munge.key" ] || (umask 077 && head -c 128 /dev/urandom >"$DIR/munge.key")
    munged --force --socket="$DIR/munge.socket" --key-file="$DIR/munge.key" \
        --pid-file="$DIR/munged.pid" --seed-file="$DIR/munge.seed" --log-file="$DIR/munged.log" ||
        fail "munged did not start"
    slurmctld -c || fail "slurmctld did not start" # -c: without the jobs of last time
    for node in lmim0 lmim1 lmim2; do slurmd -N $node || fail "the slurmd of $node did not start"; done
    until_true 30 is_ready || fail "not ready: $(timeout 5 sinfo -h -N -o '%N %T' 2>&1 | xargs)"
}

is_gone() { ! running_pid "$1"; }
has_no_jobs() { [ -z "$(timeout 5 squeue -h -o %A || echo unknown)" ]; }

stop() {
    local name pid
    if running_pid slurmctld >/dev/null; then
        timeout 5 squeue -h -o %A 2>/dev/null | xargs -r timeout 5 scancel || true
        until_true 15 has_no_jobs || true
    fi
    for name in slurmd-lmim0 slurmd-lmim1 slurmd-lmim2 slurmctld munged; do
        pid=$(running_pid $name) || continue
        kill "$pid" || true
        until_true 10 is_gone $name || kill -KILL "$pid" || true
    done
    # Jobs out of slurmctld's reach have our SLURM_CONF and a number.
    for pid in $(grep -lzsxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ | cut -d/ -f3); do
        grep -qzs ^SLURM_JOB_ID= "/proc/$pid/environ" || grep -qs ^slurmstepd "/proc/$pid/comm" ||
            continue
        kill -KILL "$pid" 2>/dev/null || true
    done
    set_hosts
}

case ${1:-} in
up)
    # stop: what a crash has left
    is_ready >/dev/null || { install_packages; stop; configure; start; }
    echo "$DIR/env.sh"
    ;;
down) stop ;;
preempt_send_user_signal)
    comment=
    [ "${2:-}" = on ] || comment="#"
    sed -i "s/^#*\(SlurmctldParameters=\)/$comment\1/" "$SLURM_CONF"
    scontrol reconfigure
    ;;
*) echo "usage: cluster.sh up | down | preempt_send_user_signal on|off" >&2 && exit 2 ;;
esac
