import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from questlib import finetune, from_pretrained, quantize, save_pretrained
from questlib.errors import CheckpointError, ConfigError, QuestError
from questlib.packing import pack, unpack
from questlib.quantization import range_search
from questlib.quantization.model import act_quantizers

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


@pytest.fixture
def saved(pipe, calib, fast, tmp_path):
    save_pretrained(quantize(pipe.unet, fast("minmax", 4, 4), calib), tmp_path)
    return tmp_path


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
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors")


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
            "expected .* bytes",
        ),
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
def test_damage_is_named(saved, change, says):
    edit(saved, change)
    with pytest.raises(CheckpointError, match=says):
        from_pretrained(saved)


def test_truncated_file_and_missing_folder(saved, tmp_path):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        from_pretrained(saved)
    with pytest.raises(CheckpointError, match="nowhere"):
        from_pretrained(tmp_path / "nowhere")


def test_checkpoint_of_another_model(saved):
    config = json.loads((saved / "config.json").read_text())
    config["unet"]["block_out_channels"] = [16, 48]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not fit UNet2DModel"):
        from_pretrained(saved)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda c: [c], "expected an object, found list"),
        (
            lambda c: {k: v for k, v in c.items() if k != "quant"},
            "does not describe a quantized UNet .KeyError.'quant'",
        ),
        (
            lambda c: {k: v for k, v in c.items() if k != "timesteps"},
            "does not describe a quantized UNet .KeyError.'timesteps'",
        ),
        (
            lambda c: c | {"unet": c["unet"] | {"down_block_types": ["NoBlock"]}},
            "does not describe a quantized UNet",
        ),
    ],
)
def test_damaged_config(saved, damage, says):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(damage(config)))
    with pytest.raises(CheckpointError, match=says):
        from_pretrained(saved)


def test_a_converted_unet_does_not_replace_a_checkpoint(saved):
    weights = (saved / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="save it before it is converted"):
        save_pretrained(from_pretrained(saved, engine="reference"), saved)
    assert (saved / "model.safetensors").read_bytes() == weights


def test_other_format_and_engine(saved):
    with pytest.raises(ConfigError, match="engine: expected"):
        from_pretrained(saved, engine="gpu")
    config = json.loads((saved / "config.json").read_text()) | {"format": 99}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expected format 1 or 2, found 99"):
        from_pretrained(saved)
    config |= {"format": 2, "class": "NoUNet"}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="found 'NoUNet'"):
        from_pretrained(saved)


def test_unwritable_folder_and_plain_unet(pipe, calib, fast, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(QuestError, match="cannot write"):
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
    """Bit for bit on a machine like the one that wrote them, also when it is saved again."""
    expected = load_file(FORMAT_1 / name / "outputs.safetensors")
    unet = from_pretrained(FORMAT_1 / name)
    save_pretrained(unet, tmp_path)
    written_here = json.loads((FORMAT_1 / "machine.json").read_text()) == this_machine()
    for folder in (FORMAT_1 / name, tmp_path):
        model = from_pretrained(folder, engine)
        with torch.no_grad():
            found = torch.stack([model(expected["x"], t).sample for t in expected["timesteps"]])
        if written_here:
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
