import copy
import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.exc import CppCompileError

from kronsearch.errors import TrainingError
from kronsearch.sekron import SeKronConv2d, SeKronSpec
from kronsearch.training import finetune as finetune_module
from kronsearch.training.batches import Batches
from kronsearch.training.evaluate import evaluate, outputs
from kronsearch.training.finetune import Trainer, finetune
from kronsearch.training.schedule import TrainSettings, learning_rate, total_steps
from kronsearch.training.team import Team


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr(finetune_module, "precision_for", lambda device: "float32")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("epochs", [0.01, 0.5, 1.0, 2.4])
def test_total_steps_is_the_ceiling_of_epochs_times_batches(epochs):
    settings = TrainSettings(epochs=epochs, batch_size=8)
    assert total_steps(settings, 30) == math.ceil(epochs * (30 // 8))
    assert total_steps(TrainSettings(epochs=epochs), 30) == math.ceil(epochs)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
def test_the_rate_climbs_to_lr_then_falls_towards_zero(warmup):
    settings = TrainSettings(epochs=1, lr=0.3, warmup=warmup)
    total = 40
    rates = [learning_rate(settings, step, total) for step in range(total)]
    top = rates.index(max(rates))
    assert top == warmup * total
    assert rates[top] == settings.lr
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < 0.01 * settings.lr
    assert learning_rate(settings, 0, 1) > 0


def test_training_learns_and_leaves_eval_mode(make_data, make_network):
    data, network = make_data(), make_network(dropout=0.1)
    before = evaluate(network, data, "test")
    report = finetune(network, data, TrainSettings(epochs=40, batch_size=10, lr=0.03), generator=seeded())
    assert report.step == report.total_steps == 40 * 3
    assert report.images_per_second > 0
    assert not any(module.training for module in network.modules())
    assert evaluate(network, data, "test").metric == 1.0 > before.metric


def functional_features(network, images):
    return F.conv2d(images, network.conv.weight, network.conv.bias, padding=1)


def test_two_steps_are_those_of_a_hand_written_loop(make_data, make_network):
    """Distillation with weight decay, warm-up and clipping, against AdamW's formulas written out."""
    data, network, teacher = make_data(), make_network(0), make_network(1)
    settings = TrainSettings(
        epochs=2,
        batch_size=30,
        lr=0.01,
        weight_decay=0.1,
        warmup=0.0,
        label_weight=0.25,
        temperature=2.0,
        feature_weight=0.5,
        clip_norm=0.05,
    )
    rates = [0.01, 0.005]
    expected = copy.deepcopy(network).train()
    generator = seeded(5)
    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in expected.named_parameters()}
    for step in (1, 2):
        ((images, labels),) = list(data.train_batches(30, generator=generator))
        torch.randint(2**62, (), generator=generator)  # the seed of dropout
        logits, goal = expected(images), teacher(images).detach()
        feature, wanted = functional_features(expected, images), functional_features(teacher, images).detach()
        cool, cool_goal = (logits / 2).log_softmax(1), (goal / 2).log_softmax(1)
        divergence = 4 * (cool_goal.exp() * (cool_goal - cool)).sum(1).mean()
        loss = 0.75 * divergence + 0.25 * F.cross_entropy(logits, labels)
        loss = loss + 0.5 * (feature - wanted).square().sum() / wanted.square().sum()
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        assert norm > settings.clip_norm
        with torch.no_grad():
            for (name, parameter), gradient in zip(expected.named_parameters(), gradients, strict=True):
                gradient = gradient * settings.clip_norm / norm
                first, second = state[name]
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.999).add_(0.001 * gradient**2)
                if parameter.dim() >= 2:
                    parameter.mul_(1 - rates[step - 1] * settings.weight_decay)
                direction = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
                parameter.sub_(rates[step - 1] * direction)
    finetune(network, data, settings, teacher=teacher, blocks=["conv"], generator=seeded(5))
    for name, parameter in network.named_parameters():
        # conv.bias has no influence behind a batch norm: its gradient is rounding noise, which Adam blows up.
        if name != "conv.bias":
            torch.testing.assert_close(parameter, expected.get_parameter(name), atol=2e-5, rtol=1e-4, msg=name)


