import numpy as np
import pytest
import torch

from kronsearch.errors import DataError
from kronsearch.training.data import Normalisation
from kronsearch.training.imagefolder import IMAGENET_MEAN, IMAGENET_STD, _random_box, _read
from kronsearch.training.sources import load_data

torchvision = pytest.importorskip("torchvision")
Image = pytest.importorskip("PIL.Image")

SIZES = [(300, 200), (120, 260), (224, 224), (401, 257)]


def write_images(folder, classes=("cat", "dog"), per_class=4):
    generator = np.random.default_rng(len(str(folder.name)))
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            width, height = SIZES[i % len(SIZES)]
            coarse = Image.fromarray(generator.integers(256, size=(6, 6, 3), dtype=np.uint8))
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / name / f"{i}.png")


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val", "test"):
        write_images(tmp_path / split)
    return tmp_path


def test_evaluation_images_are_those_of_torchvisions_transforms(folder):
    from torchvision import transforms

    data = load_data(f"imagefolder:{folder}")
    assert data.input_shape == (3, 224, 224)
    oracle = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    dataset = torchvision.datasets.ImageFolder(str(folder / "test"), oracle)
    batches = list(data.batches("test", 3))
    assert [len(labels) for _, labels in batches] == [3, 3, 2]
    expected = [dataset[i] for i in range(len(dataset))]
    torch.testing.assert_close(
        torch.cat([images for images, _ in batches]), torch.stack([e for e, _ in expected]), atol=2e-6, rtol=0
    )
    assert torch.cat([labels for _, labels in batches]).tolist() == [label for _, label in expected]


def test_a_training_image_is_the_box_resized_and_flipped(folder):
    path = str(folder / "train" / "cat" / "0.png")
    width, height = SIZES[0]
    area, ratio, x, y = 0.4, 0.7, 0.3, 0.9
    pixels = width * height * (0.08 + 0.92 * area)
    aspect = (4 / 3) ** (2 * ratio - 1)
    box_width, box_height = round((pixels * aspect) ** 0.5), round((pixels / aspect) ** 0.5)
    left, top = int(x * (width - box_width + 1)), int(y * (height - box_height + 1))
    from torchvision.transforms import functional

    with Image.open(path) as image:
        expected = functional.resized_crop(image, top, left, box_height, box_width, [224, 224])
    tries = [[area, ratio, x, y]] * 10
    result = _read(path, [*tries, [0.5, 0, 0, 0]]).short()
    # Cutting before resizing sees the same pixels but for the filter's reach over the border.
    difference = (result - torch.from_numpy(np.array(expected)).short()).abs()
    assert difference.max() <= 2
    assert torch.equal(_read(path, [*tries, [0.49, 0, 0, 0]]).short(), result.flip(1))


@pytest.mark.parametrize("size", [(400, 300), (1, 1), (900, 30), (31, 200)])
def test_boxes_lie_in_the_image_and_have_the_law_of_torchvisions(size):
    from torchvision.transforms import RandomResizedCrop

    width, height = size
    draws = torch.rand(3000, 10, 4, generator=torch.Generator().manual_seed(0)).tolist()
    ours = torch.tensor([_random_box(width, height, tries) for tries in draws]).double()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] < ours[:, 2:]).all()
    assert (ours[:, 2:] <= torch.tensor(size)).all()
    blank = torch.zeros(1, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        boxes = [RandomResizedCrop.get_params(blank, scale=[0.08, 1], ratio=[3 / 4, 4 / 3]) for _ in range(3000)]
    theirs = torch.tensor([(left, top, left + w, top + h) for top, left, h, w in boxes]).double()
    # Mean and deviation of 3000 draws are known to about 1/40 of the deviation; 0.1 is four times that.
    spread = theirs.std(dim=0) + 1e-9
    assert ((ours.mean(dim=0) - theirs.mean(dim=0)).abs() <= 0.1 * spread + 1e-6).all()
    assert ((ours.std(dim=0) - theirs.std(dim=0)).abs() <= 0.1 * spread + 1e-6).all()


def test_training_batches_follow_the_generator_only(folder):
    data = load_data(f"imagefolder:{folder}")

    def epoch(seed):
        return list(data.train_batches(3, generator=torch.Generator().manual_seed(seed)))

    first, again, other = epoch(0), epoch(0), epoch(1)
    assert [images.shape for images, _ in first] == [(3, 3, 224, 224)] * 2
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    normal = Normalisation(IMAGENET_MEAN, IMAGENET_STD)
    low, high = normal(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)), normal(torch.full((1, 3, 1, 1), 255).byte())
    assert all((images >= low).all() and (images <= high).all() for images, _ in first)


def test_an_unfinished_epoch_can_be_dropped(folder):
    batches = load_data(f"imagefolder:{folder}").train_batches(2, generator=torch.Generator().manual_seed(0))
    assert next(batches)[0].shape == (2, 3, 224, 224)
    batches.close()


@pytest.mark.parametrize("held", ["val", "test"])
def test_one_held_out_folder_is_the_test_split(tmp_path, held):
    write_images(tmp_path / "train", per_class=8)
    write_images(tmp_path / held, per_class=3)
    data = load_data(f"imagefolder:{tmp_path}", val_fraction=0.25)
    assert (data.size("train"), data.size("val"), data.size("test")) == (12, 4, 6)
    assert torch.cat([labels for _, labels in data.batches("val", 10)]).tolist() == [0, 0, 1, 1]
    assert data.fingerprint != load_data(f"imagefolder:{tmp_path}", val_fraction=0.25, seed=1).fingerprint


