#!/usr/bin/env bash
# From text to a chat: text, tokenizer, pretraining, finetuning, talking. On a laptop's CPU, in about ten minutes.
#
#   scripts/chat.sh [FOLDER]     FOLDER (chat) is made, and must be new; `make chat` installs what this needs
#
# The model is small, and knows a few answers well and no others. scripts/speedrun.sh is the same for GPUs.
set -euo pipefail
scripts=$(cd "$(dirname "$0")" && pwd)
folder=${1:-chat}
[ ! -e "$folder" ] || { echo "$folder exists already; give another folder, or remove it." >&2; exit 2; }
mkdir -p "$folder" && cd "$folder"

echo "== text and tokenizer: the Python standard library, in GPT-2's first 1,024 tokens"
daybreak prepare stdlib --tokenizer gpt2-1024

echo "== pretraining: a model that continues text"
daybreak train tiny --name base --quiet

echo "== dialogues, and the template that writes them as text"
daybreak export runs/base --to hf base-hf
python "$scripts/dialogues.py" write base-hf
daybreak prepare dialogues --tokenizer base-hf/tokenizer.json --name dialogues --row-tokens 128 --show 1

echo "== finetuning: a model that answers"
# Many more epochs would teach all answers by heart, and make the model too sure of wrong ones.
daybreak finetune base-hf --data dialogues --method full --name chat --quiet \
    --optim.lr 3e-3 --epochs 8 --batch.total_tokens 1024 --eval.every 100

echo "== talking"
python "$scripts/dialogues.py" check runs/chat
echo "Talk on: cd $folder && daybreak chat runs/chat"
