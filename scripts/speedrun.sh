#!/usr/bin/env bash
# From text to a chat on a machine with NVIDIA GPUs: scripts/chat.sh with GPT-2 124M, FineWeb-Edu and SmolTalk.
#
#   scripts/speedrun.sh [FOLDER]     FOLDER (speedrun) is made; run it again there to go on after a stop
#
# Its commands are tested for their settings, but it has not run on GPUs yet. With eight H100 GPUs, pretraining on 10
# billion tokens should take about 40 minutes. It needs 60 GB of disk and pip install -e '.[gpu,data,serve]'.
set -euo pipefail
scripts=$(cd "$(dirname "$0")" && pwd)
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
mkdir -p "${1:-speedrun}" && cd "${1:-speedrun}"

# text and tokenizer: GPT-2's, with which these shards were made
[ -e data/fineweb-edu ] || daybreak prepare fineweb-edu-100B --pretokenized 100 --name fineweb-edu

# pretraining; a second call resumes it
torchrun --standalone --nproc-per-node "$gpus" --max-restarts 3 -m daybreak \
    train gpt2-124M --data fineweb-edu --name base --parallel.zero 1

# dialogues, and the template that writes them as text
[ -e base-hf ] || daybreak export runs/base --to hf base-hf
python3 "$scripts/dialogues.py" template base-hf
[ -e data/dialogues ] || daybreak prepare hf:HuggingFaceTB/smol-smoltalk --as chat --name dialogues \
    --tokenizer base-hf/tokenizer.json --row-tokens 1024 --val-fraction 0.005

# finetuning
torchrun --standalone --nproc-per-node "$gpus" --max-restarts 3 -m daybreak \
    finetune base-hf --data dialogues --method full --name chat --parallel.zero 1 \
    --optim.lr 2e-4 --epochs 2 --batch.total_tokens 262144

# talking
daybreak chat runs/chat