def test_distillation_brings_the_outputs_to_the_teachers(make_data, make_network):
    data, student, teacher = make_data(), make_network(0), make_network(1, dropout=0.5).train()
    weights = copy.deepcopy(teacher.state_dict())
    goal = outputs(teacher, data, "val")
    before = evaluate(student, data, "val", teacher_outputs=goal).divergence
    settings = TrainSettings(epochs=30, batch_size=10, lr=0.02, label_weight=0.0)
    finetune(student, data, settings, teacher=teacher, generator=seeded())
    assert evaluate(student, data, "val", teacher_outputs=goal).divergence < 0.1 * before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in teacher.state_dict().items())
    assert all(module.training for module in teacher.modules())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_features_come_near_to_the_teachers(make_data, make_network):
    data, teacher = make_data(), make_network(1)
    (images, _), *_ = data.batches("val", 12)
    apart = []
    for weight in (0.0, 10.0):
        student = make_network(0)
        settings = TrainSettings(epochs=30, batch_size=10, lr=0.02, feature_weight=weight)
        finetune(student, data, settings, teacher=teacher, blocks=["conv"], generator=seeded())
        with torch.no_grad():
            apart.append((student.conv(images) - teacher.conv(images)).norm() / teacher.conv(images).norm())
    assert apart[1] < 0.2 < 0.5 < apart[0]


def test_hints_are_of_the_first_steps(make_data, make_network):
    data, teacher, losses = make_data(), make_network(1), {}
    for hints, weight in ((1.0, 10.0), (0.5, 10.0), (1.0, 0.0)):
        settings = TrainSettings(epochs=2, batch_size=10, lr=0.0001, feature_weight=weight, hints=hints)
        network = make_network(0)
        with Trainer(network, data, settings, teacher=teacher, blocks=["conv"], generator=seeded()) as trainer:
            losses[hints, weight] = [trainer.advance(1).loss for _ in range(6)]
    always, first, never = losses.values()
    assert first[:3] == always[:3]
    assert all(found > 1.5 * wanted for found, wanted in zip(first[:3], never[:3], strict=True))
    assert first[3:] == pytest.approx(never[3:], rel=0.02)


def test_a_step_that_was_recorded_is_not_played_back_once_there_are_no_hints(make_data, make_network):
    class Recorded:
        refusal, forgotten = None, []

        def __call__(self, *inputs):
            return trainer._learn(*inputs)

        def forget(self):
            self.forgotten.append(trainer.step)

    settings = TrainSettings(epochs=2, batch_size=10, hints=0.4)
    with Trainer(
        make_network(0), make_data(), settings, teacher=make_network(1), blocks=["conv"], generator=seeded()
    ) as trainer:
        trainer._replay = Recorded()
        trainer.advance(6)
    assert Recorded.forgotten == [3]


def test_with_a_label_weight_of_one_the_teacher_is_not_run(make_data, make_network):
    data, teacher = make_data(), make_network(1)
    teacher.forward = None
    settings = TrainSettings(epochs=1, batch_size=10, label_weight=1.0)
    finetune(make_network(), data, settings, teacher=teacher, generator=seeded())


def test_the_generator_decides_everything_and_the_global_one_nothing(make_data, make_network):
    def trained(seed, global_seed):
        network = make_network(dropout=0.5)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            before = torch.get_rng_state()
            finetune(network, make_data(), TrainSettings(epochs=2, batch_size=10), generator=seeded(seed))
            assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([parameter.flatten() for parameter in network.parameters()])

    assert torch.equal(trained(0, 0), trained(0, 1))
    assert not torch.equal(trained(0, 0), trained(1, 0))


def portions(network, data, settings, steps):
    """Train so many steps at a time, and yield each report."""
    with Trainer(network, data, settings, generator=seeded()) as trainer:
        while trainer.step < trainer.total_steps:
            yield trainer.advance(steps)


