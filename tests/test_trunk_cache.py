"""`TrunkCache`: training on what is below `start_layer`, computed once, equals training without it."""

from __future__ import annotations

import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from families import CASES
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from small_classifier import CLASSES, TEMPLATES, raises
from small_clip import make_clip, make_images, perturb

from sep_peft import SEPClassifier, SEPConfig, TrunkCache
from sep_peft.classifier.prediction import image_embeds
from sep_peft.classifier.trunk_cache import embeds_from_trunk
from sep_peft.method.mix import mix_embeddings
from sep_peft.tuner.model import find_towers
from sep_peft.tuner.wrappers import SEPEncoderLayer


LABELS = torch.tensor([3, 0, 2, 2, 1])
NOTHING = "There is nothing to cache: no active adapter has prompts in the vision tower. Train without a cache."


class Images(torch.utils.data.Dataset):
    def __init__(self, images=None, **extra):
        self.images, self.extra, self.reads = make_images(5) if images is None else images, extra, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.reads += 1
        return {"pixel_values": self.images[index], "labels": int(LABELS[index % 5]), **self.extra}


def make_classifier(start_layer: int = 2, **config) -> SEPClassifier:
    torch.manual_seed(0)
    model = get_peft_model(make_clip(), SEPConfig(start_layer=start_layer, **({"num_vision_prompts": 4} | config)))
    perturb(model)
    return SEPClassifier(model, CLASSES, TEMPLATES, prototype_weight=0.0)


def batch_of(cache: TrunkCache) -> dict[str, torch.Tensor]:
    return torch.utils.data.default_collate([cache[i] for i in range(len(cache))])