def test_a_part_to_hold_out_is_refused_where_there_is_a_validation_split(folder, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"fraction of 0.25 .* have a validation split of their own; leave it out"):
        load_data(f"imagefolder:{folder}", val_fraction=0.25)
    (tmp_path / "with_splits.py").write_text(
        "from kronsearch.training.sources import load_data\ndef given(seed): return load_data('digits')"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="'with_splits:given' have a validation split of their own"):
        load_data("with_splits:given", val_fraction=0.25)
    with pytest.raises(DataError, match="no module named 'with_split'"):
        load_data("with_split:given", val_fraction=0.25)


def test_fingerprint_is_of_the_contents(folder, tmp_path):
    import shutil

    fingerprint = load_data(f"imagefolder:{folder}").fingerprint
    copied = shutil.copytree(folder, tmp_path / "elsewhere")
    assert load_data(f"imagefolder:{copied}").fingerprint == fingerprint
    (copied / "val" / "cat" / "0.png").rename(copied / "val" / "cat" / "9.png")
    assert load_data(f"imagefolder:{copied}").fingerprint != fingerprint


def test_names_that_are_not_text_count_too(folder):
    import os

    image, fingerprints = folder / "val" / "cat" / "0.png", set()
    for name in (b"caf\xe9.png", b"caf\xe8.png"):
        image = image.rename(image.with_name(os.fsdecode(name)))
        fingerprints.add(load_data(f"imagefolder:{folder}").fingerprint)
    assert len(fingerprints) == 2


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(DataError, match="no image folders in"):
        load_data(f"imagefolder:{tmp_path}")
    write_images(tmp_path / "train", per_class=1)
    with pytest.raises(DataError, match="no image folders in"):
        load_data(f"imagefolder:{tmp_path}")
    write_images(tmp_path / "test", classes=("cat", "horse"))
    with pytest.raises(DataError, match="the same class folders, but only one of them has dog, horse"):
        load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "test" / "horse").rename(tmp_path / "test" / "dog")
    with pytest.raises(DataError, match="one image a class: none is left for validation"):
        load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="needs one folder a class with an image in each"):
        load_data(f"imagefolder:{tmp_path}")


@pytest.mark.parametrize("size", [(60_000, 1), (3, 3000)])
def test_of_a_long_image_the_middle_alone_is_resized(folder, size):
    image = Image.new("L", size, 70)
    middle = tuple(side // 2 - min(size) for side in size)
    image.paste(140, (*(max(0, start) for start in middle), *(start + 2 * min(size) + 1 for start in middle)))
    image.save(folder / "test" / "cat" / "1.png")
    seen, resize = [], Image.Image.resize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", lambda self, to, *told: seen.append(to) or resize(self, to, *told))
        images, _ = next(load_data(f"imagefolder:{folder}").batches("test", 2))
    assert sorted(seen[1]) == [256, 4096]
    grey = Normalisation(IMAGENET_MEAN, IMAGENET_STD)(torch.full((1, 3, 1, 1), 140, dtype=torch.uint8))
    torch.testing.assert_close(images[1], grey.expand_as(images[1:2])[0], atol=0.05, rtol=0)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_images_of_16_bits_have_as_many_shades_as_others(tmp_path, suffix):
    grey = np.linspace(0, 2**16 - 1, 224 * 256).astype(np.uint16).reshape(224, 256)
    Image.fromarray(grey).save(tmp_path / f"deep.{suffix}")
    Image.fromarray((grey // 256).astype(np.uint8)).save(tmp_path / f"flat.{suffix}")
    deep, flat = (_read(str(tmp_path / f"{name}.{suffix}"), None) for name in ("deep", "flat"))
    assert torch.equal(deep, flat)
    assert len(deep.unique()) > 200


@pytest.mark.parametrize(("mode", "dtype"), [("F", np.float32), ("I", np.int32)])
def test_images_of_an_unknown_range_are_refused(tmp_path, mode, dtype):
    Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=rf"x\.tif can't be read as an image: pixels of mode {mode} have no known"):
        _read(str(tmp_path / "x.tif"), None)


@pytest.mark.parametrize("kind", ["GIF", "JPEG", "MPO", "BMP", "WEBP"])
def test_an_image_may_have_the_name_of_another_format(tmp_path, kind):
    Image.new("RGB", (8, 8), (200, 100, 50)).save(tmp_path / "x.png", kind)
    assert (_read(str(tmp_path / "x.png"), None).float().mean((0, 1)) - torch.tensor([200, 100, 50])).abs().max() < 8


def test_formats_that_no_extension_is_of_are_not_decoded(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("another program was started"))
    (tmp_path / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(DataError, match=r"x\.png can't be read as an image: cannot identify image file"):
        _read(str(tmp_path / "x.png"), None)


@pytest.mark.parametrize("error", [SyntaxError("broken\nfile"), RuntimeError("broken"), NotImplementedError()])
def test_whatever_a_decoder_raises_is_one_line(tmp_path, monkeypatch, error):
    def load(_):
        raise error

    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: load(_))
    with pytest.raises(DataError, match=r"an image: (broken|NotImplementedError); repair or remove it$"):
        _read(str(tmp_path / "x.png"), None)


def test_an_unreadable_image_is_named(folder):
    (folder / "test" / "dog" / "0.png").unlink()
    (folder / "test" / "dog" / "0.png").symlink_to(folder / "nowhere")
    with pytest.raises(DataError, match=r"0\.png can't be read \(No such file"):
        load_data(f"imagefolder:{folder}").fingerprint  # noqa: B018
    (folder / "test" / "cat" / "1.png").write_bytes(b"not an image")
    data = load_data(f"imagefolder:{folder}")
    with pytest.raises(DataError, match=r"1\.png can't be read as an image"):
        list(data.batches("test", 3))