def test_reports_come_every_so_many_steps_and_at_the_end(make_data, make_network):
    data, settings = make_data(), TrainSettings(epochs=2 + 1 / 3, batch_size=10)

    def run(report_every):
        network = make_network(dropout=0.5)
        reports = list(portions(network, data, settings, report_every))
        return reports, network.conv.weight

    (each, weight), (some, same_weight), (last, _) = run(1), run(3), run(100)
    assert [report.step for report in each] == [1, 2, 3, 4, 5, 6, 7]
    assert [report.step for report in some] == [3, 6, 7]
    assert [report.step for report in last] == [7]
    assert {report.total_steps for report in each} == {7}
    assert torch.equal(weight, same_weight)
    losses = [report.loss for report in each]
    assert some[1].loss == pytest.approx(sum(losses[3:6]) / 3)
    assert last[0].loss == pytest.approx(sum(losses) / 7)
    assert [report.learning_rate for report in each] == [learning_rate(settings, step, 7) for step in range(7)]


def test_evaluating_between_reports_changes_nothing(make_data, make_network):
    data, settings = make_data(), TrainSettings(epochs=2, batch_size=10)

    def trained(watched):
        network = make_network(dropout=0.5)
        for _ in portions(network, data, settings, 1):
            if watched:
                network.eval()
                evaluate(network, data, "val")
        return network.conv.weight

    assert torch.equal(trained(True), trained(False))


def test_stopping_early_leaves_a_usable_model(make_data, make_network):
    data, network = make_data(), make_network()
    start = network.conv.weight.detach().clone()
    steps = portions(network, data, TrainSettings(epochs=5, batch_size=10), 2)
    assert next(steps).step == 2
    steps.close()
    assert not any(module.training for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not torch.equal(network.conv.weight, start)
    assert evaluate(network, data, "val").n == 12


class Noisy(torch.nn.Module):
    """Dropout in eval mode too."""

    def forward(self, x):
        return F.dropout(x, 0.5)


def wide_network(*, noisy):
    wide = torch.nn.Conv2d(128, 128, 3, padding=1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 128, 3),
        SeKronConv2d.from_conv(wide, SeKronSpec(((128, 1, 3, 1), (1, 128, 1, 3)), (16,))),
        Noisy() if noisy else torch.nn.Identity(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(128, 3),
    )


def larger(network):
    network = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
    return network


def test_wide_layers_of_low_rank_are_trained_in_stages_to_the_same_weights(monkeypatch, make_data):
    data, network = make_data(), wide_network(noisy=False)
    shapes = []
    convolve = SeKronConv2d.convolve

    def spy(inputs, weight, *others):
        shapes.append(tuple(weight.shape))
        return convolve(inputs, weight, *others)

    monkeypatch.setattr(SeKronConv2d, "convolve", staticmethod(spy))
    trained = {}
    for runs in (finetune_module.training_runs, lambda *told: {}):
        monkeypatch.setattr(finetune_module, "training_runs", runs)
        student = copy.deepcopy(network)
        with Trainer(student, data, TrainSettings(epochs=1, batch_size=10, lr=1e-3), generator=seeded()) as trainer:
            trainer.advance(1)
            shapes.clear()
            trainer.advance(2)
        trained[tuple(shapes)] = student
    in_stages, formed = trained[2 * ((16, 128, 1, 3), (128, 16, 3, 1))], trained[2 * ((128, 128, 3, 3),)]
    for ours, theirs, before in zip(in_stages.parameters(), formed.parameters(), network.parameters(), strict=True):
        assert (ours - theirs).norm() < 1e-2 * (theirs - before).norm()


def test_which_layers_these_are_is_found_anew_without_drawing_random_numbers(make_data):
    data, network, settings = make_data(), wide_network(noisy=True), TrainSettings(epochs=2, batch_size=10)
    with Trainer(copy.deepcopy(network), data, settings, generator=seeded()) as whole:
        whole.advance(2)
        state = {name: tensor.clone() for name, tensor in whole.state().items()}
        whole.advance(4)
    with Trainer(copy.deepcopy(network), data, settings, generator=seeded()) as resumed:
        resumed.restore(state)
        resumed.advance(4)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # its own look at kernels
def test_compiled_networks_learn_the_same_and_go_on_to_the_same_weights(make_data):
    data, teacher = make_data(), wide_network(noisy=False)
    start = larger(teacher)
    # behind a batch norm some gradients are rounding noise, which Adam makes whole steps of: not for long
    settings = TrainSettings(epochs=2, batch_size=10, lr=1e-4, label_weight=0.5, averaging=0.9, mixing=True)

    def trainer(settings):
        options = {"teacher": teacher, "blocks": [name for name, _ in teacher.named_children()][:1]}
        return Trainer(copy.deepcopy(start), data, settings, generator=seeded(), **options)

    losses = {}
    for compiled in (False, True):
        with trainer(replace(settings, compiled=compiled)) as whole:
            losses[compiled] = [whole.advance(1).loss for _ in range(3)]
            state = {name: tensor.clone() for name, tensor in whole.state().items()}
            evaluate(whole.result, data, "val")
            whole.advance(3)
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    with trainer(replace(settings, compiled=True)) as resumed:
        resumed.restore(state)
        resumed.advance(3)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name
    assert not any(module._forward_hooks for module in teacher.modules())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # its own look at kernels
def test_compiled_networks_know_their_blocks_from_those_of_others(make_data):
    """Compiled code is reused for other networks of a class, which may be watched in other places."""
    data, teacher = make_data(), wide_network(noisy=False)
    student = larger(teacher)

    def loss(blocks, *, compiled):
        settings = TrainSettings(epochs=1, batch_size=10, lr=1e-4, compiled=compiled)
        with Trainer(
            copy.deepcopy(student), data, settings, teacher=teacher, blocks=blocks, generator=seeded()
        ) as trainer:
            return trainer.advance(1).loss

    sets = (["0"], ["0", "3"], ["3"])
    found = [loss(blocks, compiled=True) for blocks in sets]
    assert found == pytest.approx([loss(blocks, compiled=False) for blocks in sets], rel=1e-3)
    assert max(found) > 1.1 * min(found)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_compiler_that_fails_is_one_line(monkeypatch, make_data, make_network, when):
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, data):
            return data.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise CppCompileError(["g++"], "killed")

    def fail(network):
        def run(inputs):
            if when == "forward":
                raise CppCompileError(["g++"], "killed")
            outputs, blocks = network(inputs)
            return Failing.apply(outputs), blocks

        return run

    monkeypatch.setattr(torch, "compile", fail)
    settings = TrainSettings(epochs=1, batch_size=10, compiled=True)
    with (
        Trainer(make_network(), make_data(), settings, generator=seeded()) as trainer,
        pytest.raises(TrainingError, match=r"torch.compile does not work here \(.*\): install what it needs"),
    ):
        trainer.advance(1)


