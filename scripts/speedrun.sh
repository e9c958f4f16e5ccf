#!/usr/bin/env bash
# From text to a chat on a machine with NVIDIA GPUs: scripts/chat.sh with GPT-2 124M, FineWeb-Edu and SmolTalk.
#
#   scripts/speedrun.sh [FOLDER]     FOLDER (speedrun) is made; run it again there to resume after a stop
#
# It takes 1, 2, 4 or 8 GPUs of 80 GB. At small sizes it has run on one GPU and on CPUs, never at full size.
# `bench/gpu_smoke.sh speedrun` tries it on your machine.
# With eight H100 GPUs, pretraining on 10 billion tokens should take about 40 minutes. It needs 60 GB of disk and
# pip install -e '.[gpu,data,serve]'.
#
# These variables change it, for example to try it out in minutes with chats of your own:
#   export PRETRAIN='--tokens 50M' DIALOGUES=/home/me/chats.jsonl
#   FINETUNE='--epochs 8 --batch.B 2 --batch.total_tokens 16384' scripts/speedrun.sh
#   TEXT, DIALOGUES      the sources that `daybreak prepare` reads, and flags for it; file names begin with /
#   PRETRAIN, FINETUNE   more flags of `daybreak train` and `daybreak finetune`; the last of two equal flags counts
#   GPUS                 how many processes train, one on each GPU; all GPUs by default
# Data sets that are there already, in FOLDER/data/fineweb-edu and FOLDER/data/dialogues, are taken as they are. So
# without a network put shards of GPT-2's tokens into the first, and name a file of chats.
set -euo pipefail
scripts=$(cd "$(dirname "$0")" && pwd)
gpus=${GPUS:-$(python3 -c 'import torch; print(torch.cuda.device_count())')}
[ "$gpus" -gt 0 ] || { echo "torch finds no GPU here; scripts/chat.sh is for a CPU." >&2; exit 2; }
mkdir -p "${1:-speedrun}" && cd "${1:-speedrun}"

# learn NAME COMMAND...: on all GPUs, the command that begins the run NAME; a run that is there resumes instead
learn() {
  local name=$1
  shift
  [ ! -e "runs/$name/config.toml" ] || set -- train "runs/$name"
  torchrun --standalone --nproc-per-node "$gpus" --max-restarts 3 -m daybreak "$@"
}

echo "== text and tokenizer: GPT-2's, with which these shards were made"
[ -e data/fineweb-edu ] || daybreak prepare ${TEXT:-fineweb-edu-100B --pretokenized 100} --name fineweb-edu

echo "== pretraining: a model that continues text"
learn base train gpt2-124M --data data/fineweb-edu --name base --parallel.zero 1 --checkpoint.every 1000 \
    ${PRETRAIN:-}

echo "== dialogues, and the template that writes them as text"
[ -e base-hf ] || daybreak export runs/base --to hf base-hf
python3 "$scripts/dialogues.py" template base-hf
[ -e data/dialogues ] || daybreak prepare --as chat --name dialogues --tokenizer base-hf/tokenizer.json \
    --row-tokens 1024 --show 1 ${DIALOGUES:-hf:HuggingFaceTB/smol-smoltalk --val-fraction 0.005}

echo "== finetuning: a model that answers"
learn chat finetune base-hf --data dialogues --method full --name chat --parallel.zero 1 \
    --optim.lr 2e-4 --epochs 2 --batch.B 16 --batch.total_tokens 262144 ${FINETUNE:-}

echo "== talking"
daybreak chat runs/chat
