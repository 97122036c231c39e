import pytest
import torch
from watched import Count, Stop, watched

from questlib import QuantConfig, finetune, quantize
from questlib.calibration import TimeCalls
from questlib.capture import capture_outputs
from questlib.errors import CheckpointError, ConfigError
from questlib.finetuning.loop import draw_batch, global_weight
from questlib.finetuning.losses import stage_losses
from questlib.finetuning.optimizer import StageAdam
from questlib.finetuning.stages import Stage, select_parameters, select_stages
from questlib.quantization.model import act_quantizers, quant_layers
from questlib.quantization.time_path import run_time_layers
from questlib.versions import STAGE_VERSIONS


def state(unet):
    return {k: v.clone() for k, v in unet.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("name", ["quest-paper", "quest-release", "quest"])
@pytest.mark.parametrize("a", [4, 8])
def test_every_selected_weight_and_scale_has_a_gradient(pipe, calib, fast, name, a):
    """Trap 5: losses that reach nothing.

    A stage's local and global loss together must reach every selected parameter.
    """
    config = fast(name, 4, a)
    q = quantize(pipe.unet, config, calib)
    for stage in select_stages(q, config):
        groups = select_parameters(q, stage, config)
        params = [p for g in groups for p in g["params"]]
        assert params and {id(p) for p in params} == {
            id(p) for p in q.parameters() if p.requires_grad
        }
        with (
            torch.no_grad(),
            capture_outputs(
                pipe.unet, list(stage.layers) if stage.name == "tla" else []
            ) as targets,
        ):
            run_time_layers(pipe.unet, calib.t)
        step = torch.arange(10) % 5  # every step, so that every group's scales are used
        batch = calib.batch(step, torch.zeros(10, dtype=torch.int64))
        local, total = stage_losses(
            q, pipe.unet, stage, config, batch, TimeCalls(calib.t, {}), targets
        )
        (local + total).backward()
        names = {id(p): n for n, p in q.named_parameters()}
        dead = [names[id(p)] for p in params if p.grad is None or not (p.grad != 0).any()]
        assert not dead
        q.zero_grad()


def test_local_losses_reach_their_own_layers_alone(pipe, calib, fast):
    config = fast("quest", 4, 4)
    q = quantize(pipe.unet, config, calib)
    stage = select_stages(q, config)[0]
    select_parameters(q, stage, config)
    with torch.no_grad(), capture_outputs(pipe.unet, list(stage.layers)) as targets:
        run_time_layers(pipe.unet, calib.t)
    local, _ = stage_losses(
        q,
        pipe.unet,
        stage,
        config,
        calib.batch(torch.zeros(6).long(), torch.arange(6)),
        TimeCalls(calib.t, {}),
        targets,
    )
    local.backward()
    assert all(m.weight.grad.abs().sum() > 0 for m in stage.layers.values())
    others = [
        a for n, m in quant_layers(q).items() if n not in stage.layers for a in act_quantizers(m)
    ]
    assert others and all(a.scale.grad is None or not a.scale.grad.any() for a in others)


def test_time_layers_see_what_the_whole_unet_gives_them(pipe, calib):
    names = [n for n, m in pipe.unet.named_modules() if n.endswith("time_emb_proj")]
    with torch.no_grad(), capture_outputs(pipe.unet, names) as short:
        run_time_layers(pipe.unet, calib.t[2:3])
    with torch.no_grad(), capture_outputs(pipe.unet, names) as whole:
        pipe.unet(calib.x[2][:1], calib.t[2])
    assert names and all(torch.equal(short[n], whole[n]) for n in names)


def test_targets_need_no_more_than_the_layers_of_interest(pipe, calib):
    names, ran = ["mid_block.attentions.0.to_q", "conv_in"], []
    with torch.no_grad(), capture_outputs(pipe.unet, names) as whole:
        pipe.unet(calib.x[2], calib.t[2])
    handles = [
        m.register_forward_hook(lambda m, a, o, n=n: ran.append(n))
        for n, m in pipe.unet.named_modules()
    ]
    with torch.no_grad(), capture_outputs(pipe.unet, names, stop=True) as short:
        pipe.unet(calib.x[2], calib.t[2])
        pytest.fail("went on after the last layer")
    for handle in handles:
        handle.remove()
    assert list(short) == list(whole) and all(torch.equal(short[n], whole[n]) for n in names)
    assert "conv_in" in ran and not any(n.startswith("up_blocks") for n in ran)


def test_stages_select_by_role(pipe, calib, fast):
    def roles(name, **kw):
        config = fast(name, **kw)
        return {
            s.name: {m.role for m in s.layers.values()}
            for s in select_stages(quantize(pipe.unet, config, calib), config)
        }

    assert roles("quest-paper") == {"tla": {"time_embed", "time_proj"}, "cma": {"qkv", "attn_out"}}
    assert roles("quest-release") == {"tla": {"time_proj"}, "cma": {"qkv"}}
    assert roles("quest", cma_iters=0) == {"tla": {"time_embed", "time_proj"}}
    assert roles("quest", te="ptq", cma_iters=0) == roles("q-diffusion") == roles("minmax") == {}


def test_release_never_trains_the_time_embedding_scales(pipe, calib, fast):
    config = fast("quest-release", 4, 8)
    q = quantize(pipe.unet, config, calib)
    before = state(q)
    finetune(q, pipe.unet, calib, config)
    changed = {k for k, v in q.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(k.startswith("time_embedding") for k in changed)
    assert any("time_emb_proj.input_quantizer.scale" in k for k in changed) and any(
        "to_q.weight" in k for k in changed
    )
    assert not any("conv" in k and k.endswith(".weight") for k in changed)


def test_finetuning_brings_the_model_closer(pipe, calib, fast):
    config = fast("quest", 4, 4, tla_iters=30, cma_iters=60, batch_size=8)
    q = quantize(pipe.unet, config, calib)

    def error():
        with torch.no_grad():
            return sum(
                (q(x, t).sample - e).pow(2).mean().item()
                for x, t, e in zip(calib.x, calib.t, calib.eps, strict=True)
            )

    before = error()
    log = finetune(q, pipe.unet, calib, config)
    assert error() < 0.9 * before
    assert len(log["loss"]) == 90 and 0 < log["trained_fraction"] < 1 and log["seconds"] > 0
    assert all((a.scale > 0).all() for a in act_quantizers(q))
    for layer in quant_layers(q).values():  # selected weights stay on their quantization grid
        assert torch.equal(
            layer.w_hat, layer.weight_quantizer.decode(layer.weight_quantizer.codes(layer.weight))
        )


@pytest.mark.parametrize(("stop_at", "rank"), [(3, 0), (6, 0), (11, 0), (5, 2), (11, 2)])
def test_killed_and_resumed_is_bit_identical(pipe, calib, fast, tmp_path, stop_at, rank):
    """Stopped inside either stage, between them, at a saved iteration or after one.

    With low-rank updates a state inside CMA has other tensors than one of TLA's end.
    """
    config = fast(
        "quest",
        4,
        4,
        tla_iters=5,
        cma_iters=7,
        lora_rank=rank,
        cma_layers="all" if rank else "attention",
    )
    path = tmp_path / "state.pt"

    def run(count: Count) -> tuple[torch.nn.Module, dict]:
        unet = quantize(pipe.unet, config, calib)
        data = watched(calib, count)
        return unet, finetune(unet, pipe.unet, data, config, state_path=path, save_every=2)

    whole = quantize(pipe.unet, config, calib)
    log = finetune(whole, pipe.unet, calib, config)
    with pytest.raises(Stop):
        run(Count(stop_at))

    rest = Count()
    again, resumed = run(rest)
    assert resumed["loss"] == log["loss"]
    # At most the iterations since the last save are repeated.
    assert 12 - stop_at <= rest.batches <= 12 - stop_at + 1
    assert same(state(again), state(whole))

    nothing = Count()
    third, resumed = run(nothing)
    assert nothing.batches == 0 and resumed["loss"] == log["loss"]
    assert same(state(third), state(whole))


def test_a_state_of_something_else_is_refused(pipe, calib, fast, tmp_path, monkeypatch):
    config = fast("quest", 4, 4, tla_iters=1, cma_iters=0, adaround=False)
    path = tmp_path / "state.pt"
    unet = quantize(pipe.unet, config, calib)
    finetune(unet, pipe.unet, calib, config, state_path=path)
    with pytest.raises(CheckpointError, match="another configuration"):
        finetune(unet, pipe.unet, calib, config.replace(lr_scale=0.5), state_path=path)
    with monkeypatch.context() as patch:
        patch.setitem(STAGE_VERSIONS, "finetune", 99)
        with pytest.raises(CheckpointError, match="version of questlib"):
            finetune(unet, pipe.unet, calib, config, state_path=path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="state.pt cannot be read .*remove it"):
        finetune(unet, pipe.unet, calib, config, state_path=path)


def test_sequential_order_visits_one_step_after_another(calib):
    steps = torch.arange(len(calib.t))
    tla = Stage("tla", 10, {}, True, 0.1, 2, None, "sequential")
    seen = [int(draw_batch(calib, tla, i, steps, torch.Generator()).t[0]) for i in range(10)]
    assert seen == [int(t) for t in calib.t for _ in range(2)]
    # The joint order is over all steps: its last batch is not the last step's.
    cma = Stage("cma", 10, {}, True, 0.1, 32, None, "joint")
    last = draw_batch(calib, cma, 9, steps, torch.Generator().manual_seed(0))
    assert set(last.t.tolist()) == set(calib.t.tolist())


def test_rounds_visit_each_step_for_some_iterations_and_start_again(calib):
    steps = torch.arange(len(calib.t))
    cma = Stage("cma", 2 * 16 * len(steps), {}, True, 0.1, 2, 3, "rounds")
    generator = torch.Generator().manual_seed(0)
    batches = [draw_batch(calib, cma, i, steps, generator) for i in range(cma.iters)]
    seen = [int(batch.t[0]) for batch in batches]
    assert seen == 2 * [int(t) for t in calib.t for _ in range(16)]
    drawn = torch.cat([batch.x for batch in batches])
    own = calib.x[:, :3].flatten(0, 1)  # of the first 3 trajectories, at all steps
    assert all(any(torch.equal(x, y) for y in own) for x in drawn)


def test_stages_train_their_own_scales_and_biases(pipe, calib, fast):
    """As the release does: TLA those of its layers, CMA those outside of the time path."""
    config = fast("quest-release", 4, 4, tla_iters=2, cma_iters=2, adaround=False)
    q = quantize(pipe.unet, config, calib)
    layers = quant_layers(q)
    tla, cma = select_stages(q, config)
    trained = [
        {id(p) for group in select_parameters(q, stage, config) for p in group["params"]}
        for stage in (tla, cma)
    ]
    for layer in layers.values():
        own = [layer.role == "time_proj", layer.role == "qkv"]
        assert [id(layer.weight) in found for found in trained] == own
        if layer.bias is not None:
            assert [id(layer.bias) in found for found in trained] == own
        in_time = layer.role in ("time_embed", "time_proj")
        scale = id(layer.input_quantizer.scale)
        assert [scale in found for found in trained] == [layer.role == "time_proj", not in_time]
    before = {n: x.bias.clone() for n, x in layers.items() if x.role == "qkv"}
    finetune(q, pipe.unet, calib, config)
    assert all(not torch.equal(bias, layers[n].bias) for n, bias in before.items())


def test_the_global_loss_counts_once_a_layer(pipe, calib, fast):
    config = fast("quest-release", 4, 4, tla_iters=2, cma_iters=2, global_weight=3.0)
    tla, cma = select_stages(quantize(pipe.unet, config, calib), config)
    assert len(tla.layers) > 1
    assert global_weight(tla, config) == 3.0 * len(tla.layers)
    assert global_weight(cma, config) == 3.0  # without a local loss there is nothing to count
    assert global_weight(tla, config.replace(global_per_layer=False)) == 3.0


def test_scales_of_groups_that_are_not_visited_stay(pipe, calib, fast):
    """Adam's momentum would move them on: far enough, at 8 bits, to ruin the earlier steps."""
    config = fast(
        "quest-release", 8, 8, step_groups=5, tla_iters=10, cma_iters=0, scale_layers="all"
    )
    q = quantize(pipe.unet, config, calib)
    names = (
        "mid_block.resnets.0.conv1.input_quantizer",
        # Of a TE layer: the local loss trains it, too.
        "mid_block.resnets.0.time_emb_proj.input_quantizer",
    )
    scales = [q.get_submodule(name).scale for name in names]
    path = []

    def note() -> None:
        path.append(torch.stack([scale.detach()[:, 0] for scale in scales]))

    finetune(q, pipe.unet, watched(calib, note), config)
    note()
    moved = torch.stack(path).diff(dim=0) != 0  # [iterations, scales, groups]
    for i, name in enumerate(names):
        assert torch.equal(moved[:, i], torch.eye(5).repeat_interleave(2, 0).bool()), name


def test_the_local_loss_of_a_stage_without_layers_is_zero(pipe, calib, fast):
    """A UNet without attention has no attention-related layer."""
    config = fast("quest", 4, 4, adaround=False)
    q = quantize(pipe.unet, config, calib)
    batch = calib.batch(torch.zeros(2).long(), torch.arange(2))
    stage = Stage("cma", 1, {}, True, 0.1, 2, None, "joint")
    local, total = stage_losses(q, pipe.unet, stage, config, batch, None, {})
    assert local == 0 and total > 0


def test_the_losses_are_the_papers_equations(pipe, calib, fast):
    """Eq. 4 to 6, written out with plain means."""
    config = fast("quest-paper", 4, 4, adaround=False)
    q = quantize(pipe.unet, config, calib)
    tla, cma = select_stages(q, config)
    batch = calib.batch(torch.tensor([0, 3]), torch.tensor([1, 2]))

    def outputs(unet, names):
        with torch.no_grad(), capture_outputs(unet, names) as time:
            run_time_layers(unet, calib.t)
        with torch.no_grad(), capture_outputs(unet, names) as whole:
            eps = batch.run(unet)
        return time, whole, eps

    def error(ours, theirs):
        return sum((ours[k] - theirs[k]).square().mean() for k in theirs)

    names = [*tla.layers, *cma.layers]
    (time, whole, eps), (own_time, own, own_eps) = (outputs(u, names) for u in (pipe.unet, q))
    targets = {name: time[name] for name in tla.layers}
    expected_global = (own_eps - eps).square().mean()
    for stage, expected in (
        (tla, error(own_time, targets)),
        (cma, error(own, {name: whole[name] for name in cma.layers})),
    ):
        local, total = stage_losses(
            q, pipe.unet, stage, config, batch, TimeCalls(calib.t, {}), targets
        )
        torch.testing.assert_close(local, expected)
        torch.testing.assert_close(total, expected_global)


def test_the_teacher_may_compute_its_targets_in_bfloat16(pipe, calib, fast):
    """Targets alone change, by what 8 bits of mantissa lose; weights stay in float32."""
    config = fast("quest", 4, 4)
    q = quantize(pipe.unet, config, calib)
    stage = next(stage for stage in select_stages(q, config) if stage.name == "cma")
    select_parameters(q, stage, config)
    batch = calib.batch(torch.arange(4), torch.zeros(4, dtype=torch.int64))
    found = {}
    for half in (False, True):
        own = config.replace(teacher_autocast=half)
        local, total = stage_losses(q, pipe.unet, stage, own, batch, None, {})
        found[half] = (local.item(), total.item())
        assert local.dtype == total.dtype == torch.float32
    assert found[True][0] != found[False][0]
    assert found[True][0] == pytest.approx(found[False][0], rel=0.02)
    assert found[True][1] == found[False][1]  # the noise is the calibration's
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}


def test_scales_are_stepped_as_by_an_adam_of_each_row():
    """As torch's own Adam on every row that has a gradient, bit for bit, with weights beside them.

    Also after saving and loading.
    """
    generator = torch.Generator().manual_seed(0)
    shapes, rates = [(4, 1), (4, 2), (1, 3)], [1e-2, 3e-3, 0.1]
    tables = [torch.nn.Parameter(torch.rand(shape, generator=generator)) for shape in shapes]
    weight = torch.nn.Parameter(torch.rand(3, 3, generator=generator))
    rows = [[torch.nn.Parameter(row.clone()) for row in table.data] for table in tables]
    other = torch.nn.Parameter(weight.data.clone())
    expected = torch.optim.Adam(
        [
            {"params": [other], "lr": 0.5},
            *({"params": r, "lr": lr} for r, lr in zip(rows, rates, strict=True)),
        ]
    )

    def stage_adam(rates: list[float]) -> tuple[StageAdam, torch.optim.lr_scheduler.LambdaLR]:
        groups = [
            {"params": [t], "lr": lr, "positive": True} for t, lr in zip(tables, rates, strict=True)
        ]
        opt = StageAdam([{"params": [weight], "lr": 0.5, "positive": False}, *groups])
        return opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 0.9**i)

    opt, schedule = stage_adam(rates)
    expected_schedule = torch.optim.lr_scheduler.LambdaLR(expected, lambda i: 0.9**i)
    for i in range(12):
        weight.grad = torch.randn(weight.shape, generator=generator)
        other.grad = weight.grad.clone()
        for table, own in zip(tables, rows, strict=True):
            grad = torch.randn(table.shape, generator=generator)
            visited = torch.rand(len(table), generator=generator) < 0.6
            table.grad = (
                grad * visited[:, None] if visited.any() or i % 2 else None
            )  # zero or None: not visited
            for row, g, seen in zip(own, grad, visited, strict=True):
                row.grad = g if seen else None
        for optimizer, its_schedule in ((opt, schedule), (expected, expected_schedule)):
            optimizer.step()
            its_schedule.step()
            optimizer.zero_grad()
        assert all(t.grad is None for t in tables) and torch.equal(weight, other)
        assert all(
            torch.equal(t.data, torch.stack(list(own)).data)
            for t, own in zip(tables, rows, strict=True)
        ), i
        if i == 5:
            states = opt.state_dict(), schedule.state_dict()
            opt, schedule = stage_adam([1.0, 1.0, 1.0])  # the rates are the state's
            opt.load_state_dict(states[0])
            schedule.load_state_dict(states[1])


def test_a_plain_unet_is_refused(pipe, calib):
    with pytest.raises(ConfigError, match="expected a UNet made by questlib.quantize"):
        finetune(pipe.unet, pipe.unet, calib, QuantConfig.preset("quest"))
