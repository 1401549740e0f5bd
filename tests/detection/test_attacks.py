# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Attacks against formulas by hand, and against Foolbox."""

import eagerpy
import foolbox
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from peft_sdpt.detection import FeatureCache, GroundedDetectionLoss
from peft_sdpt.detection.attacks import LOSSES, Attack, Ball, perturb
from peft_sdpt.detection.pixels import PixelRange
from peft_sdpt.detection.prediction import evaluation_mode
from peft_sdpt.errors import InputError
from tests.detection.test_loss import make_inputs, make_labels, one
from tests.helpers.detectors import attach, make_host
from tests.helpers.main_job import reset_accelerate

EPS = 4 / 255
RANGE = PixelRange.of()
LAYOUTS, CLASSES = [[1, 3], [2, 2], [3, 1]], [[1, 0], [0], [1, 1, 0]]


def images_for(layouts=LAYOUTS, size: int = 64, padded: bool = False):
    """Inputs with pixels of images, some of them black or white. With `padded`, images have other sizes."""
    inputs = make_inputs(layouts)
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(len(layouts), 3, size, size, generator=generator)
    images[images < 0.1], images[images > 0.9] = 0.0, 1.0
    inputs["pixel_values"] = RANGE.to_pixel_values(images)
    if padded:
        mask = torch.ones(len(layouts), size, size, dtype=torch.long)
        mask[1, size // 2 :], mask[2, :, size - 9 :] = 0, 0
        inputs["pixel_values"] = inputs["pixel_values"] * mask[:, None]
        inputs["pixel_mask"] = mask
    return inputs


@pytest.fixture(scope="module")
def tuned():
    return attach(make_host()).eval()


@pytest.fixture
def loss(tuned):
    return GroundedDetectionLoss(tuned.config)


def generators(number: int, seed: int = 0):
    return [torch.Generator().manual_seed(seed + image) for image in range(number)]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("norm", ["inf", "2"])
def test_an_attack_stays_in_its_ball_and_off_the_padding(tuned, loss, kind, norm):
    inputs, labels = images_for(padded=True), make_labels(CLASSES)
    attack = Attack(EPS if norm == "inf" else 0.5, steps=2, loss=kind, norm=norm)
    found = perturb(tuned, loss, inputs, labels, attack, generators(3))
    before, after = (RANGE.to_images(pixels) for pixels in (inputs["pixel_values"], found))
    mask = inputs["pixel_mask"][:, None].bool()
    change = (after - before) * mask
    distance = change.abs().amax((1, 2, 3)) if norm == "inf" else change.flatten(1).norm(dim=1)
    assert (distance <= attack.eps + 1e-6).all()
    assert (distance > 0.3 * attack.eps).all()
    assert after[mask.expand_as(after)].min() > -1e-6
    assert after[mask.expand_as(after)].max() < 1 + 1e-6
    outside = ~mask.expand_as(found)
    assert torch.equal(found[outside], inputs["pixel_values"][outside])


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_without_distance_nothing_changes(tuned, loss, norm):
    inputs = images_for(padded=True)
    found = perturb(tuned, loss, inputs, make_labels(CLASSES), Attack(0.0, steps=2, norm=norm))
    assert torch.equal(found, inputs["pixel_values"])


@pytest.mark.parametrize(("step", "moved"), [(EPS / 2, EPS / 2), (3 * EPS, EPS)])
def test_one_step_without_a_random_start_is_the_sign_of_the_gradient(tuned, loss, step, moved):
    inputs, labels = images_for(), make_labels(CLASSES)
    pixels = inputs["pixel_values"].clone().requires_grad_()
    outputs = tuned(**{**inputs, "pixel_values": pixels})
    # By the public loss of one image at a time, which `of_images` must equal.
    total = sum(loss(*one(outputs, labels, image)) for image in range(3))
    (gradient,) = torch.autograd.grad(total, pixels)
    wanted = RANGE.to_images(inputs["pixel_values"]) + moved * gradient.sign()
    attack = Attack(EPS, steps=1, step=step, random_start=False)
    found = RANGE.to_images(perturb(tuned, loss, inputs, labels, attack))
    torch.testing.assert_close(found, wanted.clamp(0, 1), rtol=0, atol=1e-6)


def test_losses_of_images_sum_to_the_loss(tuned, loss):
    labels = make_labels([[1, 0], [], [1, 1, 0]])
    with torch.no_grad():
        outputs = tuned(**images_for())
        parts = loss.of_images(outputs, labels)
        assert parts.sum().item() == pytest.approx(sum(loss(*one(outputs, labels, i)).item() for i in range(3)), 1e-6)
        for image in range(3):
            assert parts[image].item() == pytest.approx(loss(*one(outputs, labels, image)).item(), rel=1e-6)
        terms = [loss.of_images(outputs, labels, (term,)) for term in ("class", "box")]
    torch.testing.assert_close(sum(terms), parts)
    assert terms[1][1] == 0


def test_the_loss_of_an_image_with_more_objects_than_queries(tuned, loss):
    number = tuned.config.num_queries + 3
    labels = [*make_labels([[0], [1]]), {"class_labels": torch.zeros(number, dtype=torch.long),
                                         "boxes": torch.full((number, 4), 0.5)}]  # fmt: skip
    with torch.no_grad():
        outputs = tuned(**images_for())
        found = loss.of_images(outputs, labels)
        assert found[2].item() == pytest.approx(loss(*one(outputs, labels, 2)).item(), rel=1e-6)


class Watched:
    """Compares everything that an attack must leave alone."""

    def __init__(self, model: nn.Module):
        self.model = model

    def state(self):
        gradients = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        modes = [module.training for module in self.model.modules()]
        return gradients, modes, torch.get_rng_state().tolist(), [p.requires_grad for p in self.model.parameters()]


def test_an_attack_leaves_gradients_modes_and_random_numbers_alone(loss):
    model = attach(make_host()).train()
    model.get_base_model().model.backbone.eval()
    inputs, labels = images_for(), make_labels(CLASSES)
    loss(model(**inputs), labels).backward()
    watched, weights = Watched(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = watched.state()
    assert any(gradient is not None for gradient in before[0])
    perturb(model, loss, inputs, labels, Attack(EPS, steps=2, restarts=2), generators(3))
    after = watched.state()
    for old, new in zip(before[0], after[0], strict=True):
        assert (old is None and new is None) or torch.equal(old, new)
    assert before[1:] == after[1:]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_an_attack_can_be_made_where_gradients_are_disabled_and_under_autocast(tuned, loss):
    inputs, labels, attack = images_for(), make_labels(CLASSES), Attack(EPS, steps=1)
    plain = perturb(tuned, loss, inputs, labels, attack, generators(3))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(perturb(tuned, loss, inputs, labels, attack, generators(3)), plain)
    assert not plain.requires_grad


@pytest.mark.parametrize("kind", ["all", "features"])
def test_an_image_is_attacked_alone_as_in_a_batch(tuned, loss, kind):
    layouts = [[1, 3], [2, 2], [3, 1]]
    inputs, labels, attack = images_for(layouts), make_labels(CLASSES), Attack(EPS, steps=2, loss=kind)
    together = perturb(tuned, loss, inputs, labels, attack, generators(3))
    for image in range(3):
        single = {name: tensor[image : image + 1] for name, tensor in inputs.items()}
        alone = perturb(tuned, loss, single, labels[image : image + 1], attack, generators(1, seed=image))
        # The sign of a gradient that is nearly zero can change by rounding.
        assert ((alone - together[image : image + 1]).abs() < 1e-5).float().mean() > 0.995


def test_the_random_start_of_an_image_does_not_depend_on_padding():
    pixels = images_for()["pixel_values"]
    small = Ball(pixels[:1, :, :40, :30], None, EPS, "inf", RANGE).random_point(generators(1))
    mask = torch.zeros(1, 64, 64)
    mask[:, :40, :30] = 1
    large = Ball(pixels[:1], mask, EPS, "inf", RANGE).random_point(generators(1))
    assert torch.equal(large[..., :40, :30], small)


def test_restarts_keep_the_highest_loss_of_each_image(tuned, loss):
    inputs, labels = images_for(), make_labels(CLASSES)

    def losses(pixels):
        with torch.no_grad():
            return loss.of_images(tuned(**{**inputs, "pixel_values": pixels}), labels)

    drawing = generators(3)
    single = [perturb(tuned, loss, inputs, labels, Attack(EPS, steps=1), drawing) for _ in range(3)]
    each = torch.stack([losses(pixels) for pixels in single])
    best = perturb(tuned, loss, inputs, labels, Attack(EPS, steps=1, restarts=3), generators(3))
    assert each.argmax(0).unique().numel() > 1
    torch.testing.assert_close(losses(best), each.amax(0), rtol=1e-6, atol=0)


class Linear(nn.Module):
    """A detector whose loss is linear in the pixels."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights
        self.config = make_host().config

    def forward(self, pixel_values, **_):
        return (pixel_values * self.weights).flatten(1).sum(1)


class Identity:
    def of_images(self, outputs, labels, terms=()):
        return outputs


def test_the_loss_of_a_linear_detector_grows_by_the_norm_of_its_weights():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 48, 48, generator=generator, dtype=torch.float64)
    model = Linear(weights)
    pixels = RANGE.to_pixel_values(0.3 + 0.4 * torch.rand(2, 3, 48, 48, generator=generator))

    def reached(eps, norm):
        attack = Attack(eps, steps=1, step=eps, norm=norm, random_start=False)
        found = perturb(model, Identity(), {"pixel_values": pixels}, [{}, {}], attack, generators(2))
        return (found.double() * weights).flatten(1).sum(1)

    in_images = weights / RANGE.std
    for norm, dual, more, less in (("inf", in_images.abs().sum(), 0.1, 0.04), ("2", in_images.norm(), 0.9, 0.4)):
        gained = reached(more, norm) - reached(less, norm)
        torch.testing.assert_close(gained, ((more - less) * dual).expand(2), rtol=1e-4, atol=0)


def test_attacks_equal_those_of_foolbox(tuned, loss):
    inputs, labels = images_for(), make_labels(CLASSES)
    text = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}

    class Attacking(foolbox.attacks.LinfProjectedGradientDescentAttack):
        def get_loss_fn(self, model, wanted):
            def total(images):
                outputs = tuned(pixel_values=RANGE.to_pixel_values(images.raw), **text)
                return eagerpy.astensor(loss.of_images(outputs, labels).sum())

            return total

    model = foolbox.models.PyTorchModel(nn.Identity().eval(), bounds=(0, 1))
    images = RANGE.to_images(inputs["pixel_values"]).clamp(0, 1)
    attack = Attacking(rel_stepsize=0.4, steps=3, random_start=False)
    wanted = attack.run(
        model, images, foolbox.criteria.Misclassification(torch.zeros(3, dtype=torch.long)), epsilon=EPS
    )
    ours = Attack(EPS, steps=3, step=0.4 * EPS, random_start=False)
    found = RANGE.to_images(perturb(tuned, loss, {**text, "pixel_values": RANGE.to_pixel_values(images)}, labels, ours))
    # Gradients that are nearly zero can have another sign after rounding.
    assert ((found - wanted).abs() < 1e-6).float().mean() > 0.9999


@pytest.mark.parametrize("kind", ["all", "class", "box", "vanish", "mislabel"])
def test_each_loss_does_what_its_name_says(tuned, loss, kind):
    inputs, labels = images_for(), make_labels(CLASSES)
    found = perturb(tuned, loss, inputs, labels, Attack(16 / 255, steps=5, loss=kind), generators(3))
    with torch.no_grad():
        before, after = (tuned(**{**inputs, "pixel_values": pixels}) for pixels in (inputs["pixel_values"], found))
    if kind == "vanish":
        assert after.logits.sigmoid().sum() < before.logits.sigmoid().sum()
    elif kind == "mislabel":
        shifted = [{**label, "class_labels": 1 - label["class_labels"]} for label in labels]
        assert loss(after, shifted) < loss(before, shifted)
    else:
        terms = ("class", "box") if kind == "all" else (kind,)
        assert (loss.of_images(after, labels, terms) > loss.of_images(before, labels, terms)).all()


def test_an_attack_goes_through_the_prompts_but_that_on_features_does_not(tuned, loss):
    inputs, labels = images_for(), make_labels(CLASSES)
    for kind, same in (("features", True), ("all", False)):
        attack = Attack(EPS, steps=2, loss=kind)
        through = perturb(tuned, loss, inputs, labels, attack, generators(3))
        with tuned.disable_adapter():
            without = perturb(tuned, loss, inputs, labels, attack, generators(3))
        assert torch.equal(through, without) == same


def test_a_defence_is_attacked_through_its_gradient(tuned, loss):
    inputs, labels = images_for(), make_labels(CLASSES)
    seen = []

    def purify(images):
        seen.append(images.detach())
        return images * 0.5

    attack = Attack(EPS, steps=1, random_start=False)
    through = perturb(tuned, loss, inputs, labels, attack, purify=purify)
    assert seen[0].min() >= -1e-6 and seen[0].max() <= 1 + 1e-6
    darker = {**inputs, "pixel_values": RANGE.to_pixel_values(RANGE.to_images(inputs["pixel_values"]) * 0.5)}
    # The same directions as an attack on the darker images, from which only rounding and the range differ.
    change = (through - inputs["pixel_values"]).sign()
    wanted = (perturb(tuned, loss, darker, labels, attack) - darker["pixel_values"]).sign()
    inside = (RANGE.to_images(inputs["pixel_values"]) - 0.5).abs() < 0.45
    assert (change == wanted)[inside].float().mean() > 0.999


def test_stored_features_have_no_gradient(tmp_path, loss):
    model = attach(make_host())
    inputs, labels = images_for(), make_labels(CLASSES)
    cache = FeatureCache(tmp_path, model)
    for kind in ("all", "features"):
        with cache.used(), pytest.raises(InputError, match="stored features have no gradient"):
            perturb(model, loss, inputs, labels, Attack(EPS, steps=1, loss=kind))
    with cache.used(), torch.no_grad():
        model(**inputs)


def test_pixels_of_another_processor_are_read_by_it(tuned, loss):
    class Processor:
        do_rescale, rescale_factor, do_normalize, image_mean, image_std = True, 1 / 255, True, [0.5] * 3, [0.5] * 3

    half = PixelRange.of(Processor)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    inputs = images_for(LAYOUTS[:1]) | {"pixel_values": half.to_pixel_values(images)}
    found = perturb(tuned, loss, inputs, make_labels([[0]]), Attack(EPS, steps=1), image_processor=Processor)
    change = (half.to_images(found) - images).abs()
    assert change.max() == pytest.approx(EPS, rel=1e-4)
    Processor.do_normalize = False
    assert PixelRange.of(Processor).std.flatten().tolist() == pytest.approx([1.0] * 3)
    Processor.do_rescale = False
    assert PixelRange.of(Processor).to_pixel_values(torch.ones(3, 1, 1)).flatten().tolist() == pytest.approx(
        [255.0] * 3
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 2}, "eps=2: must be at most 1, the range of a pixel; for example 2 / 255"),
        ({"eps": -0.1}, "eps=-0.1: must be a number of at least 0"),
        ({"eps": float("nan")}, "eps=nan: must be a number"),
        ({"eps": "2"}, "eps='2': must be a number"),
        ({"eps": float("inf"), "norm": "2"}, "eps=inf: must be a number"),
        ({"steps": 0}, "steps=0: must be an integer"),
        ({"steps": 1.5}, "steps=1.5: must be an integer"),
        ({"restarts": 0}, "restarts=0: must be"),
        ({"step": 0.0}, "step=0.0: must be positive"),
        ({"loss": "fool"}, "loss='fool': must be one of all, class"),
        ({"norm": "1"}, "norm='1': must be one of inf, 2"),
    ],
)
def test_wrong_attacks_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Attack(**changes)


def test_wrong_inputs_are_refused(tuned, loss):
    inputs, labels = images_for(), make_labels(CLASSES)
    with pytest.raises(InputError, match=r"pixel_values: are from .* as images, not from 0 to 1"):
        perturb(tuned, loss, {**inputs, "pixel_values": 2 * inputs["pixel_values"]}, labels, Attack())
    with pytest.raises(InputError, match="generator: must be one, or one per image, got 2 for 3 images"):
        perturb(tuned, loss, inputs, labels, Attack(), generators(2))
    with pytest.raises(InputError, match="needs prompts with at least two classes"):
        perturb(tuned, loss, images_for([[2]]), make_labels([[0]]), Attack(loss="mislabel", steps=1))
    with pytest.raises(InputError, match="labels: must be a list with one entry per image"):
        perturb(tuned, loss, inputs, labels[:2], Attack(steps=1))


def test_a_distance_of_the_norm_2_may_be_above_1(tuned, loss):
    inputs = images_for()
    found = perturb(tuned, loss, inputs, make_labels(CLASSES), Attack(3.0, steps=2, norm="2"), generators(3))
    change = RANGE.to_images(found) - RANGE.to_images(inputs["pixel_values"])
    norms = change.flatten(1).norm(dim=1)
    assert (norms <= 3 + 1e-4).all() and (norms > 1).all()


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_a_gradient_that_is_not_finite_is_refused(loss, norm):
    class Broken(Linear):
        def forward(self, pixel_values, **_):
            total = super().forward(pixel_values)
            return total * torch.tensor([1.0, float("nan")])

    model = Broken(torch.ones(3, 48, 48))
    pixels = RANGE.to_pixel_values(torch.full((2, 3, 48, 48), 0.5))
    with pytest.raises(InputError, match="the gradient of the loss is not finite for image 1 of the batch"):
        perturb(model, Identity(), {"pixel_values": pixels}, [{}, {}], Attack(EPS, steps=2, norm=norm), generators(2))


def test_pixels_in_half_precision_are_images_too(tuned, loss):
    inputs = images_for()
    model = attach(make_host()).eval().to(torch.bfloat16)
    half = {**inputs, "pixel_values": inputs["pixel_values"].to(torch.bfloat16)}
    found = perturb(model, loss, half, make_labels(CLASSES), Attack(EPS, steps=1), generators(3))
    assert found.dtype == torch.bfloat16
    change = RANGE.to_images(found.float()) - RANGE.to_images(half["pixel_values"].float())
    # The step of bfloat16 between 2 and 4 is 1/64, in units of the standard deviation.
    assert change.abs().max() < EPS + 0.23 / 64


def test_a_model_that_accelerate_prepared_is_attacked_without_autocast(tuned, loss):
    inputs, labels, attack = images_for(), make_labels(CLASSES), Attack(EPS, steps=1)
    plain = perturb(tuned, loss, inputs, labels, attack, generators(3))
    reset_accelerate()
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(attach(make_host()).eval())
    try:
        assert "_original_forward" in vars(prepared)
        assert torch.equal(perturb(prepared, loss, inputs, labels, attack, generators(3)), plain)
    finally:
        reset_accelerate()


def test_an_attack_in_inference_mode_is_refused(tuned, loss):
    with torch.inference_mode(), pytest.raises(InputError, match="needs gradients"):
        perturb(tuned, loss, images_for(), make_labels(CLASSES), Attack(steps=1))


def test_a_defence_does_not_change_padding(tuned, loss):
    inputs = images_for(padded=True)
    seen = []
    forward = type(tuned).forward

    class Watching(nn.Module):
        config = tuned.config

        def forward(self, pixel_values, **others):
            seen.append(pixel_values.detach())
            return forward(tuned, pixel_values=pixel_values, **others)

    attack = Attack(EPS, steps=1)
    perturb(Watching(), loss, inputs, make_labels(CLASSES), attack, generators(3), purify=lambda images: images + 0.3)
    padding = ~inputs["pixel_mask"][:, None].bool().expand_as(seen[0])
    assert torch.equal(seen[0][padding], inputs["pixel_values"][padding])


def test_evaluation_mode_restores_the_mode_of_each_part():
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout()).train()
    model[1].eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]
