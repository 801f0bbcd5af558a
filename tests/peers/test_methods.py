"""The methods of benchmarks/peers: what each learns from, and that labels have no gradient."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, dropout2d, mse_loss
from torch.utils.flop_counter import FlopCounterMode

from semimoe_fast import functional as F
from semimoe_fast.data import augment
from semimoe_fast.data.cache import Cache
from semimoe_fast.errors import UserError
from semimoe_fast.training.batches import tensors_of
from semimoe_fast.training.command_line import RECIPES
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.speed import flops_per_step
from semimoe_fast.training.trainer import Trainer

command = pytest.importorskip("benchmarks.peers.__main__", reason="needs the source tree, and tests run from its root")
from benchmarks.peers import unimatch  # noqa: E402
from benchmarks.peers.cps import CPS, WEIGHT  # noqa: E402
from benchmarks.peers.mean_teacher import MeanTeacher  # noqa: E402
from benchmarks.peers.method import Batch, both  # noqa: E402
from benchmarks.peers.methods import METHODS, same_flops_width  # noqa: E402
from benchmarks.peers.training import Splits, Training, load_splits  # noqa: E402
from benchmarks.peers.unimatch import UniMatch  # noqa: E402

CPU = torch.device("cpu")


def batch(strong: int = 0) -> Batch:
    images, others = torch.randn(2, 2, 3, 32, 32)
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[:, 8:20, 8:20] = 1
    return Batch(images, masks, others, tuple(torch.randn(strong, 2, 3, 32, 32)))


def gradients(module: torch.nn.Module, loss: Tensor) -> list[Tensor]:
    return [*torch.autograd.grad(loss, [*module.parameters()], retain_graph=True)]


def in_double(data: Batch) -> Batch:
    strong = tuple(view.double() for view in data.strong)
    return data._replace(labeled=data.labeled.double(), unlabeled=data.unlabeled.double(), strong=strong)


def compare_losses(network: torch.nn.Module, loss: Tensor, right: Tensor) -> None:
    """Both losses and their gradients; the losses are float32 inside, so sums in another order round differently."""
    torch.testing.assert_close(loss.double(), right.double(), rtol=1e-5, atol=0)
    for found, expected in zip(gradients(network, loss), gradients(network, right), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item() + 1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_all_methods_take_equally_many_steps_and_images(name: str, config: TrainConfig, splits: Splits) -> None:
    training = Training(config, METHODS[name], splits, CPU)
    before = {key: value.clone() for key, value in training.method.state_dict().items()}
    method, seen, steps = training.method, [], []
    loss, after_step = method.loss, method.after_step
    method.loss = lambda batch, progress: seen.append(batch) or loss(batch, progress)
    method.after_step = lambda step: steps.append(step) or after_step(step)
    training.epoch = 1
    training.train_epoch()
    assert steps == [3, 4]
    images = [(len(b.labeled), 0 if b.unlabeled is None else len(b.unlabeled)) for b in seen]
    assert images == [(4, 0) if name.startswith("supervised") else (2, 2)] * (len(splits.unlabeled) // 2)
    assert all(len(b.strong) == (2 if "unimatch" in name else 0) for b in seen)
    assert training.splits.preprocessing == splits.preprocessing
    still = {key for key, value in method.named_parameters() if torch.equal(value, before[key])}
    frozen = {key for key, value in method.named_parameters() if not value.requires_grad}
    assert still == {key for key in frozen if not key.startswith("teacher.")}, "a record counts what trains"
    assert bool(still) == (name in ("semi-moe-equal-gates", "semi-moe-fixed-weights"))


def test_the_upper_bound_alone_sees_all_labels(config: TrainConfig, splits: Splits) -> None:
    for name, method in METHODS.items():
        data = splits.of(method(2))
        others = len(splits.unlabeled) if name == "supervised-all" else 0
        assert len(data.labeled) == len(data.labeled.masks) == 3 + others
        assert (data.unlabeled is None) == name.startswith("supervised")
    strong = Training(config, METHODS["unimatch"], splits, CPU)
    (first, *_) = strong._batches()
    assert not torch.equal(*first.strong)
    assert all((view - first.unlabeled).abs().mean() < 1 for view in first.strong), "the same images, changed"


def test_batches_are_on_the_device(config: TrainConfig, splits: Splits) -> None:
    meta = torch.device("meta")  # as a GPU, it does not take the CPU's tensors
    for batch in Training(config, METHODS["unimatch"], splits, meta)._batches():
        assert {tensor.device for tensor in tensors_of(batch)} == {meta}


@pytest.mark.parametrize("name", ["unimatch", "cps"])
def test_weak_views_of_unimatch_keep_their_look(name: str, config: TrainConfig, splits: Splits) -> None:
    plain, changed = (
        next(Training(dataclasses.replace(config, stain=stain), METHODS[name], splits, CPU)._batches())
        for stain in (0.0, 0.2)
    )
    assert not torch.equal(plain.labeled, changed.labeled)
    assert torch.equal(plain.unlabeled, changed.unlabeled) == (name == "unimatch")


def test_scores_leave_the_statistics_of_batch_normalization(config: TrainConfig, splits: Splits) -> None:
    training = Training(config, METHODS["supervised"], splits, CPU)
    training.train_epoch()
    before = {key: value.clone() for key, value in training.method.named_buffers()}
    training.method.train()
    training.score(splits.val)
    assert before
    for key, value in training.method.named_buffers():
        assert torch.equal(value, before[key]), key


def test_the_upper_bound_needs_the_masks(glands_folder: Path, config: TrainConfig, tmp_path: Path) -> None:
    without = dataclasses.replace(config, data=glands_folder)
    with pytest.raises(UserError, match="mask is missing: add it for supervised-all, or choose"):
        load_splits(without, Cache(tmp_path), all_labels=True)
    splits = load_splits(without, Cache(tmp_path), all_labels=False)
    assert splits.unlabeled.masks is splits.scored is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_semi_moe_is_the_step_of_the_trainer(
    recipe: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step, up to rounding: the losses are computed one by one here, in one pass there.

    A bound on each tensor's change as a whole, because rounding decides which pixels pass a ReLU; later steps amplify.
    With SGD, because the first step of AdamW is the sign of a gradient, which rounding may turn.
    """
    config = dataclasses.replace(config, **RECIPES[recipe] | {"optimizer": "sgd"})
    splits = load_splits(config, Cache(tmp_path), all_labels=False)
    training = Training(config, METHODS["semi-moe"], splits, CPU)
    first = next(training._batches())
    monkeypatch.setattr(training, "_batches", lambda: iter([first]))
    before = {key: value.clone() for key, value in training.method.model.named_parameters()}
    training.train_epoch()
    trainer = Trainer(config, splits.of(training.method), CPU)  # seeds the random numbers anew
    trainer.train_step(next(trainer.begin_epoch()))
    expected = dict(trainer.model.named_parameters())
    for key, value in training.method.model.named_parameters():
        changed = expected[key] - before[key]
        assert changed.norm() > 0, key
        assert (value - expected[key]).norm() <= 1e-3 * changed.norm() + 2**-23 * before[key].norm(), key
    torch.testing.assert_close(training.method.adaptive.log_vars, trainer.adaptive.log_vars)
    if config.ema is not None:  # of one step: the weights themselves
        for key, value in training.ema.after(1).named_parameters():
            torch.testing.assert_close(value, training.method.get_parameter(key))


