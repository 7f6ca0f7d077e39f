# Shared by the scripts of deploy/local: where things are, how they speak. Sourced, never run.
#
# Owns: paths, messages, help, free ports, bounded waits. Must not know: any one broker.
# shellcheck shell=bash disable=SC2034

set -euo pipefail

# Where Debian puts servers, for users whose PATH lacks it.
PATH=$PATH:/usr/sbin:/sbin

LOCAL=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ROOT=$(cd "$LOCAL/../.." && pwd)

# Binaries and jars that `install` fetched, whatever CARGO_TARGET_DIR says.
BROKERS=${LOCAL_BROKERS:-$ROOT/target/brokers}

# What runs, and everything it writes.
STATE=${LOCAL_STATE:-$ROOT/target/local}

KAFKA_VERSION=4.3.1

# Lines of a log that are shown when something fails.
TAIL_LINES=15

# Standard output belongs to what a caller may read (an address, a table); the story goes to standard error.
say() { printf '%s\n' "$*" >&2; }
step() { printf '  %s\n' "$*" >&2; }

# die MESSAGE [WHAT-TO-DO]
die() {
  printf 'error: %s\n' "$1" >&2
  [ $# -lt 2 ] || printf '  try: %s\n' "$2" >&2
  exit 1
}

# usage FILE: the comment at the top of a script is its help.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$1"; }

have() { command -v "$1" > /dev/null 2>&1; }

# A flag's value: `value FLAG "$@"` with what follows the flag.
value() {
  [ $# -ge 2 ] || die "$1 needs a value"
  printf '%s' "$2"
}

# free_ports COUNT: ports of loopback that nobody is bound to, below the range that outgoing connections take, each
# given once (they are kept in $STATE/ports, for who gets one binds it later).
free_ports() {
  python3 - "$1" "$STATE/ports" << 'PYTHON'
import random, socket, sys
held = []
with open(sys.argv[2], "a+") as file:
    file.seek(0)
    given = set(file.read().split())
for port in random.sample(range(10000, 32000), 4000):
    if str(port) in given:
        continue
    candidate = socket.socket()
    candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        candidate.bind(("127.0.0.1", port))
    except OSError:
        continue
    held.append(candidate)
    if len(held) == int(sys.argv[1]):
        ports = [str(socket.getsockname()[1]) for socket in held]
        with open(sys.argv[2], "a") as file:
            print(*ports, file=file)
        print(*ports)
        sys.exit()
sys.exit("no free ports")
PYTHON
}

# port_is_free PORT
port_is_free() {
  python3 -c "import socket as s; t = s.socket(); t.setsockopt(s.SOL_SOCKET, s.SO_REUSEADDR, 1); t.bind(('127.0.0.1', $1))" \
    2> /dev/null
}

# await SECONDS COMMAND...: until it succeeds; false when it never did. It looks ten times a second.
await() {
  local end=$((SECONDS + $1))
  shift
  until "$@" > /dev/null 2>&1; do
    [ "$SECONDS" -lt "$end" ] || return 1
    sleep 0.1
  done
}
