"""Gates on every family of networks, and gradient routing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import models as tv

import fsg
import models

SEQUENCE, IDS = torch.rand(2, 7, 32), torch.randint(0, 90, (2, 7))
IMAGE = torch.rand(2, 3, 64, 64)


def swin(**kwargs):
    return tv.SwinTransformer([4, 4], 24, [1, 1], [2, 4], [4, 4], num_classes=4, **kwargs)


def swin_v2():
    module = tv.swin_transformer
    return swin(block=module.SwinTransformerBlockV2, downsample_layer=module.PatchMergingV2)


def convnext():
    config = tv.convnext.CNBlockConfig
    return tv.ConvNeXt([config(16, 32, 1), config(32, None, 1)], num_classes=4)


def encoder(**kwargs):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **kwargs)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not kwargs)


class Decoder(nn.TransformerDecoder):
    def __init__(self):
        super().__init__(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 2)

    def forward(self, x):
        return super().forward(x, x)


def timm_model(name, **kwargs):
    return pytest.importorskip("timm").create_model(name, num_classes=4, **kwargs)


class Tokens(nn.Module):
    """A Hugging Face network of two layers that returns its first output alone."""

    def __init__(self, name, **kwargs):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, name.replace("Model", "Config"))
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "intermediate_size": 64}  # fmt: skip
        if name == "GPT2Model":
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4}
        if name != "ViTModel":
            sizes |= {"vocab_size": 90, "bos_token_id": 0, "eos_token_id": 0}
        self.model = getattr(transformers, name)(config(**sizes, **kwargs))

    def forward(self, x):
        return self.model(x)[0]


# name: (how to make it, an input, number of gates)
NETWORKS = {
    "vit": (lambda: models.vit_tiny(64, 4), IMAGE, 8),
    "swin": (swin, IMAGE, 4),
    "swin_v2": (swin_v2, IMAGE, 4),
    "convnext": (convnext, IMAGE, 2),
    "resnet18": (lambda: tv.resnet18(num_classes=4), IMAGE, 8),
    "resnet50": (lambda: tv.resnet50(num_classes=4), IMAGE, 16),
    "regnet": (lambda: models.regnet_tiny(4), IMAGE, 4),
    "efficientnet": (lambda: tv.efficientnet_b0(num_classes=4), IMAGE, 9),
    "mobilenet_v2": (lambda: tv.mobilenet_v2(num_classes=4), IMAGE, 10),
    "mobilenet_v3": (lambda: tv.mobilenet_v3_small(num_classes=4), IMAGE, 6),
    "timm vit": (
        lambda: timm_model("vit_tiny_patch16_224", img_size=64, depth=2), IMAGE, 4,
    ),
    "timm swin": (
        lambda: timm_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4,
                           depths=(1, 1, 2, 1)), IMAGE, 10,
    ),
    "timm swin_v2": (
        lambda: timm_model("swinv2_tiny_window8_256", img_size=64, window_size=4,
                           depths=(1, 1, 2, 1)), IMAGE, 10,
    ),
    "timm convnext": (lambda: timm_model("convnext_atto", depths=(1, 1, 1, 1)), IMAGE, 4),
    "timm resnet18": (lambda: timm_model("resnet18"), IMAGE, 8),
    "timm efficientnet": (lambda: timm_model("tf_efficientnet_lite0"), IMAGE, 9),
    "encoder": (encoder, SEQUENCE, 4),
    "encoder pre-norm": (lambda: encoder(norm_first=True), SEQUENCE, 4),
    "decoder": (Decoder, SEQUENCE, 6),
    "bert": (lambda: Tokens("BertModel"), IDS, 4),
    "gpt2": (lambda: Tokens("GPT2Model"), IDS, 4),
    "llama": (lambda: Tokens("LlamaModel", num_key_value_heads=2), IDS, 4),
    "hf vit": (lambda: Tokens("ViTModel", image_size=64), IMAGE, 4),
}  # fmt: skip


def make(name):
    """A network in evaluation mode in which no layer is zero or has trivial statistics."""
    torch.manual_seed(0)
    network = NETWORKS[name][0]().eval()
    with torch.no_grad():
        for key, value in [*network.named_parameters(), *network.named_buffers()]:
            if value.is_floating_point() and not value.any():
                value.normal_(0, 0.1)  # heads and last norms that start at zero
            if key.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            if key.endswith(("gamma", "layer_scale")):
                value.fill_(0.5)  # LayerScale of 1e-6 hides the branch
    return network, NETWORKS[name][1]


def open_at_random(model):
    for gate in fsg.gate_parameters(model):
        nn.init.normal_(gate)


# ---------------------------------------------------------------- gates on every family
@pytest.mark.parametrize("name", NETWORKS)
def test_identity_gates_keep_the_function_bit_for_bit(name):
    plain, x = make(name)
    gated = fsg.add_gates(copy.deepcopy(plain))
    with torch.inference_mode():
        assert torch.equal(plain(x), gated(x))
    assert len(fsg.gate_parameters(gated)) == NETWORKS[name][2]
    keys = gated.load_state_dict(plain.state_dict(), strict=False)
    assert keys.unexpected_keys == []
    assert len(keys.missing_keys) == NETWORKS[name][2]
    assert all(key.endswith(".fsg") for key in keys.missing_keys)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_gate_learns(name):
    plain, x = make(name)
    gated = fsg.add_gates(plain).train()
    output = gated(x).float()
    (output * torch.rand_like(output)).sum().backward()
    for key, gate in zip(fsg.gate_values(gated), fsg.gate_parameters(gated), strict=True):
        assert gate.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("hard", [False, True])
@torch.no_grad()
def test_gates_scale_channels_and_fold_away(name, hard):
    plain, x = make(name)
    gated = fsg.add_gates(copy.deepcopy(plain), hard=hard)
    open_at_random(gated)
    clone, expected = copy.deepcopy(gated), gated(x)
    scale = expected.abs().max()
    assert (expected - plain(x)).abs().max() > 1e-3 * scale
    fsg.prune_gates(gated, 1.0)  # a copy must not use the original's gates
    assert not torch.allclose(gated(x), expected)
    assert torch.equal(clone(x), expected)
    folded = fsg.fold_gates(clone)
    assert (folded(x) - expected).abs().max() <= 1e-5 * max(scale, 1)
    plain_state, folded_state = plain.state_dict(), folded.state_dict()
    assert list(folded_state) == list(plain_state)
    assert all(v.shape == plain_state[k].shape for k, v in folded_state.items())
    hooks = [m for m in folded.modules() if fsg.apply_gate in m._forward_hooks.values()]
    assert hooks == []
    assert fsg.gate_parameters(folded) == []


def test_closed_gate_leaves_the_skip_path():
    block = models.vit_tiny(64, 4).encoder.layers[0].eval()
    fsg.prune_gates(fsg.add_gates(block, sites=["self_attention", "mlp"]), 1.0)
    x = torch.rand(2, 17, 96)
    assert torch.equal(block(x), x)


def test_paper_gates_start_near_one_half():
    model = fsg.add_gates(models.vit_tiny(64), init="paper")
    values = torch.cat(list(fsg.gate_values(model).values()))
    assert values.mean().item() == pytest.approx(0.5, abs=0.01)
    assert 0.01 < values.std().item() < 0.06
    relative = torch.cat(list(fsg.gate_values(model, relative=True).values()))
    assert torch.equal(relative, 2 * values)


def test_hard_gates_are_noisy_in_training_only_and_reach_both_ends():
    model = fsg.add_gates(models.vit_tiny(64), hard=True)
    block = model.encoder.layers[0].mlp
    assert torch.equal(fsg.gate_of(block), torch.ones(96))
    torch.manual_seed(0)
    noisy = fsg.gate_of(block, sample=True)
    assert (noisy < 1).any()
    assert (noisy == 1).any()
    x = torch.rand(1, 17, 96)
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))
    with torch.no_grad():
        block.fsg.fill_(-3)
    assert torch.equal(fsg.gate_of(block), torch.zeros(96))  # zero without being pruned


def test_hard_penalty_is_the_probability_of_being_open():
    model = fsg.add_gates(models.vit_tiny(64), hard=True)
    with torch.no_grad():
        for gate in fsg.gate_parameters(model):
            gate.uniform_(-4, 4)
    torch.manual_seed(0)
    draws = [fsg.gate_of(m, True) for _ in range(300) for m in fsg.gated_modules(model).values()]
    share_open = (torch.cat(draws) > 0).float().mean().item()
    assert fsg.gate_penalty(model).item() == pytest.approx(share_open, abs=0.01)


def test_unknown_networks_and_wrong_sites_are_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    with pytest.raises(ValueError, match=r"pass sites.*parts\.\* \(3\)"):
        fsg.add_gates(Odd())
    with pytest.raises(ValueError, match="gate already"):
        fsg.add_gates(fsg.add_gates(models.vit_tiny(64)))
    with pytest.raises(ValueError, match="no module of VisionTransformer matches 'nothing"):
        fsg.add_gates(models.vit_tiny(64), sites=["encoder.*.mlp", "nothing.*"])
    with pytest.raises(ValueError, match="neither|take 'identity'"):
        fsg.add_gates(models.vit_tiny(64), init="open")
    late = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Sequential(nn.Linear(2, 2), nn.GELU())})
    with pytest.raises(ValueError, match="GELU follows"):
        fsg.add_gates(late, sites=["a", "b"])
    assert fsg.gate_parameters(late) == []  # nothing half-done
    with pytest.raises(ValueError, match="no linear"):
        fsg.add_gates(nn.Sequential(nn.ReLU()), sites=["0"])
    with pytest.raises(ValueError, match="does not lie in 0 to 1"):
        fsg.prune_gates(fsg.add_gates(models.vit_tiny(64)), 1.5)


def test_blocks_without_a_skip_or_ending_in_an_activation_take_no_gate():
    sites = fsg.find_sites(tv.efficientnet_v2_s(num_classes=2))
    assert not any(site.startswith("features.1.") for site in sites)  # SiLU ends these
    assert "features.2.0.block" not in sites  # changes the width: no skip
    assert "features.2.1.block" in sites


def test_published_example():
    model = fsg.vit_with_fsg(vit_backbone=models.vit_tiny(224))
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


# ---------------------------------------------------------------- what must not lose the gates
def test_state_dict_carries_the_gates():
    torch.manual_seed(0)
    one, two = (fsg.add_gates(tv.resnet18(num_classes=2)).eval() for _ in range(2))
    open_at_random(one)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(IMAGE), two(IMAGE))


@pytest.mark.parametrize("padded", [False, True])
@torch.inference_mode()
def test_encoder_fast_path_keeps_the_gates(padded):
    torch.manual_seed(0)
    model = fsg.add_gates(encoder()).eval()
    open_at_random(model)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 4:] = True
    mask = mask if padded else None
    out = model(SEQUENCE, src_key_padding_mask=mask)
    with torch.no_grad():
        folded = fsg.fold_gates(copy.deepcopy(model))
    expected = folded(SEQUENCE, src_key_padding_mask=mask)  # takes the fast path
    kept = slice(None) if mask is None else ~mask
    assert torch.allclose(out[kept], expected[kept], atol=1e-5)
    fsg.prune_gates(model, 1.0)
    assert not torch.allclose(model(SEQUENCE, src_key_padding_mask=mask)[kept], out[kept], atol=0.1)


def test_autocast_keeps_the_gates_and_the_precision():
    torch.manual_seed(0)
    model = fsg.add_gates(models.vit_tiny(64, 4)).eval()
    nn.init.normal_(model.heads.head.weight)
    open_at_random(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        branch = model.encoder.layers[0].mlp(torch.rand(1, 17, 96))
        low = model(IMAGE)
    assert branch.dtype == torch.bfloat16
    assert torch.allclose(low.float(), model(IMAGE), atol=0.3)
    low.float().sum().backward()
    assert all(gate.grad.abs().sum() > 0 for gate in fsg.gate_parameters(model))


def test_compiled_network_follows_its_gates():
    torch.manual_seed(0)
    model = fsg.add_gates(models.vit_tiny(64, 4)).eval()
    nn.init.normal_(model.heads.head.weight)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        open_at_random(model)
        assert torch.allclose(compiled(IMAGE), model(IMAGE), atol=1e-5)
    compiled(IMAGE).sum().backward()
    assert all(gate.grad.abs().sum() > 0 for gate in fsg.gate_parameters(model))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_distributed_data_parallel_learns_the_same_gates(process_group, mode):
    def train(wrap):
        torch.manual_seed(0)
        model = fsg.add_gates(models.regnet_tiny(2))
        wrapped = wrap(model)
        gates, weights = fsg.gate_parameters(wrapped), fsg.weight_parameters(wrapped)
        routing = fsg.GradientRouting(
            wrapped, torch.optim.SGD(weights, 0.1), torch.optim.SGD(gates, 0.5), mode
        )
        for _ in range(3):
            routing.step(lambda: wrapped(IMAGE).square().mean())
        return model.state_dict()

    alone, parallel = train(lambda m: m), train(DistributedDataParallel)
    for key, value in alone.items():
        assert torch.allclose(value, parallel[key], atol=1e-6), key


# ---------------------------------------------------------------- pruning and statistics
@torch.no_grad()
def test_pruning_closes_the_lowest_over_all_branches():
    model = fsg.add_gates(models.vit_tiny(64)).eval()
    values = torch.linspace(-3, 3, 8)
    for gate, value in zip(fsg.gate_parameters(model), values, strict=True):
        gate.fill_(value)
    fsg.prune_gates(model, 0.25)
    gates = list(fsg.gate_values(model).values())
    assert [bool(g.any()) for g in gates] == [False, False] + [True] * 6
    scores = {name: torch.arange(96.0) for name in fsg.gate_values(model)}
    fsg.prune_gates(model, 0.5, scores)
    for gate in list(fsg.gate_values(model).values())[2:]:
        assert (gate[:48] == 0).all()
        assert (gate[48:] > 0).all()
    before = {name: gate.clone() for name, gate in fsg.gate_values(model).items()}
    fsg.prune_gates(model, 0.0)
    assert all(torch.equal(gate, before[n]) for n, gate in fsg.gate_values(model).items())


def test_closed_gates_stay_closed_in_training():
    model = fsg.prune_gates(fsg.add_gates(models.vit_tiny(64)), 0.5)
    optimizer = torch.optim.Adam(fsg.gate_parameters(model), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(IMAGE).square().sum().backward()
        optimizer.step()
    values = torch.cat(list(fsg.gate_values(model).values()))
    assert (values == 0).float().mean() == 0.5
    assert values.isfinite().all()


@torch.no_grad()
def test_contributions_do_not_change_when_gate_and_weight_are_rescaled():
    torch.manual_seed(0)
    model = fsg.add_gates(models.vit_tiny(64, 4)).eval()
    first = fsg.gate_contributions(model, lambda: model(IMAGE))
    for module in fsg.gated_modules(model).values():
        layer, logit = fsg.producer(module), torch.empty(96).uniform_(-1, 1)
        module.fsg.copy_(logit)
        layer.weight.div_(2 * logit.sigmoid()[:, None])
        layer.bias.div_(2 * logit.sigmoid())
    again = fsg.gate_contributions(model, lambda: model(IMAGE))
    for name, value in first.items():
        assert value.mean().item() == pytest.approx(1, abs=1e-5)
        assert torch.allclose(value, again[name], rtol=1e-3)
    fsg.prune_gates(model, 0.5)
    closed = fsg.gate_contributions(model, lambda: model(IMAGE))
    assert (torch.cat(list(closed.values())) == 0).float().mean() == 0.5


def test_statistics_at_known_values():
    torch.manual_seed(0)
    even = fsg.gate_statistics(torch.ones(100))
    assert even["hoyer"] == pytest.approx(0, abs=1e-9)
    assert even["gini"] == pytest.approx(0, abs=1e-9)
    assert even["effective"] == pytest.approx(1)
    one = fsg.gate_statistics(torch.eye(100)[0])
    assert (one["hoyer"], one["gini"]) == pytest.approx((1, 1))
    assert one["effective"] == pytest.approx(0.01)
    assert one["closed_01"] == pytest.approx(0.99)
    wide = fsg.gate_statistics(torch.sigmoid(3 * torch.randn(100_000)))
    assert (wide["hoyer"], wide["gini"]) == pytest.approx((0.20, 0.42), abs=0.01)
    assert wide["effective"] == pytest.approx(0.65, abs=0.01)
    none = fsg.gate_statistics(torch.zeros(10))
    assert (none["hoyer"], none["gini"], none["effective"]) == (1, 1, 0)


# ---------------------------------------------------------------- gradient routing
def setup(mode, **kwargs):
    torch.manual_seed(0)
    model = fsg.add_gates(models.regnet_tiny(2))
    gates = fsg.gate_parameters(model)
    weights = [p for n, p in model.named_parameters() if not n.endswith(".fsg")]
    optimizer, gate_optimizer = torch.optim.SGD(weights, 0.05), torch.optim.SGD(gates, 0.5)
    x, y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])

    def loss_fn(x=x, y=y):
        return nn.functional.cross_entropy(model(x), y)

    if mode == "two passes":
        return model, (gates, weights), (gate_optimizer, optimizer), loss_fn
    return model, fsg.GradientRouting(model, optimizer, gate_optimizer, mode, **kwargs), loss_fn


def routed(mode, steps=3, **kwargs):
    model, routing, loss_fn = setup(mode, **kwargs)
    gate_loss = loss_fn if mode == "held_out" else None
    for _ in range(steps):
        routing.step(loss_fn, gate_loss)
    return model


def assert_same(one, two):
    other = two.state_dict()
    for key, value in one.state_dict().items():
        assert torch.equal(value, other[key]), key


def test_single_routing_is_two_passes_at_one_point():
    model, parameters, optimizers, loss_fn = setup("two passes")
    for _ in range(3):
        with fsg.frozen_statistics(model):
            gate_grads = torch.autograd.grad(loss_fn(), parameters[0])
        grads = torch.autograd.grad(loss_fn(), parameters[1])
        for own, values in zip(parameters, (gate_grads, grads), strict=True):
            for parameter, grad in zip(own, values, strict=True):
                parameter.grad = grad
        for optimizer in optimizers:
            optimizer.step()
    assert_same(routed("single"), model)


def test_sequential_routing_steps_gates_then_weights_at_the_new_gates():
    model, parameters, optimizers, loss_fn = setup("two passes")
    for _ in range(3):
        for own, optimizer in zip(parameters, optimizers, strict=True):
            for p in model.parameters():
                p.grad = None
            if own is parameters[0]:
                with fsg.frozen_statistics(model):
                    loss_fn().backward()
            else:
                loss_fn().backward()
            optimizer.step()
    assert_same(routed("sequential"), model)
    assert_same(routed("held_out"), model)  # on the same batch it is the same step
    assert all(p.requires_grad for p in routed("sequential").parameters())
    single, sequential = routed("single", 1), routed("sequential", 1)
    assert not torch.equal(single.fc.weight, sequential.fc.weight)
    assert torch.equal(single.stem[1].running_mean, sequential.stem[1].running_mean)  # updated once
    assert single.stem[1].num_batches_tracked == sequential.stem[1].num_batches_tracked == 1


def test_held_out_gates_step_on_their_own_batch():
    def step(gate_seed):
        model, routing, loss_fn = setup("held_out")
        torch.manual_seed(gate_seed)
        other = torch.rand(4, 3, 32, 32)
        start = copy.deepcopy(model)
        routing.step(loss_fn, lambda: loss_fn(other))
        return start, model, other, loss_fn

    (start, one, other, _), (_, two, _, _) = step(1), step(2)
    gates = [torch.cat(fsg.gate_parameters(m)) for m in (start, one, two)]
    assert not torch.equal(gates[1], gates[2])
    loss = nn.functional.cross_entropy(start(other), torch.tensor([0, 1, 0, 1]))
    grads = torch.autograd.grad(loss, fsg.gate_parameters(start))
    assert torch.allclose(gates[1], gates[0] - 0.5 * torch.cat(grads), atol=1e-6)
    with pytest.raises(ValueError, match="held_out"):
        setup("held_out")[1].step(lambda: None)
    with pytest.raises(ValueError, match="single"):
        setup("single")[1].step(lambda: None, lambda: None)


def test_upstream_routing_adds_up_the_gradients_of_both_passes():
    model, parameters, optimizers, loss_fn = setup("two passes")
    loss_fn().backward()
    optimizers[0].step()
    loss_fn().backward()
    optimizers[1].step()
    assert_same(routed("upstream", 1), model)
    assert not torch.equal(model.stem[1].running_mean, routed("single", 1).stem[1].running_mean)


def norms(model, start):
    """Length of the step that gates and weights took."""
    own = fsg.gate_parameters(model), fsg.gate_parameters(start)
    gates = torch.cat([a - b for a, b in zip(*own, strict=True)]).norm().item()
    rest = [n for n, _ in model.named_parameters() if not n.endswith(".fsg")]
    pairs = [(model.get_parameter(n), start.get_parameter(n)) for n in rest]
    return gates, torch.cat([(a - b).flatten() for a, b in pairs]).norm().item()


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_gates_and_weights_are_clipped_apart(mode):
    start = setup(mode)[0]
    gates, weights = norms(routed(mode, 1, clip=1e-3), start)
    free_gates, free_weights = norms(routed(mode, 1), start)
    assert gates == pytest.approx(free_gates)
    assert weights == pytest.approx(0.05 * 1e-3, rel=1e-2)
    gates, weights = norms(routed(mode, 1, gate_clip=1e-3), start)
    assert gates == pytest.approx(0.5 * 1e-3, rel=1e-2)
    assert weights == pytest.approx(free_weights, rel=0.2)  # sequential: at other gates


def test_loss_scaling_changes_nothing_but_overflow():
    """On a CPU the scaler works as on CUDA: gradients are unscaled before clipping."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain = routed("sequential", 2, clip=0.1, gate_clip=0.1)
    scaled = routed("sequential", 2, clip=0.1, gate_clip=0.1, scaler=scaler)
    for key, value in plain.state_dict().items():
        assert torch.allclose(value, scaled.state_dict()[key], atol=1e-6), key


