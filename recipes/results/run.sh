#!/usr/bin/env bash
# The whole study on one GPU: text -> token files -> models -> tables, pass keys -> docs/results.md.
#
#   NOVELS=FOLDER MATH=FOLDER bash recipes/results/run.sh
#   NOVELS=FOLDER PART="landmark baseline" STEPS=2000 bash recipes/results/run.sh
#   PART=report bash recipes/results/run.sh
#
# Every part trains its model and measures it, and goes on where it was when it is run again. After `data` they can run side
# by side, each with a GPU of its own (CUDA_VISIBLE_DEVICES), but for `million`, which comes after `landmark`:
#   data                          token files of everything
#   landmark baseline xl          the paper's three models on novels (PG19's layout: train/, validation/) and pass keys
#   million                       pass keys in texts of up to a million tokens, by the model of `landmark`
#   windows-dense windows-16k windows-64k    `landmark`'s model, and the same trained as it reads in longer windows: novels
#                                 and pass keys in novels, at lengths of up to a million tokens (windows-dense after landmark)
#   math-landmark math-baseline math-xl      the same three on mathematics, without pass keys
#   smollm2-untouched smollm2-novels smollm2-passkey      a pretrained model, as it is and fine-tuned
#   ruler-untouched ruler-recipe  RULER's tasks, asked of the pretrained model as it is and of smollm2-passkey's, after that
#   ruler-distilled               distilled from itself, then asked the same, some tasks of it at a million tokens
#   ruler-short-values            the same with tasks none of whose values has more than 13 characters
#   ruler-text-0.4                with the ordinary loss weighing 0.4
#   ruler-text-0                  without it
#   ruler-block-32                ruler-distilled in blocks of 32, of which 16 are read, as of blocks of 64
#   ruler-grouped                 and that with the paper's softmax
#   ruler-distilled-64k           ruler-grouped's model, after that, going on in windows of 64 thousand tokens, trained as it
#                                 reads; then asked the same
#   ruler-answers-0               as ruler-grouped, answers weighing no more than other text
#   made-of                       the same distillation in short, over and over, each time with one thing changed:
#                                 perplexity, RULER and pass keys in novels of each, and of SmolLM2 as it is
#   gemma3-untouched gemma3-distilled    Gemma 3 270M as it is, and distilled from itself: RULER
#   report                        all that was measured, as Markdown and pictures; needs no GPU
#
# What may be set:
#   NOVELS MATH            folders of text                      SMOLLM2      a model directory or hub id
#   STEPS MATH_STEPS SMOLLM2_STEPS    optimizer steps           PROMPTS      pass keys of each length
#   LONG_PROMPTS_8         the same in the longest texts with 8 blocks retrieved; UNTOUCHED_PROMPTS: by SmolLM2 as it is
#   NOVEL_KEYS NOVEL_PROMPTS    lengths and number of the prompts with pass keys in novels
#   LENGTHS LONG_LENGTHS SMOLLM2_LENGTHS    of pass-key prompts EVAL_TOKENS SMOLLM2_TOKENS    text for a perplexity
#   RULER_LENGTHS RULER_SAMPLES    of RULER's prompts, and how many of each task
#   RULER_LONG_LENGTHS RULER_LONG_SAMPLES RULER_LONG_TASKS    the same of the longest prompts
#   DISTILLED_STEPS        optimizer steps of ruler-distilled, -short-values, -text-0.4, -text-0, -block-32, -grouped and
#                          -answers-0; DISTILLED_64K_STEPS of -distilled-64k
#   RULER_WAYS             how models are asked, of k4 k16 long (RULER) keys keys16 long-keys (pass keys in novels), or none
#   RULER_KEYS RULER_KEY_PROMPTS    lengths and number of these pass keys; the longest are as long and many as long's prompts
#   MADE_OF                which changes, by the names in `variants`, all by default; MADE_OF_STEPS optimizer steps of each
#   MADE_OF_AT_ONCE        so many of them at a time on one GPU, of which one is trained: with 2 one is measured while the
#                          next starts and trains, and tokens/s are no speed then; 1 by default
#   MADE_OF_LENGTH         novels are read, and RULER's tasks asked, at it and at 8 times it; MADE_OF_EVAL text of a perplexity
#   MADE_OF_TASKS MADE_OF_SAMPLES    which of RULER's tasks, and how many of each
#   MADE_OF_KEYS MADE_OF_KEY_PROMPTS    lengths and number of the pass keys in novels; of SmolLM2 at MADE_OF_LENGTH
#   MADE_OF_TOKENS         of a step, whatever the windows (the recipe's)
#   MADE_OF_K              numbers of blocks that the unchanged recipe's model is asked with, by commas; after all else
#   GEMMA3                 its directory (tests/real/gemma3.py makes it); GEMMA3_STEPS GEMMA3_LENGTHS GEMMA3_SAMPLES of its parts
#   DATA RUNS RESULTS DOCS    where token files, models, figures and the report go
#   DEVICE DTYPE TRAIN FINETUNE    device, dtype of measuring, further options of training; PYTHON
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python3}
DATA=${DATA:-data/results} RUNS=${RUNS:-runs/results-models} RESULTS=${RESULTS:-runs/results} DOCS=${DOCS:-docs}
SMOLLM2=${SMOLLM2:-HuggingFaceTB/SmolLM2-135M}
STEPS=${STEPS:-4500} MATH_STEPS=${MATH_STEPS:-1500} SMOLLM2_STEPS=${SMOLLM2_STEPS:-1500}
PROMPTS=${PROMPTS:-50} LONG_PROMPTS_8=${LONG_PROMPTS_8:-10} UNTOUCHED_PROMPTS=${UNTOUCHED_PROMPTS:-20}
NOVEL_KEYS=${NOVEL_KEYS:-1024,4096,16384,65536,262144,1000000} NOVEL_PROMPTS=${NOVEL_PROMPTS:-20}
LENGTHS=${LENGTHS:-512,1024,2048,4096,8192,16384,32768,65536,131072} LONG_LENGTHS=${LONG_LENGTHS:-262144,1000000}
SMOLLM2_LENGTHS=${SMOLLM2_LENGTHS:-1024,4096,16384,65536,131072}
SMOLLM2_TOKENS=${SMOLLM2_TOKENS:-524288}
RULER_LENGTHS=${RULER_LENGTHS:-1024,2048,4096,8192,16384,32768,65536} RULER_SAMPLES=${RULER_SAMPLES:-20}
RULER_LONG_LENGTHS=${RULER_LONG_LENGTHS:-131072,1000000} RULER_LONG_SAMPLES=${RULER_LONG_SAMPLES:-5}
RULER_LONG_TASKS=${RULER_LONG_TASKS:-niah_single_2,niah_multikey_1,vt} DISTILLED_STEPS=${DISTILLED_STEPS:-1600}
DISTILLED_64K_STEPS=${DISTILLED_64K_STEPS:-120}
RULER_WAYS=${RULER_WAYS:-k4 k16 long keys keys16 long-keys}
RULER_KEYS=${RULER_KEYS:-1024,4096,8192,16384,65536} RULER_KEY_PROMPTS=${RULER_KEY_PROMPTS:-20}
MADE_OF=${MADE_OF:-} MADE_OF_STEPS=${MADE_OF_STEPS:-200} MADE_OF_AT_ONCE=${MADE_OF_AT_ONCE:-1}
MADE_OF_LENGTH=${MADE_OF_LENGTH:-8192} MADE_OF_EVAL=${MADE_OF_EVAL:-262144} MADE_OF_K=${MADE_OF_K-2,4,8,16,32}
MADE_OF_TASKS=${MADE_OF_TASKS:-niah_single_2,niah_single_3,niah_multikey_1,niah_multivalue} MADE_OF_SAMPLES=${MADE_OF_SAMPLES:-10}
MADE_OF_KEYS=${MADE_OF_KEYS:-$((8 * MADE_OF_LENGTH))} MADE_OF_KEY_PROMPTS=${MADE_OF_KEY_PROMPTS:-20}
GEMMA3=${GEMMA3:-data/gemma3} GEMMA3_STEPS=${GEMMA3_STEPS:-250} GEMMA3_SAMPLES=${GEMMA3_SAMPLES:-10}
GEMMA3_LENGTHS=${GEMMA3_LENGTHS:-4096,8192,16384,32768,65536,131072}
DEVICE=${DEVICE:-auto} DTYPE=${DTYPE:-bfloat16}
# Several words each.
TRAIN=(${TRAIN:-}) FINETUNE=(${FINETUNE:-}) MEASURE=(--device "$DEVICE" --dtype "$DTYPE")
SAMPLE=(${EVAL_TOKENS:+--sample-tokens "$EVAL_TOKENS"})
WINDOW_PARTS="windows-dense windows-16k windows-64k"
MATH_PARTS="math-landmark math-baseline math-xl"
SMOLLM2_PARTS="smollm2-untouched smollm2-novels smollm2-passkey"
RULER_PARTS="ruler-untouched ruler-recipe ruler-distilled ruler-short-values ruler-text-0.4 ruler-text-0 ruler-block-32 ruler-grouped ruler-distilled-64k ruler-answers-0"
GEMMA3_PARTS="gemma3-untouched gemma3-distilled"
PART=${PART:-data landmark million baseline xl $WINDOW_PARTS $MATH_PARTS $SMOLLM2_PARTS $RULER_PARTS made-of $GEMMA3_PARTS report}

