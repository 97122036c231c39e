"""Calibration and finetuning by several gloo processes against one process."""

import multiprocessing
import os
import socket

import pytest
import tiny_pipelines as tiny
import torch

from questlib import QuantConfig, calibrate, finetune, quantize
from questlib.distributed import broadcast_from, device, mean, processes, use_full_float32
from questlib.errors import ConfigError

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["questlib", "tiny_pipelines"])
CONFIG = QuantConfig.preset(
    "quest",
    4,
    4,
    adaround=False,
    act_granularity="tensor",
    act_range="minmax",
    weight_range="minmax",
    tla_iters=2,
    cma_iters=2,
    batch_size=8,
    calib_batch=8,
)


def job(pipe, state_path=None) -> tuple:
    """Calibration, losses, the finetuned state, and how an odd batch size is refused."""
    calib = calibrate(pipe, 7, 3, guidance_scale=2.0, batch_size=2)
    student = quantize(pipe.unet, CONFIG, calib)
    log = finetune(student, pipe.unet, calib, CONFIG, state_path=state_path)
    recorded = {"t": calib.t, "x": calib.x, "eps": calib.eps, "context": calib.context}
    found = recorded, log["loss"], {k: v.clone() for k, v in student.state_dict().items()}
    if processes().num_processes == 1:
        return (*found, None)
    with pytest.raises(ConfigError) as refused:
        finetune(student, pipe.unet, calib, CONFIG.replace(batch_size=7))
    return (*found, str(refused.value))


def process(index: int, count: int, port: int, folder) -> None:
    os.environ |= {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    state = processes()
    assert (state.num_processes, state.process_index, state.backend) == (count, index, "gloo")
    shared = broadcast_from({"a": torch.arange(3)} if index == count - 1 else None, count - 1)
    assert shared["a"].tolist() == [0, 1, 2]
    assert mean(torch.tensor([float(index)])).item() == (count - 1) / 2
    torch.save(job(tiny.class_conditional(tokens=3), folder / "state"), folder / f"{index}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes gets."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    running = [SERVER.Process(target=process, args=(i, 2, port, folder)) for i in range(2)]
    for p in running:
        p.start()
    for p in running:
        p.join(120)
        assert p.exitcode == 0
    assert not list(folder.glob("*.tmp*"))
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(2)]


@pytest.fixture(scope="module")
def one():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in the order of the two processes
    yield job(tiny.class_conditional(tokens=3))
    torch.set_num_threads(threads)


def test_calibration_is_the_same_bit_for_bit(one, two):
    for calib, *_ in two:
        assert all(torch.equal(value, one[0][key]) for key, value in calib.items())


def test_finetuning_equals_one_process_on_the_same_global_batch(one, two):
    for _, loss, state, _ in two:
        for mine, single in zip(loss, one[1], strict=True):
            assert mine[:2] == single[:2] and mine[2:] == pytest.approx(
                single[2:], rel=1e-4, abs=1e-6
            )
        for key, value in state.items():
            assert torch.allclose(value.float(), one[2][key].float(), atol=1e-5), key
    assert all(
        torch.equal(value, two[1][2][key]) for key, value in two[0][2].items()
    )  # and both processes agree bit for bit


def test_a_batch_that_cannot_be_shared_out_is_refused(two):
    assert all(
        message == "batch_size: expected a multiple of 2 processes, found 7" for *_, message in two
    )


def test_one_process_is_left_alone():
    x = {"a": torch.ones(2)}
    assert broadcast_from(x, 0) is x and mean(x["a"]) is x["a"] and str(device()) in ("cpu", "cuda")


def test_the_owner_of_tensors_has_to_give_them():
    with pytest.raises(ValueError, match="process 0 owns the tensors"):
        broadcast_from(None, 0)


@pytest.fixture
def tf32():
    """TF32 switched on; as it was before, when the test ends."""
    users = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [user.allow_tf32 for user in users]
    for user in users:
        user.allow_tf32 = True
    yield users
    for user, value in zip(users, before, strict=True):
        user.allow_tf32 = value


def test_tf32_is_switched_off_on_request_alone(tf32):
    device()
    assert all(user.allow_tf32 for user in tf32)
    use_full_float32()
    assert not any(user.allow_tf32 for user in tf32)