def test_without_the_blocks_there_is_no_training_and_no_hook(make_data, make_network):
    model, other = make_network(), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(60, 3))
    settings = TrainSettings(epochs=1, batch_size=10)
    for student, teacher in ((model, other), (other, model)):
        with pytest.raises(AttributeError, match="conv"):
            Trainer(student, make_data(), settings, teacher=teacher, blocks=["conv"], generator=seeded())
    assert not any(module._forward_hooks for network in (model, other) for module in network.modules())


def test_several_processes_can_not_train_compiled_networks(make_data, make_network):
    settings = TrainSettings(epochs=1, compiled=True)
    with pytest.raises(TrainingError, match=r"2 processes can't train compiled networks together: leave --compile out"):
        Trainer(make_network(), make_data(), settings, generator=seeded(), team=Team(0, 2))


@pytest.mark.parametrize("step", [0, 1, 3, 4, 6])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_from_its_state_a_training_goes_on_to_the_same_weights(monkeypatch, make_data, make_network, step, precision):
    """The state is taken within an epoch of three steps, and between two."""
    monkeypatch.setattr(finetune_module, "precision_for", lambda device: precision)
    data = make_data()
    settings = TrainSettings(epochs=3, batch_size=10, lr=0.02, mixing=True, averaging=0.9)

    def trainer(network, seed):
        options = {"teacher": make_network(1), "blocks": ["conv"], "generator": seeded(seed)}
        return Trainer(network, data, settings, **options)

    with trainer(make_network(dropout=0.5), 0) as whole:
        whole.advance(9)
    with trainer(make_network(dropout=0.5), 0) as cut:
        cut.advance(step)
        state = {name: tensor.clone() for name, tensor in cut.state().items()}
        cut.advance(1)  # what comes after the state does not count
    with trainer(make_network(4, dropout=0.5), 4) as resumed:
        resumed.restore(state)
        assert resumed.step == step
        resumed.advance(9)
        assert resumed.step == resumed.total_steps == 9
    assert any(name.startswith("average/") for name in whole.state())
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"place": torch.tensor(3)}, r"place is torch.int64 of shape \(\) and should be torch.int64 of shape \(2,\)"),
        ({"place": torch.tensor([1.0, 1.0])}, "place is torch.float32"),
        ({"place": torch.tensor([1, 2])}, "step 1 of 3, 2 of it in its epoch, is no place"),
        ({"place": torch.tensor([2**40, 0])}, "is no place"),
        ({"generator": torch.zeros(5056)}, "generator is torch.float32"),
        ({"generator": torch.zeros(3, dtype=torch.uint8)}, "generator is"),
        ({"model/head.bias": torch.zeros(3, dtype=torch.int64)}, r"model/head\.bias is torch.int64"),
        ({"model/other": torch.zeros(3)}, "model/other is .* should be absent"),
        ({"average/head.bias": None}, r"average/head\.bias is absent and should be"),
        ({"optimizer/conv.factors.1/left": torch.zeros(1, 2, 2)}, r"left is .* of shape \(1, 2, 2\)"),
        ({"optimizer/conv.factors.1/left": None}, "left is absent"),
        ({"optimizer/head.bias/exp_avg": None}, "exp_avg is absent"),
        ({"optimizer/head.bias/step": torch.zeros((), dtype=torch.int64)}, "step is torch.int64"),
        ({"optimizer//taken": torch.tensor(2)}, "is no place"),
    ],
)
def test_a_state_of_another_kind_is_refused(make_data, make_network, change, told):
    network = make_network()
    network.conv = SeKronConv2d.from_conv(network.conv, SeKronSpec(((4, 1, 3, 1), (1, 2, 1, 3)), (3,)))
    settings = TrainSettings(epochs=1, batch_size=10, averaging=0.9)
    with Trainer(network, make_data(), settings, generator=seeded()) as trainer:
        trainer.advance(1)
        state = {name: part.clone() for name, part in trainer.state().items()}
        trainer.restore(state)
        with pytest.raises(ValueError, match=told):
            trainer.restore({name: part for name, part in (state | change).items() if part is not None})