landmark() { "$PYTHON" -m landmark_cli "$@"; }

# Run a command, say how long it took, and note it in the part's log; one that fails is not noted.
step() {
    local begin=$SECONDS
    printf '\n$ %s\n' "$*"
    "$@" || return
    printf '(%s: %d s)\n' "${*:1:3}" $((SECONDS - begin))
    printf '%d\t%s\n' $((SECONDS - begin)) "$*" >> "$results/log.tsv"
}

# Two functions at a time: one evaluation alone leaves much of a GPU idle.
both() {
    local failed=0
    "$1" & local first=$!
    "$2" & local second=$!
    wait "$first" || failed=1
    wait "$second" || failed=1
    return "$failed"
}

# A measurement that writes a JSON file of its own.
measure() {
    local file="$results/$1.json"
    shift
    [ -e "$file" ] && echo "$file is there already" || step landmark eval "$@" "${MEASURE[@]}" --json "$file"
}

# Token files that are there are kept: their train.json comes last.
novels() {
    [ -e "$DATA/novels$suffix/train.json" ] || step landmark prepare pg19 --source "${NOVELS:?the folder of the novels, with train/ and validation/ in it}" \
        --output "$DATA/novels$suffix" "${tokenizer[@]}"
}

mathematics() {
    [ -e "$DATA/math/train.json" ] || step landmark prepare text --source "${MATH:?the folder of mathematics, with train/ and validation/ in it}" \
        --output "$DATA/math"
}

