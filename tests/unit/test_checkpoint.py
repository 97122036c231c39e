import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from questlib import QuantConfig, finetune, from_pretrained, quantize, save_pretrained
from questlib.errors import CheckpointError, ConfigError, StorageError
from questlib.quantization import range_search
from questlib.quantization.model import act_quantizers
from questlib.quantization.packed_codes import pack, unpack

FORMAT_1 = Path(__file__).parents[1] / "data" / "format1"


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(3, 5), (4, 3, 3, 3), (1, 1)])
def test_pack_round_trip(bits, shape):
    codes = torch.randint(
        0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits)
    )
    packed = pack(codes, bits)
    assert packed.numel() == (codes.numel() if bits > 4 else (codes.numel() + 1) // 2)
    assert torch.equal(unpack(packed, bits, codes.shape), codes)


def test_two_consecutive_codes_a_byte_low_nibble_first():
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]


def test_unpack_refuses_what_does_not_fit():
    with pytest.raises(CheckpointError, match="expected 8 bytes"):
        unpack(torch.zeros(7, dtype=torch.uint8), 4, torch.Size((4, 4)))
    with pytest.raises(CheckpointError, match="code 9 exceeds 3 bits"):
        unpack(torch.tensor([9], dtype=torch.uint8), 3, torch.Size((1,)))


@pytest.mark.parametrize("name", ["minmax", "q-diffusion", "quest-paper", "quest-release", "quest"])
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4), (3, 6), (16, 8), (4, 16)])
def test_loaded_outputs_are_bit_identical(pipe, calib, fast, tmp_path, name, bits):
    if bits not in ((4, 4), (8, 8)) and name not in ("minmax", "quest"):
        bits = (4, 4)
    config = fast(name, *bits, adaround_iters=1, act_iters=1, tla_iters=1, cma_iters=1)
    q = quantize(pipe.unet, config, calib)
    finetune(q, pipe.unet, calib, config)
    size = save_pretrained(q, tmp_path)
    assert size == (tmp_path / "model.safetensors").stat().st_size
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is type(pipe.unet) and loaded.quest_config == config
    with torch.no_grad():
        for x, t in zip(calib.x, calib.t, strict=True):
            assert torch.equal(q(x, t).sample, loaded(x, t).sample)


@pytest.fixture(scope="module")
def quantized(pipe, calib):
    return quantize(pipe.unet, QuantConfig.preset("minmax", 4, 4, calib_batch=8), calib)


@pytest.fixture
def saved(quantized, tmp_path):
    save_pretrained(quantized, tmp_path)
    return tmp_path


@pytest.fixture
def without_digests(saved):
    """As questlib 0.2 wrote it at first: only the checks of values can find damage."""
    edit(saved, lambda state: None)
    edit_config(saved, lambda config: {k: v for k, v in config.items() if k != "digest"})
    return saved


def test_size_shrinks(pipe, saved):
    weights = sum(p.numel() for p in pipe.unet.parameters()) * 4
    assert (
        saved / "model.safetensors"
    ).stat().st_size < 0.75 * weights  # tiny layers: headers and scales weigh
    assert all(
        v.dtype == torch.uint8
        for k, v in load_file(saved / "model.safetensors").items()
        if k.endswith("codes")
    )


def edit(path, change):
    """Change the tensors, and write them without digests."""
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors")


def edit_config(path, change):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(change(config)))


def damage(path, change):
    """Change the tensors, and leave the metadata as they are."""
    with safe_open(path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", metadata)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("conv_in.codes"), "missing: conv_in.codes"),
        (
            lambda s: s.pop("conv_in.input_quantizer.scale"),
            "missing: conv_in.input_quantizer.scale",
        ),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda s: s.update({"conv_in.bias": torch.zeros(3)}), r"wrong shape: conv_in.bias \[3\]"),
        (
            lambda s: s.update({"conv_in.codes": s["conv_in.codes"][:-1].clone()}),
            "wrong shape: conv_in.codes",
        ),
        (lambda s: s.update({"conv_in.bias": s["conv_in.bias"].bool()}), "conv_in.bias: expected"),
        (
            lambda s: s.update({"conv_out.bias": s["conv_out.bias"].to(torch.complex64)}),
            "wrong type: conv_out.bias torch.complex64",
        ),
        (lambda s: s["conv_in.weight_quantizer.scale"].neg_(), "conv_in.weight_quantizer.scale"),
        (lambda s: s["conv_in.input_quantizer.scale"].zero_(), "conv_in.input_quantizer.scale"),
        (
            lambda s: s["conv_in.weight_quantizer.zero_point"].fill_(16),
            r"conv_in.weight_quantizer.zero_point \(expected whole numbers 0..15",
        ),
        (lambda s: s["conv_in.input_quantizer.ratio"].fill_(3), r"ratio \(expected 1\)"),
        (lambda s: s["conv_in.input_quantizer.shift"].fill_(1), r"shift \(expected"),
        (lambda s: s["quest_steps.timesteps"].add_(1), "quest_steps.timesteps"),
        (
            lambda s: s["conv_in.input_quantizer.scale"].fill_(float("nan")),
            "not finite: conv_in.input_quantizer.scale",
        ),
        (
            lambda s: s["conv_in.input_quantizer.calibrated"].fill_(False),
            "never calibrated: conv_in.input_quantizer",
        ),
    ],
)
def test_damage_is_named(without_digests, change, says):
    edit(without_digests, change)
    with pytest.raises(CheckpointError, match=says):
        from_pretrained(without_digests)


