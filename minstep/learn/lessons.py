"""The exercises, a chapter each: which functions are to be written, and the scenes that check them.

Checked by: tests/learn/test_exercise.py
"""

from typing import NamedTuple

from minstep.learn.lessons_around import (
    a_checkpoint_is_read_from_disk,
    a_depth_mixes_a_state_with_the_next_token,
    an_fp8_code_times_the_scale_of_its_block,
    bfloat16_is_the_upper_half_of_float32,
    caches_hold_what_a_query_can_see,
    drafts_leave_the_distribution_alone,
    each_depth_has_tensors_of_its_own,
    each_layer_gets_what_the_config_says_of_it,
    parameters_are_counted_by_part,
    settings_that_cannot_be_are_refused,
    weights_become_the_nearest_fp8_codes,
    what_was_dropped_cannot_come_back,
)
from minstep.learn.lessons_beyond import (
    a_message_is_the_same_however_it_is_cut,
    a_product_sends_its_gradient_back,
    biases_lift_experts_that_lack_tokens,
    characters_come_whole_and_stops_do_not,
    conversations_become_prompts,
    draws_follow_the_probabilities,
    filters_apply_in_their_order,
    gradients_of_a_whole_model,
    pairs_of_tensors_are_compared,
    rows_are_measured_by_their_own_length,
    shapes_fit_where_only_form_differs,
    singular_values_become_one,
    surprise_is_minus_log_probability,
    the_objective_weighs_the_depths,
    the_rate_warms_up_and_falls,
)
from minstep.learn.lessons_layers import (
    a_block_of_each_kind,
    a_query_sees_itself_and_what_its_window_holds,
    angles_grow_with_the_position,
    attention_in_blocks_is_the_same,
    attention_of_each_kind_of_layer,
    both_factors_are_held_within_the_limit,
    halves_of_a_head_are_rotated,
    ids_that_are_no_tokens_are_refused,
    layers_run_in_order_and_go_on_from_caches,
    pairs_turn_at_their_frequencies,
    query_heads_share_key_value_heads,
    softmax_and_sigmoid_bear_large_numbers,
    states_become_logits,
    the_chosen_experts_are_added_up,
    the_router_chooses_and_weighs,
    token_ids_become_rows_of_the_table,
    vectors_of_any_shape_are_normed,
)
from minstep.learn.scenes import WHOLE, Scene

PLANT = 13  # the chapter where no function is missing, but a bug is planted


class Exercise(NamedTuple):
    """A chapter's title, the functions to write by module, methods with their class, its scenes."""

    title: str
    functions: dict[str, tuple[str, ...]]
    scenes: tuple[Scene, ...]


EXERCISES = {
    0: Exercise(
        "one token, in and out",
        {"model": ("embed", "head")},
        (
            token_ids_become_rows_of_the_table,
            ids_that_are_no_tokens_are_refused,
            states_become_logits,
            *WHOLE,
        ),
    ),
    1: Exercise(
        "the config and what is irregular",
        {"config": ("_layers", "_heads", "_scaling")},
        (
            each_layer_gets_what_the_config_says_of_it,
            settings_that_cannot_be_are_refused,
            *WHOLE,
        ),
    ),
    2: Exercise("the norm", {"norm": ("rms_norm",)}, (vectors_of_any_shape_are_normed, *WHOLE)),
    3: Exercise(
        "rotary position embedding",
        {"rope": ("inverse_frequencies", "rotation", "rotate")},
        (
            pairs_turn_at_their_frequencies,
            angles_grow_with_the_position,
            halves_of_a_head_are_rotated,
            *WHOLE,
        ),
    ),
    4: Exercise(
        "attention",
        {
            "activations": ("softmax",),
            "attention": ("self_attention", "visible", "attend", "attend_in_blocks"),
        },
        (
            softmax_and_sigmoid_bear_large_numbers,
            a_query_sees_itself_and_what_its_window_holds,
            query_heads_share_key_value_heads,
            attention_of_each_kind_of_layer,
            attention_in_blocks_is_the_same,
            *WHOLE,
        ),
    ),
    5: Exercise(
        "SwiGLU and its clamps",
        {"activations": ("sigmoid", "silu"), "mlp": ("swiglu",)},
        (
            softmax_and_sigmoid_bear_large_numbers,
            both_factors_are_held_within_the_limit,
            *WHOLE,
        ),
    ),
    6: Exercise(
        "router and experts",
        {"moe": ("route", "experts", "one_by_one", "at_once")},
        (the_router_chooses_and_weighs, the_chosen_experts_are_added_up, *WHOLE),
    ),
    7: Exercise(
        "block and decoder",
        {"model": ("block", "decoder", "run_layers")},
        (a_block_of_each_kind, layers_run_in_order_and_go_on_from_caches, *WHOLE),
    ),
    8: Exercise(
        "caches",
        {
            "cache": (
                "FullCache.append",
                "FullCache._make_room",
                "FullCache.truncate",
                "WindowCache.truncate",
            )
        },
        (
            caches_hold_what_a_query_can_see,
            what_was_dropped_cannot_come_back,
            layers_run_in_order_and_go_on_from_caches,
            *WHOLE[1:],
        ),
    ),
    9: Exercise(
        "drafts that change no text",
        {
            "weights": ("mtp_weights",),
            "mtp": ("mtp_depth", "mtp_head", "mtp_forward"),
            "sampling": ("acceptance", "verify"),
        },
        (
            each_depth_has_tensors_of_its_own,
            a_depth_mixes_a_state_with_the_next_token,
            drafts_leave_the_distribution_alone,
            *WHOLE,
        ),
    ),
    10: Exercise(
        "weights on disk",
        {
            "fast.bf16": ("BF16Array.into", "to_bf16"),
            "fast.fp8": ("FP8Array.into", "to_fp8", "_nearest"),
        },
        (
            bfloat16_is_the_upper_half_of_float32,
            an_fp8_code_times_the_scale_of_its_block,
            weights_become_the_nearest_fp8_codes,
            a_checkpoint_is_read_from_disk,
        ),
    ),
    11: Exercise(
        "comparing with another implementation",
        {"parity.compare": ("compare", "fitted", "row_errors")},
        (
            shapes_fit_where_only_form_differs,
            pairs_of_tensors_are_compared,
            rows_are_measured_by_their_own_length,
        ),
    ),
    12: Exercise(
        "training",
        {
            "train.loss": ("surprise", "objective"),
            "train.tape": ("matmul",),
            "train.optimizer": ("orthogonalised", "rate_at"),
            "train.balance": ("balance",),
        },
        (
            surprise_is_minus_log_probability,
            the_objective_weighs_the_depths,
            a_product_sends_its_gradient_back,
            gradients_of_a_whole_model,
            singular_values_become_one,
            biases_lift_experts_that_lack_tokens,
            the_rate_warms_up_and_falls,
        ),
    ),
    PLANT: Exercise("a planted bug", {}, WHOLE),
    14: Exercise(
        "what one token costs",
        {"store.inspect": ("_part", "_active")},
        (parameters_are_counted_by_part,),
    ),
    15: Exercise(
        "text, chat and sampling",
        {
            "sampling": ("distribution", "draw"),
            "text.reply": ("unfinished",),
            "text.tokenizer": ("StreamingText.add",),
            "text.prompt": ("_last_question", "_assistant"),
        },
        (
            filters_apply_in_their_order,
            draws_follow_the_probabilities,
            characters_come_whole_and_stops_do_not,
            a_message_is_the_same_however_it_is_cut,
            conversations_become_prompts,
            *WHOLE[1:],
        ),
    ),
}