passkeys() {
    [ -e "$DATA/passkey$suffix/train.json" ] || step landmark prepare passkey --max-documents "$documents" --shortest 128 --longest "$longest" \
        --validation-share 0 --output "$DATA/passkey$suffix" "${tokenizer[@]}"
}

# train RECIPE OPTIONS: into the part's own directory, unless a finished model is there.
train() {
    local recipe=$1
    shift
    [ -e "$model/config.json" ] ||
        step landmark train --recipe "results/$recipe" --output "$model" --resume --device "$DEVICE" "$@" "${TRAIN[@]}"
    cp "$model/metrics.jsonl" "$results/"
}

own_text() { suffix='' tokenizer=() documents=120000 longest=500; }
smollm2_text() { suffix=-smollm2 tokenizer=(--tokenizer "$SMOLLM2") documents=20000 longest=1000; }

all_text() {
    own_text
    both novels passkeys
    mathematics
    smollm2_text
    both novels passkeys
}

on_novels() {
    own_text
    both novels passkeys
    train "$1" --data "$DATA/novels" --data "$DATA/passkey" --mix 0.75,0.25 --steps "$STEPS"
}

on_mathematics() {
    mathematics
    train "$1" --data "$DATA/math" --mix 1 --steps "$MATH_STEPS"
}

table() {
    measure "$1" study "$1" --role "$role=$model" --data "$text" --output "$RUNS/studies/$part" \
        --batch-size 32 "${SAMPLE[@]}"
}

tables() {
    table table1
    [ "$role" != landmark ] || [ "$text" = "$DATA/math" ] || table table2
}