def test_the_learning_curve_has_what_semi_moe_learns(config: TrainConfig, splits: Splits) -> None:
    """The pseudo-labels of the unlabeled images are compared with masks that training does not see."""

    def trained_on(splits: Splits) -> Training:
        training = Training(config, METHODS["semi-moe"], splits, CPU)
        norm = training.method.model.experts[1].decoder[-1][-1]
        with torch.no_grad():  # kill the sdf expert
            norm.weight[:], norm.bias[:] = 0.0, -1.0
        training.train_epoch()
        return training

    training = trained_on(splits)
    (point,) = training.curve
    mask, sdf, boundary = point["dead_channels"]
    assert sdf == 1 > max(mask, boundary)
    assert point["loss_weights"] == training.method.adaptive.log_vars.neg().exp().tolist()
    gates = torch.tensor(point["gate_weights"])  # (predictions, experts)
    torch.testing.assert_close(gates.sum(1), torch.ones(3))
    model = training.method.model.eval()
    images = augment.normalize(splits.scored.images, *splits.preprocessing[1:3])
    found, right = model(images).mask.argmax(1) == 1, splits.scored.masks == 1
    assert point["unlabeled_dice"] == pytest.approx(
        2 * (found & right).sum().item() / (found.sum() + right.sum()).item()
    )
    assert trained_on(splits._replace(scored=None)).curve == [
        {key: value for key, value in point.items() if key != "unlabeled_dice"}
    ]


