"""How other programs call settings (LLaMA-Factory, Axolotl, Unsloth, TRL, mlx-lm, LitGPT), and what they are here."""

from __future__ import annotations

import re

_TRAIN = {
    "rank": "r lora_r lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target-modules": "lora_target lora_target_modules lora_modules_to_target",
    "dora": "use_dora", "rslora": "use_rslora",
    "learning-rate": "lr learning_rate",
    "epochs": "num_train_epochs num_epochs n_epochs epoch train_epochs",
    "max-steps": "iters num_iters max_iters",
    "batch-size": "global_batch_size train_batch_size",
    "micro-batch": "per_device_train_batch_size micro_batch_size per_device_batch_size",
    "accumulation": "gradient_accumulation_steps gradient_accumulation grad_accumulation",
    "schedule": "lr_scheduler lr_scheduler_type",
    "warmup": "warmup_ratio",
    "warmup, a share of the steps": "warmup_steps lr_warmup_steps",
    "weight-decay": "weight_decay",
    "clip": "max_grad_norm gradient_clipping max_norm",
    "activation-checkpointing": "gradient_checkpointing use_gradient_checkpointing grad_checkpoint",
    "eval-steps": "steps_per_eval eval_interval",
    "eval-steps, a number of steps": "evals_per_epoch eval_strategy",
    "save-steps": "save_every save_interval",
    "save-steps, a number of steps": "saves_per_epoch save_strategy",
    "from-adapter": "resume_adapter_file adapter_name_or_path lora_model_dir",
    "keep-checkpoints": "save_total_limit",
    "early-stopping": "early_stopping_patience",
    "method": "rl stage training_type",
    "beta": "pref_beta dpo_beta rl_beta",
    "dpo-loss": "pref_loss loss_type",
    "qlora": "load_in_4bit quantize",
    "qlora, in 4 bits": "load_in_8bit quantization_bit",
    "dtype bf16": "bf16 pure_bf16",
    "dtype fp16": "fp16",
    "report-to": "use_wandb wandb_project wandb",
    "continue": "resume_from_checkpoint auto_resume_from_checkpoints",
}
_ELSEWHERE = {
    "gemma-tune prepare --max-length": "max_length max_seq_length max_seq_len cutoff_len sequence_len model_max_length",
    "gemma-tune prepare DATA": "dataset datasets data data_path data_dir dataset_dir dataset_name dataset_path "
                               "train_file",
    "gemma-tune prepare --valid": "val_size val_set_size eval_dataset test_datasets validation_split",
    "gemma-tune prepare --model": "model_name_or_path model_name base_model model_id model_path",
    "gemma-tune prepare --train-on, for all answers or the last": "roles_to_train mask_history",
    "gemma-tune prepare --chat-template, where the model has none": "template chat_template_jinja",
    "gemma-tune eval --data": "test",
    "gemma-tune merge --push": "push_to_hub hub_model_id push_to_hub_model_id",
    "gemma-tune export-ollama --push": "push_to_hub_gguf",
    "gemma-tune export-ollama --quant": "outtype quantization_method export_quantization_bit",
    "gemma-tune prepare --max-samples": "max_samples max_train_samples num_samples train_samples",
    "gemma-tune prepare --max-samples NAME=SHARE%, such as general.jsonl=20%": "interleave_probs mix_strategy",
    "--run": "output_dir adapter_path out_dir save_path export_dir save_dir",
    "--force": "overwrite_output_dir overwrite_cache",
}
_NOT_HERE = {
    "rows of similar length share a batch, and a GPU packs them where that is faster":
        "packing sample_packing group_by_length train_sampling_strategy",
    "answers are learned, and prompts never": "train_on_inputs train_on_prompt mask_prompt completion_only_loss "
                                              "assistant_only_loss train_on_responses_only",
    "it is AdamW, with its moments in 32 bits": "optim optimizer optimizer_type adam_beta1 adam_beta2",
    "each step is written to logs/metrics.jsonl, and logs/loss.png drawn at the end":
        "logging_steps logging_strategy log_every steps_per_report plot_loss logging_dir",
    "all rows that are kept aside are evaluated": "val_batches eval_batches max_eval_samples",
    "every layer gets an adapter, and no embeddings are trained":
        "num_layers lora_layers layers_to_transform lora_target_linear modules_to_save lora_modules_to_save "
        "additional_target add_tokens new_special_tokens add_special_tokens special_tokens resize_vocab",
    "the command says what is done": "do_train do_eval do_predict train_mode test_mode",
    "there is no smoothing of labels but that of --method dpo": "label_smoothing_factor",
    "a tracker gets the name of the run's directory": "run_name wandb_name wandb_run_id",
    "it is chosen by itself, the fastest that is right here": "flash_attn flash_attention attn_implementation "
                                                              "sdp_attention use_liger_kernel enable_liger_kernel",
    "a model is divided among processes with --num-processes N --strategy fsdp": "deepspeed fsdp fsdp_config",
    "an adapter is trained, and never the whole model": "full full_finetune full_finetuning finetuning_type "
                                                        "fine_tune_type use_peft use_lora lora lora_parameters",
    "there is no noise on embeddings here": "neftune neftune_noise_alpha noisy_embedding_alpha",
}
_MEANT: dict[str, str] = {}
for _table, _sentence in ((_TRAIN, "here it is --{}"), (_ELSEWHERE, "here it is {}"), (_NOT_HERE, "{}")):
    for _ours, _theirs in _table.items():
        _MEANT |= dict.fromkeys(_theirs.split(), _sentence.format(_ours))


def meant(name: str) -> str | None:
    """What a setting of another program is here, as the end of a sentence; None for one that nobody is known to have.

    Args:
        name: with or without dashes before it.
    """
    return _MEANT.get(name.lstrip("-").replace("-", "_").lower())


# How people name number formats of GGUF files, by what counts of the name: its bits, where it says no more than those.
_BITS = {"32": "f32", "16": "f16", "8": "q8_0", "6": "q6_k", "5": "q5_k_m", "4": "q4_k_m", "3": "q3_k_m",
         "2": "q2_k"}
_BITS_ALONE = re.compile(r"(?:q|i|int|uint|nf|f|fp|float)?[-_ ]?(\d+)[-_ ]?(?:bits?|k)?")


def number_format(word: str) -> str:
    """What a name for a number format means here, as far as it says how many bits; else the name in lower case.

    >>> number_format("int4"), number_format("Q4_K_M"), number_format("8-bit"), number_format("1.5bit")
    ('q4_k_m', 'q4_k_m', 'q8_0', '1.5bit')
    """
    bits = _BITS_ALONE.fullmatch(word.strip().lower())
    return _BITS.get(bits[1], word.lower()) if bits else word.strip().lower()