# keys K PROMPTS LENGTHS ROWS: rows are prompts read at a time; a million tokens of one take 12 GB.
keys() {
    measure "passkey-k$1" passkey --model "$model" --top-k-blocks "$1" --prompts "$2" --lengths "$3" --batch-size "$4"
}

short_keys() {
    keys 4 "$PROMPTS" "$LENGTHS" 17
    keys 8 "$PROMPTS" "$LENGTHS" 17
}

long_keys_4() { keys 4 "$PROMPTS" "$LONG_LENGTHS" 3; }
# With 8 blocks, 512 positions leave room for chunks of 50 tokens: five times as many.
long_keys_8() { keys 8 "$LONG_PROMPTS_8" "$LONG_LENGTHS" 2; }

window_keys() {
    measure passkey passkey --model "$model" --lengths "$LENGTHS,$LONG_LENGTHS" --prompts "$PROMPTS"
}

# Trained on the same tokens, in windows of another length; read by each model's own chunk, and by one that all can.
windows() {
    if [ "$role" = dense ]; then
        own_text
        novels
        model=$RUNS/landmark
    else
        on_novels "landmark-$role"
    fi
    measure perplexity study recipes/results/windows.yaml --role "$role=$model" --data "$text" \
        --output "$RUNS/studies/$part" "${SAMPLE[@]}"
    for k in 4 8; do
        measure "passkey-novels-k$k" passkey --model "$model" --top-k-blocks "$k" --lengths "$NOVEL_KEYS" \
            --prompts "$NOVEL_PROMPTS" --haystack "$NOVELS/validation"
    done
}

pretrained_novels() {
    measure perplexity study recipes/results/smollm2-perplexity.yaml --role "$role=$model" --data "$DATA/novels$suffix" \
        --output "$RUNS/studies/$part" --sample-tokens "$SMOLLM2_TOKENS"
}

pretrained_keys() {
    local how=(--top-k-blocks 4 --batch-size 4 --prompts "$PROMPTS")
    [ "$role" != untouched ] || how=(--full-attention --batch-size 1 --prompts "$UNTOUCHED_PROMPTS")
    measure passkey passkey --model "$model" --lengths "$SMOLLM2_LENGTHS" "${how[@]}"
}

smollm2() {
    smollm2_text
    local mix=(--data "$DATA/novels$suffix")
    if [ "$role" = passkey ]; then
        both novels passkeys
        mix+=(--data "$DATA/passkey$suffix" --mix 0.75,0.25)
    else
        novels
    fi
    if [ "$role" = untouched ]; then
        model=$SMOLLM2
    else
        [ -e "$model/config.json" ] ||
            step landmark finetune --recipe results/smollm2 --model "$SMOLLM2" "${mix[@]}" --steps "$SMOLLM2_STEPS" \
                --output "$model" --resume --device "$DEVICE" "${FINETUNE[@]}"
        cp "$model/metrics.jsonl" "$results/"
    fi
    both pretrained_novels pretrained_keys
}

# distil RECIPE BASE STEPS OPTIONS: a decoder from itself, unless a finished model is there. The tasks of training are hidden
# in the novels that are trained on, RULER's in those that are not.
distil() {
    local recipe=$1 base=$2 steps=$3
    shift 3
    [ -e "$model/config.json" ] ||
        step landmark finetune --recipe "$recipe" --model "$base" --data "$DATA/novels$suffix" \
            --steps "$steps" --output "$model" --resume --device "$DEVICE" "${FINETUNE[@]}" "$@" || return
    cp "$model/metrics.jsonl" "$results/"
}

# ask NAME MODEL LENGTHS SAMPLES OPTIONS: RULER's tasks; the answers are kept as they come.
ask() {
    local name=$1 asked=$2 lengths=$3 samples=$4
    shift 4
    measure "$name" ruler --model "$asked" --haystack "${NOVELS:?the folder of the novels, with validation/ in it}/validation" \
        --lengths "$lengths" --samples "$samples" --output "$RUNS/studies/$part/$name" "$@"
}

# keys_in_novels NAME LENGTHS PROMPTS OPTIONS: pass keys in novels that no training saw, asked for in words that no training of
# these models saw.
keys_in_novels() {
    local name=$1 lengths=$2 prompts=$3
    shift 3
    measure "$name" passkey --model "$model" --haystack "${NOVELS:?the folder of the novels, with validation/ in it}/validation" \
        --lengths "$lengths" --prompts "$prompts" "$@"
}

