#!/usr/bin/env bash
# A real Ray cluster of N nodes on this machine: a raylet for each node, token authentication on.
#
#   cluster/local.sh N [--cpus C]    start N nodes of C CPUs (1); what to export is printed
#   cluster/local.sh kill-node K     kill worker node K (1 to N-1) and all that runs on it
#   cluster/local.sh stop            stop all that was started here, and nothing else
#
#   eval "$(cluster/local.sh 3)"     start one and use it in this shell
set -euo pipefail

readonly OBJECT_STORE_BYTES=200000000
state="${XDG_STATE_HOME:-$HOME/.local/state}/avss_dist/cluster"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
bin="$here/../.venv/bin"
[[ -x "$bin/ray" ]] || bin="$(dirname "$(command -v ray || echo /ray)")"

fail() {
    printf 'Error: %s\n' "$1" >&2
    exit 2
}

usage() {
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

# Processes carry the mark of their cluster and node in their environment, whoever their parent is by now.
members() { # [NODE]
    local mark="AVSS_LOCAL_CLUSTER=$state"
    [[ $# -eq 0 ]] || mark="AVSS_LOCAL_NODE=$state:$1"
    { grep -lzsxF "$mark" /proc/[0-9]*/environ || true; } | cut -d/ -f3
}

kill_members() { # [NODE]
    local processes
    while processes="$(members "$@")" && [[ -n "$processes" ]]; do
        # shellcheck disable=SC2086  # one argument for each process
        kill -KILL $processes 2>/dev/null || true
        sleep 0.1
    done
}

free_ports() { # COUNT
    "$bin/python3" - "$1" <<'PYTHON'
import contextlib, random, socket, sys
free = []  # between the ports of Ray's workers and those of outgoing connections, which may take one at any time
for port in random.sample(range(20_000, 32_768), 1_000):
    with contextlib.suppress(OSError):
        socket.create_server(("", port)).close()
        free.append(port)
print(*free[: int(sys.argv[1])])
PYTHON
}

start_node() { # NODE CPUS ARGUMENT...
    local node="$1" cpus="$2" log="$state/node-$1.log"
    shift 2
    # Ray takes 127.0.0.1 for "the address that others see", so each node has a loopback address of its own. Its workers
    # would be at niceness 15, and wait for whatever else computes on this machine. A job that is stopped would be killed
    # after 3 s.
    AVSS_LOCAL_CLUSTER="$state" AVSS_LOCAL_NODE="$state:$node" SPT_NOENV=1 RAY_USAGE_STATS_ENABLED=0 \
        RAY_worker_niceness="${RAY_worker_niceness:-0}" RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-60}" \
        "$bin/ray" start "$@" --node-ip-address "127.0.0.$((node + 2))" --num-cpus "$cpus" \
        --object-store-memory "$OBJECT_STORE_BYTES" --temp-dir "$(cat "$state/temp")/$node" \
        --dashboard-agent-listen-port 0 \
        </dev/null >"$log" 2>&1 && return
    tail -n 20 "$log" >&2
    return 1
}

start() { # COUNT CPUS
    local nodes="$1" cpus="$2" node port jobs client starting=()
    if [[ -n "$(members)" ]]; then
        [[ "$(cat "$state/shape")" == "$nodes $cpus" ]] || fail "a cluster of another shape runs: cluster/local.sh stop"
        echo "It runs already." >&2
        cat "$state/exports"
        return
    fi
    stop
    mkdir -p "$state"
    chmod 700 "$state" # the token is in it
    echo "$nodes $cpus" >"$state/shape"
    mktemp -d /tmp/avss-XXXXXX >"$state/temp" # short: Ray puts sockets there
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$state/token}"
    if [[ ! -s "$RAY_AUTH_TOKEN_PATH" ]]; then
        # In a shell of its own: what jobs write has the rights that the caller's umask leaves.
        (
            umask 077
            "$bin/python3" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH"
        )
    fi
    unset RAY_ADDRESS RAY_AUTH_TOKEN
    export PATH="$bin:$PATH" # a submitted job finds avss there
    read -r port jobs client <<<"$(free_ports 3)"
    trap 'stop; fail "the cluster did not start"' ERR
    start_node 0 "$cpus" --head --port "$port" --ray-client-server-port "$client" \
        --include-dashboard true --dashboard-host 127.0.0.1 --dashboard-port "$jobs"
    for ((node = 1; node < nodes; node++)); do
        start_node "$node" "$cpus" --address "127.0.0.2:$port" &
        starting+=($!)
    done
    for node in "${starting[@]}"; do wait "$node"; done
    trap - ERR
    cat >"$state/exports" <<EXPORTS
export RAY_ADDRESS='127.0.0.2:$port'
export RAY_API_SERVER_ADDRESS='http://127.0.0.1:$jobs'
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH='$RAY_AUTH_TOKEN_PATH'
EXPORTS
    echo "$nodes nodes run; the job server and the dashboard are at http://127.0.0.1:$jobs" >&2
    cat "$state/exports"
}

stop() {
    kill_members
    [[ ! -s "$state/temp" ]] || rm -rf -- "$(cat "$state/temp")"
    rm -rf -- "$state"
}

kill_node() { # NODE
    [[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || fail "which worker node? They count from 1; node 0 is the head."
    [[ -n "$(members "$1")" ]] || fail "no node $1 runs"
    kill_members "$1"
}

case "${1:-}" in
    stop) stop ;;
    kill-node) kill_node "${2:-}" ;;
    [1-9]*)
        [[ "$1" =~ ^[0-9]+$ && "$1" -le 200 ]] || fail "the number of nodes is 1 to 200, not $1"
        cpus=1
        [[ $# -eq 1 ]] || { [[ $# -eq 3 && "$2" == --cpus && "$3" =~ ^[0-9]+$ ]] && cpus="$3"; } || fail "$(usage)"
        [[ -x "$bin/ray" ]] || fail "there is no ray: run pip install -e '${here%/*}[run]'"
        start "$1" "$cpus"
        ;;
    -h | --help) usage ;;
    *) fail "$(usage)" ;;
esac
