"""python -m reproduce sample: the command, and (slow) launches of processes that are killed."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from questlib import calibrate, quantize, save_pretrained
from questlib.config import QuantConfig
from questlib.distributed import cpu_threads
from reproduce.__main__ import main
from reproduce.evaluation.drawing import sample
from reproduce.evaluation.samples import read_run, read_samples
from reproduce.models.loading import load_pipeline

ROOT = Path(__file__).parent.parent.parent


def command(tiny, out, *more: str) -> list[str]:
    return ["sample", "--model", str(tiny / "model"), "--out", str(out), "--steps", "2", *more]


def test_command_draws_what_the_library_draws(tiny, tmp_path, capsys):
    asked = [
        "--num-samples",
        "5",
        "--batch-size",
        "2",
        "--eta",
        "1",
        "--seed",
        "7",
        "--sampler",
        "ddim",
    ]
    assert main(command(tiny, tmp_path / "out", *asked)) == 0
    assert "5 samples" in capsys.readouterr().out
    pipe = load_pipeline(tiny / "model")
    with cpu_threads(1):
        expected = sample(
            pipe,
            5,
            num_inference_steps=2,
            eta=1.0,
            seed=7,
            batch_size=2,
            sampler="ddim",
            progress=False,
        )
    assert torch.equal(
        torch.cat([s.images for s in read_samples(tmp_path / "out")]), expected.images
    )
    run = read_run(tmp_path / "out")
    assert (run["num_samples"], run["eta"], run["sampler"], run["guidance_scale"]) == (
        5,
        1.0,
        "DDIMScheduler",
        1.0,
    )


def test_a_folder_refuses_another_number_of_threads(tiny, tmp_path, capsys):
    asked = command(tiny, tmp_path / "out", "--num-samples", "2")
    assert main(asked) == 0 and read_run(tmp_path / "out")["threads"] == 1
    before = torch.get_num_threads()
    assert main([*asked, "--threads", "2"]) == 2
    assert "threads: expected 2, found 1" in capsys.readouterr().err
    assert torch.get_num_threads() == before
    assert main([*asked, "--threads", "0"]) == 2


def test_quantized_unet_by_its_checkpoint(tiny, tmp_path, capsys):
    pipe = load_pipeline(tiny / "model")
    config = QuantConfig.preset("minmax", 8, 8, calib_batch=4)
    save_pretrained(quantize(pipe.unet, config, calibrate(pipe, 4, 2)), tmp_path / "unet")
    unet = ["--unet", str(tmp_path / "unet")]
    half = [*unet, "--dtype", "bfloat16", "--device", "cpu"]
    for name, more in (("full", []), ("quantized", unet), ("half", half)):
        assert main(command(tiny, tmp_path / name, "--num-samples", "2", *more)) == 0
    full, quantized, halved = (
        next(read_samples(tmp_path / name)) for name in ("full", "quantized", "half")
    )
    assert not torch.equal(full.latents, quantized.latents)
    assert not torch.equal(halved.latents, quantized.latents)
    torch.testing.assert_close(halved.latents, quantized.latents, rtol=0.3, atol=0.3)
    assert read_run(tmp_path / "full")["unet"] != read_run(tmp_path / "quantized")["unet"]
    # In integers, fused or not: a folder holds one kind.
    integers = command(tiny, tmp_path / "integers", "--num-samples", "2", *unet, "--engine", "cpu")
    assert main(integers) == 0
    run = read_run(tmp_path / "integers")
    assert (run["engine"], run["fused"]) == ("cpu", False)
    capsys.readouterr()
    assert main([*integers, "--fuse"]) == 2
    assert "fused: expected True, found False" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--num-samples", "0"], "must be >= 1, found 0, 32, 2"),
        (
            ["--num-samples", "1", "--guidance-scale", "3"],
            "guidance_scale: LDMPipeline is unconditional",
        ),
        (["--num-samples", "1", "--seed", "4294967296"], "seed: expected a whole number 0..4293"),
        (["--num-samples", "1", "--labels", "a"], "--labels: expected whole numbers"),
        (
            ["--num-samples", "1", "--prompts", "nowhere.txt"],
            "--prompts: nowhere.txt cannot be read",
        ),
        (["--num-samples", "1", "--sampler", "plms", "--eta", "1"], "eta: PNDMScheduler has none"),
        (["--num-samples", "1", "--engine", "cpu"], "--engine cpu is of a quantized UNet"),
        (
            ["--num-samples", "1", "--dtype", "half"],
            "--dtype: expected one of float32, float16, bfloat16, found 'half'",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tiny, tmp_path, capsys, more, says):
    assert main(command(tiny, tmp_path / "out", *more)) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def launch(tiny: Path, out: Path, count: int) -> subprocess.Popen:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    # --multi_gpu is accelerate's name for several processes on this machine. Without GPUs they are
    # CPU processes on gloo.
    several = ["--multi_gpu", "--main_process_port", port] if count > 1 else []
    options = [
        *several,
        "--num_processes",
        str(count),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    more = ["--num-samples", "600", "--batch-size", "2"]
    line = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *options,
        "-m",
        "reproduce",
        *command(tiny, out, *more),
    ]
    return subprocess.Popen(line, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)


@pytest.mark.slow
def test_launches_of_1_2_and_3_processes_agree_also_when_killed(tiny, tmp_path):
    """accelerate launch; kill -9 of a worker, the launcher or all, while shards are written."""
    rng, folders = random.Random(0), {}
    for count in (1, 2, 3):
        out = folders[count] = tmp_path / str(count)
        for attempt in range(3):
            running = launch(tiny, out, count)
            seen, deadline = len(list(out.glob("*.safetensors"))), time.monotonic() + 120
            while (
                running.poll() is None
                and len(list(out.glob("*.safetensors"))) < seen + 5
                and time.monotonic() < deadline
            ):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.1))
            children = subprocess.run(
                ["pgrep", "-P", str(running.pid)], capture_output=True, text=True
            ).stdout.split()
            if attempt == 0 and children:
                os.kill(
                    int(rng.choice(children)), signal.SIGKILL
                )  # the launcher must end the others
            elif attempt == 1 and running.poll() is None:
                running.kill()
                for child in children:
                    os.kill(int(child), signal.SIGKILL)
            elif running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
            assert running.wait(120) != 0
        assert launch(tiny, out, count).wait(300) == 0
        assert sum(len(s.images) for s in read_samples(out)) == 600
        assert not list(out.glob("*.lock")) and not list(out.glob("*.tmp"))
    files = {p.name: p.read_bytes() for p in folders[1].iterdir()}
    assert len(files) == 301
    for count in (2, 3):
        assert {p.name: p.read_bytes() for p in folders[count].iterdir()} == files