def step(classifier: SEPClassifier, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    classifier.zero_grad()
    loss = classifier.train()(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in classifier.named_parameters() if p.grad is not None}


class Calls:
    """How often each layer of the vision tower and of the text tower has run."""

    def __init__(self, classifier):
        self.counts, self.handles = {}, []
        for tower, module in find_towers(classifier.model).items():
            for layer in module.modules():
                if isinstance(layer, SEPEncoderLayer):
                    key = tower, layer.index
                    self.counts[key] = 0
                    self.handles.append(layer.base_layer.register_forward_hook(lambda *_, key=key: self.add(key)))

    def add(self, key):
        self.counts[key] += 1


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("config", [{}, {"frozen_weight": 0.0}, {"fusion": "none"}, {"batch_coupled": True}], ids=str)
def test_a_step_equals_one_without_the_cache(config, folder, tmp_path):
    classifier = make_classifier(**config)
    expected = step(classifier, pixel_values=make_images(5), labels=LABELS)
    cache = TrunkCache(classifier.model, Images(), tmp_path if folder else None)
    assert len(cache) == 5 and cache[0]["trunk"].shape == (10, 48) and cache[0]["frozen_embeds"].shape == (24,)
    torch.testing.assert_close(step(classifier, **batch_of(cache)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("folder", [False, True])
def test_a_step_at_layer_0_runs_the_prompted_pass_alone(folder, tmp_path):
    """The frozen embedding of each image is kept, on disk too; the image is read again."""
    classifier, plain = make_classifier(0), make_classifier(0)
    expected = step(plain, pixel_values=make_images(5), labels=LABELS)
    cache = TrunkCache(classifier.model, Images(), tmp_path if folder else None)
    batch = batch_of(cache)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "pixel_values": (5, 3, 24, 24),
        "frozen_embeds": (5, 24),
        "labels": (5,),
    }
    calls = Calls(classifier)
    torch.testing.assert_close(step(classifier, **batch), expected, rtol=1e-5, atol=1e-6)
    assert {calls.counts["vision", layer] for layer in range(4)} == {1}
    if folder:
        (file,) = tmp_path.iterdir()
        assert file.stat().st_size < 5 * (4 * 24 + 400)
        again = Calls(classifier)
        found = batch_of(TrunkCache(classifier.model, Images(), tmp_path))
        assert {again.counts["vision", layer] for layer in range(4)} == {0}
        assert all(torch.equal(found[name], value) for name, value in batch.items())


SIZES = "{} takes images of several sizes. Train it without a trunk cache."
EXTRA = (
    "A trunk cache takes pixel_values and labels alone, but the images have ['pixel_attention_mask', 'spatial_shapes']."
)
#: Families whose images cannot be cached, each with the reason that the error gives.
REFUSED = {
    "blip": SIZES.format("BlipVisionModel"),
    "blip retrieval": SIZES.format("BlipVisionModel"),
    "blip vision alone": SIZES.format("BlipVisionModel"),
    "blip_2 retrieval": SIZES.format("Blip2VisionModel"),
    "blip_2 vision": SIZES.format("Blip2VisionModel"),
    "blip_2 vision with projection": SIZES.format("Blip2VisionModel"),
    "siglip2": EXTRA,
    "siglip2 vision": EXTRA,
    "siglip2 image classification": EXTRA,
}
WITH_IMAGES = [name for name, case in CASES.items() if case.image and "pixel_values" in case.image(1)]


def model_and_images(family: str) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """A model whose image tower has a trunk, and two images."""
    case = CASES[family]
    model = case.build()
    torch.manual_seed(0)
    options = {"num_text_prompts": 0, "num_vision_prompts": 2, "start_layer": 1} | case.options
    model = get_peft_model(model, SEPConfig(**({"num_vision_prompts": 4} | options)))
    perturb(model)
    return model, case.image(2)


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_are_refused(family):
    """Before anything runs."""
    model, inputs = model_and_images(family)
    extra = {key: value[0] for key, value in inputs.items() if key != "pixel_values"}
    find_towers(model)["vision"].base_layer.register_forward_pre_hook(lambda *_: pytest.fail("the tower ran"))
    with raises(REFUSED[family]):
        TrunkCache(model, Images(inputs["pixel_values"], **extra))


@pytest.mark.parametrize("family", [name for name in WITH_IMAGES if name not in REFUSED])
def test_families(family):
    """The image tower gives the same embeddings from its trunk, or from the frozen ones with layers in stages."""
    model, inputs = model_and_images(family)
    tower = find_towers(model)["vision"].eval()
    batch = batch_of(TrunkCache(model, Images(inputs["pixel_values"])))
    assert ("trunk" in batch) != tower.spec.in_stages
    if "trunk" in batch:
        image, _ = embeds_from_trunk(tower, batch["trunk"], batch["frozen_embeds"], batch["trunk_layer"])
    else:
        del batch["labels"]
        image, _ = image_embeds(tower, batch)
    prompted, frozen = tower.embed(**inputs)
    torch.testing.assert_close(image, mix_embeddings(prompted, frozen, tower.frozen_weight), rtol=1e-5, atol=1e-5)


def test_layers_that_run():
    """With the cache only those from `start_layer` on, once; without it the trunk once and these twice."""
    classifier = make_classifier(start_layer=2)
    cache = TrunkCache(classifier.model, Images())
    batch = batch_of(cache)
    step(classifier, **batch)
    calls = Calls(classifier)
    step(classifier, **batch)
    assert calls.counts == {
        **{("text", i): int(i >= 2) for i in range(3)},
        **{("vision", i): int(i >= 2) for i in range(4)},
    }
    calls = Calls(classifier)
    step(classifier, pixel_values=make_images(5), labels=LABELS)
    assert [calls.counts["vision", i] for i in range(4)] == [1, 1, 2, 2]


def test_every_change_is_noticed_and_what_is_known_is_used(tmp_path):
    def computed(classifier, images=None, **options):
        """Rows that go through the trunk."""
        rows, tower = [], find_towers(classifier.model)["vision"]
        handle = tower.base_layer.register_forward_hook(
            lambda _, args, kwargs, out: rows.append(len(out[0])), with_kwargs=True
        )
        TrunkCache(classifier.model, Images(images), tmp_path, **options)
        handle.remove()
        return sum(rows)

    images = make_images(5)
    assert computed(make_classifier()) == 5
    assert computed(make_classifier()) == 0
    changed = images.clone()
    changed[3, 0, 0, 0] += 1e-3
    assert computed(make_classifier(), changed) == 1
    assert computed(make_classifier(), images.flip(0)) == 0  # another order, another transform of the same pixels
    assert computed(make_classifier(), images * 1.01) == 5
    assert computed(make_classifier(1)) == 5
    assert computed(make_classifier(), dtype=torch.bfloat16) == 5
    other = make_classifier()
    find_towers(other.model)["vision"].base_layer.encoder.layers[0].base_layer.mlp.fc1.weight.data[0, 0] += 1e-3
    assert computed(other) == 5
    with torch.autocast("cpu", torch.bfloat16):
        assert computed(make_classifier()) == 5
    other = make_classifier()
    find_towers(other.model)["vision"].base_layer.config.hidden_act = "gelu"
    assert computed(other) == 5
    assert computed(make_classifier()) == 0


def test_a_second_instance_reads_what_the_first_wrote(tmp_path):
    first = batch_of(TrunkCache(make_classifier().model, Images(), tmp_path))
    second = batch_of(TrunkCache(make_classifier().model, Images(), tmp_path))
    assert all(torch.equal(first[key], second[key]) for key in first)
    classifier = make_classifier()  # has run no trunk itself
    torch.testing.assert_close(
        step(classifier, **second),
        step(make_classifier(), pixel_values=make_images(5), labels=LABELS),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_write_that_fails_leaves_no_file_that_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        TrunkCache(make_classifier().model, Images(), tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert len(TrunkCache(make_classifier().model, Images(), tmp_path)) == 5


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path, monkeypatch):
    def killed(tensors, file, metadata):
        Path(file).write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr("sep_peft.classifier.trunk_cache.save_file", killed)
            TrunkCache(make_classifier().model, Images(), tmp_path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert any(path.read_bytes() == b"half a file" for path in tmp_path.rglob("*") if path.is_file())
    assert len(TrunkCache(make_classifier().model, Images(), tmp_path)) == 5
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0xFF
    file.write_bytes(content)


def damaged(file: Path, reason: str) -> str:
    return (
        f"The trunk cache's file {file} is damaged: {reason}. Remove it; a new TrunkCache computes its entries again."
    )


def rewrite(file: Path, metadata: dict[str, str] | None) -> None:
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    save_file(tensors, file, metadata)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:100]), "Error while deserializing header: .+"),
        (lambda file: file.write_bytes(b""), "Error while deserializing header: .+"),
        (lambda file: flip(file, 7), "Error while deserializing header: .+"),
        (lambda file: rewrite(file, None), "its digests do not belong to its entries"),
        (lambda file: rewrite(file, {"digests": "[]"}), "its digests do not belong to its entries"),
        (lambda file: rewrite(file, {"digests": '{"a": "b"}'}), "its digests do not belong to its entries"),
        (lambda file: rewrite(file, {"digests": "{"}), "Expecting property name enclosed in double quotes: .+"),
    ],
    ids=["cut", "empty", "length", "no digests", "list", "others", "no JSON"],
)
def test_a_damaged_file_is_named(damage, reason, tmp_path):
    TrunkCache(make_classifier().model, Images(), tmp_path)
    (file,) = tmp_path.iterdir()
    damage(file)
    pattern = re.escape(damaged(file, "@")).replace("@", reason)
    with pytest.raises(ValueError, match=f"^{pattern}$"):
        TrunkCache(make_classifier().model, Images(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_flipped_byte_is_found_when_it_is_read(dtype, tmp_path):
    """Bytes of the entries, of the digests and of the header's other parts."""
    model = make_classifier().model
    cache = TrunkCache(model, Images(), tmp_path, dtype=dtype)
    expected = batch_of(cache)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(8, header, (40,), generator=generator).tolist()
    places += torch.randint(header, len(whole), (40,), generator=generator).tolist()
    for place in places:
        file.write_bytes(whole)
        flip(file, place)
        with pytest.raises(ValueError, match=f"^The trunk cache's file {re.escape(str(file))} is damaged: .+"):
            batch_of(TrunkCache(model, Images(), tmp_path, dtype=dtype))
    file.write_bytes(whole)
    flip(file, len(whole) - 1)
    with raises(damaged(file, "an entry is not what was written")):
        batch_of(cache)  # that was made before the damage
    file.write_bytes(whole)
    torch.testing.assert_close(batch_of(cache), expected)


def test_threads_share_a_folder(tmp_path):
    models = [make_classifier().model for _ in range(4)]
    expected = batch_of(TrunkCache(models[0], Images()))
    barrier = threading.Barrier(4)

    def work(index: int) -> dict[str, torch.Tensor]:
        barrier.wait(timeout=60)
        return batch_of(TrunkCache(models[index], Images(), tmp_path))

    for _ in range(5):
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(work, range(4)))
        for batch in found:
            torch.testing.assert_close(batch, expected)
        assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
        for path in tmp_path.iterdir():
            path.unlink()


def test_a_file_that_somebody_else_computed_otherwise_replaces_none(tmp_path):
    """On another machine the same images may differ in their last bits."""
    cache = TrunkCache(make_classifier().model, Images(), tmp_path)
    expected = batch_of(cache)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.unlink()
    other = make_classifier()
    find_towers(other.model)["vision"].base_layer.register_forward_hook(
        lambda _, args, kwargs, out: setattr(out, "pooler_output", out.pooler_output * (1 + 1e-6)), with_kwargs=True
    )
    TrunkCache(other.model, Images(), tmp_path)
    (second,) = tmp_path.iterdir()
    assert second != file
    file.write_bytes(content)
    torch.testing.assert_close(batch_of(cache), expected, rtol=0, atol=0)
    assert len(TrunkCache(make_classifier().model, Images(), tmp_path)) == 5


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, None])
def test_bad_batch_size(batch_size):
    with raises(f"batch_size must be a whole number of at least 1, but got {batch_size!r}."):
        TrunkCache(make_classifier().model, Images(), batch_size=batch_size)


