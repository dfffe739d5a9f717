# shellcheck shell=bash
# shellcheck disable=SC2154  # dry_run, stage, stop_stage, python and train_run are pam.sh's
# Sourced by pam.sh: how a stage is announced, what it needs, and how its commands are run or, in a dry run, printed.

fail() {
    printf 'error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf '%s\n' "${@:2}" >&2
    exit 1
}
run() {
    # Run a command, or print it in a dry run.
    if [ "${dry_run}" = true ]; then
        printf '    '
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}
module() { run "${python}" -m "pam_espnet.bin.$1" "${@:2}"; }

begin() {
    # begin N NAME READS WRITES
    stage_name="stage $1 ($2)"
    echo "== ${stage_name}: reads $3; writes $4"
    stage_start=${SECONDS}
}
end() {
    [ "${dry_run}" = true ] || echo "== ${stage_name}: done in $((SECONDS - stage_start)) s; next: $1"
}
needs() {
    # needs PATH STAGES: PATH is made by an earlier stage
    [ "${dry_run}" = true ] || [ -e "$1" ] || fail "${stage_name}: there is no $1" "  -> first the same command with $2"
}
wants() { ((stage <= $1 && $1 <= stop_stage)); }

background() {
    # background FOLLOWED LOGS COMMAND...: run COMMAND; meanwhile show the file FOLLOWED, in which it draws its bar.
    # Ctrl-C or a kill of this script ends COMMAND and its children (it is started in a separate process group).
    local followed=$1 logs=$2 pid status=0
    shift 2
    if [ "${dry_run}" = true ]; then
        run "$@"
        return
    fi
    mkdir -p "$(dirname "${followed}")"
    : >"${followed}"
    set -m
    "$@" &
    pid=$!
    set +m
    # shellcheck disable=SC2064  # the process of now, not of later
    trap "kill -TERM -- -${pid} 2>/dev/null || true; wait; exit 130" INT TERM HUP
    tail -n +1 -s 0.5 -f --pid="${pid}" "${followed}" 2>/dev/null &
    wait "${pid}" || status=$?
    trap - INT TERM HUP
    wait
    ((status == 0)) || fail "${stage_name} failed (status ${status}); logs: ${logs}" \
        "  -> run the same command again to continue where it stopped"
}
job() {
    # job FOLLOWED GPUS NODES LOG MODULE ARGUMENTS...: run a module in the background as a job with its log
    local nodes=()
    (($3 == 1)) || nodes=(--num-nodes "$3")
    background "$1" "$4" "${train_run[@]}" --gpu "$2" "${nodes[@]}" "$4" "${python}" -m "pam_espnet.bin.$5" "${@:6}"
}
