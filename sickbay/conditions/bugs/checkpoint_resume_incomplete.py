"""A run was taken up again with its weights and its step count, but without the rest of its training state.

Looks like
    A jump of the loss right after the resume, then a slow way back to where it was; or a learning rate that starts its warm-up again.
    A run that is resumed often enough never gets far.

Why
    The optimizer's state (momentum, Adam's moments and its own step count) was not saved, or was saved and not loaded; or it was loaded
    into an optimizer that was made anew afterwards. The same for the scheduler: it begins at step 0 while the loop begins at step N.

Tell apart
    Fine-tuning from somebody's weights begins with a fresh optimizer by design, and counts from zero: only a run that reads the count
    from the file is asked. Plain SGD has no state to lose. loss-spike has no load before it.

Cure
    Save and load model, optimizer, scheduler, GradScaler, random number generators, the position in the data and the step count
    together; load the optimizer's state after the optimizer was made for this model, and before the first step.

Sources
    PyTorch documentation, "Saving & Loading a General Checkpoint for Inference and/or Resuming Training"; accelerate pull request 4071;
    Kingma & Ba 2015, arXiv 1412.6980, section 3 (the moments are estimates over about 1/(1-beta) steps).
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, Threshold

COMPLETE = Threshold(
    0, "parts", source="a resumed run is the run that was stopped: nothing of its state may be missing (PyTorch documentation)"
)


def diagnose(chart: Chart) -> Diagnosis | None:
    """The first resume whose first step went without the optimizer's or the scheduler's state."""
    found = next((r for r in chart["restored_state"] if r.value > COMPLETE), None)
    if found is None:
        return None
    note = found.note
    missing, saved = list(note.get("missing") or ()), list(note.get("saved") or ())
    lost = " and ".join(f"the {part}'s state, which the file {'holds' if part in saved else 'does not hold'}" for part in missing)
    count = f"{note.get('key')} {note.get('count')}"
    fresh = f"{found.where} began with empty moments" if "optimizer" in missing else "its schedule began again at step 0"
    return Diagnosis(
        summary=f"The run goes on from {note.get('file')} ({count}) without {lost}: {fresh}.",
        evidence=(Evidence(found, COMPLETE, label="parts not restored"),),
        severity="warning",
        step=found.step,
        where=found.where,
        source=found.source,
        seconds=found.seconds,
    )


def inject(case: Any) -> Any:
    """In the middle of the run weights and step count are saved, loaded and trained on with an optimizer that begins anew."""
    update = case.update
    steps = 0

    def update_and_resume(case: Any, model: Any, optimizer: Any) -> None:
        import tempfile

        import torch

        nonlocal steps
        update(case, model, optimizer)
        steps += 1
        if steps == max(2, case.steps // 2):
            with tempfile.TemporaryFile() as file:
                torch.save({"model": model.state_dict(), "step": steps}, file)
                file.seek(0)
                state = torch.load(file)
            model.load_state_dict(state["model"])
            steps = state["step"]
            optimizer.state.clear()

    return case.but(update=update_and_resume)


condition = Condition(
    id="checkpoint-resume-incomplete",
    symptom="a resumed run goes on without the optimizer's or the scheduler's state",
    needs=("restored_state",),
    diagnose=diagnose,
    prescribes=("resume-everything",),
    leads_to=("loss-spike", "repetitive-generation", "incoherent-generation"),
    inject=inject,
)