def test_views():
    cache = TrunkCache(make_classifier().model, Images(make_images(10)), views=2)
    assert len(cache) == 5
    seen = {float(cache[1]["trunk"].sum()) for _ in range(40)}
    assert len(seen) == 2
    assert cache[-1]["labels"] == 1


def test_dropout_is_not_kept():
    classifier = make_classifier().train()
    layers = [m for m in find_towers(classifier.model)["vision"].modules() if hasattr(m, "dropout")]
    for layer in layers:
        layer.dropout = 0.5
    found = batch_of(TrunkCache(classifier.model, Images()))
    assert layers and classifier.training and all(layer.training for layer in layers)
    expected = batch_of(TrunkCache(make_classifier().eval().model, Images()))
    assert torch.equal(found["trunk"], expected["trunk"]) and torch.equal(
        found["frozen_embeds"], expected["frozen_embeds"]
    )


def test_lora_switched_off_below_is_another_model(tmp_path):
    lora = get_peft_model(make_clip(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "style")
    model = get_peft_model(lora.get_base_model(), SEPConfig(start_layer=2, num_vision_prompts=4))
    lora.base_model.set_requires_grad("style", False)
    on = TrunkCache(model, Images(), tmp_path)[0]["trunk"]
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(False)
    off = TrunkCache(model, Images(), tmp_path)[0]["trunk"]
    assert not torch.equal(on, off)


def test_half_precision_is_close():
    classifier = make_classifier()
    full, half = (batch_of(TrunkCache(classifier.model, Images(), dtype=d)) for d in (torch.float32, torch.bfloat16))
    assert half["trunk"].dtype == torch.float32
    torch.testing.assert_close(half["trunk"], full["trunk"], rtol=1e-2, atol=1e-2)
    assert not torch.equal(half["trunk"], full["trunk"])


# errors


def test_nothing_to_cache():
    with raises(NOTHING):
        TrunkCache(make_classifier(num_vision_prompts=0).model, Images())
    classifier = make_classifier()
    batch = batch_of(TrunkCache(classifier.model, Images()))
    with raises("Pass either pixel_values or trunk and frozen_embeds."):
        classifier(labels=LABELS)
    with raises("Pass either pixel_values or trunk and frozen_embeds."):
        classifier(make_images(5), **batch)
    message = "The cached trunk ends at layer 2, but the active adapter starts at layer 1. Make a "
    with raises(message + "TrunkCache for this adapter."):
        make_classifier(1)(**batch)


def test_a_trunk_that_is_trained_itself():
    clip = get_peft_model(make_clip(), LoraConfig(r=2, target_modules=["q_proj"]), "style").get_base_model()
    model = get_peft_model(clip, SEPConfig(start_layer=2, num_vision_prompts=4))
    with pytest.raises(ValueError, match=r"^The vision tower below SEP is trained as well .* train without a cache\.$"):
        TrunkCache(model, Images())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".sep_" in name)
    assert len(TrunkCache(model, Images())) == 5


def test_images_that_cannot_be_cached():
    model = make_classifier().model
    with raises("views must divide the number of entries, but got 2 views and 5 entries."):
        TrunkCache(model, Images(), views=2)
    with raises("views must divide the number of entries, but got 1 view and 0 entries."):
        TrunkCache(model, Images(make_images(0)))
    with raises("Every image must have shape (3, 24, 24), but entry 0 has (3, 24, 23)."):
        TrunkCache(model, Images(make_images(5)[..., 1:]))
    with raises("A trunk cache takes pixel_values and labels alone, but the images have ['mask']."):
        TrunkCache(model, Images(mask=torch.ones(1)))


def test_class_texts_follow_the_weights_below():
    """What the encoder keeps of the trunk while training is made anew when a weight changes in place."""
    classifier, fresh = make_classifier(), make_classifier()
    inputs = {"pixel_values": make_images(5), "labels": LABELS}
    before, _ = step(classifier, **inputs)
    with torch.no_grad():
        for each in (classifier, fresh):
            find_towers(each.model)["text"].base_layer.get_input_embeddings().weight.mul_(1.5)
    after = step(classifier, **inputs)
    assert not torch.allclose(after[0], before)
    torch.testing.assert_close(after, step(fresh, **inputs))
