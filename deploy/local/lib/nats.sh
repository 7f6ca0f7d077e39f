# NATS with JetStream on loopback: a cluster of three, or one server.
#
# Owns: its configuration. Sourced by `up` and `status`.
# shellcheck shell=bash

# How long a server may take to be healthy, JetStream's leader included, in seconds.
NATS_READY_S=60

# nats_binary: SERVER, else the newest that `install` fetched, else Debian's.
nats_binary() {
  local binary=${SERVER:-$BROKERS/nats-server}
  [ -n "${SERVER:-}" ] || [ -x "$binary" ] || binary=nats-server
  have "$binary" || die "$binary is missing" 'deploy/local/install nats'
  echo "$binary"
}

# nats_servers COUNT
nats_servers() {
  local count=$1 ports i at binary routes='' urls=''
  binary=$(nats_binary)
  read -ra ports <<< "$(free_ports $((count * 3)))"
  for ((i = 0; i < count; i++)); do routes+="${routes:+, }\"nats-route://127.0.0.1:${ports[count + i]}\""; done
  for ((i = 0; i < count; i++)); do
    at=$(prepare "nats-$((i + 1))" nats "${ports[i]}")
    echo "${ports[2 * count + i]}" > "$at/health"
    # Not advertised: clients know the addresses that they were given, and dial no others.
    cat > "$at/conf" << EOF
server_name: nats-$((i + 1))
listen: "127.0.0.1:${ports[i]}"
http: "127.0.0.1:${ports[2 * count + i]}"
jetstream { store_dir: "$at/data", max_mem: 64M, max_file: 1G }
EOF
    [ "$count" = 1 ] || cat >> "$at/conf" << EOF
cluster { name: ringmain, no_advertise: true, listen: "127.0.0.1:${ports[count + i]}", routes: [ $routes ] }
EOF
    command_of "nats-$((i + 1))" -- "$binary" -c "$at/conf"
    launch "nats-$((i + 1))"
    urls+=${urls:+,}127.0.0.1:${ports[i]}
  done
  for ((i = 1; i <= count; i++)); do
    ready "nats-$i" "$NATS_READY_S" nats_healthy "nats-$i" || return 1
  done
  [ "$count" = 1 ] || ready nats-1 "$NATS_READY_S" nats_led || return 1
  doors_plain nats "${ports[@]:0:count}"
  echo "nats://$urls"
}

nats_asks() { curl -fsS -m 5 "http://127.0.0.1:$(cat "$(record "$1")/health")/$2"; }
nats_healthy() { nats_asks "$1" healthz > /dev/null; }

# nats_led: JetStream's servers have a leader, so that streams can be made.
nats_led() { nats_asks nats-1 jsz | grep -q '"leader": *"nats-'; }

nats_health() {
  if nats_healthy "$1" 2> /dev/null; then echo healthy; else echo 'not healthy'; fi
}
