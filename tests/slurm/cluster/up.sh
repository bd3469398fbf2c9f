#!/bin/bash
# up.sh DIR: start a Slurm cluster whose every file is under DIR; then `. DIR/env.sh`.
# Needs root and the Debian packages slurm-wlm and munge; with DBD=1 also slurmdbd,
# slurm-wlm-mysql-plugin and mariadb-server. Nothing under /etc is read or changed.
#   NODES=2 CPUS=8 MEM=8000 GPUS=4   what each node claims to have
#   NS=1    1: nodes n1, n2, ... have their own hostname, /etc/hosts and process ids
#           2: and their own network, on a bridge, which can be unplugged or slowed down
#   DBD=0   1: with accounting (sacct, sacctmgr); ENFORCE=associations,limits,qos enforces it
set -Eeuo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
DIR=$(cd "$1" && pwd)
NODES=${NODES:-2} CPUS=${CPUS:-8} MEM=${MEM:-8000} GPUS=${GPUS:-4} NS=${NS:-1} DBD=${DBD:-0}
cd "$DIR"
mkdir -p etc run log state spool dev
chmod 755 . run
chmod 700 state

# ---- which ports and addresses: forty ports and a bridge of its own, that nobody uses ----
block=$(($(cksum <<<"$DIR" | cut -d' ' -f1) % 250))
taken() {
  (: <"/dev/tcp/127.0.0.1/$((20000 + block * 40))") 2>/dev/null || [ -e "/sys/class/net/slbr$block" ]
}
while taken; do block=$(((block + 1) % 250)); done
port=$((20000 + block * 40)) bridge=slbr$block net=10.231.$block
controller=$(hostname -s)
if [ "$NS" = 2 ]; then controller_address=$net.254; else controller_address=127.0.0.1; fi
address() { if [ "$NS" = 2 ]; then echo "$net.$1"; else echo "127.0.1.$1"; fi; }
cat >env.sh <<END
export SLURM_CONF=$DIR/etc/slurm.conf
LAB_NS=$NS LAB_NODES=$NODES LAB_BRIDGE=$bridge LAB_NET=$net
END
# shellcheck source=/dev/null
. ./env.sh

# ---- configuration ----
fill() {
  sed -e "s|@DIR@|$DIR|g;s|@PORT@|$port|g;s|@DBDPORT@|$((port + 1))|g;s|@SQLPORT@|$((port + 2))|g" \
    -e "s|@CTLHOST@|$controller|g;s|@CTLADDR@|$controller_address|g;s|@LASTGPU@|$((GPUS - 1))|g" "$here/$1"
}
partition() { echo "PartitionName=$1 Nodes=n[1-$NODES] MaxTime=INFINITE State=UP ${*:2}"; }
fill gres.conf >etc/gres.conf
# slurmd sets CUDA_VISIBLE_DEVICES for character devices only. Nothing drives those of memory with
# numbers of 200 and more: opening one is an error, and no more.
for i in $(seq 0 $((GPUS - 1))); do mknod "dev/gpu$i" c 1 $((200 + i)); done
{
  fill slurm.conf.tmpl
  for i in $(seq "$NODES"); do
    echo "NodeName=n$i NodeHostname=n$i NodeAddr=$(address "$i") Port=$((port + 10 + i))" \
      "CPUs=$CPUS RealMemory=$MEM Gres=gpu:a100:$GPUS,lscratch:500"
  done
  # Nodes of several clusters share /tmp, where jobs have folders by their number.
  echo "FirstJobId=$((port * 100))"
  partition a100 Default=YES DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE
  partition grace PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
  partition urgent PriorityTier=10 PreemptMode=OFF
  partition cpu PriorityTier=1 PreemptMode=OFF
  if [ "$DBD" = 1 ]; then
    echo "AccountingStorageType=accounting_storage/slurmdbd"
    echo "AccountingStorageHost=127.0.0.1"
    echo "AccountingStoragePort=$((port + 1))"
    echo "AccountingStoragePass=$DIR/run/munge.sock"
    echo "AccountingStorageTRES=gres/gpu"
    [ -z "${ENFORCE:-}" ] || echo "AccountingStorageEnforce=$ENFORCE"
  else
    echo "AccountingStorageType=accounting_storage/none"
  fi
} >etc/slurm.conf
{
  echo "127.0.0.1 localhost"
  echo "$controller_address $controller"
  for i in $(seq "$NODES"); do echo "$(address "$i") n$i"; done
} >etc/hosts # what the nodes see as /etc/hosts

# ---- daemons ----
trap 'echo "up.sh failed in line $LINENO; see $DIR/log" >&2; "$here/down.sh" "$DIR"' ERR
wait_for() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  until timeout 5 "${@:2}" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || { echo "gave up waiting for: ${*:2}" >&2 && return 1; }
    sleep .05
  done
}
(umask 077 && head -c 1024 /dev/urandom >etc/munge.key)
munged --socket="$DIR/run/munge.sock" --key-file="$DIR/etc/munge.key" --pid-file="$DIR/run/munged.pid" \
  --log-file="$DIR/log/munged.log" --seed-file="$DIR/run/munge.seed" --force 2>>log/munged.err

if [ "$DBD" = 1 ]; then
  (umask 077 && fill slurmdbd.conf >etc/slurmdbd.conf) # slurmdbd insists on 0600
  mariadb-install-db --no-defaults --user=root --datadir="$DIR/mysql" \
    --auth-root-authentication-method=normal --skip-test-db >log/mariadb-install.log 2>&1
  cat >etc/init.sql <<'END'
CREATE DATABASE slurm_acct_db;
CREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'slurm';
CREATE USER slurm@'localhost' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';
GRANT ALL ON slurm_acct_db.* TO slurm@'localhost';
END
  setsid mariadbd --no-defaults --user=root --datadir="$DIR/mysql" --socket="$DIR/run/mysql.sock" \
    --pid-file="$DIR/run/mariadbd.pid" --bind-address=127.0.0.1 --port=$((port + 2)) --skip-name-resolve \
    --init-file="$DIR/etc/init.sql" --innodb-buffer-pool-size=128M --innodb-lock-wait-timeout=900 \
    --innodb-flush-log-at-trx-commit=0 --skip-log-bin >log/mariadbd.log 2>&1 </dev/null &
  wait_for 20 mariadb --no-defaults -uslurm -pslurm -h127.0.0.1 -P$((port + 2)) slurm_acct_db -e 'select 1'
  slurmdbd
  wait_for 30 sacctmgr -n show cluster
  sacctmgr -i add cluster ci >/dev/null
  sacctmgr -i add account lab cluster=ci >/dev/null
  sacctmgr -i add user root account=lab >/dev/null
fi

if [ "$NS" = 2 ]; then
  ip link add "$bridge" type bridge
  ip addr add "$net.254/24" dev "$bridge"
  ip link set "$bridge" up
fi
slurmctld
for i in $(seq "$NODES"); do "$here/node.sh" "$DIR" start "n$i"; done
all_idle() { [ "$(timeout 5 sinfo -h -r -N -p a100 -t idle -o %N | wc -l)" = "$NODES" ]; }
export -f all_idle
export NODES
wait_for 20 bash -c all_idle