# Keys are asked for with as many blocks as the model was trained for, or 16, and in its own chunks.
ask_in_ways() {
    local way
    for way in $RULER_WAYS; do
        case $way in
            k4) ask ruler-k4 "$model" "$RULER_LENGTHS" "$RULER_SAMPLES" --top-k-blocks 4 ;;
            k16) ask ruler-k16 "$model" "$RULER_LENGTHS" "$RULER_SAMPLES" --top-k-blocks 16 ;;
            long) ask ruler-long "$model" "$RULER_LONG_LENGTHS" "$RULER_LONG_SAMPLES" --top-k-blocks 16 --tasks "$RULER_LONG_TASKS" ;;
            keys) keys_in_novels passkey-novels "$RULER_KEYS" "$RULER_KEY_PROMPTS" ;;
            keys16) keys_in_novels passkey-novels-k16 "$RULER_KEYS" "$RULER_KEY_PROMPTS" --top-k-blocks 16 ;;
            long-keys) keys_in_novels passkey-novels-long "$RULER_LONG_LENGTHS" "$RULER_LONG_SAMPLES" --top-k-blocks 16 ;;
            none) ;;
            *) echo "there is no way of asking called $way" >&2; return 2 ;;
        esac
    done
}

ruler() {
    case $role in
        untouched)
            model=$SMOLLM2
            if [[ " $RULER_WAYS " == *" k"[0-9]* ]]; then
                ask ruler "$model" "$RULER_LENGTHS" "$RULER_SAMPLES" --full-attention
            fi
            if [[ " $RULER_WAYS " == *" keys "* ]]; then
                keys_in_novels passkey-novels "$RULER_KEYS" "$RULER_KEY_PROMPTS" --full-attention
            fi
            ;;
        recipe)
            ask ruler-k4 "$RUNS/smollm2-passkey" "$RULER_LENGTHS" "$RULER_SAMPLES" --top-k-blocks 4
            # More blocks than 4 leave little room for a chunk in windows of 1024: it goes beyond them.
            ask ruler-k16 "$RUNS/smollm2-passkey" "$RULER_LENGTHS" "$RULER_SAMPLES" --top-k-blocks 16 --chunk 504
            ;;
        distilled | short-values | text-0.4 | text-0 | block-32 | grouped | answers-0)
            smollm2_text
            novels
            local changes=()
            case $role in
                distilled) ;;
                short-values) read -ra changes < <(variants | sed -n "s/^short-values *//p") ;;
                text-0.4) changes=(--text-weight 0.4) ;;
                block-32) changes=(--landmark-freq 31 --top-k-blocks 16) ;;
                *) changes=(--text-weight 0) ;;
            esac
            [[ $role != grouped && $role != answers-0 ]] || changes+=(--softmax grouped --gate-weight 0)
            [ "$role" != answers-0 ] || changes+=(--answer-weight 0 --answer-divergence-weight 0)
            distil results/smollm2-distilled "$SMOLLM2" "$DISTILLED_STEPS" "${changes[@]}"
            ask_in_ways
            ;;
        distilled-64k)
            local base=$RUNS/ruler-grouped
            [ -e "$base/config.json" ] || [ -e "$model/config.json" ] ||
                { echo "ruler-distilled-64k goes on from the model of ruler-grouped, and $base has none: run that part first" >&2; return 2; }
            smollm2_text
            novels
            distil results/smollm2-distilled-64k "$base" "$DISTILLED_64K_STEPS" --teacher "$SMOLLM2" --eval-ruler none
            ask_in_ways
            if [[ " $RULER_WAYS " == *" keys "* ]] && [ -e "$base/config.json" ]; then
                # The model that it went on from, in the chunks that it was trained in: what these alone change. In text
                # tokens, of which a block has one less.
                local blocks=$(($(recipe_value smollm2-distilled-64k read-chunk) / 64))
                model=$base keys_in_novels passkey-novels-before "$RULER_KEYS" "$RULER_KEY_PROMPTS" --chunk $((63 * blocks))
            fi
            ;;
    esac
}

# recipe_value RECIPE NAME: a number of a recipe.
recipe_value() { sed -n "s/^$2: *//p" "recipes/results/$1.yaml"; }

