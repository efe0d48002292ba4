#!/bin/bash
# Start a Slurm cluster on this host, for tests: fake nodes, without systemd, accounting or any change to /etc/slurm.
#
#   apt-get install slurm-wlm munge
#   eval "$(tests/slurm/up.sh)"     prints `export SLURM_CONF=...`, which makes this shell use it
#   tests/slurm/down.sh
#
# NODES fake nodes of CPUS cores and GPUS fake GPUs each (2, 4, 2). Needs root, as slurmd does. Takes about a second.
# Several may run at one time, each with a SLURM_TEST_ROOT, munged, ports and job numbers of its own.
set -euo pipefail
NODES=${NODES:-2} CPUS=${CPUS:-4} GPUS=${GPUS:-2}
root=${SLURM_TEST_ROOT:-/tmp/slurm-test}
host=$(hostname -s)
fail() { echo "tests/slurm/up.sh: $*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || fail "needs root"
for tool in slurmctld slurmd munged; do
  PATH=$PATH:/usr/sbin command -v $tool > /dev/null || fail "$tool is missing: apt-get install slurm-wlm munge"
done
"$(dirname "$0")/down.sh"
rm -rf "$root"; mkdir -p "$root"/{etc,state,spool,log,run,dev}

munge_socket=$root/run/munge.socket
(umask 077; head -c 1024 /dev/urandom > "$root/etc/munge.key")
/usr/sbin/munged --force --socket="$munge_socket" --key-file="$root/etc/munge.key" --pid-file="$root/run/munged.pid" \
  --seed-file="$root/state/munged.seed" --log-file="$root/log/munged.log" 2> "$root/log/start.log" ||
  fail "munged does not start: $(cat "$root/log/start.log" "$root/log/munged.log")"

# The first free place for one more on this host, held (descriptor 9) until slurmctld listens: a port for each daemon,
# and job numbers apart from those of the others, for a job's MASTER_PORT is made of its number.
exec 9> /tmp/slurm-test.lock; flock 9
for ((place = 0; place < 100; place++)); do
  port=$((16800 + 20 * place)) first_job=$((1 + 120 * place))
  (: < /dev/tcp/127.0.0.1/$port) 2> /dev/null || break
done

# A GPU must be a character device: these are copies of /dev/null.
for ((g = 0; g < GPUS; g++)); do mknod -m 666 "$root/dev/gpu$g" c 1 3 || fail "mknod is not allowed here"; done

# cred_expire: how long a requeued job must wait. MinJobAge: finished jobs stay visible without accounting.
cat > "$root/etc/slurm.conf" <<C
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
FirstJobId=$first_job
AuthType=auth/munge
AuthInfo=cred_expire=5,socket=$munge_socket
SlurmUser=root
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool/%n
SlurmctldPidFile=$root/run/slurmctld.pid
SlurmdPidFile=$root/run/slurmd.%n.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
ReturnToService=2
MinJobAge=86400
KillWait=10
InactiveLimit=0
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
C
echo "AutoDetect=off" > "$root/etc/gres.conf"
for ((i = 1; i <= NODES; i++)); do
  echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=$CPUS RealMemory=8000" \
    "Gres=gpu:$GPUS State=UNKNOWN" >> "$root/etc/slurm.conf"
  echo "NodeName=n$i Name=gpu File=$root/dev/gpu[0-$((GPUS - 1))]" >> "$root/etc/gres.conf"
  mkdir -p "$root/spool/n$i"
done
cat >> "$root/etc/slurm.conf" <<C
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
C

export SLURM_CONF=$root/etc/slurm.conf
/usr/sbin/slurmctld -c -f "$SLURM_CONF" > "$root/log/start.log" 2>&1 9>&- || fail "slurmctld does not start: $(cat "$root/log/start.log")"
for _ in $(seq 50); do scontrol ping > /dev/null 2>&1 && break; sleep 0.1; done
exec 9>&-
for ((i = 1; i <= NODES; i++)); do
  /usr/sbin/slurmd -f "$SLURM_CONF" -N n$i >> "$root/log/start.log" 2>&1 || fail "slurmd does not start: $(cat "$root/log/start.log")"
done
idle() { sinfo -h -N -p normal -t idle -o %N 2> /dev/null | sort -u | wc -l; }
for _ in $(seq 100); do [ "$(idle)" = "$NODES" ] && break; sleep 0.1; done
[ "$(idle)" = "$NODES" ] || fail "the nodes do not come up: $(sinfo -N 2>&1), see $root/log"
echo "export SLURM_CONF=$SLURM_CONF"
