#!/usr/bin/env bash
# What only a CUDA GPU can show, in less than 8 minutes: bash benchmarks/gpu.sh [PYTHON]
# Tests marked gpu, training in mixed precision and with torch.compile, NCCL with one process, speed. Example data.
set -u
cd "$(dirname "$0")/.."
python=${1:-python3} failed=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

step() { # NAME COMMAND...: run it in what is left of the time, show the end of what it prints
    local name=$1 start=$SECONDS status
    shift
    timeout "$((SECONDS < 460 ? 470 - SECONDS : 10))" "$@" >"$work/log" 2>&1
    status=$?
    [ "$name $status" = "tests 5" ] && status=0 # no test is marked gpu
    tr '\r' '\n' <"$work/log" | tail -n 30
    echo "== $name: status $status after $((SECONDS - start)) s"
    [ $status = 0 ] || failed=1
}
train() { # NAME FLAGS...: an epoch of one fold
    step "train $1" "$python" train.py --name "$1" --data_dir "$work/data" --runs_dir "$work/runs" --weights none \
        --fold 0 --epochs 1 --batch_size 32 --device cuda "${@:2}"
}

step cuda "$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'
step tests "$python" -m pytest -q -m gpu
step preprocess "$python" preprocess.py --output_dir "$work/data"
train fp32 --model resnet
train bf16 --model chipnet --amp bf16
train fp16 --model fsg_vit --amp fp16 --clip_grad 1
train compiled --model resnet --amp bf16 --compile
step nccl "$python" -c 'import torch, torch.distributed as d
d.init_process_group("nccl", init_method="tcp://127.0.0.1:29513", rank=0, world_size=1)
x, parts = torch.ones(4, 4, device="cuda"), [None]
d.all_reduce(x); d.broadcast(x, 0); d.all_gather_object(parts, 7); d.broadcast_object_list(parts, 0); d.barrier()
torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4).cuda())(x).sum().backward()
d.destroy_process_group(); print(parts)'
step gates "$python" benchmarks/fsg_cost.py --device cuda --amp bf16 --batch_size 64
step speed "$python" benchmarks/speed.py --device cuda --quick
exit $failed
