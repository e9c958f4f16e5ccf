#!/usr/bin/env bash
# Does daybreak work on this GPU machine? Runs every verb, both command lines and every documented GPU example, small.
#
#   bench/gpu_smoke.sh [SECTION ...]     all sections by default, 2 to 8 minutes each:
#       machine post verbs decoder families fp8 muon nanochat images finetune speedrun ranks fences
#
# It needs the packages of `pip install -e '.[gpu,dev]'`, but no network and no data: it trains on the Python standard
# library. PYTHON names the interpreter (python3).
# Each step prints one line, `ok NAME SECONDS` or `FAILED NAME` with the end of its output; each section ends with
# `SECTION: N of M ok`. The exit status is 0 when all are ok. SMOKE=cpu runs the same on a CPU with toy shapes, to try
# this script itself; RANKS=2 then gives the section ranks two processes. The steps and their outputs stay in the folder
# that the first line names.
set -u -o pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=$(command -v "${PYTHON:-python3}")
work=${SMOKE_FOLDER:-$(mktemp -d)}
export PYTHONPATH=$root:${PYTHONPATH:-} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHON ROOT=$root
mkdir -p "$work/bin" && cd "$work" || exit 2
printf '#!/bin/sh\nexec "%s" -m daybreak "$@"\n' "$PYTHON" >bin/daybreak
printf '#!/bin/sh\nexec "%s" -m torch.distributed.run "$@"\n' "$PYTHON" >bin/torchrun
printf '#!/bin/sh\nexec "%s" "$@"\n' "$PYTHON" >bin/python
chmod +x bin/*
export PATH=$work/bin:$PATH
checks="$PYTHON $root/bench/smoke_checks.py"
post="-c 0.1 -l 0.0006 -u 700 -v 250 -h 1 -y 1 -z 1" # what llm.c's two published commands share
if [ "${SMOKE:-gpu}" = cpu ]; then
  shape="d6 --model.L 2 --model.C 64 --model.NH 2 --batch.T 64 --batch.B 2"
  small="-b 2 -t 64 -d 256 -m 2 -r 1 -q 0.0 -n 5000 -s 20000 -e d6" large="" steps=4
  decoder="smollm-135M --model.L 2 --model.C 64 --model.NH 4 --model.NKV 2 --model.HS 16 --model.F 128 --batch.T 64 \
    --batch.B 2 --batch.total_tokens 256"
  nano="nanochat:d4 --model.L 2 --model.C 64 --model.NH 2 --model.window 17 --batch.T 64 --batch.B 2 \
    --batch.total_tokens 256"
  ranks=${RANKS:-1}
else
  shape="d12 --batch.B 8"
  small="-b 64 -t 1024 -d 524288 -r 1 -q 0.0 -n 5000 -s 20000 -e d12"
  large="-b 16 -t 1024 -d 1048576 -r 0 -k cosine -q 0.1 -n 2000 -s 300000 -g 384 -ge 1 -e d48" steps=16
  decoder="smollm-135M --batch.T 1024 --batch.B 8 --batch.total_tokens 32768"
  nano="nanochat:d4 --batch.T 1024 --batch.B 8 --batch.total_tokens 16384"
  ranks=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
fi
muon="--optim.name muon --optim.lr 0.008 --optim.muon_warmup 4 --optim.clip 0 --optim.muon_final_momentum 0.9 \
  --optim.muon_decay_schedule cosine --schedule.name wsd-linear --schedule.wsd_frac 0.35"
flags="--data text --eval.tokens 32768 --eval.sample_tokens 16"
passed=0 tried=0 failed=0

step() { # NAME COMMAND: run one step, print one line
  local name=$1 start=$SECONDS log
  log=$work/log-${1//[^a-zA-Z0-9]/-}
  tried=$((tried + 1))
  if timeout 400 bash -euo pipefail -c "$2" >"$log" 2>&1 </dev/null; then
    echo "ok $name $((SECONDS - start))" && passed=$((passed + 1))
  else
    echo "FAILED $name (exit $?, $((SECONDS - start)) s)" && tail -n 15 "$log" | sed 's/^/    /'
  fi
}

section() { # NAME: its steps, then its last line
  passed=0 tried=0
  echo "== $1"
  "section_$1"
  echo "$1: $passed of $tried ok"
  failed=$((failed + tried - passed))
}

data() { # the token shards and the HellaSwag file that the sections share
  [ -d data/text ] || step "prepare" "daybreak prepare stdlib --name text"
  [ -e dev/data/hellaswag/hellaswag_val.bin ] || step "make a HellaSwag file" "$checks hellaswag"
}

section_machine() {
  step "doctor" "daybreak doctor"
  step "doctor --check" "daybreak doctor --check"
}

section_post() {
  data
  local files="-i 'data/text/*train*.bin' -j 'data/text/*val*.bin'"
  step "llm.c's command, 124M" "python -m daybreak.llmc $files -o log124M $small $post -x $steps"
  step "its lines are there" "$checks llmc log124M $steps"
  step "the same again: nothing to do" "python -m daybreak.llmc $files -o log124M $small $post -x $steps"
  step "daybreak train gpt2-124M" "daybreak train gpt2-124M --data text --steps $steps --eval.tokens 65536 \
    --eval.hellaswag dev/data/hellaswag/hellaswag_val.bin $([ "${SMOKE:-gpu}" = cpu ] && echo --batch.B 1 \
    --batch.T 64 --batch.total_tokens 64)"
  [ -z "$large" ] && return
  step "llm.c's command, 1558M" "python -m daybreak.llmc $files -o log1558M $large $post -x 2 -m 1"
  step "its lines too" "$checks llmc log1558M 2"
  rm -rf log1558M # 34 GB
}

section_verbs() {
  data
  step "plan" "daybreak plan $shape --data text"
  step "train" "daybreak train $shape $flags --name a --steps 24 --checkpoint.every 8 --eval.every 12 \
    --eval.sample_every 12 --eval.hellaswag dev/data/hellaswag/hellaswag_val.bin --log.norms_every 8"
  step "train, killed" "daybreak train $shape $flags --name b --steps 24 --checkpoint.every 8 --eval.every 12 \
    --eval.sample_every 12 --eval.hellaswag dev/data/hellaswag/hellaswag_val.bin --log.norms_every 8 & $checks kill b 12 \$!"
  step "resume" "daybreak train runs/b"
  step "equal losses and weights after the kill" "$checks same a b"
  step "stop by a signal" "daybreak train $shape $flags --name c --steps 20000 & $checks stop c 6 \$!"
  step "sample" "daybreak sample runs/a --prompt 'def main' --tokens 32 -n 2"
  step "sample, top-p" "daybreak sample runs/a --prompt 'def main' --tokens 32 --top-p 0.9 --top-k 50"
  step "eval" "daybreak eval runs/a --hellaswag dev/data/hellaswag/hellaswag_val.bin"
  step "export to Hugging Face" "daybreak export runs/a --to hf a-hf"
  step "equal logits in transformers" "$checks logits a a-hf"
  step "export to GGUF" "daybreak export runs/a --to gguf a.gguf --dtype f16"
  step "export to llm.c" "daybreak export runs/a --to llmc a-llmc"
  step "import from Hugging Face" "daybreak import a-hf --name from-hf"
  step "import from llm.c, train on" "daybreak import a-llmc --name from-llmc && \
    daybreak train runs/from-llmc $flags --steps 27"
  step "init from" "daybreak train $shape $flags --name d --steps 2 --init-from a-hf"
  step "report" "daybreak report runs/a runs/b -o report.html && grep -q '</html>' report.html"
  step "watch" "daybreak watch runs/a --port 0 >watch.out 2>&1 & $checks answers watch.out \$!"
  step "serve" "daybreak serve runs/a --port 0 >serve.out 2>&1 & $checks client serve.out \$!"
  step "bench" "daybreak bench $shape --seconds 2"
  step "doctor of a run" "daybreak doctor runs/a"
}

section_decoder() { # Llama's family: from scratch, killed, scored, exported, imported, served
  data
  local few="--steps 12 --checkpoint.every 4"
  step "train a decoder" "daybreak train $decoder $flags --name e $few"
  step "killed" "daybreak train $decoder $flags --name g $few & $checks kill g 6 \$!"
  step "resume" "daybreak train runs/g"
  step "equal losses and weights after the kill" "$checks same e g"
  step "recompute 2" "daybreak train $decoder $flags --name e2 --steps 12 --batch.recompute 2"
  step "equal bits with recompute 2" "$checks same e e2"
  step "sample" "daybreak sample runs/e --prompt 'def main' --tokens 32 -n 2 --top-p 0.9"
  step "eval" "daybreak eval runs/e --hellaswag dev/data/hellaswag/hellaswag_val.bin --data text"
  step "export to Hugging Face" "daybreak export runs/e --to hf e-hf"
  step "equal logits in transformers" "$checks logits e e-hf"
  step "export to GGUF" "daybreak export runs/e --to gguf e.gguf --dtype f16"
  step "import, train on" "daybreak import e-hf --name from-e && daybreak train runs/from-e $flags --steps 2"
  step "serve" "daybreak serve runs/e --port 0 >serve-e.out 2>&1 & $checks client serve-e.out \$!"
}

section_families() { # one model of each kind, made by transformers
  data
  step "a tokenizer to share" "daybreak train $decoder $flags --name ids --steps 4 && daybreak export runs/ids --to hf ids-hf"
  for kind in llama mistral qwen2 qwen3 smollm3 gemma3_text; do
    step "import $kind made by transformers" "$checks made $kind ids-hf $kind-hf && daybreak import $kind-hf --name $kind"
    step "$kind: equal logits" "$checks logits $kind $kind-hf"
    step "$kind: train" "daybreak train d12 --init-from $kind-hf $flags --steps 2 --name $kind-2 --batch.B 2 \
      \$($checks shape $kind)"
    step "$kind: greedy text of transformers" "$checks greedy $kind $kind-hf"
  done
}

section_fp8() { # the blocks' matmuls in fp8, evaluation and text in bf16
  data
  local fp8="$flags --precision.compute fp8 --batch.recompute 2 --steps 12 --checkpoint.every 4 --eval.every 6"
  [ "${SMOKE:-gpu}" = cpu ] && fp8="${fp8/32768/512}" # evaluation is in bf16, which many CPUs are slow at
  step "train in fp8" "daybreak train $shape $fp8 --name f8"
  step "killed" "daybreak train $shape $fp8 --name k8 & $checks kill k8 6 \$!"
  step "resume" "daybreak train runs/k8"
  step "equal losses and weights after the kill" "$checks same f8 k8"
  step "the last third in bf16" "daybreak train $shape $fp8 --name u8 --precision.fp8_until 0.67"
  step "sample" "daybreak sample runs/f8 --prompt 'def main' --tokens 32"
  step "eval" "daybreak eval runs/f8 --data text"
  local wide="$decoder $flags --precision.compute fp8 --batch.recompute 2 --steps 12 --checkpoint.every 4"
  step "a decoder" "daybreak train $wide --name fd"
  step "a decoder, killed" "daybreak train $wide --name kd & $checks kill kd 6 \$!"
  step "a decoder, resumed" "daybreak train runs/kd"
  step "a decoder, equal losses and weights after the kill" "$checks same fd kd"
  step "a decoder, sample and export" "daybreak sample runs/fd --prompt 'def main' --tokens 32 && \
    daybreak export runs/fd --to hf fd-hf && daybreak import fd-hf --name from-fd"
}

section_finetune() { # adapters and in full: a run that starts from a model, and what becomes of it elsewhere
  data
  local lora="$flags --steps 12 --checkpoint.every 4 --eval.every 6"
  [ "${SMOKE:-gpu}" = cpu ] && lora="$lora --batch.T 64 --batch.B 2 --batch.total_tokens 256"
  step "a model" "daybreak train $decoder $flags --name base --steps 4"
  step "LoRA" "daybreak finetune runs/base $lora --name l"
  step "killed" "daybreak finetune runs/base $lora --name lk & $checks kill lk 6 \$!"
  step "resume" "daybreak train runs/lk"
  step "equal losses and weights after the kill" "$checks same l lk"
  step "recompute 2" "daybreak finetune runs/base $lora --batch.recompute 2 --name l2"
  step "equal bits with recompute 2" "$checks same l l2"
  step "sample" "daybreak sample runs/l --prompt 'def main' --tokens 32 -n 2"
  step "export, adapters merged" "daybreak export runs/l --to hf l-hf"
  step "equal logits in transformers" "$checks logits l l-hf"
  step "export to PEFT" "daybreak export runs/l --to peft l-peft"
  step "QLoRA" "daybreak finetune runs/base $lora --method qlora --name q"
  step "QLoRA, killed" "daybreak finetune runs/base $lora --method qlora --name qk & $checks kill qk 6 \$!"
  step "QLoRA, resumed" "daybreak train runs/qk"
  step "QLoRA, equal losses and weights after the kill" "$checks same q qk"
  step "QLoRA, export" "daybreak export runs/q --to hf q-hf && $checks logits q q-hf"
  step "a base in fp8" "daybreak finetune runs/base $lora --lora.base fp8 --name l8"
  step "a base in fp8, killed" "daybreak finetune runs/base $lora --lora.base fp8 --name l8k & \
    $checks kill l8k 6 \$!"
  step "a base in fp8, resumed" "daybreak train runs/l8k"
  step "a base in fp8, equal losses and weights after the kill" "$checks same l8 l8k"
  step "a base in fp8, recompute 2" "daybreak finetune runs/base $lora --lora.base fp8 \
    --batch.recompute 2 --name l82 && $checks same l8 l82"
  step "a base in fp8, export" "daybreak export runs/l8 --to hf l8-hf"
  step "in full" "daybreak finetune runs/l $lora --method full --name lf"
  local narrow="$lora --method full --precision.compute bf16 --precision.masters none --precision.moments bf16"
  step "in full, all in bf16" "daybreak finetune runs/l $narrow --name n"
  step "in full, all in bf16, killed" "daybreak finetune runs/l $narrow --name nk & $checks kill nk 6 \$!"
  step "in full, all in bf16, resumed" "daybreak train runs/nk"
  step "in full, all in bf16, equal after the kill" "$checks same n nk"
  step "GPT-2 with adapters" "daybreak train $shape $flags --name base2 --steps 2 && \
    daybreak finetune runs/base2 $lora --name l3"
  step "a model with a chat template" "daybreak export runs/base --to hf base-hf && $checks dialogues base-hf"
  step "chats in rows" "daybreak prepare dialogues.jsonl --tokenizer base-hf/tokenizer.json --row-tokens 128"
  step "finetune on chats" "daybreak finetune base-hf --data dialogues --method full --batch.B 4 --batch.total_tokens 512 \
    --optim.lr $([ "${SMOKE:-gpu}" = cpu ] && echo 1e-2 || echo 5e-4) --steps 80 --eval.tokens 2048 --name talk"
  step "chat: serve, OpenAI's client, a pipe" "daybreak serve runs/talk --port 0 >talk.out 2>&1 & $checks talk talk talk.out \$!"
}

section_speedrun() { # scripts/speedrun.sh on all GPUs, small: killed while it pretrains, run again, and asked
  data
  local how="--batch.B 8 --batch.total_tokens $((ranks * 8192)) --steps 60 --schedule.warmup 10" rate=3e-4 epochs=12
  [ "${SMOKE:-gpu}" = cpu ] && rate=1e-2 epochs=24 how="--model.L 2 --model.C 64 --model.NH 2 --batch.T 128 --batch.B 1 --steps 30 \
    --batch.total_tokens $((ranks * 128)) --precision.compute fp32"
  mkdir -p quick/data quick/made && ln -sfn "$work/data/text" quick/data/fineweb-edu
  step "its dialogues" "cd quick/made && $checks dialogues ."
  export GPUS=$ranks DIALOGUES="$work/quick/made/dialogues.jsonl --row-tokens 128"
  export PRETRAIN="$how --eval.tokens 2048 --eval.sample_tokens 8 --checkpoint.every 10 --log.display plain"
  export FINETUNE="--epochs $((ranks * epochs)) --optim.lr $rate --batch.B 4 --batch.total_tokens $((ranks * 512)) \
    --eval.tokens 2048 --checkpoint.every 20 --log.display plain"
  step "speedrun.sh, killed" "setsid bash $root/scripts/speedrun.sh quick & cd quick && $checks kill_all base 14 \$!"
  step "speedrun.sh, run again and asked" "$checks questions | bash $root/scripts/speedrun.sh quick >quick/said"
  step "its answers" "$checks asked quick/said"
  unset GPUS DIALOGUES PRETRAIN FINETUNE
}

section_muon() { # the blocks' matrices by Muon, the rest by AdamW
  data
  local run="$flags --optim.name muon --optim.muon_warmup 4 --steps 12 --checkpoint.every 4 --eval.every 6"
  step "train with Muon" "daybreak train $shape $run --name m"
  step "killed" "daybreak train $shape $run --name km & $checks kill km 6 \$!"
  step "resume" "daybreak train runs/km"
  step "equal losses and weights after the kill" "$checks same m km"
  step "in fp8" "daybreak train $shape $run --name m8 --precision.compute fp8"
}

section_nanochat() { # nanochat's family: Muon, and its own groups of parameters
  data
  local run="$nano $flags --model.V 50257 $muon --checkpoint.every 2 --eval.every 4"
  [ "${SMOKE:-gpu}" = cpu ] && run="$run --eval.tokens 1024"
  step "train nanochat's family" "daybreak train $run --name nc --steps 8"
  step "killed" "daybreak train $run --name nck --steps 8 & $checks kill nck 4 \$!"
  step "resume" "daybreak train runs/nck"
  step "equal losses and weights after the kill" "$checks same nc nck"
  step "recompute 2" "daybreak train $run --name nc2 --steps 8 --batch.recompute 2"
  step "equal bits with recompute 2" "$checks same nc nc2"
  step "sample" "daybreak sample runs/nc --prompt 'def main' --tokens 32 -n 2"
  step "eval" "daybreak eval runs/nc --hellaswag dev/data/hellaswag/hellaswag_val.bin --data text"
  step "export to Hugging Face" "daybreak export runs/nc --to hf nc-hf"
  step "equal logits in transformers" "$checks logits nc nc-hf"
  step "import from Hugging Face" "daybreak import nc-hf --name from-nc"
  step "in fp8" "daybreak train $run --name nc8 --steps 4 --precision.compute fp8"
  step "a vocabulary of the text" "daybreak prepare stdlib --name own --train-tokenizer 2048"
  local fitted="${run/--data text/--data own} --model.V 2048 --data.best_fit true"
  step "rows of whole documents" "daybreak train $fitted --name nb --steps 8"
  step "killed" "daybreak train $fitted --name nbk --steps 8 & $checks kill nbk 4 \$!"
  step "resume" "daybreak train runs/nbk"
  step "equal losses and weights after the kill" "$checks same nb nbk"
  step "CORE of a made bundle" "$checks bundle && daybreak eval runs/nb --tasks core --data-files core --json >core.json && \
    $checks scored core.json"
}

section_images() { # captions and pictures, trained on and drawn
  local pictures="--steps $steps --eval.every 8 --eval.sample_every 8 --checkpoint.every 8"
  step "prepare shapes" "daybreak prepare shapes --tokenizer gpt2-1024"
  step "train on pictures" "daybreak train shapes --name pictures $pictures"
  step "draw" "daybreak sample runs/pictures --prompt 'a red circle left of a blue square' --out drawn -n 2 --guidance 2"
  step "two PNG files" "head -qc 4 drawn/*.png | tr -d '\\211' | grep -qx PNGPNG"
}

section_ranks() { # every kind of run on all GPUs of this machine
  data
  local total=$((ranks * 32768)) few="--steps 12 --checkpoint.every 4 --eval.every 6" zero
  local half=$((total / 2))
  [ "${SMOKE:-gpu}" = cpu ] && total=256 && half=256
  local run="torchrun --standalone --nproc-per-node $ranks -m daybreak"
  step "one process" "daybreak train $shape $flags --name one --steps 12 --batch.total_tokens $total"
  step "torchrun, $ranks process(es)" "torchrun --standalone --nproc-per-node $ranks --max-restarts 1 -m daybreak train \
    $shape $flags --name all --steps 12 --batch.total_tokens $total --parallel.zero 1"
  step "close losses" "$checks near one all"
  [ "$ranks" = 1 ] && return
  step "a model to finetune" "daybreak train $decoder $flags --name start --steps 4"
  for zero in 0 1 2; do
    local all="$flags $few --parallel.zero $zero --batch.total_tokens $total"
    step "fp8, ZeRO $zero" "$run train $shape $all --precision.compute fp8 --batch.recompute 2 --name z$zero"
    step "LoRA, ZeRO $zero" "$run finetune runs/start $all --name lz$zero"
    step "Muon, ZeRO $zero" "$run train $shape $all --optim.name muon --optim.muon_warmup 4 --name mz$zero"
    step "nanochat, ZeRO $zero" "$run train $nano $flags --model.V 50257 $muon --steps 4 --parallel.zero $zero \
      --batch.total_tokens $half --name nz$zero"
  done
}

section_fences() { # the GPU examples of README and docs; PAGES="README.md docs/plan.md" takes only theirs
  data
  step "a run for the examples" "daybreak train $shape $flags --name example --steps 24 --optim.horizon 48"
  while IFS=$'\t' read -r name command; do
    step "$name" "$command"
    rm -rf fence-*
  done < <($checks fences)
}

echo "folder $work"
echo "commit $(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo "${COMMIT:-unknown}"), $(date -u +%F)"
[ "${SMOKE:-gpu}" = cpu ] || nvidia-smi --query-gpu=name,driver_version,power.limit --format=csv,noheader
"$PYTHON" -c 'import torch; print("torch", torch.__version__)'
for name in ${*:-machine post verbs decoder families fp8 muon nanochat images finetune speedrun ranks fences}; do section "$name"; done
exit $((failed > 0))