# windows_of LENGTH: as many tokens in windows of this length: of a step, or, where one window is more, of all steps.
windows_of() {
    local rows=$((MADE_OF_TOKENS / $1))
    if [ "$rows" -gt 0 ]; then
        echo "--sequence-length $1 --batch-size $rows"
    else
        echo "--sequence-length $1 --batch-size 1 --steps $((MADE_OF_STEPS * MADE_OF_TOKENS / $1))"
    fi
}

# A name a line, and what differs from recipes/results/smollm2-distilled.yaml, the most telling first: one thing, or the two
# that a name joins, as a candidate for the best. All see as many tokens of text. Blocks of another size are read so many at
# a time that they hold as many. What has no teacher has the grouped softmax.
variants() {
    local recipe=smollm2-distilled
    MADE_OF_TOKENS=${MADE_OF_TOKENS:-$(($(recipe_value $recipe sequence-length) * $(recipe_value $recipe batch-size) * $(recipe_value $recipe accumulation)))}
    cat <<TABLE
best
text-0.4            --text-weight 0.4
answers-0.2         --answer-weight 0.2
text-0.4-answers-0.2    --text-weight 0.4 --answer-weight 0.2
grouped             --softmax grouped --gate-weight 0
no-teacher          --teacher none --answer-weight 1
no-tasks            --tasks-share 0 --answer-weight 0
seed-1              --seed 1
landmarks           --train landmarks
windows-2k          $(windows_of 2048)
read-8k             --read-chunk 2048 $(windows_of 8192)
block-32            --landmark-freq 31 --top-k-blocks 24
lora-64             --lora-rank 64 --merge
lr-1e-4             --lr 1e-4
lr-1e-3             --lr 1e-3
block-16            --landmark-freq 15 --top-k-blocks 48
block-128           --landmark-freq 127 --top-k-blocks 6
windows-1k          $(windows_of 1024)
windows-4k          $(windows_of 4096)
no-teacher-seed-1   --teacher none --answer-weight 1 --seed 1
text-0              --text-weight 0
text-1              --text-weight 1
answers-0           --answer-weight 0 --answer-divergence-weight 0
answers-1           --answer-weight 1
hidden-1            --hidden-weight 1
gate-0.3            --gate-weight 0.3
gate-3              --gate-weight 3
grouped-gate-0.1    --softmax grouped --gate-weight 0.1
read-32k            --read-chunk 2048 $(windows_of 32768)
read-128k           --read-chunk 2048 $(windows_of 131072)
grouped-read-32k    --softmax grouped --gate-weight 0 --read-chunk 2048 $(windows_of 32768)
answers-by-words    --answer-weight 1 --answer-divergence-weight 0
answers-by-teacher  --answer-weight 0 --answer-divergence-weight 3
no-teacher-answers  --teacher none --answer-weight 30
hidden-0.1          --hidden-weight 0.1
hidden-5            --hidden-weight 5
fewer-tasks         --tasks-share 0.3
inventories         --kinds look_up --kinds inventory --kinds quotation
short-values        --kinds look_up --kinds look_up --kinds look_up --kinds look_up --kinds look_up --kinds together --kinds all_values --kinds first_or_last --kinds chain --kinds quotation
inventories-words   --kinds look_up --kinds inventory --kinds quotation --answer-weight 0.2
lr-3e-5             --lr 3e-5
lora-8              --lora-rank 8 --merge
lora-256            --lora-rank 256 --merge
landmarks-lr-1e-3   --train landmarks --lr 1e-3
grouped-gate-1      --softmax grouped --gate-weight 1
TABLE
}

# rows_of NAME LINES: the study file of that name, with these rows.
rows_of() {
    local file=$RUNS/studies/$part/$1.yaml
    shift
    printf '%s\n' "study: perplexity" "roles: {model: what is measured}" "rows:" "$@" > "$file"
}

