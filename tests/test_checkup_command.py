"""`sickbay checkup` as a command, and the pytest plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytest_plugins = ["pytester"]


def checkup(*words: str, folder: Path = HERE) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-m", "sickbay", "checkup", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


def test_a_healthy_target_is_clean() -> None:
    done = checkup("--only", "shapes,gradients,causality", "--json", "checkup_targets:healthy")
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(done.stdout)
    assert content["verdict"] == "healthy" and all(finding["severity"] == "note" for finding in content["findings"])
    assert [row["exam"] for row in content["exams"]] == ["shapes", "gradients", "causality"]


def test_a_sick_target_exits_with_1_and_says_why() -> None:
    done = checkup("checkup_targets.py:leaky", "--only=causality")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "SICK: 1 critical" in done.stdout and "causal-leak" in done.stdout


@pytest.mark.parametrize(
    "target, text",
    [
        ("checkup_targets:helthy", "did you mean healthy?"),
        ("no_such_module:make", "there is no module 'no_such_module'"),
        ("nowhere.py:make", "there is no file nowhere.py"),
        ("checkup_targets:next_token", "needs the arguments outputs, targets"),
        ("checkup_targets:batches", "returned a generator without model and batches"),
        ("checkup_targets", "neither module:function"),
        ("--only", "expected one argument"),
    ],
)
def test_a_wrong_target_is_a_usage_error_in_one_line(target: str, text: str) -> None:
    done = checkup(target)
    assert done.returncode == 2
    assert text in done.stderr and "Traceback" not in done.stderr and not done.stdout


def test_a_function_that_raises_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def make():\n    print('hello')\n    raise ValueError('no data')\n")
    done = checkup("mine:make", folder=tmp_path)
    assert done.returncode == 2
    assert "mine:make raised ValueError: no data (mine.py:3)" in done.stderr


def test_a_script_is_stopped_and_judged_by_its_first_steps(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import torch\n"
        "from checkup_targets import batches, next_token, tiny\n"
        "model = tiny()\n"
        "optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)\n"
        "for step, (ids, targets) in enumerate(batches()):\n"
        "    loss = next_token(model(ids), targets)\n"
        "    optimizer.zero_grad(); loss.backward(); optimizer.step()\n"
        "    print(step)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    command = [sys.executable, "-m", "sickbay", "checkup", "--json", "--max-steps", "6", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["exam"]: row for row in json.loads(done.stdout)["exams"]}
    assert rows["training"]["text"].startswith("6 watched steps")
    assert rows["causality"]["verdict"] == "ok" and "in hand" in rows["throughput"]["text"]


def test_a_transformers_config_is_built_and_examined(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32
    )
    config.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("what is past is prologue. " * 40)
    done = checkup(".", "--text", "text.txt", "--only", "shapes,generation,initial-loss", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cached and full logits differ" in done.stdout
    assert "needs a text" in checkup(".", folder=tmp_path).stderr


@pytest.mark.parametrize("name, outcome", [("healthy", {"passed": 1}), ("leaky", {"failed": 1})])
def test_the_fixture_is_a_gate(pytester: pytest.Pytester, name: str, outcome: dict[str, int]) -> None:
    pytester.makepyfile(
        f"""
        import sys
        sys.path.insert(0, {str(HERE)!r})
        import pytest
        import checkup_targets

        @pytest.mark.sickbay(only=["causality", "gradients"])
        def test_model(sickbay):
            sickbay.assert_healthy(*checkup_targets.{name}())
        """
    )
    result = pytester.runpytest_subprocess("-p", "sickbay.pytest_plugin", "--strict-markers")
    result.assert_outcomes(**outcome)
    if name == "leaky":
        result.stdout.fnmatch_lines(["*causal-leak*critical*"])


def test_the_plugin_loads_neither_torch_nor_sickbays_rooms() -> None:
    code = "import sys, sickbay.pytest_plugin; assert 'torch' not in sys.modules and 'sickbay.doctor' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0
