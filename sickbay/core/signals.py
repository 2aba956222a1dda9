"""Every quantity that may be recorded: its unit, what it belongs to, and what its absence means.

A signal is the only thing probes and exams (which measure) share with conditions (which judge).
`event` signals are written only when something happened, so silence while watched means "did not happen";
every other signal is written in health and sickness alike, so silence means "was not observed".
Of `per_rank` signals the chart of a run holds the readings of all its ranks, those of rank 1 and up with `note["rank"]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
    per_rank: bool = False


# fmt: off
_ROWS = (
    # --- the loop: order of calls and their numbers --------------------------------------------------------------
    Signal("loss", "nats", "run", "loss handed to backward, summed over the step's micro-batches", "no loss was seen"),
    Signal("eval_loss", "nats", "run", "mean loss of the forwards without gradient since the last step", "no evaluation was seen"),
    Signal("train_loss", "nats", "run", "mean of the step's training losses as the loss function gave them, sums over class targets per target: the same units as eval_loss", "no torch loss function was seen"),
    Signal("validation_loss", "nats", "run", "mean loss of an evaluation's own data: of two passes between two steps, the one with the higher loss; note: error, batches", "no evaluation was seen"),
    Signal("ngram_loss", "nats per token", "run", "what counts of all batches before lose on this one's new rows: the best of single tokens, pairs and triples; note: unigram, bigram, trigram, model (its own loss on the batch), tokens, counted", "no next-token training was seen"),
    Signal("pairing_gain", "share of loss", "run", "by how much the loss is lower than with the targets of other rows, over that; 0 = inputs tell the model nothing; where: fresh, repeated (rows seen before), evaluation; note: rows, error", "no loss over rows of a batch was seen"),
    Signal("input_conflicts", "share of rows", "run", "rows whose very input came before with another target, over all rows; note: rows, repeats, inputs (distinct), rate (over the repeats), marginal (what rows at random would give)", "no loss over rows of a batch was seen"),
    Signal("input_dependence", "standard deviations", "run", "dependence of targets on inputs above that of pairs put together at random (HSIC, linear kernels); note: rows, columns (that vary), noise (inputs look made up)", "no loss over rows of a batch was seen"),
    Signal("chance_loss", "nats", "run", "ln of the number of classes: the loss of a uniform guess; note: classes", "no classification loss was seen"),
    Signal("frequency_loss", "nats", "run", "entropy of the frequencies of the targets so far: the loss of guessing by frequency; note: targets", "no single loss over classes or yes-or-no targets was seen"),
    Signal("learning_rate", "per step", "run", "largest learning rate over the parameter groups", "no optimizer was seen"),
    Signal("scheduler_steps", "scheduler steps", "run", "steps that a torch scheduler took until the run's end; note: updates (its optimizer's), moves (of these, how many found it advanced), planned, warmup, kind, optimizer, called, base, own_loop, unreached, stopped; where: class", "no torch scheduler was built"),
    Signal("step_gain", "share of loss", "run", "how much the optimizer's next step lowers the loss of its own batch, tried on a copy; note: losses (by multiple of the step), best (multiple of the lowest loss), loss, rate, ratio", "no step was tried on a copy: updates were of ordinary size"),
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
    Signal("unmoved_share", "share of elements", "parameter", "share of elements with a gradient that did not move in a step; note: moved, elements, rounding (share that one ulp explains), dtype, rate, exact (the optimizer is torch's own, which rounds to nearest)", "no update was sampled"),
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
    Signal("padding_influence", "ratio", "module", "change of real positions' outputs when padding is perturbed, over the change when real tokens are; note: pad_id, known_by, cut (the same when padding is cut off, without attention; None if it cannot be)", "no padding was seen"),
    Signal("packing_influence", "ratio", "module", "change of a packed document's outputs when its neighbour is perturbed, over its own change; note: boundaries, known_by", "no packed documents were seen"),
    Signal("row_influence", "ratio", "module", "change of other batch rows' outputs when one row is perturbed, over that row's own change", "batches of one row only"),
    Signal("activation_rms", "RMS", "module", "RMS of a block's output; note: depth, blocks", "activations were not sampled"),
    Signal("normalization_ops", "operations", "run", "normalisations in one forward pass; note: kinds, blocks", "the forward pass was not traced"),
    Signal("attention_scale", "ratio", "module", "scale applied to attention scores times sqrt(head dimension): 1 is right; note: head_dim, factor, steps, declared", "no attention scores were recognised"),
    Signal("attention_logit_max", "score", "module", "largest attention score before softmax", "no attention scores were recognised"),
    Signal("attention_entropy", "share of ln n", "module", "lowest mean entropy over heads, over that of uniform attention", "no attention scores were recognised"),
    Signal("dead_units", "share of units", "module", "share of a ReLU's units that were zero for every input of a batch; note: units, all_dead_so_far", "the model has no ReLU"),
    # --- time -------------------------------------------------------------------------------------------------------
    Signal("step_seconds", "seconds", "run", "median time of a step without sickbay's own; note: forward, backward, optimizer (shares of it), steps", "too few steps were timed"),
    Signal("data_wait", "share of step time", "run", "median share of a step spent waiting for or making its batch; note: seconds, step_seconds, loader, workers, dataset, idle (share of the wait without computing), rows (asked of loaders in a step, 0 = not known)", "too few steps were timed"),
    Signal("idle_copies", "share of step time", "run", "share of a step spent by lines between steps that copy into a name nobody reads; note: seconds, step_seconds", "too few steps were timed"),
    Signal("float64_gain", "share of step time", "run", "measured share of a step that float32 would save; note: seconds64, seconds32, elements", "no step was profiled"),
    Signal("loop_gain", "share of step time", "module", "measured share of a step that one batched call would save of a Python loop's calls; note: count, operation, loop_seconds, batched_seconds, rows", "no step was profiled"),
    Signal("broadcast_gain", "share of step time", "module", "measured share of a step that a matrix product would save of a broadcast multiplication and its sum; note: shape, count, seconds, product_seconds", "no step was profiled"),
    Signal("attention_gain", "share of step time", "module", "measured share of a step that scaled_dot_product_attention would save of attention written out; note: shape, count, seconds, fused_seconds", "no step was profiled"),
    Signal("copy_share", "share of step time", "module", "measured share of a step spent on copies and casts without which outputs and gradients are bit-identical; note: count, bytes, kinds, seconds", "no step was profiled"),
    Signal("single_forwards", "calls per step", "run", "calls of the model on one row each in a step; note: same_storage, shape, gain (times faster as one call, measured), saved (share of the step)", "no step called the model several times on one row"),
    Signal("throughput_gain", "ratio", "run", "most rows a second over those at the script's own batch size, by repeating its rows; note: rows, knee, curve", "throughput was not measured"),
    # --- memory ---------------------------------------------------------------------------------------------------------
    Signal("kept_graphs", "steps", "run", "earlier steps whose autograd graph is still in memory at the end of a step", "no optimizer step after a backward was seen"),
    Signal("kept_outputs", "bytes", "run", "model outputs of earlier steps that are still in memory; note: steps", event=True),
    Signal("resident_memory", "bytes", "run", "memory in use at the end of a step: of the GPU's allocator where CUDA is used, else of the process", "memory in use could not be read"),
    Signal("memory_holder", "steps or tensors", "run", "a variable that keeps more of the past with every step; note: kind (graph, tensors), path, type, function, bytes (per step), freed, drops, others", event=True),
    Signal("memory_part", "bytes", "run", "one part of the training's memory, measured in one step; where: weights, gradients, optimizer, activations, logits; note: how", "memory was not taken apart in this run"),
    Signal("memory_limit", "bytes", "run", "the memory there is when it ran out; note: what, asked, rows, blocks, around, boundary, outputs, largest, adam", event=True),
    Signal("block_activations", "bytes", "module", "bytes that one block keeps for its backward pass, in one step", "the autograd graph was not looked into"),
    Signal("vocabulary_used", "share of rows", "parameter", "share of the embedding's rows whose ids have come in the data so far; note: rows, seen, tokens, steps, new_late (share of the rows seen that first came in the newer half of the steps), weight_bytes, trained, share (of all parameters), head, tied", "no embedding of token ids was seen"),
    Signal("evaluation_graphs", "forwards", "run", "forwards in an evaluation that built a graph no backward used; note: kept (most graphs alive at once), bytes (of one forward's outputs), mode (evaluation, training)", event=True),
    Signal("evaluation_outputs", "bytes", "run", "outputs of one evaluation's forwards that were alive at once; note: forwards", event=True),
    # --- structure: initialisation, scale, depth --------------------------------------------------------------------
    Signal("initial_loss", "nats", "run", "mean cross-entropy of the first batch, before any update; note: chance (ln of the classes), classes, targets, logit_std, trained (the weights were learned before)", "no cross-entropy over classes was seen in the first step"),
    Signal("initial_gain", "ratio", "parameter", "RMS of a weight matrix before any update times sqrt of its fan-in: about 1 keeps the size of activations; note: rms, mean, fan_in, trained", "no weight matrix was seen in the first step's graph"),
    Signal("clone_units", "bool", "parameter", "1 where all rows or all columns of a weight matrix are alike and so are those of its gradient; note: entry (the first), constant (one value throughout), zero, no_gradient, shape", "no weight matrix was seen in the first step's graph"),
    Signal("gradient_by_depth", "1 / weight", "parameter", "gradient norm over weight norm of a matrix; note: depth (order of first use), matrices, size (the weight's norm)", "no gradient could be computed in the first step's graph"),
    Signal("input_rms", "RMS", "parameter", "RMS of the data that a first layer multiplies, after whatever the model does to it before; note: mean, std, largest, normalised (a normalisation alone sees the result)", "no layer multiplies the batch itself"),
    Signal("target_rms", "RMS", "run", "RMS of a regression's targets; note: mean, std, output_rms (of the model before any update)", "no regression loss was seen in the first step"),
    Signal("loss_floor", "nats", "run", "the lowest classification loss that the logits' bounds leave reachable, above that of unbounded ones; note: op, low, high, classes, chance", "no classification loss was seen in the first step"),
    Signal("probability_sum", "sum", "run", "sum over classes of exp(what nll_loss was given): 1 for log-probabilities; note: least, largest, plain_sum", "no loss over log-probabilities was seen"),
    Signal("paired_broadcast", "ratio", "run", "elements of an operation between model and loss over those of its operands, which hold one number per sample each but lie in different dimensions; note: function, shapes, result, roles", event=True),
    Signal("restored_state", "parts", "run", "parts of the training state that the first step after a resume did without; where: the optimizer's class; note: missing, saved, file, key, count", "no training was taken up from a checkpoint's step or epoch count"),
    Signal("gradient_error", "relative error", "module", "of a hand-written backward against difference quotients of its forward in float64, over several directions; where: the autograd Function; note: input, shape, analytic, numeric, directions", "no autograd Function of the script's own was seen"),
    Signal("batch_rows", "rows", "batch", "rows of a training batch, the first time and where they are not what its loader was made for; note: promised, batches", "no training batch came from a DataLoader with a batch size"),
    Signal("setting_effect", "share of trials", "run", "trials in which a fresh model with one setting changed computed something else; where: the setting; note: was, tried", "no model with a configuration of its own and settings to change was trained"),
    # --- ranks ----------------------------------------------------------------------------------------------------------
    Signal("rank_weights", "sum of absolute values", "run", "of the trained weights that one rank's forward used; where: the model's class; note: rank, by (what makes the ranks replicas), around, apart, layout, norms (by tensor), names, gradients, averaged", "only one process trained", per_rank=True),
    Signal("rank_batch", "checksum", "batch", "mark of the first batch of one rank's step: inputs and targets; note: rank", "only one process trained", per_rank=True),
    # --- generated text -----------------------------------------------------------------------------------------------
    Signal("generated_repetition", "share of stretches", "run", "share of the stretches of generated tokens that repeat more n-grams than 99 of 100 stretches of the training text; note: stretch, gram, own and usual (median repeated shares), loop and period (longest, tokens), tokens, distinct_1, distinct_2, surprise, entropy, greedy, temperature, decoding settings", "no text of 24 tokens or more was generated in this run"),
    Signal("sampling_temperature", "temperature", "run", "temperature under which the chosen tokens are likeliest, 0 = every one the model's first choice; note: surprise and entropy (nats per token at temperature 1), greedy (share of first choices), lead (nats of evidence against temperature 1), tokens", "no text of 24 tokens or more was generated in this run"),
    Signal("generated_cross_entropy", "nats per token", "run", "generated text under counts of token pairs in the training text; note: usual (the same of training text left out of the counts), surprise, entropy, temperature, tokens", "no text of 24 tokens or more was generated in this run"),
    Signal("generation_gap", "ratio", "module", "largest difference between the log-probabilities that the generating loop got and those of the training forward on the same tokens, over the spread of the latter; note: kl (nats), kind, tokens, half (half precision)", "no generation by a trained model was seen"),
    # --- things that broke ------------------------------------------------------------------------------------------
    Signal("nonfinite_step", "steps", "run", "a NaN or infinity was first noticed; note: what (loss, gradient, weight, update)", event=True),
    Signal("first_nonfinite", "elements", "module", "the first operation with a non-finite result from finite operands; note: op, phase, operands, result, chain, seen_again (made before the model; the numbers are that step's)", event=True),
    Signal("exception", "errors", "run", "an uncaught exception; note: type, message, kind, shapes, likely, operation", event=True),
)
# fmt: on

SIGNALS: dict[str, Signal] = {row.id: row for row in _ROWS}


def wanted(module: Any, asked: frozenset[str] | None) -> bool:
    """True if one of the signals `asked` for (None = all) is measured by `module` (its SIGNALS) or builds on what it measures (its FEEDS)."""
    return asked is None or not asked.isdisjoint((*getattr(module, "SIGNALS", ()), *getattr(module, "FEEDS", ())))