# What is asked of every variant, of the untouched model, whose positions end at the first of the lengths, and of the
# unchanged recipe's model by the blocks that it reads with. By one process each, which opens the model once.
made_of_studies() {
    local length k tasks="tasks: [$MADE_OF_TASKS]" prompts="prompts: $MADE_OF_KEY_PROMPTS"
    local asked=() read=() whole=() by_blocks=()
    for length in "$MADE_OF_LENGTH" "$((8 * MADE_OF_LENGTH))"; do
        read+=("  - {role: model, eval-length: $length}")
        asked+=("  - {role: model, study: ruler, length: $length, $tasks}")
    done
    for length in ${MADE_OF_KEYS//,/ }; do
        asked+=("  - {role: model, study: passkey, length: $length, $prompts}")
    done
    whole=(
        "  - {role: model, study: ruler, length: $MADE_OF_LENGTH, full-attention: true, $tasks}"
        "  - {role: model, study: passkey, length: $MADE_OF_LENGTH, full-attention: true, $prompts}"
    )
    for k in ${MADE_OF_K//,/ }; do by_blocks+=("${asked[@]/%\}/, top-k-blocks: $k\}}"); done
    rows_of measured "${read[@]}" "${asked[@]}"
    rows_of untouched "${read[@]}" "${whole[@]}"
    [ -z "$MADE_OF_K" ] || rows_of blocks "${by_blocks[@]}"
}

# of_made_of NAME STUDY: a study of a model, in novels that no training saw, the same for all.
of_made_of() {
    measure "$1" study "$RUNS/studies/$part/$2.yaml" --role "model=$model" --data "$DATA/novels$suffix" \
        --sample-tokens "$MADE_OF_EVAL" --samples "$MADE_OF_SAMPLES" --haystack "$NOVELS/validation" \
        --output "$RUNS/studies/$part/$(basename "$results")-$2"
}

# train_variant OPTIONS
train_variant() {
    local recipe=results/smollm2-distilled
    printf '%s\n' "$*" > "$results/options.txt"
    if [[ " $* " == *" --teacher none "* ]]; then
        # What is said of a teacher is refused where there is none, and what only a teacher can show.
        recipe=$results/recipe.yaml
        sed '/^\(answer-divergence\|text\|gate\|hidden\)-weight/d; /^distill-temperature/d; /^softmax/d' \
            recipes/results/smollm2-distilled.yaml > "$recipe"
    fi
    distil "$recipe" "$SMOLLM2" "$MADE_OF_STEPS" --eval-ruler none --eval-every "$MADE_OF_STEPS" "$@"
}

# apart NAME COMMAND: what fails is noted, with its status. A signal that comes to all processes is the running command's
# to answer, which first keeps what it has done: this shell waits for it.
apart() {
    trap : TERM INT
    local name=$1 status
    shift
    "$@" && return
    status=$?
    echo "$status $name" >> "$failed"
}

# Whether a signal came, to this script or to what it ran.
is_stopped() { [ -n "$stopped" ] || grep -qE '^(130|143) ' "$failed"; }

# room N: wait until fewer than N of the processes run. A signal ends a `wait`, not what is waited for.
room() { while [ "$(jobs -rp | wc -l)" -ge "$1" ]; do wait -n || true; done; }

# One variant is trained at a time; with MADE_OF_AT_ONCE of 2 the next begins when its training has ended, beside its
# measurements. Where one fails, the others are measured; after a signal nothing more is begun.
made_of() {
    smollm2_text
    novels
    : "${NOVELS:?the folder of the novels, with validation/ in it}"
    mkdir -p "$RUNS/studies/$part"
    made_of_studies
    local all name options line failed=$RUNS/studies/$part/failed stopped='' part_results=$results trained
    : > "$failed"
    mapfile -t all < <(variants)
    # The report has the rows in this order.
    printf '%s\n' "${all[@]%% *}" > "$results/order.txt"
    for name in $MADE_OF; do
        [[ " ${all[*]%% *} " == *" $name "* ]] ||
            { echo "MADE_OF=$MADE_OF: there is no change called $name; there are ${all[*]%% *}" >&2; return 2; }
    done
    if [ "$MADE_OF_AT_ONCE" -gt 1 ]; then
        echo "Models were measured while the next was trained on the same GPU: tokens/s and seconds are no speed." \
            > "$results/about.md"
    fi
    # Without a trap of its own what is run in the background would not hear of Ctrl-C.
    trap 'stopped=143' TERM
    trap 'stopped=130' INT
    for line in "untouched" "${all[@]}"; do
        read -r name options <<< "$line"
        # What is said of the untouched model stands in the part's own folder.
        results=$part_results model=$SMOLLM2
        if [ "$name" != untouched ]; then
            [ -z "$MADE_OF" ] || [[ " $MADE_OF " == *" $name "* ]] || continue
            results=$part_results/$name model=$RUNS/$part/$name
        fi
        # What is measured already takes no model.
        [ ! -e "$results/measured.json" ] || { echo "$results is measured already"; continue; }
        room "$MADE_OF_AT_ONCE"
        ! is_stopped || break
        if [ "$name" = untouched ]; then
            apart "$name" of_made_of measured untouched &
        else
            mkdir -p "$results"
            # Options are several words each.
            apart "$name" train_variant $options &
            trained=$!
            while kill -0 "$trained" 2> /dev/null; do wait "$trained" || true; done
            ! is_stopped || break
            [ ! -e "$model/config.json" ] || apart "$name" of_made_of measured measured &
        fi
    done
    room 1
    results=$part_results
    if [ -n "$MADE_OF_K" ] && [ -e "$RUNS/$part/best/config.json" ] && ! is_stopped; then
        results=$part_results/best model=$RUNS/$part/best
        apart best of_made_of blocks blocks &
        room 1
        results=$part_results
    fi
    trap - TERM INT
    ! is_stopped || { echo "a signal stopped it; the same command goes on" >&2; return "${stopped:-130}"; }
    [ ! -s "$failed" ] || { echo "these failed:" $(sort -u "$failed" | cut -d ' ' -f 2) >&2; return 1; }
}

gemma3() {
    suffix=-gemma3 tokenizer=(--tokenizer "$GEMMA3")
    if [ "$role" = untouched ]; then
        ask ruler "$GEMMA3" "$GEMMA3_LENGTHS" "$GEMMA3_SAMPLES" --full-attention
        return
    fi
    novels
    distil results/gemma3-distilled "$GEMMA3" "$GEMMA3_STEPS"
    for k in 4 16; do
        ask "ruler-k$k" "$model" "$GEMMA3_LENGTHS" "$GEMMA3_SAMPLES" --top-k-blocks "$k"
    done
}

machine() {
    "$PYTHON" - <<'PYTHON_CODE'
import platform
from importlib.metadata import version

import torch

chip = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
print(f"{chip}; Python {platform.python_version()}, {versions}")
PYTHON_CODE
}

run_part() {
    part=$1 results=$RESULTS/$1 model=$RUNS/$1 text=$DATA/novels role=${1#*-}
    local begin=$SECONDS
    if [ "$part" = report ]; then
        "$PYTHON" recipes/results/report.py "$RESULTS" --output "$DOCS/results.md"
        return
    fi
    mkdir -p "$results"
    printf 'machine\t%s\n' "$(machine)" >> "$results/log.tsv"
    case $part in
        data) all_text ;;
        landmark) on_novels landmark; both tables short_keys ;;
        baseline) on_novels baseline; both tables window_keys ;;
        xl) on_novels transformer-xl; tables ;;
        million) model=$RUNS/landmark; long_keys_4; long_keys_8 ;;
        windows-*) windows ;;
        math-xl) text=$DATA/math; on_mathematics transformer-xl; tables ;;
        math-*) text=$DATA/math; on_mathematics "$role"; tables ;;
        smollm2-*) smollm2 ;;
        ruler-*) ruler ;;
        made-of) made_of ;;
        gemma3-*) gemma3 ;;
        *) echo "there is no part called $part" >&2; return 2 ;;
    esac
    printf 'total\t%d\n' $((SECONDS - begin)) >> "$results/log.tsv"
    printf '\npart %s: %d s\n' "$part" $((SECONDS - begin))
}

for name in $PART; do
    case $name in
        windows) for one in $WINDOW_PARTS; do run_part "$one"; done ;;
        math) for one in $MATH_PARTS; do run_part "$one"; done ;;
        smollm2) for one in $SMOLLM2_PARTS; do run_part "$one"; done ;;
        ruler) for one in $RULER_PARTS; do run_part "$one"; done ;;
        gemma3) for one in $GEMMA3_PARTS; do run_part "$one"; done ;;
        *) run_part "$name" ;;
    esac
done
