# Doors: ways to the brokers that can be cut: each node's own, or on Redis Cluster and Sentinel each server's. Only for
# tests.
#
# Owns: which door leads where ($STATE/doors/table), and each node's flags ($STATE/doors/N). Sourced by `up`.
# shellcheck shell=bash

DOORS=${DOORS:-0}
DOORS_READY_S=20

# door NAME TARGET-PORT: the port of a new door; NAME is what it is cut by.
door() {
  local port
  port=$(free_ports 1)
  mkdir -p "$STATE/doors"
  echo "$1 $port $2" >> "$STATE/doors/table"
  echo "$port"
}

# doors_url NODE SCHEME PORTS...: the bus's address through doors of this node.
doors_url() {
  local node=$1 scheme=$2 port urls=''
  shift 2
  for port in "$@"; do urls+=${urls:+,}127.0.0.1:$(door "$node" "$port"); done
  echo "$scheme://$urls"
}

# doors_plain SCHEME PORTS...: for a bus whose clients dial only what the address names.
doors_plain() {
  local node
  for ((node = 1; node <= DOORS; node++)); do
    printf '%s\n' --bus "$(doors_url "$node" "$@")" > "$STATE/doors/flags"
    mv "$STATE/doors/flags" "$STATE/doors/$node"
  done
}

# doors_start: after the last door is known.
doors_start() {
  local control
  [ "$DOORS" -gt 0 ] && [ ! -e "$(record doors)" ] || return 0
  have node || die 'node is missing' 'deploy/local/install client'
  control=$(free_ports 1)
  prepare doors doors "$control" > /dev/null
  command_of doors -- node "$LOCAL/lib/doors.mjs" "$control" "$STATE/doors/table"
  launch doors
  ready doors "$DOORS_READY_S" curl -fsS -m 5 "http://127.0.0.1:$control/"
}
