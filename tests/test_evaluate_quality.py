from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import open_clip
import pandas as pd
import pytest
import scipy.linalg
import torch
from gallery import write_clip, write_shard
from PIL import Image

from ecodiff.config.sections import EvaluateSettings
from ecodiff.evaluate import features
from ecodiff.evaluate.quality import quality
from ecodiff.evaluate.samples import Samples
from ecodiff.evaluate.shards import Seen, see, see_real, write_seen
from ecodiff.runtime.errors import UserError
from ecodiff.toys import world

COUNT = 12


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    rng = np.random.default_rng(0)
    return [world.sample_scene(rng) for _ in range(COUNT)]


class Gallery:
    """True pictures as `dense`, the same with noise as `pruned`, in two shards of uneven size."""

    def __init__(self, folder: Path, scenes: list[world.Scene], clip: str) -> None:
        rng = np.random.default_rng(1)
        self.folder, self.captions = folder, [scene.caption for scene in scenes]
        self.true = np.stack([world.render(scene) for scene in scenes])
        noise = rng.normal(0, 40, self.true.shape)
        self.noisy = np.clip(self.true + noise, 0, 255).astype(np.uint8)
        self.z0 = torch.from_numpy(rng.normal(3, 2, (COUNT, 4, 8, 8))).float()
        self.z1 = self.z0 + torch.from_numpy(rng.normal(0, 1, self.z0.shape)).float()
        self.settings = EvaluateSettings(
            features="clip", clip_model=clip, clip_pretrained=None, batch_size=5
        )
        paths = [folder / f"real{i}.png" for i in range(COUNT)]
        for path, image in zip(paths, self.true, strict=True):
            Image.fromarray(image).save(path)
        self.prompts = pd.DataFrame(
            {
                "index": range(COUNT),
                "prompt": self.captions,
                "seed": range(COUNT),
                "image": list(map(str, paths)),
            }
        )
        self.dense = self.write("dense", self.true, self.z0)
        self.pruned = self.write("pruned", self.noisy, self.z1)

    def write(self, name: str, images: np.ndarray, z0: torch.Tensor, **origin: object) -> Samples:
        index, captions = list(range(COUNT)), self.prompts["prompt"].tolist()
        shards = [
            write_shard(
                self.folder / name / str(i),
                index[rows],
                images[rows],
                z0[rows].clone(),
                captions[rows],
                **origin,
            )
            for i, rows in enumerate((slice(0, 7), slice(7, COUNT)))
        ]
        return Samples(shards[::-1])

    def judge(
        self, samples: Samples, resamples: int = 0, dense: Samples | None = None
    ) -> dict[str, Any]:
        """What the three steps find, with the real pictures in shards of other sizes."""
        seen = self.folder / f"seen-{len(list(self.folder.glob('seen*')))}"
        write_seen(seen, see(samples, dense or self.dense, self.settings), self.settings, (64, 64))
        if self.prompts["image"].isna().all():
            return quality(Seen.read([seen]), None, resamples)
        return quality(Seen.read([seen]), self.real(), resamples)

    def real(self) -> Seen:
        files = [self.folder / f"real-{half}" for half in "ab"]
        for file, rows in zip(files, (self.prompts[:5], self.prompts[5:]), strict=True):
            write_seen(file, see_real(rows, (64, 64), self.settings), self.settings, (64, 64))
        return Seen.read(files[::-1])

    def embed(self, images: np.ndarray) -> torch.Tensor:
        return features.Clip(self.settings.clip_model, None).images(images)


@pytest.fixture
def gallery(tmp_path: Path, scenes: list[world.Scene], clip: str) -> Gallery:
    return Gallery(tmp_path, scenes, clip)


