# Redis and Valkey on loopback: a cluster of six, a master with two replicas and three sentinels, or one server.
#
# Owns: their configuration and how they are joined. Sourced by `up` and `status`.
# shellcheck shell=bash

# A master counts as dead after this long, in milliseconds (cluster-node-timeout, down-after-milliseconds).
REDIS_DEAD_MS=${REDIS_DEAD_MS:-1000}

# How long a server may take to answer, and a group of them to agree, in seconds.
REDIS_READY_S=30

# The name under which the sentinels know the master.
SENTINEL_MASTER=ringmain

# What every data server has: what it acknowledged survives kill -9, not a power cut.
REDIS_DATA='save ""
appendonly yes
auto-aof-rewrite-percentage 0
repl-diskless-sync yes
repl-diskless-sync-delay 0'

redis_binary() {
  local binary=${SERVER:-redis-server} package=redis
  [ "${VALKEY:-}" != 1 ] || { binary=$BROKERS/valkey-server package=valkey; }
  have "$binary" || die "$binary is missing" "deploy/local/install $package"
  have redis-cli || die 'redis-cli is missing' 'deploy/local/install redis'
  echo "$binary"
}

# redis_says PORT ANSWER COMMAND...: the first line of the answer is this.
redis_says() { [ "$(redis-cli -p "$1" "${@:3}" 2> /dev/null | tr -d '\r' | head -1)" = "$2" ]; }
redis_info() { timeout 5 redis-cli -p "$1" info "$2" 2> /dev/null | tr -d '\r'; }

# redis_start NAME KIND PORT CONFIG ARGS...: one server.
redis_start() {
  local name=$1 kind=$2 port=$3 config=$4 at binary
  shift 4
  binary=$(redis_binary)
  at=$(prepare "$name" "$kind" "$port")
  mkdir -p "$at/data"
  # A sentinel keeps what it learns in this file: it is written once.
  cat > "$at/conf" << EOF
bind 127.0.0.1
protected-mode no
port $port
dir $at/data
$config
EOF
  command_of "$name" -- "$binary" "$at/conf" "$@"
  launch "$name"
}

redis_single() {
  local port
  port=$(free_ports 1)
  redis_start redis-1 redis "$port" "$REDIS_DATA"
  ready redis-1 "$REDIS_READY_S" redis_says "$port" PONG ping || return 1
  doors_plain redis "$port"
  echo "redis://127.0.0.1:$port"
}

# redis_doors PORTS...: their doors, into `seen`: the ports under which servers are known to nodes and to each other.
# Servers name each other to clients, so a door is a server's and not a node's: cutting it is cutting the server off
# from all nodes and from its replica. Without doors it is the ports themselves.
redis_doors() {
  local i=0 port
  seen=("$@")
  [ "$DOORS" -gt 0 ] || return 0
  for port in "$@"; do
    seen[i]=$(door "redis-$((i + 1))" "$port")
    i=$((i + 1))
  done
  doors_start
}

redis_cluster() {
  local ports seen i urls=''
  read -ra ports <<< "$(free_ports 12)"
  redis_doors "${ports[@]:0:6}" || return 1
  for i in {0..5}; do
    redis_start "redis-$((i + 1))" redis-cluster "${ports[i]}" "$REDIS_DATA
cluster-enabled yes
cluster-port ${ports[i + 6]}
cluster-announce-ip 127.0.0.1
cluster-announce-port ${seen[i]}
cluster-announce-bus-port ${ports[i + 6]}
cluster-config-file nodes.conf
cluster-node-timeout $REDIS_DEAD_MS
cluster-require-full-coverage no
cluster-allow-pubsubshard-when-down yes
cluster-replica-validity-factor 0"
  done
  for i in {0..5}; do
    ready "redis-$((i + 1))" "$REDIS_READY_S" redis_says "${ports[i]}" PONG ping || return 1
    urls+=${urls:+,}127.0.0.1:${seen[i]}
  done
  redis_join "${ports[@]}" || return 1
  echo "redis+cluster://$urls"
}

