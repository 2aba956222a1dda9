"""An error that ends a training shows the same text under `sickbay run` as under plain Python."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from running import assert_alike, both, write

TRAINING = """
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
            self.fault = None

        def forward(self, x):
            if self.fault:
                self.fault(x)
            return self.body(x)

    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x, y):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    for _ in range(STEPS):
        step(x, y)
    """
ERRORS = {
    "in the forward": "step(x[:, :3], y)",
    "in the forward, chained": """
        def fault(x):
            try:
                x.view(7)
            except RuntimeError as problem:
                raise ValueError("no view") from problem
        model.fault = fault
        try:
            step(x, y)
        finally:
            model(x[:, 1:])
        """,
    "in a module with a hook": "model.register_forward_hook(lambda *_: None); step(x[0], y)",
    "in a hook": "model.register_forward_hook(lambda *_: 1 / 0); step(x, y)",
    "in a part called alone": "model.body[0](x[:, 1:])",
    "in the loss": "step(x, y + 3)",
    "in the loss module": "nn.CrossEntropyLoss()(model(x), y[1:])",
    "in mse": "nn.functional.mse_loss(model(x), torch.zeros(7, 2))",
    "in the backward": "loss = model(x).sum(); loss.backward(); loss.backward()",
    "in the backward, not a scalar": "model(x).backward()",
    "in a hook of the backward": """
        out = model(x)
        out.register_hook(lambda gradient: gradient.view(7))
        torch.autograd.backward(out.sum())
        """,
    "in torch.autograd.grad": "torch.autograd.grad(model(x).sum(), [torch.ones(1, requires_grad=True)])",
    "in a function of one's own": """
        class Cube(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x ** 3
            @staticmethod
            def backward(ctx, gradient):
                raise NotImplementedError("no derivative")
        Cube.apply(model(x)).sum().backward()
        """,
    "in clipping": "nn.utils.clip_grad_norm_(model.parameters(), 1.0, 'two', error_if_nonfinite=True)",
    "in clipping's arguments": "nn.utils.clip_grad_norm_(model.parameters())",
    "in the optimizer": "torch.optim.SGD([torch.ones(1) * x], lr=0.1)",
    "in the optimizer's arguments": "torch.optim.AdamW()",
    "in a closure": "optimizer.step(lambda: model(x[:, 1:]))",
    "in the scaler": "torch.amp.GradScaler('cpu').step(optimizer)",
    "in a functional gradient": "torch.func.grad(lambda x: x)(x)",
    "in the compiler's arguments": "torch.compile(model, nonsense=1)(x)",
    "ctrl-C in the forward": """
        def fault(x):
            raise KeyboardInterrupt
        model.fault = fault
        step(x, y)
        """,
}


@pytest.mark.parametrize("steps", [0, 4], ids=["at once", "later"])
def test_text_of_an_uncaught_error_is_pythons(tmp_path: Path, steps: int) -> None:
    """All errors in one script, which prints each by way of `sys.excepthook`; the last one ends it."""
    write(tmp_path, TRAINING.replace("STEPS", str(steps)), "training.py")
    parts = ["import sys", "from training import *"]
    for number, (name, code) in enumerate(ERRORS.items()):
        write(tmp_path, "from training import *\n\n" + textwrap.dedent(code), f"error{number}.py")
        parts += [f"print({name!r}, file=sys.stderr)", "try:", f"    import error{number}", "except BaseException:"]
        parts += ["    sys.excepthook(*sys.exc_info())", "    model.fault = None", "    model._forward_hooks.clear()"]
    parts.append("step(x[:, :3], y)")
    write(tmp_path, "\n".join(parts))
    bare, watched = both(tmp_path, "script.py")
    assert bare.stderr.count(b"Traceback (most recent call last)") >= len(ERRORS) + 1
    assert_alike(bare, watched)


@pytest.mark.parametrize("name", ["in the backward", "ctrl-C in the forward"])
def test_uncaught_in_the_script_itself(tmp_path: Path, name: str) -> None:
    write(tmp_path, textwrap.dedent(TRAINING.replace("STEPS", "1")) + "\n" + textwrap.dedent(ERRORS[name]))
    bare, watched = both(tmp_path, "script.py")
    assert b"Traceback" in bare.stderr and bare.code != 0
    assert_alike(bare, watched)