def test_the_dense_model_is_at_no_distance_from_itself(gallery: Gallery) -> None:
    judged = gallery.judge(gallery.dense)
    assert judged["count"] == COUNT
    assert judged["latent_error"] == 0
    assert judged["ssim"] == pytest.approx(1, abs=1e-4)
    assert judged["psnr"] is None  # infinite
    assert judged["fid"] == pytest.approx(0, abs=1e-6)  # its pictures are the real ones here
    assert judged["scene_accuracy"] == 1


def test_latent_error_is_the_squared_error_over_the_variance_of_the_whole_set(
    gallery: Gallery,
) -> None:
    judged = gallery.judge(gallery.pruned)
    expected = (gallery.z1 - gallery.z0).square().mean() / gallery.z0.var(correction=0)
    assert judged["latent_error"] == pytest.approx(expected.item(), rel=1e-5)
    each = (gallery.z1 - gallery.z0).square().flatten(1).mean(1) / gallery.z0.var(correction=0)
    low, high = sorted(each.tolist())[COUNT // 2 - 1 : COUNT // 2 + 1]
    assert judged["latent_error_median"] == pytest.approx((low + high) / 2, rel=1e-5)


def test_psnr_is_that_of_the_pooled_error(gallery: Gallery) -> None:
    judged = gallery.judge(gallery.pruned)
    error = np.mean((gallery.noisy.astype(float) - gallery.true) ** 2)
    assert judged["psnr"] == pytest.approx(10 * np.log10(255**2 / error), rel=1e-5)


def test_ssim_falls_with_noise(gallery: Gallery) -> None:
    judged = gallery.judge(gallery.pruned)
    assert 0 < judged["ssim"] < 0.9


def test_fid_is_the_frechet_distance_of_image_embeddings(gallery: Gallery) -> None:
    judge = gallery.judge
    real = gallery.embed(gallery.true).double().numpy()
    fake = gallery.embed(gallery.noisy).double().numpy()
    a, b = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    # Tr sqrt(AB) by a symmetric product, where the textbook's sqrtm is exact.
    root = scipy.linalg.sqrtm(a).real
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b @ root), 0, None)).sum()
    expected = np.square(real.mean(0) - fake.mean(0)).sum() + np.trace(a + b) - 2 * cross
    assert judge(gallery.pruned)["fid"] == pytest.approx(expected, rel=1e-3)


def test_kid_is_the_cubic_kernel_distance_and_repeats(gallery: Gallery) -> None:
    judge = gallery.judge
    first, second = judge(gallery.pruned), judge(gallery.pruned)
    assert (first["kid"], first["kid_std"]) == (second["kid"], second["kid_std"])
    assert first["kid_std"] > 0
    real, fake = gallery.embed(gallery.true), gallery.embed(gallery.noisy)
    kernel = lambda x, y: ((x @ y.T) / x.shape[1] + 1) ** 3  # noqa: E731
    off = 1 - torch.eye(COUNT)
    within = [(kernel(x, x) * off).sum() / (COUNT * (COUNT - 1)) for x in (real, fake)]
    whole = sum(within) - 2 * kernel(real, fake).mean()
    assert first["kid"] == pytest.approx(whole.item(), abs=3 * first["kid_std"])


def test_cmmd_is_the_gaussian_kernel_distance_of_normalised_embeddings(gallery: Gallery) -> None:
    judge = gallery.judge
    both = [gallery.embed(images).double() for images in (gallery.true, gallery.noisy)]
    x, y = (one / one.norm(dim=1, keepdim=True) for one in both)
    kernel = lambda a, b: torch.exp(-torch.cdist(a, b).square() / (2 * 10**2)).mean()  # noqa: E731
    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)).item()
    assert judge(gallery.pruned)["cmmd"] == pytest.approx(expected, rel=1e-6)
    assert judge(gallery.dense)["cmmd"] == pytest.approx(0, abs=1e-9)  # they are the real ones