# redis_join PORTS: three masters share the slots, each of the other three follows one.
redis_join() {
  local ports=("$@") i ids=() first=(0 5461 10923) last=(5460 10922 16383)
  for i in {0..5}; do
    ids+=("$(redis-cli -p "${ports[i]}" cluster myid | tr -d '\r')")
    redis-cli -p "${ports[i]}" cluster set-config-epoch $((i + 1)) > /dev/null
    [ "$i" -ge 3 ] || redis-cli -p "${ports[i]}" cluster addslotsrange "${first[i]}" "${last[i]}" > /dev/null
  done
  for i in {1..5}; do
    redis-cli -p "${ports[0]}" cluster meet 127.0.0.1 "${ports[i]}" "${ports[i + 6]}" > /dev/null
  done
  for i in {0..5}; do
    ready "redis-$((i + 1))" "$REDIS_READY_S" redis_knows "${ports[i]}" 6 || return 1
  done
  for i in {3..5}; do
    ready "redis-$((i + 1))" "$REDIS_READY_S" redis_says "${ports[i]}" OK cluster replicate "${ids[i - 3]}" || return 1
  done
  for i in {0..5}; do
    ready "redis-$((i + 1))" "$REDIS_READY_S" redis_whole "${ports[i]}" || return 1
  done
}

redis_knows() { [ "$(redis-cli -p "$1" cluster nodes | grep -cv handshake)" = "$2" ]; }

# redis_whole PORT: the cluster is whole as this server sees it, and a replica has what its master has.
redis_whole() {
  redis-cli -p "$1" cluster info | grep -q '^cluster_state:ok' || return 1
  [ "$(redis-cli -p "$1" cluster nodes | grep -cE '[ ,]slave ')" = 3 ] || return 1
  redis_info "$1" replication | grep -qE '^(role:master|master_link_status:up)'
}

redis_sentinel() {
  local ports seen i urls=''
  read -ra ports <<< "$(free_ports 6)"
  redis_doors "${ports[@]:0:3}" || return 1
  redis_start redis-1 redis "${ports[0]}" "$REDIS_DATA
replica-announce-ip 127.0.0.1
replica-announce-port ${seen[0]}"
  ready redis-1 "$REDIS_READY_S" redis_says "${ports[0]}" PONG ping || return 1
  for i in 1 2; do
    redis_start "redis-$((i + 1))" redis "${ports[i]}" "$REDIS_DATA
replica-announce-ip 127.0.0.1
replica-announce-port ${seen[i]}
replicaof 127.0.0.1 ${seen[0]}"
  done
  for i in 1 2; do
    ready "redis-$((i + 1))" "$REDIS_READY_S" redis_follows "${ports[i]}" || return 1
  done
  for i in 1 2 3; do
    redis_start "sentinel-$i" sentinel "${ports[i + 2]}" "sentinel monitor $SENTINEL_MASTER 127.0.0.1 ${seen[0]} 2
sentinel down-after-milliseconds $SENTINEL_MASTER $REDIS_DEAD_MS
sentinel failover-timeout $SENTINEL_MASTER 5000" --sentinel
    urls+=${urls:+,}127.0.0.1:${ports[i + 2]}
  done
  for i in 1 2 3; do
    ready "sentinel-$i" "$REDIS_READY_S" sentinel_whole "${ports[i + 2]}" || return 1
  done
  echo "redis+sentinel://$urls/$SENTINEL_MASTER"
}

redis_follows() { redis_info "$1" replication | grep -q '^master_link_status:up'; }

# sentinel_whole PORT: it knows two more sentinels and two replicas.
sentinel_whole() {
  local line
  line=$(redis-cli -p "$1" info sentinel | grep "name=$SENTINEL_MASTER")
  [[ $line == *status=ok* && $line == *slaves=2* && $line == *sentinels=3* ]]
}

# redis_health KIND PORT: a few words.
redis_health() {
  local role
  if [ "$1" = sentinel ]; then
    redis_info "$2" sentinel | sed -n 's/.*status=\([^,]*\),address=[^:]*:\([0-9]*\),.*/\1, master is \2/p' |
      grep . || echo 'no answer'
    return
  fi
  role=$(redis_info "$2" replication | sed -n 's/^role://p')
  [ -n "$role" ] || { echo 'no answer'; return; }
  [ "$role" = master ] || { echo "replica of $(redis_info "$2" replication | sed -n 's/^master_port://p')"; return; }
  [ "$1" = redis ] || role="master, cluster $(redis-cli -p "$2" cluster info | tr -d '\r' | sed -n 's/^cluster_state://p')"
  echo "$role"
}
