"""`sickbay generate`: prompts in, texts out, on the terminal, as JSON and in a conversation."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from running import run, sickbay
from test_reference_generate import transformer

from sickbay.cli import conversation, train
from sickbay.cli import generate as command
from sickbay.core.errors import UsageError
from sickbay.reference.generation import complete
from sickbay.reference.generation.beam import Beams, beam_search
from sickbay.reference.generation.complete import Continuer, Piece, encoded
from sickbay.reference.generation.decoding import Decoding
from sickbay.reference.generation.generate import generate
from sickbay.reference.models.model import Transformer
from sickbay.reference.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

WORDS = CharTokenizer("abcdefghij\n")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """`written(*words)`: what the command prints for a model of eleven characters."""
    monkeypatch.setattr(command, "load", lambda path, device, weights: Continuer(transformer(), WORDS))

    def call(*words: str) -> str:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        assert command.main(parser.parse_args([str(tmp_path), *words])) == 0
        return capsys.readouterr().out

    return call


def test_the_same_words_give_the_same_text_and_another_seed_another(written: Any) -> None:
    first = written("--prompt", "abc", "--tokens", "30")
    assert first.startswith("abc") and first.endswith("\n") and len(first) == 34
    assert first == written("--prompt", "abc", "--tokens", "30", "--seed", "0")
    assert first != written("--prompt", "abc", "--tokens", "30", "--seed", "1")


def test_each_of_several_texts_is_what_its_own_seed_gives_alone(written: Any) -> None:
    lines = written("--prompt", "abc", "--prompt", "j", "--num", "2", "--tokens", "20", "--seed", "3", "--json").splitlines()
    texts = [json.loads(line) for line in lines]
    assert [(text["prompt"], text["seed"]) for text in texts] == [("abc", 3), ("abc", 4), ("j", 5), ("j", 6)]
    for text in texts:
        alone = json.loads(written("--prompt", text["prompt"], "--tokens", "20", "--seed", str(text["seed"]), "--json"))
        assert alone["text"] == text["text"]
    plain = written("--prompt", "abc", "--prompt", "j", "--num", "2", "--tokens", "20", "--seed", "3")
    assert plain == f"\n{command.RULE}\n".join(text["prompt"] + text["text"] for text in texts) + "\n"


def test_the_prompt_may_be_a_file_or_the_standard_input(written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("abc\nde", encoding="utf-8")
    said = written("--prompt", "abc\nde", "--tokens", "9")
    assert written("--prompt-file", str(file), "--tokens", "9") == said
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\nde"))
    assert written("--prompt-file", "-", "--tokens", "9") == said


def test_a_stop_string_ends_the_text_and_json_says_so(written: Any) -> None:
    text = json.loads(written("--prompt", "abc", "--tokens", "400", "--stop", "a", "--json"))
    assert text["ended"] == "stop" and "a" not in text["text"] and text["tokens"] == len(text["text"]) + 1
    assert text["decoding"]["stop"] == ["a"]


def test_beams_write_the_likeliest_texts_the_best_first(written: Any) -> None:
    texts = [
        json.loads(line)["text"] for line in written("--prompt", "ab", "--tokens", "6", "--beams", "4", "--num", "3", "--json").splitlines()
    ]
    assert len(set(texts)) == 3
    assert written("--prompt", "ab", "--tokens", "6", "--beams", "4") == f"ab{texts[0]}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num", "0"], ["--num is 0", "at least 1"]),
        (["--beams", "0"], ["--beams is 0", "at least 1"]),
        (["--beams", "2", "--top-k", "3"], ["--beams draws nothing", "--top-k"]),
        (["--beams", "2", "--num", "3"], ["--num is 3", "--beams 2"]),
        (["--beams", "2", "--stop", "x"], ["--beams", "leave out --interactive and --stop"]),
        (["--length-penalty", "2"], ["--length-penalty is for --beams"]),
        (["--early-stopping"], ["--early-stopping is for --beams"]),
        (["--prompt", "a", "--prompt-file", "b"], ["--prompt and --prompt-file"]),
        (["--prompt-file", "nowhere.txt"], ["--prompt-file nowhere.txt", "No such file"]),
        (["--interactive", "--json"], ["--interactive goes on from what is typed"]),
        (["--stop", ""], ["stop string", "at least one character"]),
        (["--min-p", "2"], ["min_p is 2.0", "at most 1"]),
        (["--prompt", ""], ["prompt is empty"]),
        (["--prompt", "xyz"], ["'x' (character 0)"]),
    ],
)
def test_bad_words_are_refused_in_one_line(written: Any, words: list[str], said: list[str]) -> None:
    with pytest.raises(UsageError) as refusal:
        written(*words)
    assert all(part in str(refusal.value) for part in said), refusal.value
    assert "\n" not in str(refusal.value)


def answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, model: Transformer) -> tuple[list[str], str]:
    """The prompts that the model was asked to go on from, and what stood on the standard output."""
    asked: list[str] = []
    real = complete.write

    def noted(model: Transformer, tokenizer: Tokenizer, prompts: list[str], *rest: Any) -> Any:
        asked.extend(prompts)
        return real(model, tokenizer, prompts, *rest)

    monkeypatch.setattr(complete, "write", noted)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert conversation.converse(Continuer(model, WORDS), 4, Decoding(), 0, []) == 0
    return asked, capsys.readouterr().out


def test_a_conversation_remembers_what_was_said_until_it_is_told_to_forget(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, out = answers(monkeypatch, capsys, "abc\\n\nde\nxx\n/new\nj\n", transformer())
    said = out.split("\n")
    assert asked[0] == "abc\n"
    assert asked[1].startswith("abc\n") and asked[1].endswith("de") and len(asked[1]) in (10, 11)  # a line end unless the answer had one
    assert asked[2].endswith("xx")  # has no ids here: refused, and forgotten
    assert asked[3] == "j"
    assert said[-1] == ""


def test_ctrl_c_ends_an_answer_and_what_it_said_is_remembered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def interrupted(model: Transformer, tokenizer: Tokenizer, prompts: list[str], *rest: Any) -> Any:
        asked.extend(prompts)
        yield Piece(0, "fg", 2, None)
        raise KeyboardInterrupt

    lines = iter(["abc", KeyboardInterrupt(), "d", EOFError()])

    def typed(mark: str) -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(complete, "write", interrupted)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    assert conversation.converse(Continuer(transformer(), WORDS), 4, Decoding(), 0, []) == 0
    assert asked == ["abc", "abcfg\nd"]
    assert "ctrl-D" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_transformers_folder_writes_what_transformers_writes(tmp_path: Path, kind: str) -> None:
    import transformers

    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 257, "bos_token_id": 0, "eos_token_id": 256}
    peer: Any
    if kind == "gpt2":
        peer = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, **shape)
        )
    else:
        peer = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                initializer_range=0.3,
                **shape,
            )
        )
    peer.eval().save_pretrained(tmp_path)
    words = ByteTokenizer()
    words.save(tmp_path / "tokenizer.json")
    writer = command.load(tmp_path, "cpu", "fp32")
    assert isinstance(writer, Continuer)
    model, tokenizer = writer.model, writer.tokenizer
    ids = encoded(tokenizer, "go on")
    mine = torch.stack(list(generate(model, [ids], 40, Decoding(temperature=0))), dim=1)[0]
    other = peer.generate(ids[None], attention_mask=torch.ones(1, len(ids)), max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert torch.equal(mine, other[0, len(ids) :])
    found = beam_search(model, [ids], 12, Beams(width=4, early_stopping=True), end_of_text=None)[0][0]
    other = peer.generate(
        ids[None],
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=12,
        num_beams=4,
        do_sample=False,
        eos_token_id=None,
        early_stopping=True,
    )
    assert found.ids == other[0, len(ids) :].tolist()


def test_the_whole_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Train, then write from a pipe, as at a shell."""
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 60, encoding="utf-8")
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    small = ["--dim", "16", "--layers", "1", "--heads", "2", "--context", "16", "--steps", "3"]
    assert train.main(parser.parse_args([str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), *small])) == 0
    done = run(sickbay("generate", "run", "--interactive", "--tokens", "7"), tmp_path, stdin=b"to be\nor\n")
    assert done.code == 0, done.stderr
    assert done.stderr == b""
    assert len(done.stdout.decode().rstrip("\n")) >= 14