def test_wrong_owners_of_parameters_are_refused():
    model, routing, _ = setup("single")
    gates, everything = fsg.gate_parameters(model), torch.optim.SGD(model.parameters(), 0.1)
    gate_optimizer = torch.optim.SGD(gates, 0.1)
    with pytest.raises(ValueError, match="contradict"):
        fsg.GradientRouting(model, everything, None, "single")
    with pytest.raises(ValueError, match="optimizer 4 of the gates"):
        fsg.GradientRouting(model, everything, gate_optimizer)
    with pytest.raises(ValueError, match="gate_optimizer 3 parameters"):
        fsg.GradientRouting(model, routing.optimizer, torch.optim.SGD(gates[1:], 0.1))
    with pytest.raises(ValueError, match="none of"):
        fsg.GradientRouting(model, everything, gate_optimizer, "dual")


@pytest.mark.parametrize("momentum", [0.1, None])
def test_frozen_statistics_leave_running_and_evaluated_norms_as_they_were(momentum):
    norm = nn.BatchNorm1d(3, momentum=momentum)
    x = torch.rand(8, 3)
    expected, before = copy.deepcopy(norm)(x), copy.deepcopy(norm.state_dict())
    with fsg.frozen_statistics(norm):
        assert torch.equal(norm(x), expected)
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    assert norm.track_running_stats
    norm.eval()
    expected = norm(x)
    with fsg.frozen_statistics(norm):
        assert torch.equal(norm(x), expected)
