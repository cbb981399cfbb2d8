#!/bin/bash
# registry.sh start STORAGE PORT [STATE]   serves the directory STORAGE as a registry, over plain
#                                          HTTP on 127.0.0.1:PORT (0: a free one); returns when it answers
# registry.sh stop [STATE]
#
# The registry is Debian's docker-registry. STATE (default /run/hull-registry) gets its pid, port,
# config.yml and log. STORAGE may be read-only; pushing needs REGISTRY_WRITE=1.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/../host/lib.sh"

start() {
    local storage=$1 port=$2 state=$3 program
    ! running "$state" || die "already running, on port $(cat "$state/port")"
    program=$(PATH=$PATH:$TOOLS command -v docker-registry) || die "no docker-registry (tests/host/install.sh registry)"
    [ -d "$storage" ] || die "no directory $storage"
    if [ "$port" = 0 ]; then
        port=$((32000 + RANDOM % 700))
        while (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
    fi
    mkdir -p "$state"
    local read_only=true; [ -z "${REGISTRY_WRITE:-}" ] || read_only=false
    cat >"$state/config.yml" <<Y
version: 0.1
log: {level: warn, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: "$storage"}
  maintenance:
    uploadpurging: {enabled: false}
    readonly: {enabled: $read_only}
http: {addr: "127.0.0.1:$port"}
Y
    OTEL_TRACES_EXPORTER=none setsid "$program" serve "$state/config.yml" >"$state/log" 2>&1 </dev/null &
    echo $! >"$state/pid"
    echo "$port" >"$state/port"
    for _ in {1..200}; do
        if curl -fso /dev/null --noproxy '*' "http://127.0.0.1:$port/v2/"; then return 0; fi
        running "$state" || break
        sleep 0.1
    done
    tail -n 5 "$state/log" >&2
    die "the registry did not start"
}

# Is the process of that pid still ours? Its command line names its configuration.
running() {
    local pid
    pid=$(cat "$1/pid" 2>/dev/null) && { tr '\0' ' ' <"/proc/$pid/cmdline" | grep -qF "$1/config.yml"; } 2>/dev/null
}

stop() {
    local pid
    pid=$(cat "$1/pid" 2>/dev/null || true)
    if running "$1"; then
        kill "$pid"
        for _ in {1..100}; do running "$1" || break; sleep 0.05; done
    fi
    rm -f "$1/pid" "$1/port"
}

case ${1:-} in
    start) [ $# -ge 3 ] || die "start STORAGE PORT [STATE]"; start "$2" "$3" "${4:-/run/hull-registry}" ;;
    stop) stop "${2:-/run/hull-registry}" ;;
    *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 2 ;;
esac