def test_a_mixed_batch_is_learnt_from_in_the_shares_of_its_labels(make_data, make_network):
    """The loss of one step against the same written out."""
    data, settings = make_data(), TrainSettings(epochs=1, batch_size=10, mixing=True, label_weight=0.3)
    network, teacher = make_network(0), make_network(1)
    (inputs, targets), seed = Batches(data, 10, generator=seeded()).take()
    share = torch.rand((), generator=seeded(seed)).item()
    mixed = share * inputs + (1 - share) * inputs.flip(0)
    with torch.no_grad():
        found, wanted = copy.deepcopy(network).train()(mixed), teacher(mixed)
        labels = share * F.cross_entropy(found, targets) + (1 - share) * F.cross_entropy(found, targets.flip(0))
        softened = F.kl_div((found / 4).log_softmax(1), (wanted / 4).softmax(1), reduction="batchmean")
    with Trainer(network, data, settings, teacher=teacher.eval(), generator=seeded()) as trainer:
        report = trainer.advance(1)
    assert report.loss == pytest.approx((0.3 * labels + 0.7 * 16 * softened).item(), rel=1e-4)


def test_what_is_no_image_is_not_mixed(make_data):
    """Half of two tokens is no token."""
    network = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(8, 3))
    settings = TrainSettings(epochs=1, batch_size=3, mixing=True)
    tokens, targets = torch.arange(6).view(3, 2), torch.arange(3)
    wanted = F.cross_entropy(network(tokens), targets).item()
    with Trainer(network, make_data(), settings, generator=seeded()) as trainer:
        trainer._optimizer.prepare(0.0)
        assert trainer._learn(tokens, targets, trainer._share(tokens, 0)).item() == pytest.approx(wanted)


def test_with_averaging_the_result_is_the_average_of_the_weights(make_data, make_network):
    data, settings = make_data(), TrainSettings(epochs=2, batch_size=10, lr=0.02, averaging=0.3)
    network = make_network()
    wanted = {name: tensor.double() for name, tensor in network.state_dict().items()}
    with Trainer(network, data, settings, generator=seeded()) as trainer:
        for step in range(1, 7):
            trainer.advance(1)
            decay = min(0.3, step / (step + 9))
            for name, tensor in network.state_dict().items():
                wanted[name] = decay * wanted[name] + (1 - decay) * tensor if tensor.is_floating_point() else tensor
        assert trainer.result is not network
        assert not any(module.training for module in trainer.result.modules())
        for name, tensor in trainer.result.state_dict().items():
            torch.testing.assert_close(tensor.double(), wanted[name].double(), msg=name)