def test_pseudo_labels_of_semi_moe_teach_no_gate() -> None:
    method = METHODS["semi-moe"](4)
    data, found = batch(), []
    for progress in (0.1, 1.0):
        torch.manual_seed(0)  # the same dropout
        found.append(gradients(method.model.gating, method.loss(data, progress)))
    assert any(gradient.abs().sum() > 0 for gradient in found[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_ablations_leave_out_what_they_say() -> None:
    means = torch.randn(2, 3, 4)
    equal, fixed = METHODS["semi-moe-equal-gates"](4), METHODS["semi-moe-fixed-weights"](4)
    assert torch.equal(equal.model.gating.gate_weights(means), torch.full((2, 3, 3), 1 / 3))
    assert equal.model(torch.randn(2, 3, 32, 32)).gate_weights.unique().tolist() == [pytest.approx(1 / 3)]
    terms = torch.rand(3)
    constant = fixed.adaptive(torch.zeros(3))
    torch.testing.assert_close(fixed.adaptive(terms) - constant, terms @ torch.tensor([1.0, 0.5, 1.0]))
    assert METHODS["semi-moe-no-sdf"](4).model.expert_tasks == ("mask", "boundary")
    assert METHODS["semi-moe-no-sdf"](4).adaptive.coefficients == (1.0, 1.0)
    assert METHODS["semi-moe-no-boundary"](4).model.expert_tasks == ("mask", "sdf")
    assert METHODS["semi-moe-no-boundary"](4).adaptive.coefficients == (1.0, 0.5)


def test_the_teacher_is_the_average_of_the_student() -> None:
    method = MeanTeacher(2)
    method.loss(batch(), 1.0).backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    expected = [parameter.double() for parameter in method.teacher.parameters()]
    for step in (1, 2, 50, 1000):
        for parameter in method.student.parameters():
            parameter.data += torch.randn_like(parameter)
        method.after_step(step)
        decay = min(1 - 1 / (step + 1), 0.99)
        pairs = zip(expected, method.student.parameters(), strict=True)
        expected = [decay * old + (1 - decay) * new.detach().double() for old, new in pairs]
        for value, right in zip(method.teacher.parameters(), expected, strict=True):
            torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-6)  # float32 against float64


def test_the_loss_of_mean_teacher_is_that_of_its_formula() -> None:
    method, data = MeanTeacher(4).double(), in_double(batch())
    method.student.head.weight.data *= 3  # else the teacher is the student
    torch.manual_seed(0)
    loss = method.loss(data, 0.5)

    torch.manual_seed(0)
    noise = (0.1 * torch.randn_like(data.unlabeled)).clamp(-0.2, 0.2)
    target = method.teacher(data.unlabeled + noise)[1].softmax(1).detach()
    consistency = mse_loss(method.student(data.unlabeled)[1].softmax(1), target)
    right = F.squared_dice_loss(method.student(data.labeled)[1], data.masks) + 5 * 0.5 * consistency
    compare_losses(method.student, loss, right)


def test_gradients_of_cross_pseudo_supervision_do_not_cross() -> None:
    method, data = CPS(4), batch()
    loss = method.loss(data, 0.5)
    (unlabeled, labeled), (others, _) = (both(network, data) for network in method.networks)
    own = F.squared_dice_loss(labeled, data.masks) + WEIGHT * 0.5 * F.squared_dice_loss(unlabeled, others.argmax(1))
    torch.testing.assert_close(gradients(method.networks[0], loss), gradients(method.networks[0], own))
    assert not torch.equal(method.networks[0].head.weight, method.networks[1].head.weight)


def test_only_confident_pixels_count() -> None:
    logits = torch.randn(2, 2, 8, 8, requires_grad=True)
    labels = torch.randint(0, 2, (2, 8, 8))
    torch.testing.assert_close(unimatch.confident_dice(logits, labels), F.squared_dice_loss(logits, labels))
    labels[:, :3] = -1
    (gradient,) = torch.autograd.grad(unimatch.confident_dice(logits, labels), logits)
    assert (gradient[:, :, :3] == 0).all()
    assert (gradient[:, :, 3:] != 0).all()
    assert unimatch.confident_dice(logits, torch.full_like(labels, -1)) == 0


def test_the_loss_of_unimatch_is_that_of_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unimatch, "MIXED", 1.1)  # always
    method, data = UniMatch(4).double(), in_double(batch(strong=2))  # else rounding decides which pixels are confident
    network = method.network
    network.head.weight.data *= 10  # so that some pixels are confident
    torch.manual_seed(0)
    loss = method.loss(data, 0.5)

    torch.manual_seed(0)
    labeled, features = network(data.labeled)[1], network.encode(data.unlabeled)
    dropped = network.head(network.decode([dropout2d(x, 0.5) for x in features]))
    confidence, labels = network.head(network.decode(features)).softmax(1).max(1)
    labels[confidence < 0.95] = -1
    assert 0.1 < (labels < 0).double().mean() < 0.9
    right = F.squared_dice_loss(labeled, data.masks) / 4 + cross_entropy(labeled, data.masks.long()) / 4
    right = right + unimatch.confident_dice(dropped, labels) / 4
    for view, box in zip(data.strong, [unimatch.random_boxes(labels) for _ in data.strong], strict=True):
        mixed = torch.where(box[:, None], view.flip(0), view)  # of two images, each is the other's partner
        target = torch.where(box, labels.flip(0), labels)
        right = right + unimatch.confident_dice(network(mixed)[1], target) / 8
    compare_losses(network, loss, right)


