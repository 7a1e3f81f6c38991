"""Other packages beside ours: not imported, refused in one line where they are not as wanted, recorded as measured."""

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn

import transact
from bench.__main__ import main
from bench.quality import peers
from bench.quality.peers import PEERS, Peer, check_peers, linear_parameters, peer_rows
from tests.tiny import tiny_llama

WINDOWS = torch.randint(1, 97, (4, 16), generator=torch.Generator().manual_seed(0))


def halved(model: nn.Module, windows: torch.Tensor, ratio: float) -> nn.Module:
    """Stands for a package's pruning: half of every MLP goes."""
    assert windows.shape == (4, 32)
    for layer in model.model.layers:
        mlp, width = layer.mlp, layer.mlp.down_proj.in_features // 2
        mlp.gate_proj.weight.data = mlp.gate_proj.weight.data[:width]
        mlp.up_proj.weight.data = mlp.up_proj.weight.data[:width]
        mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, :width]
    return model


@pytest.fixture
def installed(monkeypatch):
    """A package `halver` 1.0 beside those that are installed."""
    monkeypatch.setitem(PEERS, "halver", Peer("1.0", halved))
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.0" if name == "halver" else version(name))
    monkeypatch.setattr(peers, "OURS", ("transact",))


def test_nothing_imports_them():
    program = "import sys, bench.__main__; print(sorted({'optipfair', 'torch_pruning'} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.strip() == "[]"


def test_a_package_that_is_missing_or_another_is_one_line_before_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peers, "load_model", None)

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ValueError, match=r"^optipfair==[\d.]+ is not installed: nox -s rivals has it$"):
        check_peers(PEERS)
    monkeypatch.setattr(metadata, "version", lambda name: "0.1")
    with pytest.raises(ValueError, match=r"^optipfair==[\d.]+ is wanted, 0.1 is installed: nox -s rivals has it$"):
        list(peer_rows())
    assert main(["peers", "--results", str(tmp_path)]) == 2
    assert "is wanted, 0.1 is installed" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "peers.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "1.5"], "ratio is the fraction removed and must lie in [0, 1), got 1.5"),
        (["--text", "nothing.txt"], "nothing.txt"),
    ],
)
def test_mistakes_are_one_line(arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peers, "load_model", None)
    monkeypatch.setattr(peers, "check_peers", lambda names: None)
    assert main(["peers", *arguments, "--results", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "peers.jsonl").exists()


@pytest.mark.parametrize(("ratio", "wrong"), [(0.6, False), (0.3, True)])
def test_what_a_package_cannot_do_is_refused_before_anything_is_pruned(
    ratio, wrong, monkeypatch, tmp_path, tiny_directory, tiny_text, capsys
):
    monkeypatch.setattr(peers, "check_peers", lambda names: None)
    monkeypatch.setattr(peers, "measure_perplexity", None)
    model = tiny_directory
    if wrong:
        model = tmp_path / "pruned"
        transact.prune(tiny_llama("gqa"), recipe=transact.Recipe(criterion="magnitude")).model.save_pretrained(model)
        for file in tiny_directory.glob("tokenizer*"):
            (model / file.name).write_bytes(file.read_bytes())
    command = ["peers", str(model), "--ratio", str(ratio), "--text", str(tiny_text), "--samples", "4"]
    command += ["--seq-len", "16", "--calibration", str(tiny_text), "--results", str(tmp_path / "results")]
    assert main(command) == 2
    message = "the model is pruned already" if wrong else "ratio 0.6 is out of reach of optipfair"
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "results" / "peers.jsonl").exists()


def test_a_peer_that_is_none_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["peers", "--peers", "slicegpt"])
    assert "unknown peer 'slicegpt', allowed: optipfair" in capsys.readouterr().err


def test_rows_and_records(installed, tiny_directory, tiny_text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bench.__main__.peer_rows", lambda base, **given: peer_rows(base, **given, count=3))
    command = ["peers", str(tiny_directory), "--peers", "halver", "--text", str(tiny_text), "--decode", "2"]
    command += ["--calibration", str(tiny_text), "--samples", "4", "--seq-len", "32"]
    command += ["--results", str(tmp_path)]
    assert main(command) == 0
    lines = [json.loads(line) for line in (tmp_path / "peers.jsonl").read_text().splitlines()]
    dense, ours, theirs = (line["row"] for line in lines)
    assert [line["case"]["method"] for line in lines] == ["dense", "transact", "halver 1.0"]
    assert dense["fraction_removed"] == 0
    model = tiny_llama("gqa")
    mlps = sum(linear.weight.numel() for layer in model.model.layers for linear in layer.mlp.children()
               if isinstance(linear, nn.Linear))  # fmt: skip
    assert theirs["fraction_removed"] == pytest.approx(mlps / 2 / linear_parameters(model))
    assert ours["fraction_removed"] == pytest.approx(0.3, abs=0.01)
    assert dense["parameters"] - theirs["parameters"] == mlps // 2
    for row in (dense, ours, theirs):
        assert len(row["losses"]["words.txt"]) == 3
        assert row["perplexity"]["words.txt"] > 1
    assert "decode_speedup" not in dense
    for row in (ours, theirs):
        assert row["decode_speedup"] > 0
        assert row["prefill_speedup"] > 0
    assert lines[0]["schema"] == 1
    assert {"device", "torch", "transformers"} <= lines[0]["environment"].keys()
    assert "halver 1.0" in capsys.readouterr().out
    assert "halver 1.0" in (tmp_path / "peers.md").read_text()
    assert main(command) == 0  # appended
    assert len((tmp_path / "peers.jsonl").read_text().splitlines()) == 6


def test_the_session_installs_what_is_wanted():
    noxfile = (Path(__file__).parents[1] / "noxfile.py").read_text(encoding="utf-8")
    pinned = dict(re.findall(r'"(optipfair|torch-pruning)==([\d.]+)"', noxfile))
    assert pinned == {name: peer.version for name, peer in PEERS.items()}
