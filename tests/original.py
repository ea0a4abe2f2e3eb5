"""The scripts of the authors' project (github.com/epfml/landmark-attention) and the flags that each takes."""

TRAINING = """
--config_format --batch_size --acc_steps --seed --device --iterations --lr --warmup_percent --weight_decay --beta1
--beta2 --scheduler --opt --eval_freq --results_base_folder --save_checkpoint_freq --dataset --vocab_size --mem_freq
--model --dropout --group_dropout --n_head --n_layer --n_embd --sequence_length --dtype --bias --no_compile --run_prefix
--exp_name --softmax_func --positional_encoder --wandb --wandb_project --distributed_backend --max_groups_for_softmax
--optimization_process --total_sequence_length --allow_cache_during_training --postpone_lm_cache --enable_rem_score
--under_rem_score_prob --pos_jump_on_mem
""".split()
READING = """
--checkpoint --use_cache --lm_cache --mem_cache_size --mem_cache_freq --cache_topk --cache_selection_method
--eval_seq_length --eval_sample_size --mid_length --rem_cutoff
""".split()
# Those of its own and those that its README gives; the others are transformers' TrainingArguments.
LLAMA = """
--model_name_or_path --cache_dir --optim --model_max_length --use_flash --mem_freq --bf16 --output_dir
--num_train_epochs --per_device_train_batch_size --per_device_eval_batch_size --gradient_accumulation_steps
--evaluation_strategy --save_strategy --save_steps --save_total_limit --learning_rate --weight_decay --warmup_ratio
--lr_scheduler_type --logging_steps --fsdp --fsdp_transformer_layer_cls_to_wrap --tf32 --max_steps
""".split()
WEIGHT_DIFF = "--path_raw --path_diff --path_tuned --device --test_inference --check_integrity_naively".split()

SCRIPTS = {
    "lm_benchmark/main.py": TRAINING,
    "lm_benchmark/eval.py": READING,
    "lm_benchmark/eval_cmd_generator.py": [],
    "lm_benchmark/data/pg19/prepare.py": [],
    "lm_benchmark/data/proof-pile/prepare.py": [],
    "llama/train.py": LLAMA,
    "llama/run_test.py": [],
    "llama/redpajama.py": [],
    "llama/weight_diff.py": WEIGHT_DIFF,
}
# Every file of theirs that a page may name.
FILES = {*SCRIPTS, *(path.rpartition("/")[2] for path in SCRIPTS), "llama_mem.py"}