def test_images_and_labels_are_mixed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unimatch, "MIXED", 1.1)  # always
    labels = torch.stack([torch.zeros(16, 16), torch.ones(16, 16)]).long()
    boxes = unimatch.random_boxes(labels)
    assert all(0.01 <= box.float().mean() <= 0.5 for box in boxes)
    images = labels[:, None].expand(-1, 3, -1, -1).float()
    mixed = unimatch.cut_mix(images, boxes[:, None])
    assert torch.equal(mixed[:, 0].long(), unimatch.cut_mix(labels, boxes))
    assert torch.equal(mixed[0, 0] == 1, boxes[0])
    assert torch.equal(mixed[1, 0] == 0, boxes[1])


def test_the_wide_network_costs_what_the_experts_cost() -> None:
    wide = same_flops_width(8)
    assert flops_per_step(wide, 64, 1) / 3 == pytest.approx(flops_per_step(8, 64, 1), rel=0.07)  # widths are integers
    assert METHODS["supervised-wide"](8).network.head.in_channels == wide


@pytest.mark.parametrize("name", ["supervised", "mean-teacher", "cps", "unimatch"])
def test_the_page_has_the_cost_of_a_step(name: str) -> None:
    """Relative to the experts; the gates and targets of semi-moe do not show in two digits."""
    page = (Path(__file__).parents[2] / "docs" / "accuracy.md").read_text()
    images = torch.empty(2, 3, 32, 32, device="meta")
    masks = torch.empty(2, 32, 32, dtype=torch.uint8, device="meta")
    costs = []
    for variant in (name, f"{name}-wide"):
        with torch.device("meta"):
            method = METHODS[variant](16)
        data = Batch(images, masks, images, (images,) * method.strong_views)
        if method.learns_from == "labeled":
            data = Batch(torch.cat([images] * 2), torch.cat([masks] * 2), None)
        with FlopCounterMode(display=False) as counter:
            method.loss(data, 1.0).backward()
        costs.append(counter.get_total_flops() / flops_per_step(16, 32, 4))
    assert f"| `{name}` | {costs[0]:.2f} | {costs[1]:.2f} |" in page
