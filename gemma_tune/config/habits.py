"""How other programs call settings (LLaMA-Factory, ms-swift, Axolotl, Unsloth, TRL, mlx-lm, LitGPT), and what they are
here."""

from __future__ import annotations

import re
from collections.abc import Collection

_TRAIN = {
    "rank": "r lora_r lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target-modules": "lora_target lora_target_modules lora_modules_to_target",
    "modules-to-save": "modules_to_save lora_modules_to_save additional_target",
    "full": "full_finetune full_finetuning",
    "full for all weights; else an adapter is trained": "finetuning_type fine_tune_type use_peft use_lora lora "
                                                        "lora_parameters train_type tuner_type",
    "dora": "use_dora", "rslora": "use_rslora",
    "learning-rate": "lr learning_rate",
    "epochs": "num_train_epochs num_epochs n_epochs epoch train_epochs",
    "max-steps": "iters num_iters max_iters",
    "batch-size, with --accumulation 1": "global_batch_size train_batch_size",
    # A step of theirs learns from this many times the accumulation, as here from --batch-size times it.
    "batch-size, times --accumulation for a step; how many go through the model at once (--micro-batch) follows from "
    "the memory": "per_device_train_batch_size micro_batch_size per_device_batch_size",
    "accumulation": "gradient_accumulation_steps gradient_accumulation grad_accumulation grad_accumulation_steps",
    "schedule": "lr_scheduler lr_scheduler_type lr_schedule",
    "warmup": "warmup_ratio",
    "warmup, a share of the steps": "warmup_steps lr_warmup_steps",
    "weight-decay": "weight_decay",
    "clip": "max_grad_norm gradient_clipping max_norm",
    "activation-checkpointing": "gradient_checkpointing use_gradient_checkpointing grad_checkpoint",
    "eval-steps": "steps_per_eval eval_interval",
    "eval-steps, a number of steps": "evals_per_epoch eval_strategy",
    "save-steps": "save_every save_interval",
    "save-steps, a number of steps": "saves_per_epoch save_strategy",
    "from-adapter, to train it further; one from elsewhere is merged by gemma-tune merge --adapter":
        "resume_adapter_file adapter_name_or_path lora_model_dir adapters",
    "keep-checkpoints": "save_total_limit",
    "keep best, by the validation loss, where nothing else is said": "load_best_model_at_end metric_for_best_model",
    "early-stopping": "early_stopping_patience",
    "method, which goes by the data where it is left out": "rl stage training_type rlhf_type",
    "beta": "pref_beta dpo_beta rl_beta",
    "dpo-loss, and --method for ORPO": "pref_loss loss_type",
    "sft-weight": "pref_ftx rpo_alpha",
    "label-smoothing": "dpo_label_smoothing",
    "good-weight": "kto_chosen_weight desirable_weight kto_desirable_weight",
    "reward": "reward_funcs reward_func reward_functions reward_weights",
    "answers": "num_generations num_generations_per_prompt",
    "max-new-tokens": "max_completion_length",
    "bad-weight": "kto_rejected_weight undesirable_weight kto_undesirable_weight",
    "qlora": "load_in_4bit quantize",
    "qlora, in 4 bits": "load_in_8bit quantization_bit",
    "qlora, which is NF4 with double quantisation, computed in --dtype":
        "bnb_4bit_quant_type bnb_4bit_compute_dtype bnb_4bit_use_double_quant double_quantization",
    "compile": "torch_compile",
    "seed": "random_state data_seed",
    "dtype": "torch_dtype",
    "dtype bf16": "bf16 pure_bf16",
    "dtype fp16": "fp16",
    "report-to": "use_wandb wandb_project wandb",
    "num-processes": "nproc_per_node",
}
_ELSEWHERE = {
    "gemma-tune prepare --max-length": "max_length max_seq_length max_seq_len cutoff_len sequence_len model_max_length",
    "gemma-tune prepare DATA": "dataset datasets data data_path data_dir dataset_dir dataset_name dataset_path "
                               "train_file",
    "gemma-tune prepare DATA, such as data/dataset_info.json:NAME": "dataset_info",
    "gemma-tune prepare DATA, the files themselves, with --columns": "custom_dataset_info",
    "gemma-tune prepare --valid": "val_size val_set_size eval_dataset test_datasets validation_split "
                                  "split_dataset_ratio val_dataset",
    "gemma-tune prepare --pictures": "media_dir image_folder image_dir root_image_dir",
    "gemma-tune prepare --thinking on, or off": "enable_thinking",
    "gemma-tune prepare --on-long": "truncation_strategy truncation_mode excess_length_strategy",
    "gemma-tune prepare --columns": "dataset_text_field prompt_feature completion_feature chat_feature field_messages",
    "gemma-tune prepare --model": "model_name_or_path model_name base_model model_id model_path",
    "gemma-tune prepare --new-tokens, which take unused entries of the vocabulary":
        "add_tokens tokens new_special_tokens add_special_tokens add_new_tokens added_tokens_overrides "
        "trainable_token_indices",
    "gemma-tune prepare --train-on, for all answers or the last": "roles_to_train mask_history loss_scale",
    "gemma-tune prepare --chat-template, where the model has none": "template chat_template_jinja",
    "gemma-tune eval --data": "test",
    "gemma-tune merge, which writes into the run": "export_dir merge_lora save_method",
    "gemma-tune merge --max-shard-size": "export_size",
    "gemma-tune merge --push": "push_to_hub hub_model_id push_to_hub_model_id export_hub_model_id upload_repo",
    "gemma-tune export-ollama --push": "push_to_hub_gguf",
    "gemma-tune export-ollama": "export_gguf",
    "gemma-tune export-ollama --quant": "outtype export_quantization_bit",
    "gemma-tune export-ollama --quant, and for a base in 4 bits gemma-tune train --qlora":
        "quantization_method quant_method quant_bits",  # of GGUF files for Unsloth, of the loaded base for the others
    "gemma-tune export-ollama --calibration": "export_quantization_dataset",
    "gemma-tune chat --use": "infer_backend",
    "gemma-tune chat --max-new-tokens": "max_tokens",
    "gemma-tune chat --temperature": "temp",
    "gemma-tune chat --system; what is learned has it in its rows": "default_system system_prompt",
    "gemma-tune prepare --max-samples": "max_samples max_train_samples num_samples train_samples",
    "gemma-tune prepare --max-samples NAME=SHARE%, such as general.jsonl=20%": "interleave_probs mix_strategy",
    "--run": "output_dir adapter_path out_dir save_path save_dir",
    "--revision": "model_revision",
    "--force": "overwrite_output_dir overwrite_cache",
}
_NOT_HERE = {
    "rows of similar length share a batch, and a GPU packs them where that is faster":
        "packing sample_packing group_by_length train_sampling_strategy neat_packing padding_free eval_sample_packing "
        "pad_to_sequence_len",
    "answers are learned, and prompts never": "train_on_inputs train_on_prompt mask_prompt completion_only_loss "
                                              "assistant_only_loss train_on_responses_only",
    "each answer is learned with the token that ends it": "train_on_eos eos_token eot_tokens",
    "the same command goes on where a training was stopped, and --continue where it finished":
        "resume_from_checkpoint auto_resume_from_checkpoints",
    "it is AdamW, with its moments in 32 bits": "optim optimizer optimizer_type adam_beta1 adam_beta2",
    "each step is written to logs/metrics.jsonl, and logs/loss.png drawn at the end":
        "logging_steps logging_strategy log_every steps_per_report plot_loss logging_dir",
    "how many rows go through the model at once follows from the memory": "per_device_eval_batch_size",
    "rows stream through `prepare`, and are tokenised there once":
        "preprocessing_num_workers dataset_num_proc streaming dataset_streaming dataloader_num_workers",
    "code that comes with a model is never run": "trust_remote_code",
    "the reference is the model before the first step": "ref_model reference_free precompute_ref_log_probs",
    "there is no SimPO; --method is sft, dpo, orpo, kto or grpo": "simpo_gamma",
    "answers are learned from once, in the step that sampled them":
        "num_iterations epsilon epsilon_high steps_per_generation",
    "the model in training samples its answers itself": "use_vllm vllm_mode fast_inference",
    "text alone is learned, and what sees or hears stays as it was":
        "freeze_vit freeze_vision_tower finetune_vision_layers image_max_pixels",
    "it is plain LoRA with one learning rate for A and B; other kinds are --dora and --rslora":
        "loraplus_lr_ratio lorap_lr_ratio pissa_init loftq_config init_weights init_lora_weights",
    "all rows that are kept aside are evaluated": "val_batches eval_batches max_eval_samples",
    "every layer gets an adapter": "num_layers lora_layers layers_to_transform lora_target_linear",
    "the vocabulary keeps its size, and gemma-tune prepare --new-tokens names unused entries of it":
        "resize_vocab resize_token_embeddings_to_32x",
    "the model's own special tokens stay; those of one's own are named with gemma-tune prepare --new-tokens":
        "special_tokens",
    "the command says what is done": "do_train do_eval do_predict train_mode test_mode",
    "there is no smoothing of labels but that of --method dpo": "label_smoothing_factor",
    "a tracker gets the name of the run's directory": "run_name wandb_name wandb_run_id",
    "it is chosen by itself, the fastest that is right here":
        "flash_attn flash_attention attn_implementation attn_impl sdp_attention xformers_attention flex_attention "
        "use_liger_kernel enable_liger_kernel use_unsloth",
    "a model is divided among processes with --num-processes N --strategy fsdp": "deepspeed fsdp fsdp_config",
    "there is no noise on embeddings here": "neftune neftune_noise_alpha noisy_embedding_alpha",
}
_COMMANDS = {
    "gemma-tune prepare": "preprocess tokenize",
    "gemma-tune train": "sft pt finetune finetune_lora fine_tune lora",
    **{f"gemma-tune train --method {name}": name for name in ("dpo", "kto", "orpo", "grpo")},
    "gemma-tune train --method": "rlhf",
    "gemma-tune merge": "fuse merge_lora",
    "gemma-tune merge, and gemma-tune export-ollama for GGUF": "export",
    "gemma-tune export-ollama": "quantize convert gguf",
    "gemma-tune chat": "infer inference generate predict",
    "gemma-tune eval": "evaluate",
    "gemma-tune export-ollama, and Ollama serves the model": "api serve server deploy webui web_ui webchat",
}
_MEANT: dict[str, str] = {}
for _table, _sentence in ((_TRAIN, "here it is gemma-tune train --{}"), (_ELSEWHERE, "here it is {}"),
                          (_NOT_HERE, "{}")):
    for _ours, _theirs in _table.items():
        _MEANT |= dict.fromkeys(_theirs.split(), _sentence.format(_ours))


