"""The model a run starts from: drawn at random or already trained, the whole of it trained or a part."""

from __future__ import annotations

from pathlib import Path

from sickbay.core.errors import UsageError
from sickbay.reference.models import lora, pretrained
from sickbay.reference.models.config import Config
from sickbay.reference.models.freeze import freeze
from sickbay.reference.models.kinds import DECODER, KINDS, OF_OBJECTIVE, Model, model_for
from sickbay.reference.saving import checkpoint
from sickbay.reference.settings.recipe import Objective, Recipe, listed


def starting_model(config: Config, recipe: Recipe, *, fresh: bool = True) -> Model:
    """A model of shape `config` and the kind that the objective trains, with the recipe's adapters, its frozen parts frozen.

    Raises UsageError. `fresh`: False = a checkpoint will bring the weights, so that none are read.
    """
    if fresh and recipe.from_pretrained is not None:
        model = trained_model(Path(recipe.from_pretrained), config)
    else:
        model = model_for(recipe.objective, config)
    if recipe.lora_rank is not None:
        lora.apply(model, recipe.lora_rank, recipe.lora_alpha, listed(recipe.lora_targets))
    if recipe.freeze is not None:
        freeze(model, listed(recipe.freeze))
    return model


def shape_of(folder: Path, objective: Objective) -> tuple[Config, Path | None]:
    """(shape, tokenizer.json) of the trained model in `folder`, one of `sickbay train` or of transformers.

    Raises UsageError, also for another kind of model than `objective` trains.
    """
    state = checkpoint.read(folder) if _is_ours(folder) else None
    found, wanted = DECODER if state is None else state.kind, OF_OBJECTIVE[objective]
    if found != wanted:
        raise UsageError(f"the model in {folder} is of kind {found}; objective={objective} trains one of kind {wanted}")
    if state is not None:
        return state.config, state.folder / pretrained.TOKENIZER
    tokenizer = folder / pretrained.TOKENIZER
    return pretrained.config_of(folder), tokenizer if tokenizer.is_file() else None


def trained_model(folder: Path, config: Config) -> Model:
    """The trained model in `folder` with the context and the dropout of `config`. Raises UsageError."""
    if not _is_ours(folder):
        return pretrained.load(folder, context=config.context, dropout=config.dropout, pad_id=config.pad_id)[0]
    state = checkpoint.read(folder)
    trained = checkpoint.load_model(state, averaged=checkpoint.has_average(state))
    if state.config.positions == "learned" and config.context > state.config.context:
        raise UsageError(f"context is {config.context}; {folder} has learned positions up to {state.config.context}")
    held = {
        name: weight[: config.context] if name.endswith("position_embedding.weight") else weight
        for name, weight in trained.state_dict().items()
    }
    model: Model = KINDS[state.kind](config)
    model.load_state_dict(held)
    return model


def _is_ours(folder: Path) -> bool:
    try:
        checkpoint.find(folder)
    except FileNotFoundError:
        return False
    return True
