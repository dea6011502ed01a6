"""The methods of TRL's trainer that we override or call: an upgrade of TRL that changes one of them is named here."""

import inspect
from importlib.metadata import version

import pytest
import trl

from grpo_ext import GRPOExtTrainer

# The parameters of each method in the TRL version that grpo-ext was checked with.
TRL_METHODS = {
    "_generate": "self prompts",
    "_generate_single_turn": "self prompt_ids images multimodal_fields num_generations has_tool_images",
    "_tokenize_prompts": "self prompts",
    "_calculate_rewards": "self inputs prompts completions completion_ids_list",
    "_generate_and_score_completions": "self inputs",
    "_prepare_inputs": "self generation_batch",
    "compute_loss": "self model inputs return_outputs num_items_in_batch",
    "_compute_loss": "self model inputs",
    "_get_per_token_logps_and_entropies": (
        "self model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss pixel_values "
        "image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles image_sizes token_type_ids "
        "mm_token_type_ids image_position_ids"
    ),
    "training_step": "self model inputs num_items_in_batch",
    "log": "self logs start_time",
    "train": "self resume_from_checkpoint trial ignore_keys_for_eval",
    "get_train_dataloader": "self",
    "_get_train_sampler": "self dataset",
    "_run_epoch": (
        "self model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
        "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch"
    ),
    "_maybe_log_save_evaluate": (
        "self tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time learning_rate"
    ),
    "_finalize_training": "self trial num_train_samples start_time",
    "_load_rng_state": "self checkpoint",
    "_get_output_dir": "self trial",
    "_save": "self output_dir state_dict",
    "_save_checkpoint": "self model trial",
    "create_model_card": "self model_name dataset_name tags",
    "init_hf_repo": "self token private",
    "push_to_hub": "self commit_message blocking token revision private kwargs",
    "_push_from_checkpoint": "self checkpoint_folder",
    "_load_from_checkpoint": "self resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "self checkpoint",
    "get_off_policy_mask": "advantages per_token_logps sampling_per_token_logps mask off_policy_threshold",
}


@pytest.mark.parametrize("name", TRL_METHODS)
def test_the_methods_of_trl_are_unchanged(name):
    parameters = list(inspect.signature(getattr(trl.GRPOTrainer, name)).parameters)
    assert parameters == TRL_METHODS[name].split(), (
        f"TRL {version('trl')} changed GRPOTrainer.{name}; grpo-ext was checked with 1.16.0. Read the new method, "
        f"adapt grpo_ext/trainer.py, then this table."
    )


def test_every_override_is_in_the_table():
    classes = GRPOExtTrainer.__mro__[: GRPOExtTrainer.__mro__.index(trl.GRPOTrainer)]
    ours = {name for kind in classes for name, value in vars(kind).items() if inspect.isfunction(value)}
    overridden = {name for name in ours if hasattr(trl.GRPOTrainer, name)} - {"__init__"}
    assert overridden <= set(TRL_METHODS)
