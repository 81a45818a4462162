"""Gates on every family of networks, and gradient routing."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torchvision import models as tv

import fsg
from plumbing.backbones import regnet_tiny, vit_tiny

torch.manual_seed(0)
SEQUENCE, IDS = torch.rand(2, 7, 32), torch.randint(0, 90, (2, 7))
IMAGE, SWIN = torch.rand(2, 3, 64, 64), tv.swin_transformer


def swin(**kwargs):
    return tv.SwinTransformer([4, 4], 24, [1, 1], [2, 4], [4, 4], num_classes=4, **kwargs)


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
        config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
                  "vocab_size": 90, "bos_token_id": 0, "eos_token_id": 0, **kwargs}  # fmt: skip
        self.model = getattr(transformers, name)(getattr(transformers, name.replace("Model", "Config"))(**config))

    def forward(self, x):
        return self.model(x)[0]


# name: (how to make it, an input, number of gates: of residual branches with a skip)
NETWORKS = {
    "vit": (lambda: vit_tiny(64, 4), IMAGE, 8),
    "swin": (swin, IMAGE, 4),
    "swin_v2": (lambda: swin(block=SWIN.SwinTransformerBlockV2, downsample_layer=SWIN.PatchMergingV2), IMAGE, 4),
    "convnext": (convnext, IMAGE, 2),
    "regnet": (lambda: regnet_tiny(4), IMAGE, 4),
    "encoder": (encoder, SEQUENCE, 4),
    "encoder pre-norm": (lambda: encoder(norm_first=True), SEQUENCE, 4),
    "decoder": (Decoder, SEQUENCE, 6),
    "bert": (lambda: Tokens("BertModel"), IDS, 4),
    "gpt2": (lambda: Tokens("GPT2Model"), IDS, 4),
    "llama": (lambda: Tokens("LlamaModel", num_key_value_heads=2), IDS, 4),
    "hf vit": (lambda: Tokens("ViTModel", image_size=64), IMAGE, 4),
}
TORCHVISION = {"resnet18": 8, "resnet50": 16, "efficientnet_b0": 9, "mobilenet_v2": 10, "mobilenet_v3_small": 6}
TIMM = {
    "resnet18": 8, "resnetv2_18": 8, "resnetv2_50": 16, "regnetx_002": 13, "regnety_002": 13, "regnetz_005": 17,
    "tf_efficientnet_lite0": 9, "efficientnet_b0_gn": 9, "efficientnet_es": 12, "tf_efficientnetv2_b0": 15,
    "mobilenetv4_conv_small": 10, "mobilenetv4_hybrid_medium": 27,
}  # fmt: skip
TIMM_SMALL = {
    "vit_tiny_patch16_224": ({"img_size": 64, "depth": 2}, 4),
    "swin_tiny_patch4_window7_224": ({"img_size": 64, "window_size": 4, "depths": (1, 1, 2, 1)}, 10),
    "swinv2_tiny_window8_256": ({"img_size": 64, "window_size": 4, "depths": (1, 1, 2, 1)}, 10),
    "convnext_atto": ({"depths": (1, 1, 1, 1)}, 4),
    "resnet34": ({"layers": (1, 1, 1, 1), "norm_layer": "layernorm2d"}, 4),
}
NETWORKS |= {name: (partial(tv.get_model, name, num_classes=4), IMAGE, n) for name, n in TORCHVISION.items()}
NETWORKS |= {f"timm {name}": (partial(timm_model, name), IMAGE, n) for name, n in TIMM.items()}
NETWORKS |= {f"timm {name}": (partial(timm_model, name, **more), IMAGE, n) for name, (more, n) in TIMM_SMALL.items()}


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


def values_of(model, **kwargs):  # of all branches in one vector
    return torch.cat(list(fsg.gate_values(model, **kwargs).values()))


# ---------------------------------------------------------------- gates on every family
@pytest.mark.filterwarnings("error:residual blocks")
@pytest.mark.parametrize("name", NETWORKS)
def test_identity_gates_keep_the_function_bit_for_bit_and_learn(name):
    plain, x = make(name)
    gated = fsg.add_gates(copy.deepcopy(plain))
    with torch.inference_mode():
        assert torch.equal(plain(x), gated(x))
    keys = gated.load_state_dict(plain.state_dict(), strict=False)
    assert keys.unexpected_keys == []
    assert len(keys.missing_keys) == len(fsg.gate_parameters(gated)) == NETWORKS[name][2]
    assert all(key.endswith(".fsg") for key in keys.missing_keys)
    output = gated.train()(x).float()
    (output * torch.rand_like(output)).sum().backward()
    for key, gate in zip(fsg.gate_values(gated), fsg.gate_parameters(gated), strict=True):
        assert gate.grad.abs().sum() > 0, key


@pytest.mark.parametrize(("name", "hard"), [*((name, name == "vit") for name in NETWORKS), ("vit", False)])
@torch.no_grad()
def test_gates_scale_channels_and_fold_away(name, hard):
    plain, x = make(name)
    plain, x = plain.double(), x.double() if x.is_floating_point() else x  # deep random networks amplify rounding
    gated = fsg.add_gates(copy.deepcopy(plain), hard=hard)
    open_at_random(gated)
    clone, expected = copy.deepcopy(gated), gated(x)
    scale = expected.abs().max()
    assert (expected - plain(x)).abs().max() > 1e-3 * scale
    fsg.prune_gates(gated, 1.0)  # a copy must not use the original's gates
    assert not torch.allclose(gated(x), expected)
    assert torch.equal(clone(x), expected)
    gated.load_state_dict(clone.state_dict())  # carries the gates
    assert torch.equal(gated(x), expected)
    folded = fsg.fold_gates(clone)
    assert (folded(x) - expected).abs().max() <= 1e-5 * max(scale, 1)
    shapes = [[(key, value.shape) for key, value in network.state_dict().items()] for network in (plain, folded)]
    assert shapes[0] == shapes[1]
    assert not any(fsg.apply_gate in m._forward_hooks.values() for m in folded.modules())
    assert fsg.gate_parameters(folded) == []


@pytest.mark.parametrize("shared", ["layer", "weight", "ungated", "inside"])
def test_shared_layers_are_not_folded(shared):
    a, b = (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2))
    if shared == "layer":
        b[2] = a[2]
    else:
        b[2].weight = b[0].weight if shared == "inside" else a[2].weight
    model = fsg.add_gates(nn.ModuleDict({"a": a, "b": b}), sites=["a"] if shared == "ungated" else ["a", "b"])
    open_at_random(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"b\.0.*b\.2" if shared == "inside" else r"a\.2.*b\.2"):
        fsg.fold_gates(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_a_branch_used_twice_folds_and_closed_gates_leave_the_skip_path():
    branch, x = nn.Linear(96, 96), torch.rand(2, 17, 96)
    model = fsg.add_gates(nn.ModuleDict({"a": branch, "b": branch}), sites=["a"])
    open_at_random(model)
    expected = branch(x)
    assert torch.allclose(fsg.fold_gates(model)["b"](x), expected, atol=1e-6)
    block = vit_tiny(64, 4).encoder.layers[0].eval()
    fsg.prune_gates(fsg.add_gates(block, sites=["self_attention", "mlp"]), 1.0)
    assert torch.equal(block(x), x)


def test_paper_gates_start_near_one_half():
    model = fsg.vit_with_fsg(vit_backbone=vit_tiny(224))  # the published example
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)
    model = fsg.add_gates(vit_tiny(64), init="paper")
    values = values_of(model)
    assert values.mean().item() == pytest.approx(0.5, abs=0.01)
    assert 0.01 < values.std().item() < 0.06
    assert torch.equal(values_of(model, relative=True), 2 * values)


def test_hard_gates_are_noisy_in_training_only_and_reach_both_ends():
    model, x = fsg.add_gates(vit_tiny(64), hard=True), torch.rand(1, 17, 96)
    block = model.encoder.layers[0].mlp
    assert torch.equal(fsg.gate_of(block), torch.ones(96))
    torch.manual_seed(0)
    assert 0 < (fsg.gate_of(block, sample=True) == 1).float().mean() < 1
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))
    with torch.no_grad():
        block.fsg.fill_(-3)
        assert torch.equal(fsg.gate_of(block), torch.zeros(96))  # zero without being pruned
        for gate in fsg.gate_parameters(model):
            gate.uniform_(-4, 4)
    draws = [fsg.gate_of(m, True) for _ in range(300) for m in fsg.gated_modules(model).values()]
    share_open = (torch.cat(draws) > 0).float().mean().item()
    assert fsg.gate_penalty(model).item() == pytest.approx(share_open, abs=0.01)


def test_unknown_networks_and_wrong_sites_are_refused():
    linears = nn.ModuleDict({"parts": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))})
    for message, call in (
        (r"sites=.*parts\.\* \(3\)", lambda: fsg.add_gates(linears)),
        (r"encoder\.layers.*gate", lambda: fsg.add_gates(fsg.add_gates(vit_tiny(64)))),
        ("'nothing", lambda: fsg.add_gates(vit_tiny(64), sites=["encoder.*.mlp", "nothing.*"])),
        ("'open'", lambda: fsg.add_gates(vit_tiny(64), init="open")),
        ("ReLU", lambda: fsg.add_gates(nn.Sequential(nn.ReLU()), sites=["0"])),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    last = {"GELU": nn.GELU(), "ParametrizedLinear": normed, "MyStdConv": type("MyStdConv", (nn.Conv1d,), {})(1, 1, 1)}
    for name, module in last.items():
        late = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Sequential(nn.Linear(2, 2), module)})
        with pytest.raises(ValueError, match=f"^b: .*{name}"):
            fsg.add_gates(late, sites=["a", "b"])
        assert fsg.gate_parameters(late) == []  # nothing half-done


def test_blocks_without_a_skip_take_no_gate_and_those_that_end_in_an_activation_are_reported():
    with pytest.warns(UserWarning, match=": 2 FusedMBConv$"):
        sites = fsg.find_sites(tv.efficientnet_v2_s(num_classes=2))
    assert min(sites) == "features.2.1.block"  # features.2.0 has no skip, and SiLU ends features.1
    with pytest.warns(UserWarning, match=": 2 ConvBnAct$"):
        assert len(fsg.find_sites(timm_model("tf_efficientnetv2_s"))) == 33


# ---------------------------------------------------------------- what must not lose the gates
@pytest.mark.parametrize("padded", [False, True])
@torch.inference_mode()
def test_encoder_fast_path_keeps_the_gates(padded):
    torch.manual_seed(0)
    model = fsg.add_gates(encoder()).eval()
    open_at_random(model)
    mask = torch.arange(7).expand(2, 7) >= torch.tensor([[7], [4]]) if padded else None
    out = model(SEQUENCE, src_key_padding_mask=mask)
    with torch.no_grad():
        folded = fsg.fold_gates(copy.deepcopy(model))
    expected = folded(SEQUENCE, src_key_padding_mask=mask)  # takes the fast path
    kept = slice(None) if mask is None else ~mask
    assert torch.allclose(out[kept], expected[kept], atol=1e-5)
    fsg.prune_gates(model, 1.0)
    assert not torch.allclose(model(SEQUENCE, src_key_padding_mask=mask)[kept], out[kept], atol=0.1)


def test_autocast_and_compile_keep_the_gates():
    torch.manual_seed(0)
    model = fsg.add_gates(vit_tiny(64, 4)).eval()
    nn.init.normal_(model.heads.head.weight)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        open_at_random(model)
        assert torch.allclose(compiled(IMAGE), model(IMAGE), atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        branch, low = model.encoder.layers[0].mlp(torch.rand(1, 17, 96)), model(IMAGE)
    assert branch.dtype == torch.bfloat16
    assert torch.allclose(low.float(), model(IMAGE), atol=0.3)
    for output in (compiled(IMAGE), low):
        model.zero_grad()
        output.float().sum().backward()
        assert all(gate.grad.abs().sum() > 0 for gate in fsg.gate_parameters(model))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", ["single", "sequential", "upstream", "sequential compiled"])
def test_distributed_data_parallel_learns_the_same_gates_and_reduces_once_per_pass(process_group, mode):
    reduced = []

    def count(_, bucket):
        reduced.append(bucket.is_last())
        return allreduce_hook(None, bucket)

    def parallel(model):
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, count)  # takes the place of the all-reduce
        return torch.compile(wrapped, backend="eager") if "compiled" in mode else wrapped

    def train(wrap):
        torch.manual_seed(0)
        model = fsg.add_gates(regnet_tiny(2))
        wrapped = wrap(model)
        own = fsg.weight_parameters(wrapped), fsg.gate_parameters(wrapped)
        routing = fsg.GradientRouting(wrapped, *(torch.optim.SGD(p, 0.1) for p in own), mode.split()[0])
        for _ in range(3):
            routing.step(lambda part: wrapped(part).square().mean() / 2, [IMAGE, IMAGE.flip(2)])
        return model.state_dict()

    alone, together = train(lambda m: m), train(parallel)
    for key, value in alone.items():
        assert torch.allclose(value, together[key], atol=1e-6), key
    assert sum(reduced) == 3 * (1 if mode == "single" else 2)


# ---------------------------------------------------------------- pruning and statistics
@torch.no_grad()
def test_pruning_closes_the_lowest_over_all_branches():
    model = fsg.add_gates(vit_tiny(64)).eval()
    for gate, value in zip(fsg.gate_parameters(model), torch.linspace(-3, 3, 8), strict=True):
        gate.fill_(value)
    before = values_of(model)
    with fsg.pruned(model, 0.5):
        assert (values_of(model) == 0).sum() == 4 * 96
    assert torch.equal(values_of(model), before)
    fsg.prune_gates(model, 0.25)
    assert [bool(g.any()) for g in fsg.gate_values(model).values()] == [False, False] + [True] * 6
    fsg.prune_gates(model, 0.5, {name: torch.arange(96.0) for name in fsg.gate_values(model)})
    for gate in list(fsg.gate_values(model).values())[2:]:
        assert torch.equal(gate > 0, torch.arange(96) >= 48)
    before = values_of(model)
    assert torch.equal(values_of(fsg.prune_gates(model, 0.0)), before)
    optimizer = torch.optim.Adam(fsg.gate_parameters(model), 0.1)
    for _ in range(2):  # closed gates stay closed in training
        optimizer.zero_grad()
        with torch.enable_grad():
            model(IMAGE).square().sum().backward()
        optimizer.step()
    assert torch.equal(values_of(model) == 0, before == 0)
    assert values_of(model).isfinite().all()


@torch.no_grad()
def test_contributions_do_not_change_when_gate_and_weight_are_rescaled():
    torch.manual_seed(0)
    model = fsg.add_gates(vit_tiny(64, 4)).eval()
    measure = partial(fsg.gate_contributions, model, lambda: model(IMAGE))
    first = measure()
    for module in fsg.gated_modules(model).values():
        layer, logit = fsg.layers_of(module)[-1], torch.empty(96).uniform_(-1, 1)
        module.fsg.copy_(logit)
        layer.weight.div_(2 * logit.sigmoid()[:, None])
        layer.bias.div_(2 * logit.sigmoid())
    again = measure()
    for name, value in first.items():
        assert value.mean().item() == pytest.approx(1, abs=1e-5)
        assert torch.allclose(value, again[name], rtol=1e-3)
    fsg.prune_gates(model, 0.5)
    assert (torch.cat(list(measure().values())) == 0).float().mean() == 0.5


def test_statistics_at_known_values():
    torch.manual_seed(0)
    even, one, none = (fsg.gate_statistics(gate) for gate in (torch.ones(100), torch.eye(100)[0], torch.zeros(10)))
    assert (even["hoyer"], even["gini"], even["effective"]) == pytest.approx((0, 0, 1), abs=1e-9)
    assert (one["hoyer"], one["gini"], one["effective"], one["closed_01"]) == pytest.approx((1, 1, 0.01, 0.99))
    assert (none["hoyer"], none["gini"], none["effective"]) == (1, 1, 0)
    wide = fsg.gate_statistics(torch.sigmoid(3 * torch.randn(100_000)))
    assert (wide["hoyer"], wide["gini"], wide["effective"]) == pytest.approx((0.20, 0.42, 0.65), abs=0.01)


# ---------------------------------------------------------------- gradient routing
X, OTHER, Y = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])


def setup(mode, **kwargs):
    torch.manual_seed(0)
    model = fsg.add_gates(regnet_tiny(2))
    gates, weights = fsg.gate_parameters(model), [p for n, p in model.named_parameters() if not n.endswith(".fsg")]
    optimizer, gate_optimizer = torch.optim.SGD(weights, 0.05), torch.optim.SGD(gates, 0.5)
    if mode == "reference":
        return model, gates, (gate_optimizer, optimizer)
    if mode == "off":
        optimizer.add_param_group({"params": gates, "lr": 0.5})
        gate_optimizer = None
    return model, fsg.GradientRouting(model, optimizer, gate_optimizer, mode, **kwargs)


def routed(mode, steps=3, **kwargs):
    model, routing = setup(mode, **kwargs)
    own = {"parts": [slice(None)], "gate_loss_fn": lambda: cross_entropy(model(OTHER), Y)} if mode == "held_out" else {}
    for _ in range(steps):
        routing.step(lambda part=slice(None): cross_entropy(model(X[part]), Y[part]), **own)
    return model


def reference(mode):
    """Three steps as written out: a pass for the gates, a pass for the weights."""
    model, gates, optimizers = setup("reference")
    for _ in range(3):
        model.zero_grad()
        with nullcontext() if mode == "upstream" else fsg.frozen_statistics(model):
            cross_entropy(model(OTHER if mode == "held_out" else X), Y).backward()
        gate_grads = [gate.grad for gate in gates]
        if mode != "single":
            optimizers[0].step()
        if mode != "upstream":
            model.zero_grad()
        cross_entropy(model(X), Y).backward()
        optimizers[1].step()
        if mode == "single":
            for gate, grad in zip(gates, gate_grads, strict=True):
                gate.grad = grad
            optimizers[0].step()
    return model


@pytest.mark.parametrize("mode", ["single", "sequential", "held_out", "upstream"])
def test_routing_steps_as_written_out(mode):
    model, state = routed(mode), reference(mode).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(p.requires_grad for p in model.parameters())
    assert model.stem[1].num_batches_tracked == 3 * (2 if mode == "upstream" else 1)
    assert torch.equal(routed("single").fc.weight, model.fc.weight) == (mode == "single")


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("mode", ["off", "single", "sequential", "upstream"])
def test_parts_add_up_to_the_whole_batch(mode, scaled):
    two_passes = mode in ("sequential", "upstream")
    clips = {"clip": 0.1, "gate_clip": 0.1} if scaled and mode != "upstream" else {}

    def step(parts, scaler=None):
        model, routing = setup(mode, scaler=scaler, **clips)
        model.eval()  # batch norms that use the same statistics in every part
        seen = []

        def loss_fn(part=slice(None), factor=1):
            seen.append((part, factor))
            return factor * cross_entropy(model(X[part]), Y[part], reduction="sum") / 4

        loss = routing.step(loss_fn, parts, partial(loss_fn, factor=2) if two_passes else None)
        assert seen == [(p, factor) for factor in (2, 1)[not two_passes :] for p in parts or [slice(None)]]
        return model, loss

    start, (whole, loss) = setup(mode)[0], step(None)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None  # works on a CPU as on CUDA
    model, total = step([slice(0, 1), slice(1, 2), slice(2, 4)], scaler)
    assert total.item() == pytest.approx(loss.item())
    assert not total.requires_grad
    for (key, value), old in zip(whole.named_parameters(), start.parameters(), strict=True):
        assert not torch.equal(value, old), key
        assert torch.allclose(model.get_parameter(key) - old, value - old, rtol=1e-3, atol=1e-6), key


def norms(model, start):
    """Length of the step that gates and weights took."""
    steps = {n: (p - start.get_parameter(n)).flatten() for n, p in model.named_parameters()}
    return [torch.cat([s for n, s in steps.items() if n.endswith(".fsg") == gates]).norm().item() for gates in (1, 0)]


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_gates_and_weights_are_clipped_apart(mode):
    start = setup(mode)[0]
    free_gates, free_weights = norms(routed(mode, 1), start)
    gates, weights = norms(routed(mode, 1, clip=1e-3), start)
    assert (gates, weights) == (pytest.approx(free_gates), pytest.approx(0.05 * 1e-3, rel=1e-2))
    gates, weights = norms(routed(mode, 1, gate_clip=1e-3), start)
    assert gates == pytest.approx(0.5 * 1e-3, rel=1e-2)
    assert weights == pytest.approx(free_weights, rel=0.2)  # sequential: at other gates


def test_wrong_owners_of_parameters_and_wrong_modes_are_refused():
    model, routing = setup("single")
    gates, everything = fsg.gate_parameters(model), torch.optim.SGD(model.parameters(), 0.1)
    for message, call in (
        ("'single'", lambda: fsg.GradientRouting(model, everything, None, "single")),
        ("'dual'", lambda: fsg.GradientRouting(model, everything, routing.gate_optimizer, "dual")),
        ("optimizer 4 of", lambda: fsg.GradientRouting(model, everything, routing.gate_optimizer)),
        ("holds 3 ", lambda: fsg.GradientRouting(model, routing.optimizer, torch.optim.SGD(gates[1:], 0.1))),
        ("held_out", lambda: setup("held_out")[1].step(lambda: None)),
        ("single", lambda: routing.step(lambda: None, gate_loss_fn=lambda: None)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_frozen_statistics_leave_running_and_evaluated_norms_as_they_were(momentum):
    norm, x = nn.BatchNorm1d(3, momentum=momentum), torch.rand(8, 3)
    for training in (True, False):
        expected, before = copy.deepcopy(norm.train(training))(x), copy.deepcopy(norm.state_dict())
        with fsg.frozen_statistics(norm):
            assert torch.equal(norm(x), expected)
        assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
        assert norm.track_running_stats
