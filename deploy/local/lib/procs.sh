# Processes that these scripts start: recorded in $STATE/procs/NAME, stopped by what is recorded there.
#
# Owns: the record of a process. Must not know: what the process is for.
#   kind  port    what it is, and the port it is asked on
#   run           a script that becomes the process (to start it again, as tests do)
#   pid           "PID START": START is the kernel's start time, so that another process of that number is not ours
#   log           what it said
# shellcheck shell=bash disable=SC2153

# How long a process may take to end before it is killed, in seconds.
STOP_S=15

record() { printf '%s' "$STATE/procs/$1"; }

# names: all recorded processes, in the order of their start.
names() {
  [ ! -e "$STATE/order" ] || while read -r name; do [ ! -d "$(record "$name")" ] || echo "$name"; done < "$STATE/order"
}

kind_of() { cat "$(record "$1")/kind"; }
port_of() { cat "$(record "$1")/port"; }

# start_time PID: of the process, in the kernel's ticks; nothing where there is none.
start_time() {
  local stat
  stat=$(cat "/proc/$1/stat" 2> /dev/null) || return 0
  stat=${stat##*) }
  cut -d' ' -f20 <<< "$stat"
}

# pid_of NAME: the number, if the process recorded under that name still lives and is ours.
pid_of() {
  local pid began state
  read -r pid began 2> /dev/null < "$(record "$1")/pid" || return 1
  [ -n "$began" ] && [ "$(start_time "$pid")" = "$began" ] || return 1
  state=$(sed 's/.*) //' "/proc/$pid/stat" 2> /dev/null | cut -c1) || return 1
  [ "$state" != Z ] && [ -n "$state" ] && echo "$pid"
}

# prepare NAME KIND PORT: its directory, which it prints.
prepare() {
  local at
  at=$(record "$1")
  mkdir -p "$at"
  echo "$2" > "$at/kind"
  echo "$3" > "$at/port"
  grep -qx "$1" "$STATE/order" 2> /dev/null || echo "$1" >> "$STATE/order"
  echo "$at"
}

# command_of NAME [SETUP] -- COMMAND...: writes down how it is run.
command_of() {
  local at setup=''
  at=$(record "$1")
  shift
  [ "$1" = -- ] || { setup=$1; shift; }
  shift
  {
    echo '#!/usr/bin/env bash'
    printf 'cd %q || exit 1\n' "$at"
    [ -z "$setup" ] || printf '%s || exit 1\n' "$setup"
    echo "exec$(printf ' %q' "$@")"
  } > "$at/run"
}

# launch NAME: starts what command_of wrote down, apart from this terminal.
launch() {
  local at pid
  at=$(record "$1")
  setsid bash "$at/run" >> "$at/log" 2>&1 < /dev/null &
  pid=$!
  disown "$pid"
  echo "$pid $(start_time "$pid")" > "$at/pid"
}

# ready NAME SECONDS COMMAND...: waits until the command succeeds, or says why that will not be.
ready() {
  local name=$1 end=$((SECONDS + $2))
  shift 2
  until "$@" > /dev/null 2>&1; do
    pid_of "$name" > /dev/null || { failed "$name" 'it ended'; return 1; }
    [ "$SECONDS" -lt "$end" ] || { failed "$name" 'it is not ready in time'; return 1; }
    sleep 0.1
  done
}

# failed NAME WHY: shows the end of its log.
failed() {
  say "$1: $2. The end of $(record "$1")/log:"
  tail -n "$TAIL_LINES" "$(record "$1")/log" 2> /dev/null | sed 's/^/    /' >&2
}

# halt NAME [SIGNAL]: SIGTERM (and SIGCONT, should it be stopped), SIGKILL when that does not help.
halt() {
  local pid
  pid=$(pid_of "$1") || return 0
  kill "-${2:-TERM}" "$pid" 2> /dev/null || true
  kill -CONT "$pid" 2> /dev/null || true
  await "$STOP_S" ended "$1" || kill -KILL "$pid" 2> /dev/null || true
  await 5 ended "$1"
}

ended() { ! pid_of "$1"; }
