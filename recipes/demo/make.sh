#!/usr/bin/env bash
# Makes the model of `make demo` again, from nothing but the package, on a GPU in minutes: a vocabulary -> documents in which
# facts are hidden -> a model, in three stages -> what the package ships -> how many of its answers are right.
#
#   bash recipes/demo/make.sh
#   OUTPUT=runs/demo-package SHAPE="--n-layer 6" bash recipes/demo/make.sh --seed 1   # further options of every stage
#   PROCESSES=16 PART="vocabulary tasks" bash recipes/demo/make.sh
#
# It goes on where it was when it is run again. On one H200, beside other work, the three stages took 128, some 150 and some
# 40 seconds. What is shipped is from one run of them, with seed 0: how much a model of another seed finds is not known.
#
# What may be set:
#   PART        what is done, of vocabulary tasks train ship measure (all)
#   DATA RUN OUTPUT    where vocabulary and documents, the runs (RUN, RUN-2, RUN-3), and what is shipped go
#   CORPORA     of tasks: shortest and longest document in tokens and how many there are; KINDS: of which kinds, as often as
#               they are named; PROCESSES: how many make them
#   FACTS       hidden in the novel when answers are counted; SEEDS: how often, with other facts at other places
#   SHAPE       further options of the first stage alone, such as the model's shape
#   DEVICE PYTHON
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python} PART=${PART:-vocabulary tasks train ship measure}
DATA=${DATA:-data/demo} RUN=${RUN:-runs/demo-shipped} OUTPUT=${OUTPUT:-landmark_cli/assets/demo}
# All ask for everything that they hide. Three of four are what `make demo` is: sentences in the prose.
CORPORA=${CORPORA:-256-700:100000 700-1950:40000 2000-8000:6000} KINDS=${KINDS:-completion completion completion inventory}
PROCESSES=${PROCESSES:-$(getconf _NPROCESSORS_ONLN)} FACTS=${FACTS:-50} SEEDS=${SEEDS:-1 2} DEVICE=${DEVICE:-auto}

step() { printf '\n$ %s\n' "$*"; "$@"; }
does() { [[ " $PART " == *" $1 "* ]]; }

if does vocabulary; then
    step "$PYTHON" recipes/demo/vocabulary.py --output "$DATA/tokenizer"
fi
if does tasks; then
    # Each process encodes with one thread; together they take all cores.
    if [ "$PROCESSES" -gt 1 ]; then export RAYON_NUM_THREADS=1; run=(-m torch.distributed.run --nproc_per_node "$PROCESSES"); fi
    for corpus in $CORPORA; do
        lengths=${corpus%:*}
        # What is not there is not asked for: a model of this size should answer.
        prepare=(-m landmark_cli prepare tasks --tokenizer "$DATA/tokenizer" --output "$DATA/tasks-$lengths" --absent 0
            --shortest "${lengths%-*}" --longest "${lengths#*-}" --max-documents "${corpus#*:}" --validation-share 0.01)
        for kind in $KINDS; do prepare+=(--kinds "$kind"); done
        step "$PYTHON" ${run[@]+"${run[@]}"} "${prepare[@]}"
    done
fi
if does train; then
    stage() { step "$PYTHON" -m landmark_cli "$@" --device "$DEVICE" --resume; }
    data=()
    for corpus in $CORPORA; do data+=(--data "$DATA/tasks-${corpus%:*}"); done
    # Looking up is learned in the shortest documents.
    short=("${data[@]:0:2}")
    stage train --recipe demo/shipped "${short[@]}" --output "$RUN" ${SHAPE:-} "$@"
    stage finetune --recipe demo/shipped-2 --model "$RUN" "${short[@]}" --output "$RUN-2" "$@"
    stage finetune --recipe demo/shipped-3 --model "$RUN-2" "${data[@]}" --output "$RUN-3" "$@"
fi
if does ship; then
    step "$PYTHON" recipes/demo/ship.py "$RUN-3" "$OUTPUT"
fi
if does measure; then
    # Questions with the beginning of the answer, and without it. The first is what `make demo` asks.
    for seed in $SEEDS; do
        step "$PYTHON" recipes/demo/ask.py --model "$OUTPUT" --facts "$FACTS" --seed "$seed" --brief --device "$DEVICE" \
            --json "$RUN-3/begun-$seed.json"
        step "$PYTHON" recipes/demo/ask.py --model "$OUTPUT" --facts "$FACTS" --seed "$seed" --brief --device "$DEVICE" \
            --plain --json "$RUN-3/plain-$seed.json"
    done
fi