class Centred(nn.Module):
    """Puts other buffers in the place of its own in training, one of them ever longer."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x):
        x = self.network(x)
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * x.detach().mean(0)
            self.seen = torch.cat([self.seen, x.detach().mean().view(1)])
        return x - self.centre


def test_buffers_that_are_assigned_anew_are_averaged_too(make_data, make_network):
    network, wanted = Centred(make_network()), torch.zeros(3)
    with Trainer(
        network, make_data(), TrainSettings(epochs=1, batch_size=10, averaging=0.3), generator=seeded()
    ) as trainer:
        for step in range(1, 4):
            trainer.advance(1)
            decay = min(0.3, step / (step + 9))
            wanted = decay * wanted + (1 - decay) * network.centre
            torch.testing.assert_close(trainer.result.centre, wanted)
            assert torch.equal(trainer.result.seen, network.seen)
            assert trainer.result.seen is not network.seen


def test_without_averaging_the_result_is_the_model(make_data, make_network):
    network = make_network()
    with Trainer(network, make_data(), TrainSettings(epochs=1, batch_size=10), generator=seeded()) as trainer:
        assert trainer.result is network


def test_frozen_parameters_stay(make_data, make_network):
    network = make_network()
    network.conv.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    finetune(network, make_data(), TrainSettings(epochs=1, batch_size=10), generator=seeded())
    assert torch.equal(network.conv.weight, before["conv.weight"])
    assert not torch.equal(network.head.weight, before["head.weight"])


def test_bf16_trains_too(monkeypatch, make_data, make_network):
    monkeypatch.setattr(finetune_module, "precision_for", lambda device: "bf16")
    data, student, teacher = make_data(), make_network(0), make_network(1)
    goal = outputs(teacher, data, "val")
    before = evaluate(student, data, "val", teacher_outputs=goal).divergence
    settings = TrainSettings(epochs=30, batch_size=10, lr=0.02)
    finetune(student, data, settings, teacher=teacher, generator=seeded())
    assert student.conv.weight.dtype == torch.float32
    assert evaluate(student, data, "val", teacher_outputs=goal).divergence < 0.5 * before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "must be positive"),
        ({"epochs": 1, "lr": -1.0}, "must be positive"),
        ({"epochs": 1, "warmup": 1.0}, r"warmup must be in \[0, 1\)"),
        ({"epochs": 1, "label_weight": 1.5}, r"label_weight in \[0, 1\]"),
        ({"epochs": float("nan")}, "must be positive"),
        ({"epochs": 1, "hints": 1.5}, r"hints must be in \[0, 1\]"),
        ({"epochs": 1, "averaging": 1.0}, r"averaging must be in \[0, 1\)"),
    ],
)
def test_senseless_settings_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**settings)


class Strided(nn.Module):
    """A pixel's kernel, strided, that a crash of torch waits for, beside a larger one."""

    def __init__(self):
        super().__init__()
        self.block = nn.Conv2d(2, 5, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(5, 32, 1, stride=2, bias=False)

    def forward(self, x):
        return self.shortcut(self.block(x)).mean((2, 3))[:, :3]


def test_gradients_of_strided_pixels_are_right_in_the_layout_for_images(make_data):
    """Else torch crashes here, or gives any gradient: see `shield_gradients`."""
    inputs, targets = torch.randn(4, 2, 112, 112, generator=seeded()), torch.arange(4) % 3
    network = Strided()
    reference = copy.deepcopy(network).double()
    F.cross_entropy(reference(inputs.double()), targets).backward()
    with Trainer(network, make_data(), TrainSettings(epochs=1), generator=seeded()) as trainer:
        trainer._loss(inputs, [(1.0, targets)]).backward()
        for found, expected in zip(network.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad.float(), rtol=1e-3, atol=1e-6)
        assert network.shortcut._forward_pre_hooks
        assert not network.block._forward_pre_hooks
    assert not network.shortcut._forward_pre_hooks
