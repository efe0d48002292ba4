#!/bin/bash
# Stop what tests/slurm/up.sh started, by process id: jobs first, then the daemons.
root=${SLURM_TEST_ROOT:-/tmp/slurm-test}
stop() {
  local file=$1 pid
  pid=$(cat "$file" 2> /dev/null) && kill "$pid" 2> /dev/null || return
  for _ in $(seq 100); do kill -0 "$pid" 2> /dev/null || break; sleep 0.1; done
  kill -9 "$pid" 2> /dev/null
}
if [ -e "$root/run/slurmctld.pid" ]; then
  export SLURM_CONF=$root/etc/slurm.conf
  for job in $(squeue -h -o %A 2> /dev/null); do scancel "$job"; done
  for _ in $(seq 150); do [ -z "$(squeue -h 2> /dev/null)" ] && break; sleep 0.1; done
fi
for file in "$root"/run/slurmd.*.pid "$root/run/slurmctld.pid" "$root/run/munged.pid"; do
  [ -e "$file" ] && stop "$file" && rm -f "$file"
done
exit 0
