# Ringmain nodes and the HAProxy in front of them.
#
# Owns: their configuration. Sourced by `up` and `status`.
# shellcheck shell=bash

# How long a node may take to be ready, its bus included, in seconds.
NODE_READY_S=60

# Secret of the tokens that the nodes take, for `ringmain token`. Known to all: for one's own machine only.
TOKEN_SECRET='local cluster: not a secret at all'
TICKET_KEY='local cluster: not a secret either, and long enough'

# ringmain_binary: LOCAL_BINARY, else what was built last, else it is built.
ringmain_binary() {
  local target=${CARGO_TARGET_DIR:-$ROOT/target} binary=${LOCAL_BINARY:-}
  # shellcheck disable=SC2012 # two known names, by time
  [ -n "$binary" ] || binary=$(ls -t "$target"/{release,debug}/ringmain 2> /dev/null | head -1)
  if [ -z "$binary" ]; then
    step 'building ringmain (cargo build --release -p ringmain)'
    (cd "$ROOT" && cargo build --quiet --release -p ringmain) >&2 || die 'it does not build'
    binary=$target/release/ringmain
  fi
  [ -x "$binary" ] || die "$binary is missing" 'cargo build --release -p ringmain'
  echo "$binary"
}

# cpus: those that this process may use, one a line.
cpus() {
  awk '/^Cpus_allowed_list/ { n = split($2, parts, ","); for (i = 1; i <= n; i++) { split(parts[i], ends, "-")
    for (cpu = ends[1]; cpu <= (ends[2] == "" ? ends[1] : ends[2]); cpu++) print cpu } }' /proc/self/status
}

# ringmain_nodes COUNT URL SHARDS FLAGS...: nodes of one shard are spread over the CPUs.
ringmain_nodes() {
  local count=$1 url=$2 shards=$3 binary i ports cpus spread
  shift 3
  mapfile -t cpus < <(cpus)
  binary=$(ringmain_binary)
  step "$binary"
  read -ra ports <<< "$(free_ports $((count * 4)))"
  for ((i = 1; i <= count; i++)); do
    spread=()
    [ "$shards" != 1 ] || spread=("--server.cpus=${cpus[(i - 1) % ${#cpus[@]}]}")
    ringmain_start "$i" "${ports[@]:(i - 1) * 4:4}" "$binary" --bus "$url" --shards "$shards" "${spread[@]}" "$@"
  done
  for ((i = 1; i <= count; i++)); do
    ready "node-$i" "$NODE_READY_S" node_ready "node-$i" || return 1
  done
}

# ringmain_start NUMBER PROXIED-PORT DIRECT-PORT ADMIN-PORT OWN-PORT BINARY FLAGS...
ringmain_start() {
  local number=$1 port=$2 direct=$3 admin=$4 own=$5 binary=$6 at
  shift 6
  at=$(prepare "node-$number" ringmain "$port")
  echo "$direct" > "$at/direct"
  echo "$admin" > "$at/admin"
  echo "$own" > "$at/own"
  cat > "$at/conf" << EOF
[server]
name = "node-$number"

[token]
hmac_secret = "$TOKEN_SECRET"

# Where the balancer leads to this node alone: what GET /v1/place?user=42 answers for users that belong here.
[cluster]
address = "ws://127.0.0.1:$own/connection/websocket"
ticket_key = "$TICKET_KEY"
EOF
  command_of "node-$number" -- "$binary" serve --demo --config "$at/conf" --admin "127.0.0.1:$admin" \
    --listen "127.0.0.1:$port proxy_protocol" --listen "127.0.0.1:$direct" "$@"
  launch "node-$number"
}

# node_answers NAME: the code of /ready.
node_answers() {
  curl -s -o /dev/null -m 5 -w '%{http_code}' "http://127.0.0.1:$(cat "$(record "$1")/admin")/ready" || true
}

node_ready() { [ "$(node_answers "$1")" = 200 ]; }

node_health() {
  case $(node_answers "$1") in
    200) echo ready ;;
    503) echo 'not ready' ;;
    *) echo 'no answer' ;;
  esac
}

# haproxy_start PORT: what each part is for stands in the file that it writes.
haproxy_start() {
  local port=$1 at name stats number
  have haproxy || die 'haproxy is missing' 'deploy/local/install haproxy'
  stats=$(free_ports 1)
  at=$(prepare haproxy haproxy "$port")
  echo "$stats" > "$at/stats"
  haproxy_config "$port" "$stats" > "$at/conf"
  command_of haproxy -- haproxy -db -f "$at/conf"
  launch haproxy
  ready haproxy 10 curl -fsS -m 5 "http://127.0.0.1:$stats/"
}

haproxy_config() {
  local name
  cat << EOF
global
  maxconn 4000

defaults
  mode tcp
  timeout connect 2s
  # A node that just died is not known to be dead yet: try another at once.
  retries 2
  option redispatch 1
  # A WebSocket is quiet between two pings (25 s); a dead peer is found by the node.
  timeout client 5m
  timeout server 5m

# The one address for clients. They go where the fewest are, and the node learns who they are from PROXY v2.
# A node whose bus is lost or that drains is red, and gets nobody new; those it has, it tells itself.
listen ringmain
  bind 127.0.0.1:$1
  balance leastconn
  option httpchk GET /ready
  default-server send-proxy-v2 check check-send-proxy inter 500ms fall 2 rise 1
$(for name in $(ringmain_names); do echo "  server $name 127.0.0.1:$(port_of "$name")"; done)

# And an address for each node alone: where users are placed.
$(for name in $(ringmain_names); do haproxy_own "$name"; done)

# Who is there, for people: http://127.0.0.1:$2/
listen stats
  mode http
  bind 127.0.0.1:$2
  stats enable
  stats uri /
  stats refresh 2s
EOF
}

# haproxy_own NAME
haproxy_own() {
  cat << EOF
listen $1
  bind 127.0.0.1:$(cat "$(record "$1")/own")
  server $1 127.0.0.1:$(port_of "$1") send-proxy-v2
EOF
}

ringmain_names() { names | grep '^node-' || true; }

# haproxy_health: how many nodes it sends clients to.
haproxy_health() {
  local table
  table=$(curl -fsS -m 5 "http://127.0.0.1:$(cat "$(record haproxy)/stats")/;csv" 2> /dev/null) || { echo 'no answer'; return; }
  awk -F, '$1 == "ringmain" && $2 ~ /^node-/ { all++; if ($18 ~ /^UP/) up++; open += $5 }
    END { printf "%d of %d nodes up, %d clients\n", up, all, open }' <<< "$table"
}