def test_clip_score_uses_the_evaluation_preprocessing(gallery: Gallery, clip: str) -> None:
    """The augmentation of training crops at random: fault 22 of the public code."""
    model, _, evaluation = open_clip.create_model_and_transforms(clip)
    with torch.inference_mode():
        images = model.encode_image(
            torch.stack([evaluation(Image.fromarray(image)) for image in gallery.noisy])
        )
        texts = model.encode_text(open_clip.get_tokenizer(clip)(gallery.captions))
    expected = torch.cosine_similarity(images, texts).mean().item()
    judged = gallery.judge(gallery.pruned)
    assert judged["clip_score"] == pytest.approx(expected, abs=1e-6)


def test_scene_accuracy_counts_pictures_that_show_their_captions(gallery: Gallery) -> None:
    swapped = gallery.true.copy()
    swapped[:3] = 128  # nothing to be seen
    samples = gallery.write("swapped", swapped, gallery.z0)
    judged = gallery.judge(samples)
    assert judged["scene_accuracy"] == pytest.approx((COUNT - 3) / COUNT)


def test_captions_of_one_and_of_two_objects_are_counted_apart(
    gallery: Gallery, scenes: list[world.Scene]
) -> None:
    pairs = np.array([len(scene.things) == 2 for scene in scenes])
    assert 0 < pairs.sum() < COUNT
    wrong = gallery.true.copy()
    wrong[np.flatnonzero(pairs)[0]] = 128  # nothing to be seen
    judged = gallery.judge(gallery.write("wrong", wrong, gallery.z0))
    assert judged["scene_accuracy_one"] == 1
    assert judged["scene_accuracy_two"] == pytest.approx(1 - 1 / pairs.sum())


def test_other_captions_have_no_scene_accuracy(gallery: Gallery) -> None:
    gallery.prompts.loc[4, "prompt"] = "a photo of a dog"
    dense = gallery.write("dogs", gallery.true, gallery.z0)
    judged = gallery.judge(dense, dense=dense)
    assert judged["scene_accuracy"] is None
    assert judged["scene_accuracy_one"] is judged["scene_accuracy_two"] is None


def test_without_real_images_there_is_no_fid(gallery: Gallery) -> None:
    gallery.prompts["image"] = None
    judged = gallery.judge(gallery.pruned)
    assert [judged[key] for key in ("fid", "kid", "kid_std", "cmmd")] == [None] * 4
    assert judged["ssim"] is not None


def test_real_images_are_cut_around_the_centre_and_never_squashed(gallery: Gallery) -> None:
    """The public code squashed them to squares: fault 23."""
    for path, image in zip(gallery.prompts["image"], gallery.true, strict=True):
        wide = np.zeros((64, 128, 3), dtype=np.uint8)
        wide[:, 32:96] = image
        Image.fromarray(wide).resize((384, 192), Image.Resampling.NEAREST).save(path)
    cut = gallery.real().column("embeddings")
    true = gallery.embed(gallery.true)
    squashed = gallery.embed(np.stack([squash(path) for path in gallery.prompts["image"]]))
    assert (cut - true).norm() < 0.1 * (squashed - true).norm()


def squash(path: str) -> np.ndarray:
    return np.asarray(Image.open(path).resize((64, 64)))


def test_weights_of_inception_that_cannot_be_had_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(feature: int) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(features, "FrechetInceptionDistance", offline)
    with pytest.raises(UserError, match=r"6726825d\.pth or fetched .*no network.*features: clip"):
        features.inception("clean")


def test_a_variant_of_another_dense_model_is_refused(gallery: Gallery) -> None:
    other = gallery.write("other", gallery.noisy, gallery.z1, model="p::", dense="q::")
    judge = gallery.judge
    with pytest.raises(UserError, match="pruned from another dense model"):
        judge(other)


def test_a_metric_that_is_not_finite_is_named(gallery: Gallery) -> None:
    """Latents that are all the same have no variance to be relative to."""
    same = torch.zeros_like(gallery.z0)
    dense = gallery.write("same", gallery.true, same)
    with pytest.raises(UserError, match=r"seen.*latent_error.* is (inf|nan)"):
        gallery.judge(gallery.pruned, dense=dense)


