# Shared by the scripts of deploy/local: where things are, how they speak. Sourced, never run.
#
# Owns: paths, messages, free ports. Must not know: any one broker.

set -euo pipefail

# Where Debian puts servers, for users whose PATH lacks it.
PATH=$PATH:/usr/sbin:/sbin

LOCAL=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ROOT=$(cd "$LOCAL/../.." && pwd)

# Binaries and jars that `install` fetched, whatever CARGO_TARGET_DIR says.
BROKERS=${RINGMAIN_BROKERS:-$ROOT/target/brokers}

KAFKA_VERSION=4.3.1

say() { printf '%s\n' "$*"; }
step() { printf '  %s\n' "$*"; }
warn() { printf '%s\n' "$*" >&2; }

# die MESSAGE [WHAT-TO-DO]
die() {
  warn "error: $1"
  [ $# -lt 2 ] || warn "  try: $2"
  exit 1
}

# usage FILE: the comment at the top of a script is its help.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$1"; }

have() { command -v "$1" > /dev/null 2>&1; }
