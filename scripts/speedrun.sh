#!/usr/bin/env bash
# From text to a chat on a machine with NVIDIA GPUs: scripts/chat.sh with GPT-2 124M, FineWeb-Edu and SmolTalk.
#
#   scripts/speedrun.sh [FOLDER]     FOLDER (speedrun) is made; run it again there to go on after a stop
#
# Its commands are tested on a CPU at small sizes, and it has not run on GPUs yet. It takes 1, 2, 4 or 8 GPUs of 80 GB.
# With eight H100 GPUs, pretraining on 10 billion tokens should take about 40 minutes. It needs 60 GB of disk and
# pip install -e '.[gpu,data,serve]'.
set -euo pipefail
scripts=$(cd "$(dirname "$0")" && pwd)
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 0 ] || { echo "torch finds no GPU here; scripts/chat.sh is for a CPU." >&2; exit 2; }
mkdir -p "${1:-speedrun}" && cd "${1:-speedrun}"

# learn NAME COMMAND...: on all GPUs, the command that begins the run NAME; a run that is there goes on instead
learn() {
  local name=$1
  shift
  [ ! -e "runs/$name/config.toml" ] || set -- train "runs/$name"
  torchrun --standalone --nproc-per-node "$gpus" --max-restarts 3 -m daybreak "$@"
}

echo "== text and tokenizer: GPT-2's, with which these shards were made"
[ -e data/fineweb-edu ] || daybreak prepare fineweb-edu-100B --pretokenized 100 --name fineweb-edu

echo "== pretraining: a model that continues text"
learn base train gpt2-124M --data fineweb-edu --name base --parallel.zero 1 --checkpoint.every 1000

echo "== dialogues, and the template that writes them as text"
[ -e base-hf ] || daybreak export runs/base --to hf base-hf
python3 "$scripts/dialogues.py" template base-hf
[ -e data/dialogues ] || daybreak prepare hf:HuggingFaceTB/smol-smoltalk --as chat --name dialogues \
    --tokenizer base-hf/tokenizer.json --row-tokens 1024 --val-fraction 0.005 --show 1

echo "== finetuning: a model that answers"
learn chat finetune base-hf --data dialogues --method full --name chat --parallel.zero 1 \
    --optim.lr 2e-4 --epochs 2 --batch.B 16 --batch.total_tokens 262144

echo "== talking"
daybreak chat runs/chat