def test_a_missing_real_image_is_named(gallery: Gallery) -> None:
    Path(gallery.prompts["image"][3]).unlink()
    with pytest.raises(UserError, match=r"real3\.png: there is no such file"):
        gallery.real()


def test_a_clip_folder_without_weights_is_refused(gallery: Gallery, tmp_path: Path) -> None:
    empty = gallery.settings.model_copy(update={"clip_model": f"local-dir:{tmp_path}/none"})
    with pytest.raises(UserError, match=r"clip_model: .*none holds no safetensors"):
        features.Networks(empty)


def test_truncated_clip_weights_are_refused(gallery: Gallery, tmp_path: Path) -> None:
    name = write_clip(tmp_path / "broken")
    weights = tmp_path / "broken" / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    broken = gallery.settings.model_copy(update={"clip_model": name})
    with pytest.raises(UserError, match=r"clip_model: .*broken cannot be loaded"):
        features.Networks(broken)


@pytest.mark.parametrize("variant", ["dense", "pruned"])
def test_latents_that_are_not_finite_never_reach_a_table(gallery: Gallery, variant: str) -> None:
    z0 = gallery.z0.clone()
    z0[2, 0, 0, 0] = torch.nan
    broken = gallery.write("broken", gallery.noisy, z0)
    pair = (gallery.pruned, broken) if variant == "dense" else (broken, gallery.dense)
    with pytest.raises(UserError, match=r"broken/.*latents of prompts \[2\] are not finite"):
        see(*pair, gallery.settings)


def test_shards_of_any_size_are_reduced_to_the_same_metrics(gallery: Gallery) -> None:
    whole = gallery.judge(gallery.pruned, resamples=3)
    files = []
    for half in ("0", "1"):
        files.append(gallery.folder / f"part-{half}")
        pair = [Samples([gallery.folder / name / half]) for name in ("pruned", "dense")]
        write_seen(files[-1], see(*pair, gallery.settings), gallery.settings, (64, 64))
    parts = quality(Seen.read(files), gallery.real(), 3)
    for key, value in whole.items():
        if key != "resampled":
            assert parts[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    for key, values in whole["resampled"].items():
        assert parts["resampled"][key] == pytest.approx(values, rel=1e-4, abs=1e-6), key


def test_shards_that_overlap_or_were_seen_otherwise_are_refused(gallery: Gallery) -> None:
    real = gallery.real().files
    with pytest.raises(UserError, match="is there more than once"):
        Seen.read([real[0], real[0]])
    with pytest.raises(UserError, match="is not of the prompts of"):
        gallery_half = gallery.folder / "half"
        half = [Samples([gallery.folder / name / "0"]) for name in ("pruned", "dense")]
        write_seen(gallery_half, see(*half, gallery.settings), gallery.settings, (64, 64))
        quality(Seen.read([gallery_half]), Seen.read(real))
    other = gallery.settings.model_copy(update={"resize": "legacy"})
    write_seen(real[0], see_real(gallery.prompts[:5], (64, 64), other), other, (64, 64))
    with pytest.raises(UserError, match=r"does not belong.*resize is"):
        Seen.read(real)


def test_standard_errors_are_those_of_the_mean(gallery: Gallery) -> None:
    """Of a mean over prompts, the bootstrap's is known: deviation over the root of their number."""
    drawn = gallery.judge(gallery.pruned, resamples=2000)["resampled"]["ssim"]
    seen = Seen.read([next(gallery.folder.glob("seen-0"))]).column("ssim").numpy()
    assert np.std(drawn) == pytest.approx(seen.std() / COUNT**0.5, rel=0.2)


@pytest.mark.slow
def test_judging_starts_without_diffusers() -> None:
    code = "import sys, ecodiff.evaluate.quality; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
