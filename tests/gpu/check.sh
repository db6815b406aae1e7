#!/usr/bin/env bash
# Everything that only a GPU can show, in about ten minutes on one H100 with 16 cores.
#
#   bash tests/gpu/check.sh      from the root of a checkout; needs the packages of setup.cfg and pytest
#
# One line a check: PASS, FAIL, INFO (a number without a goal) or SKIP. Nothing stops at a failure. Logs and numbers go to
# $OUT (default: a temporary folder). The checks share BUDGET seconds (570): what no longer fits is skipped.
# CHECK_DEVICE=cpu rehearses the script at toy sizes on a machine without a GPU: one check at a time, limits times PATIENCE (4).
set -u
PY=${PY:-python3}
export CHECK_DEVICE=${CHECK_DEVICE:-cuda}
if [ "$CHECK_DEVICE" = cpu ]; then PATIENCE=${PATIENCE:-4}; export OMP_NUM_THREADS=1; else PATIENCE=1; fi
BUDGET=${BUDGET:-$((570 * PATIENCE))}
BEGAN=$(date +%s)
WORK=$(mktemp -d "${TMPDIR:-/tmp}/gpu-check.XXXXXX")
OUT=${OUT:-$WORK/out}
mkdir -p "$OUT" "$WORK/log" "$WORK/runs"
export WORK OUT PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TORCHINDUCTOR_CACHE_DIR=$WORK/inductor
export PYTHONPATH="$PWD:$PWD/tests"
[ -f run.py ] && [ -d engine ] || { echo "run me from the root of a checkout"; exit 2; }
left() { echo $((BUDGET - $(date +%s) + BEGAN)); }
say() { flock "$WORK/lock" printf '%-5s %-22s %s\n' "$1" "$2" "$3" | tee -a "$OUT/verdicts.txt"; }

# check NAME SECONDS [FLAG...]: runs checks.py NAME FLAG...; each line "VERDICT|status|detail" of its output is a verdict;
# without one, or after SECONDS, it has failed. A name may have a variant: run:eager is the check `run` for `eager`.
check() {
    local name=$1 limit=$(($2 * PATIENCE)) rest code line log; shift 2
    rest=$(left); log=$WORK/log/$name
    if [ "$rest" -lt 12 ]; then say SKIP "$name" "no time left"; return; fi
    [ "$limit" -gt "$rest" ] && limit=$rest
    timeout -k 5 "$limit" "$PY" tests/gpu/checks.py "$name" "$@" >"$log" 2>&1 </dev/null
    code=$?
    grep -a '^VERDICT|' "$log" | while IFS='|' read -r _ status detail; do say "$status" "$name" "$detail"; done
    if [ $code -ne 0 ] || ! grep -qa '^VERDICT|' "$log"; then
        line=$(grep -aE 'Error|assert' "$log" | tail -1 | cut -c1-200)
        [ $code -eq 124 ] && line="still running after $limit s; $line"
        say FAIL "$name" "exit $code: ${line:-see its log}"
    fi
}
# The same beside the checks that follow, up to `wait`.
beside() { check "$@" & [ "$CHECK_DEVICE" = cpu ] && wait; }

echo "commit $(git log -1 --format=%h 2>/dev/null), $BUDGET s, logs in $OUT"
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader

# Limits add up to BUDGET where checks beside one another count once. One: is it right? Nobody takes the time, so processes
# run side by side.
beside draw 40
check cuda_tests 60
wait
beside run:cpu32 90 --device cpu --precision fp32
beside run:graph 90 --device "$CHECK_DEVICE" --precision bf16
beside run:eager 90 --device "$CHECK_DEVICE" --precision bf16 --cuda-graph off
beside run:streaming 90 --device "$CHECK_DEVICE" --precision bf16 --mode streaming
beside run:gpu32 90 --device "$CHECK_DEVICE" --precision fp32
check demo 90
wait
check losses 10
beside signals 90
beside two_ranks 60
beside nccl 60
beside profile 80
beside fp32 60
check after_the_run 90
wait
check out_of_memory 25

# Two: is it fast? One at a time, the dearest last.
check bench:machine 20
check no_sync 40
check log_and_memory 35
check bench:epochs 40
check bench:recall 30
check bench:cold 50
check bench:towers 90

tar -C "$WORK" -czf "$OUT/logs.tgz" log
echo "---"
for status in PASS FAIL INFO SKIP; do printf '%s %s  ' "$(grep -c "^$status" "$OUT/verdicts.txt")" $status; done
echo "in $(($(date +%s) - BEGAN)) s"
grep '^FAIL' "$OUT/verdicts.txt"
[ "$OUT" = "$WORK/out" ] || rm -rf "$WORK"
! grep -q '^FAIL' "$OUT/verdicts.txt"