_OPTION = re.compile(r"(?<=^here it is )gemma-tune (?P<stage>[a-z-]+) (?P<option>--[a-z-]+)"
                     r"( (?P<value>[a-z0-9]+)(?=,|$))?")
_DATA = "gemma-tune prepare DATA"
_COMMON = re.compile("(?<=^here it is )--(run|revision)$")  # which stand beside the stages in a file


def meant(name: str, own: Collection[str] = ()) -> str | None:
    """What a setting of another program is here, as the end of a sentence; None for one that nobody is known to have.

    Args:
        name: with or without dashes before it.
        own: options of the command that it was typed for, which needs no telling that they are its own.
    """
    said = _MEANT.get(name.lstrip("-").replace("-", "_").lower())
    option = _OPTION.search(said or "")
    return said.replace(f"gemma-tune {option['stage']} ", "", 1) if option and option["option"] in own else said


def meant_command(name: str) -> str | None:
    """The same for a command of another program."""
    word = name.replace("-", "_").lower()
    return next((f"here it is {ours}" for ours, theirs in _COMMANDS.items() if word in theirs.split()), None)


def meant_in_file(name: str) -> str | None:
    """The same for a settings file, where options stand below their stage."""
    said = meant(name)
    return said and _COMMON.sub(r"`\1`", _OPTION.sub(_in_file, said)).replace(_DATA, "`data` below `prepare:`")


def _in_file(option: re.Match[str]) -> str:
    entry = option["option"].strip("-").replace("-", "_")
    if entry == "model":  # which all stages have together
        return "`model`"
    return f"`{entry}{f': {value}' if (value := option['value']) else ''}` below `{option['stage']}:`"


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