def test_one_changed_bit_is_found_and_named(saved):
    damage(saved, lambda s: s["conv_in.codes"][:1].bitwise_xor_(1))
    with pytest.raises(CheckpointError, match=r"model.safetensors: not .* saved: conv_in.codes$"):
        from_pretrained(saved)


def test_a_checkpoint_without_digests_is_the_same(quantized, without_digests, calib):
    batch = calib.batch(1, torch.arange(2))
    assert torch.equal(batch.run(from_pretrained(without_digests)), batch.run(quantized))


def test_files_of_two_saves(quantized, saved, tmp_path):
    """A save that stopped between its two files is whole; what a tool has mixed is not."""
    older = from_pretrained(saved)
    older.quest_config = older.quest_config.replace(seed=1)
    save_pretrained(older, tmp_path / "older")
    shutil.copy(tmp_path / "older" / "config.json", saved)
    assert from_pretrained(saved).quest_config == quantized.quest_config
    edit(saved, lambda state: None)
    with pytest.raises(CheckpointError, match="not saved together"):
        from_pretrained(saved)


def test_a_full_disk_leaves_the_older_checkpoint(quantized, saved):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    folder = str(saved)
    code = f"""
import resource, questlib
from questlib.errors import StorageError
unet = questlib.from_pretrained({folder!r})
unet.quest_config = unet.quest_config.replace(seed=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    questlib.save_pretrained(unet, {folder!r})
except StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout and done.stdout.count("\n") == 1
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_truncated_file_and_missing_folder(saved, tmp_path):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        from_pretrained(saved)
    with pytest.raises(CheckpointError, match="nowhere"):
        from_pretrained(tmp_path / "nowhere")


def test_checkpoint_of_another_model(without_digests):
    edit_config(without_digests, lambda c: c | {"unet": c["unet"] | {"norm_eps": 1e30}})
    from_pretrained(without_digests)  # a value that only a digest protects
    edit_config(
        without_digests, lambda c: c | {"unet": c["unet"] | {"block_out_channels": [16, 24]}}
    )
    with pytest.raises(CheckpointError, match="does not fit UNet2DModel"):
        from_pretrained(without_digests)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: [c], "expected an object, found list"),
        (lambda c: {k: v for k, v in c.items() if k != "quant"}, "quant: expected a dict"),
        (lambda c: {k: v for k, v in c.items() if k != "timesteps"}, "timesteps: expected a list"),
        (lambda c: c | {"timesteps": [True]}, "timesteps: expected a list of numbers"),
        (lambda c: c | {"timesteps": [10**400]}, "timesteps: expected a list of numbers"),
        (lambda c: c | {"class": ["UNet2DModel"]}, "expected one of UNet2DModel"),
        (lambda c: c | {"quant": c["quant"] | {"weight_bits": 10**30}}, "quant: weight_bits"),
        (
            lambda c: c | {"unet": c["unet"] | {"down_block_types": ["NoBlock"]}},
            "does not describe a quantized UNet",
        ),
        (lambda c: c | {"unet": c["unet"] | {"layers_per_block": 1e30}}, "layers_per_block = 1e"),
        (lambda c: c | {"unet": c["unet"] | {"layers_per_block": 10**9}}, "layers_per_block = 1"),
        (
            lambda c: c | {"unet": c["unet"] | {"block_out_channels": [16, 10**6]}},
            "more than its file holds",
        ),
        (lambda c: c | {"unet": c["unet"] | {"block_out_channels": [16, 10**30]}}, "describe"),
        (lambda c: c | {"unet": c["unet"] | {"norm_esp": 1e-5}}, "unexpected: norm_esp"),
        (
            lambda c: c | {"unet": {k: v for k, v in c["unet"].items() if k != "act_fn"}},
            "missing: act_fn",
        ),
    ],
)
def test_damaged_config(without_digests, change, says):
    edit_config(without_digests, change)
    with pytest.raises(CheckpointError, match=says):
        from_pretrained(without_digests)


def test_a_changed_config_is_not_what_was_saved(saved):
    edit_config(saved, lambda c: c | {"unet": c["unet"] | {"norm_eps": 1e-4}})
    with pytest.raises(CheckpointError, match=r"config.json is not what was saved"):
        from_pretrained(saved)
    (saved / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config.json"):
        from_pretrained(saved)


def test_a_converted_unet_does_not_replace_a_checkpoint(saved):
    weights = (saved / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="save it before it is converted"):
        save_pretrained(from_pretrained(saved, engine="reference"), saved)
    assert (saved / "model.safetensors").read_bytes() == weights


def test_other_format_and_engine(without_digests):
    with pytest.raises(ConfigError, match="engine: expected"):
        from_pretrained(without_digests, engine="gpu")
    edit_config(without_digests, lambda config: config | {"format": 99})
    with pytest.raises(CheckpointError, match="expected format 1 or 2, found 99"):
        from_pretrained(without_digests)
    edit_config(without_digests, lambda config: config | {"format": 2, "class": "NoUNet"})
    with pytest.raises(CheckpointError, match="found 'NoUNet'"):
        from_pretrained(without_digests)


def test_unwritable_folder_and_plain_unet(pipe, calib, fast, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        save_pretrained(quantize(pipe.unet, fast("minmax"), calib), tmp_path / "file" / "out")
    with pytest.raises(ConfigError):
        save_pretrained(pipe.unet, tmp_path)


def test_names_and_groups_of_format_2(pipe, calib, fast, tmp_path):
    q = quantize(pipe.unet, fast("quest", 4, 4, adaround=False), calib)
    save_pretrained(q, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format"] == 2 and config["quant"] == q.quest_config.to_dict()
    assert config["quant"]["finetuning"]["cma_iters"] == q.quest_config.finetuning.cma_iters
    stored = load_file(tmp_path / "model.safetensors")
    dtypes = {name.removeprefix("conv_in."): x.dtype for name, x in stored.items()}
    assert dtypes["weight_quantizer.scale"] == dtypes["input_quantizer.scale"] == torch.float32
    for name in ("weight_quantizer.zero_point", "input_quantizer.ratio", "input_quantizer.shift"):
        assert dtypes[name] == torch.uint8
    loaded = from_pretrained(tmp_path).state_dict()
    shifts = {name: x for name, x in q.state_dict().items() if name.endswith(".shift")}
    assert shifts and all(torch.equal(x, loaded[name]) for name, x in shifts.items())


def test_loading_searches_no_ranges(saved, monkeypatch):
    def search(*args, **kwargs):
        raise AssertionError("searched")

    monkeypatch.setattr(range_search, "affine", search)  # every search ends in it
    from_pretrained(saved)


# ---- format 1: checkpoints and outputs that code of that format wrote (make.py there) ----


def this_machine() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("make", FORMAT_1 / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    return make.fingerprint()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("engine", ["fake", "reference"])
@pytest.mark.parametrize("name", ["quest_carrier", "quest_token", "ptq_d"])
def test_format_1_has_the_outputs_that_it_had(one_thread, tmp_path, name, engine):
    """Also when it is saved again.

    The simulation's are the same bit for bit on a machine like the one that wrote them. The integer
    engines have added the zero points of 8-bit weights in another order since.
    """
    expected = load_file(FORMAT_1 / name / "outputs.safetensors")
    unet = from_pretrained(FORMAT_1 / name)
    save_pretrained(unet, tmp_path)
    written_here = json.loads((FORMAT_1 / "machine.json").read_text()) == this_machine()
    for folder in (FORMAT_1 / name, tmp_path):
        model = from_pretrained(folder, engine)
        with torch.no_grad():
            found = torch.stack([model(expected["x"], t).sample for t in expected["timesteps"]])
        if written_here and engine == "fake":
            assert torch.equal(found, expected[engine])
        else:
            torch.testing.assert_close(found, expected[engine], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["quest_carrier", "quest_token"])
def test_shifts_of_format_1_are_recovered(name):
    """They are not in the file; some are not zero, and ratios are m * 2^e with m in 1..8."""
    assert not any("shift" in k for k in load_file(FORMAT_1 / name / "model.safetensors"))
    quantizers = list(act_quantizers(from_pretrained(FORMAT_1 / name)))
    assert any(q.shift.any() for q in quantizers)
    for q in quantizers:
        multiplier = q.ratio / 2**q.shift
        assert torch.equal(multiplier, multiplier.round())
        assert multiplier.min() >= 1 and multiplier.max() <= 8


def test_impossible_ratios_of_format_1_are_refused(tmp_path):
    shutil.copytree(FORMAT_1 / "quest_carrier", tmp_path / "copy")
    edit(tmp_path / "copy", lambda s: s["conv_in.act.ratio"].fill_(65))
    with pytest.raises(CheckpointError, match="conv_in.input_quantizer: scale ratios"):
        from_pretrained(tmp_path / "copy")
