#!/usr/bin/env bash
# Acceptance of training on several GPUs of one machine, in one command: NCCL, DDP and FSDP2, a killed rank, a signal,
# resumes, equal directors. Prints ok or FAILED for each step; the exit status is 1 if any failed.
# usage: scripts/multi_gpu.sh [OUT] [--ranks N] [--cpu]
#   OUT       a new folder for runs, logs and summary.txt (default build/multi_gpu)
#   --ranks   GPUs, at least 2 (default: all of this machine)
#   --cpu     rehearse on gloo, with two ranks and small sizes
# PYTHON: the interpreter (default .venv/bin/python, else python3). Needs what `dex pretrain` needs, and no network.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
out="" ranks="" cpu=0
while [ $# -gt 0 ]; do
    case $1 in
        --ranks) ranks=${2:?--ranks: expected a number}; shift ;;
        --cpu) cpu=1 ;;
        -h | --help) sed -n '2,8p' "$0" | cut -c3-; exit 0 ;;
        -*) echo "multi_gpu: expected OUT, --ranks N or --cpu, got $1" >&2; exit 2 ;;
        *) out=$1 ;;
    esac
    shift
done
default=python3
[ -x .venv/bin/python ] && default=.venv/bin/python
python=$(command -v "${PYTHON:-$default}") || { echo "multi_gpu: no Python at ${PYTHON:-$default}" >&2; exit 2; }
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())') || exit 2
if [ $cpu = 1 ]; then
    ranks=${ranks:-2}
    export CUDA_VISIBLE_DEVICES=""
else
    ranks=${ranks:-$gpus}
    [ "$ranks" -le "$gpus" ] 2>/dev/null || { echo "multi_gpu: expected at most $gpus ranks, got $ranks; --cpu rehearses on gloo" >&2; exit 2; }
fi
[ "$ranks" -ge 2 ] 2>/dev/null || { echo "multi_gpu: expected at least 2 ranks, got $ranks; --cpu rehearses on gloo" >&2; exit 2; }
out=$(realpath -m "${out:-build/multi_gpu}")
[ ! -e "$out" ] || [ -z "$(ls -A "$out")" ] || { echo "multi_gpu: expected a new folder, got $out" >&2; exit 2; }
mkdir -p "$out"
export PYTHONPATH="$root:$root/python${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1

steps=12
fields=(--preset demo --steps $steps --data.batch-size $((4 * ranks)) --run.checkpoint-every 4 --run.evaluate-every 100
    --run.log-every 4 --run.evaluate-images 16 --run.precision fp32 --run.keep-checkpoints 9)
small=(--model.img-size 32 --model.patch-size 8 --model.embed-dim 32 --model.depth 2 --model.num-heads 2)
# Plain torch adds in no fixed order on a GPU: there a resumed run is near the other, on a CPU it has the same bits.
# Strategies add in another order: of biases that begin at 0 they differ by a percent of the largest (7.5e-3 on two ranks).
near=5e-2 same=5e-2
[ $cpu = 1 ] && fields+=("${small[@]}") same=0

failed=0
step() { # NAME LOG COMMAND...: run it, and say how it ended
    local name=$1 log=$out/$2.log began=$SECONDS state=ok
    shift 2
    "$@" >>"$log" 2>&1 || { state=FAILED; failed=1; }
    printf '%-6s %4d s  %s: %s\n' $state $((SECONDS - began)) "$name" "$(tail -n 1 "$log" | cut -c1-160)" | tee -a "$out/summary.txt"
}
launch() { "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" --signals-to-handle SIGTERM,SIGINT "$@"; }
train() { # RUN FIELD...
    local run=$1
    shift
    launch -m dex pretrain "${fields[@]}" --out "$out/$run" "$@"
}
check() { "$python" scripts/multi_gpu_ranks.py "$@"; }
whole() { train "$@" && check healthy "$out/$1" $steps; }
# Start RUN, wait for its first checkpoint, send SIGNAL to one of its ranks, wait for the end, which must not be success.
interrupted() { # RUN SIGNAL FIELD...
    local run=$1 signal=$2 launcher victim code
    shift 2
    train "$run" "$@" &
    launcher=$!
    for _ in $(seq 3000); do
        compgen -G "$out/$run/checkpoints/step-*" >/dev/null && break
        kill -0 $launcher 2>/dev/null || { echo "$run ended before its first checkpoint"; return 1; }
        sleep 0.1
    done
    victim=$(ps -o pid= --ppid "$(ps -o pid= --ppid $launcher | head -n 1 | grep . || echo $launcher)" | tail -n 1)
    [ -n "$victim" ] || victim=$(ps -o pid= --ppid $launcher | tail -n 1)
    kill -s "$signal" $victim || { echo "no rank to signal"; return 1; }
    wait $launcher
    code=$?
    [ $code -ne 0 ] || { echo "expected $run to end with an error after SIG$signal, got exit status 0"; return 1; }
    echo "ended with $code after SIG$signal"
}
resumed() { train "$1" --resume auto && check healthy "$out/$1" $steps && check compare "$out/$2" "$out/$1" $same; }

step "sums over ranks, directors equal" exchange launch scripts/multi_gpu_ranks.py exchange
step "DDP" ddp whole ddp
step "DDP again gives the same" ddp-again eval 'whole again && check compare "$out/ddp" "$out/again" $same'
step "FSDP2" fsdp whole fsdp --parallel.strategy fsdp
step "FSDP2 against DDP" fsdp check compare "$out/ddp" "$out/fsdp" $near
step "a rank killed by SIGKILL" killed interrupted killed KILL --run.stop-at $steps
step "and resumed" killed resumed killed ddp
step "a rank signalled by SIGTERM" signalled interrupted signalled TERM --parallel.strategy fsdp
step "and resumed as DDP" signalled eval 'train signalled --resume auto --parallel.strategy ddp && check healthy "$out/signalled" $steps && check compare "$out/fsdp" "$out/signalled" $near'
[ $failed = 0 ] && echo "all steps ok; logs and runs in $out" || echo "some steps FAILED; send summary.txt and the logs in $out" >&2
exit $failed
