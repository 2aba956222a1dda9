"""Every quantity that may be recorded: its unit, what it belongs to, and what its absence means.

A signal is the only thing probes and exams (which measure) share with conditions (which judge).
`event` signals are written only when something happened, so silence while watched means "did not happen";
every other signal is written in health and sickness alike, so silence means "was not observed".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scope = Literal["run", "parameter", "module", "batch"]


@dataclass(frozen=True, slots=True)
class Signal:
    """One measurable quantity; `absent` is the reason shown when it was never observed."""

    id: str
    unit: str
    scope: Scope
    meaning: str
    absent: str = "it was not observed in this run"
    event: bool = False


# fmt: off
_ROWS = (
    # --- the loop: order of calls and their numbers --------------------------------------------------------------
    Signal("loss", "nats", "run", "loss handed to backward, summed over the step's micro-batches", "no loss was seen"),
    Signal("eval_loss", "nats", "run", "mean loss of the forwards without gradient since the last step", "no evaluation was seen"),
    Signal("chance_loss", "nats", "run", "ln of the number of classes: the loss of a uniform guess; note: classes", "no classification loss was seen"),
    Signal("learning_rate", "per step", "run", "largest learning rate over the parameter groups", "no optimizer was seen"),
    Signal("backwards_since_step", "backward calls", "run", "backward calls that reached the optimizer's parameters since its last step; where: optimizer", "no optimizer step was seen"),
    Signal("backwards_without_step", "backward calls", "run", "backward calls so far without any change of the weights; note: optimizers, scaler_skips", event=True),
    Signal("carried_gradient", "share of norm", "run", "norm of the gradients still there when the first backward after a step begins, over their norm at that step; 0 = zeroed; where: optimizer", "no second step was seen"),
    Signal("dropped_backwards", "backward calls", "run", "backward calls whose gradients were zeroed before any step used them; note: finite_loss", event=True),
    Signal("loss_weight_sum", "share", "run", "sum over a step's micro-batches of (loss given to backward / mean loss of the batch); 1 = a mean; note: count, weights, tokens, worst (largest relative deviation from token weighting)", "no gradient accumulation was seen"),
    # --- gradients, weights, updates --------------------------------------------------------------------------------
    Signal("grad_norm", "L2 norm", "run", "global gradient norm before clipping, after unscaling", "no gradients were seen"),
    Signal("param_grad_norm", "L2 norm", "parameter", "gradient norm of one tensor, before clipping, after unscaling", "no gradients were seen"),
    Signal("clip_norm", "L2 norm", "run", "norm the script's own clipping found; note: max_norm", "no clipping was seen"),
    Signal("clip_on_scaled", "loss scale", "run", "clipping ran while gradients were still multiplied by the loss scale", event=True),
    Signal("loss_scale", "factor", "run", "GradScaler's scale after update()", "no GradScaler was seen"),
    Signal("skipped_step", "steps", "run", "1 where GradScaler skipped the optimizer step, else 0", "no GradScaler was seen"),
    Signal("weight_norm", "L2 norm", "parameter", "norm of one weight tensor", "weights were not sampled"),
    Signal("update_ratio", "ratio", "parameter", "norm of the measured weight change over the norm of the weight, around one optimizer step", "no update was sampled"),
    Signal("unmoved_share", "share of elements", "parameter", "share of elements with a gradient that did not move in a step; note: moved, elements, rounding (share that one ulp explains)", "no update was sampled"),
    Signal("nonfinite_weight", "elements", "parameter", "weights already NaN or infinite; note: updates_before", event=True),
    Signal("gradient_absent", "parameters", "parameter", "trainable parameters without any gradient so far; note: names, changes_output (true/false/null), op, backwards", event=True),
    Signal("missing_from_optimizer", "parameters", "parameter", "parameters that get gradients but are in no optimizer; note: names, kind (unregistered, created-later, skipped, upstream), share", event=True),
    Signal("stale_in_optimizer", "parameters", "parameter", "parameters in the optimizer that the model no longer has; note: shapes", event=True),
    Signal("tied_weights", "bool", "parameter", "1 where embedding and head share memory as declared, 0 where they do not; note: declared_by, pair, equal_values", "no tying is declared and no copy was found"),
    # --- modes ------------------------------------------------------------------------------------------------------
    Signal("training_mode", "share of modules", "run", "share of dropout/batch-norm modules in training mode during training forwards; note: modules, count", "the model has no dropout or batch-norm"),
    Signal("evaluation_mode", "share of modules", "run", "share of dropout/batch-norm modules in training mode during forwards without gradient; note: modules, count, repeats, every_step (one pass in each of several training steps running)", "no evaluation of a model with dropout was seen"),
    # --- batches, targets -------------------------------------------------------------------------------------------
    Signal("batch_repeat", "steps", "batch", "steps since this very batch was last trained on; 0 = never before", "batches could not be fingerprinted"),
    Signal("target_offset", "positions", "batch", "offset k at which targets[t] equals inputs[t+k]; -1 = none; note: match, counted", "no loss over token sequences was seen"),
    Signal("ignored_targets", "share of targets", "batch", "share of the batch's targets that the loss ignores; note: count, ignore_index", "no loss with targets was seen"),
    Signal("padding_counted", "share of targets", "batch", "share of counted targets that are padding; note: pad_id, known_by, counted", "no padding was seen"),
    Signal("eos_targets", "targets", "batch", "counted targets that are the end token; note: eos_id, eos_in_inputs, known_by", "no end token shared with padding was seen"),
    # --- active questions -------------------------------------------------------------------------------------------
    Signal("future_influence", "ratio", "module", "change of counted outputs before a perturbed position over the change at and after it; note: position, affected", "the loss does not ask for next-token prediction"),
    Signal("past_blocked", "share of pairs", "module", "share of earlier positions whose perturbation leaves a later output unchanged; note: pairs, span", "the loss does not ask for next-token prediction"),
    Signal("padding_influence", "ratio", "module", "change of real positions' outputs when padding is perturbed, over the change when real tokens are; note: pad_id, known_by", "no padding was seen"),
    Signal("packing_influence", "ratio", "module", "change of a packed document's outputs when its neighbour is perturbed, over its own change; note: boundaries, known_by", "no packed documents were seen"),
    Signal("row_influence", "ratio", "module", "change of other batch rows' outputs when one row is perturbed, over that row's own change", "batches of one row only"),
    Signal("activation_rms", "RMS", "module", "RMS of a block's output; note: depth, blocks", "activations were not sampled"),
    Signal("normalization_ops", "operations", "run", "normalisations in one forward pass; note: kinds, blocks", "the forward pass was not traced"),
    Signal("attention_scale", "ratio", "module", "scale applied to attention scores times sqrt(head dimension): 1 is right; note: head_dim, factor, steps, declared", "no attention scores were recognised"),
    Signal("attention_logit_max", "score", "module", "largest attention score before softmax", "no attention scores were recognised"),
    Signal("attention_entropy", "share of ln n", "module", "lowest mean entropy over heads, over that of uniform attention", "no attention scores were recognised"),
    Signal("dead_units", "share of units", "module", "share of a ReLU's units that were zero for every input of a batch; note: units, all_dead_so_far", "the model has no ReLU"),
    # --- things that broke ------------------------------------------------------------------------------------------
    Signal("nonfinite_step", "steps", "run", "a NaN or infinity was first noticed; note: what (loss, gradient, weight, update)", event=True),
    Signal("first_nonfinite", "elements", "module", "the first operation with a non-finite result from finite operands; note: op, phase, operands, result, chain", event=True),
    Signal("exception", "errors", "run", "an uncaught exception; note: type, message, kind, shapes, likely, operation", event=True),
)
# fmt: on

SIGNALS: dict[str, Signal] = {row.id: row for row in _ROWS}
