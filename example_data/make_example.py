"""Make the example data: drawn dermoscopy-like photographs with labels, lesion masks and tables.

    python example_data/make_example.py --overwrite

Nothing here is a photograph of a person and nothing learnt from it says anything about skin.
The pictures exist to show, within minutes, that looking at the lesion at its native resolution
pays. Written to --output_dir:

    images/EX_0000.jpg ...  640 to 1600 px wide, mostly landscape, one lesion in each
    masks/EX_0000.png ...   the lesion (0 / 255), same height and width as the image
    train.csv               image_name, patient_id, sex, age_approx,
                            anatom_site_general_challenge, target (ISIC 2020's columns,
                            without diagnosis and benign_malignant), pattern
    test.csv                the same without target and pattern
    sample_submission.csv   image_name, target (all 0)
    test_labels.csv         image_name, target, pattern

Skin, hair, ruler, vignette, picture size, and the lesion's place and area are drawn without
looking at the class. The two classes (0 benign, 1 malignant) differ inside the lesion only:

* fine, strong: a benign lesion carries an even mesh or even globules (pattern says which) and a
  smooth border; a malignant one dots of uneven size, a broken network, radial streaks and a border
  jagged at the same small scale. The spacing is a fixed share of the lesion's diameter: 3 to 12 px
  in the file (mostly 4 to 8), about 2 px once the short side is 224 px (there mostly averaged
  away), about 6 px in a 224 px crop of the lesion. The texture has next to no low frequencies and
  one contrast in both classes, so that shrinking it leaves (nearly) the same brown.
* coarse, weak: one number per lesion, normal with unit variance and COARSE_SHIFT higher on
  average when malignant, makes the lesion darker, greyer, patchier, less round and (when very
  high) veiled in blue-white. It survives the shrinking, and overlaps a lot between the classes.
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

CYCLES = 29  # fine structures along one lesion diameter
FINE_CONTRAST = 0.26  # standard deviation of the fine texture, in log absorption
COARSE_SHIFT = 1.4  # AUC of the coarse number alone: Phi(1.4 / sqrt 2) = 0.84
SITES = ["torso", "lower extremity", "upper extremity", "head/neck", "palms/soles", "oral/genital"]
SITE_SHARES = [0.50, 0.25, 0.15, 0.06, 0.03, 0.01]
TABLES = ["train.csv", "test.csv", "sample_submission.csv", "test_labels.csv"]


def get_args_parser():
    """Return the command line parser."""
    parser = argparse.ArgumentParser(
        description="Make the drawn example data (images, masks, tables).",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).resolve().parent,
                        help="folder to write to")
    parser.add_argument("--n_train", type=int, default=160, help="number of training images")
    parser.add_argument("--n_test", type=int, default=40, help="number of test images")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything drawn")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    return parser


def smooth_noise(rng, shape, scale):
    """Return noise of unit variance, shape (height, width), that varies over about scale px."""
    coarse = rng.standard_normal([int(side / scale) + 2 for side in shape]).astype(np.float32)
    noise = cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC)
    return (noise - noise.mean()) / noise.std()


def draw_lines(shape, lines, thick):
    """Return smooth-edged lines, (height, width) uint8, each given as its (x, y) points in px."""
    drawn = np.zeros(shape, np.uint8)
    points = [np.int32(np.rint(line * 16)) for line in lines]
    cv2.polylines(drawn, points, False, 255, max(1, round(thick)), cv2.LINE_AA, 4)
    return drawn


def smooth_step(x):
    """Return x clipped to 0..1 with soft shoulders."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def draw_size(rng):
    """Return (height, width) in px: mostly small landscape pictures, with a tail to 1600 px."""
    low, high = [(640, 720), (720, 960), (960, 1600)][rng.choice(3, p=[0.74, 0.21, 0.05])]
    width = int(rng.integers(low, high + 1)) // 2 * 2
    ratio = rng.choice([3 / 4, 2 / 3, 1, 4 / 3], p=[0.58, 0.27, 0.08, 0.07])
    if ratio >= 1:
        width = min(width, 800)  # tall pictures of full width would take most of the bytes
    return int(round(width * ratio / 2)) * 2, width


def draw_skin(rng, shape):
    """Return bare skin, (height, width, 3) float RGB in 0..255."""
    short = min(shape)
    depth = rng.beta(1.3, 2.6)
    light, dark = np.array([232, 196, 176.0]), np.array([150, 104, 80.0])
    tone = light + depth * (dark - light) + rng.normal(0, 5, 3)
    melanin, blood = np.array([0.5, 0.9, 1.2]), np.array([0.1, 1.0, 0.8])
    absorb = 0.03 * smooth_noise(rng, shape, short / 3)[..., None] * melanin
    absorb = absorb + 0.018 * smooth_noise(rng, shape, short / 6)[..., None] * blood
    absorb += 0.010 * smooth_noise(rng, shape, short / 22)[..., None] * blood
    # the furrows of the skin: valleys between stretched blobs
    furrow = np.abs(smooth_noise(rng, shape, short / rng.uniform(45, 65)))
    furrow = smooth_step(1 - furrow / 0.5) - 0.2
    absorb += rng.uniform(0.005, 0.022) * furrow[..., None] * melanin
    return (tone * np.exp(-absorb)).astype(np.float32)


def draw_outline(rng, shape, coarse, malignant):
    """Return distance / radius (height, width), radius by angle, middle and spacing, in px."""
    height, width = shape
    short = min(shape)
    theta = np.linspace(0, 2 * np.pi, 1440, endpoint=False)
    share = np.clip(np.exp(rng.normal(np.log(0.05), 0.5)), 0.02, 0.25)
    lumps = rng.normal(0, 1, 5) * [0.0, 0.12, 0.05, 0.03, 0.02] * (1 + 0.25 * coarse)
    radius = np.ones_like(theta)
    for k, (lump, phase) in enumerate(zip(lumps, rng.uniform(0, 2 * np.pi, 5), strict=True), 1):
        radius += np.clip(lump, -0.2, 0.2) * np.cos(k * theta + phase)
    radius *= np.sqrt(share * height * width / (np.pi * np.mean(radius**2)))
    box = np.abs([radius * np.sin(theta), radius * np.cos(theta)]).max(axis=1)
    shrink = min(1, 0.47 * short / box.max())
    radius, box = radius * shrink, box * shrink
    # off centre, with the whole lesion inside the centre square (a few touch its border)
    room = short / 2 - box - rng.choice([0, 0.02, 0.05], p=[0.05, 0.35, 0.6]) * short
    middle = np.array([height, width]) / 2 + rng.uniform(-1, 1, 2) * np.maximum(room, 0)
    spacing = 2 * np.sqrt(np.mean(radius**2)) / CYCLES
    jag = smooth_noise(rng, (1, 1440), 1440 / (np.pi * CYCLES) * 0.8)[0]
    radius = radius + (0.4 if malignant else 0.1) * spacing * np.clip(jag, -2, 1.5)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    y, x = y - middle[0], x - middle[1]
    bearing = (np.arctan2(y, x) % (2 * np.pi)) * (1440 / (2 * np.pi))
    at = np.interp(bearing.ravel(), np.arange(1441), np.append(radius, radius[0]))
    distance = np.hypot(y, x) / at.reshape(shape)
    return distance.astype(np.float32), radius, middle, spacing


def even_texture(rng, shape, spacing):
    """Return a texture of even spacing (px), (height, width), larger where darker, and its name: globules or mesh."""
    y, x = np.mgrid[:shape[0], :shape[1]].astype(np.float32)
    bend = 0.4 * spacing
    y = y + bend * smooth_noise(rng, shape, 4 * spacing)
    x = x + bend * smooth_noise(rng, shape, 4 * spacing)
    turn = rng.uniform(0, np.pi / 3)
    wave = 0
    for angle in turn + np.array([0, 1, 2]) * np.pi / 3:
        wave = wave + np.cos((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / spacing)
    if rng.random() < 0.65:
        return smooth_step((0.9 - wave) / 2.0), "mesh"
    return smooth_step((wave + 0.6) / 2.4), "globules"


def uneven_texture(rng, distance, radius, middle, spacing):
    """Return dots of uneven size, broken network and streaks, (height, width), in 0..about 1."""
    shape = distance.shape
    dots = np.zeros(shape, np.uint8)
    count = int(0.55 * (2 * radius.mean() / spacing) ** 2)
    away = np.sqrt(rng.uniform(0, 1, count)) * 1.02
    turn = rng.integers(0, 1440, count)
    sizes = spacing * np.clip(np.exp(rng.normal(np.log(0.3), 0.45, count)), 0.16, 0.8)
    for r, t, size in zip(away * radius[turn], turn * 2 * np.pi / 1440, sizes, strict=True):
        place = np.rint(16 * (middle[::-1] + [r * np.cos(t), r * np.sin(t)])).astype(int)
        cv2.circle(dots, place.tolist(), int(size * 16), 255, -1, cv2.LINE_AA, 4)
    streaks = []
    for t in rng.integers(0, 1440, int(np.pi * CYCLES * rng.uniform(0.35, 0.6))):
        ends = radius[t] * np.array([rng.uniform(0.72, 0.88), rng.uniform(0.95, 1.05)])
        lean = t * 2 * np.pi / 1440 + np.array([0, rng.normal(0, 0.04)])
        streaks.append(middle[::-1] + (ends * [np.cos(lean), np.sin(lean)]).T)
    streaks = draw_lines(shape, streaks, 0.3 * spacing)
    lines = smooth_step(1 - np.abs(smooth_noise(rng, shape, spacing * 0.9)) / 0.45)
    patches = smooth_step(0.5 + smooth_noise(rng, shape, radius.mean() * 0.5))
    network = lines * patches * (distance < 1)
    blobs = np.maximum(dots * (1 - 0.6 * patches), streaks) / 255
    return np.maximum(cv2.GaussianBlur(blobs.astype(np.float32), (0, 0), 0.5), 0.8 * network)


def draw_lesion(rng, skin, malignant):
    """Return the skin with a lesion, (height, width, 3) float RGB, the mask, bool, and the name of its pattern."""
    shape = skin.shape[:2]
    coarse = rng.normal(COARSE_SHIFT * (0.5 if malignant else -0.5), 1)
    distance, radius, middle, spacing = draw_outline(rng, shape, coarse, malignant)
    edge = rng.uniform(0.05, 0.12)
    cover = smooth_step((1 + edge - distance) / (2 * edge))
    if malignant:
        fine, pattern = uneven_texture(rng, distance, radius, middle, spacing), "irregular"
    else:
        fine, pattern = even_texture(rng, shape, spacing)
    # equal contrast and no low frequencies: what is left after shrinking tells little
    fine = (fine - cv2.GaussianBlur(fine, (0, 0), 0.7 * spacing)) * (distance < 1.1)
    inside = fine[distance < 0.95]
    fine = np.clip((fine - inside.mean()) / inside.std(), -2.5, 2.5) * FINE_CONTRAST
    size = radius.mean()
    fine *= np.clip(1 + 0.4 * smooth_noise(rng, shape, size * 0.5), 0.3, 1.6)
    depth = np.clip(0.85 + 0.10 * coarse + rng.normal(0, 0.10), 0.5, 1.4)
    patchy = np.clip(0.14 + 0.04 * coarse + rng.normal(0, 0.03), 0.04, 0.35)
    pigment = depth * (1 + patchy * smooth_noise(rng, shape, size * 0.6))
    pigment += 0.12 * depth * (1 - np.minimum(distance, 1) ** 2)
    grey = np.clip(0.35 + 0.17 * coarse + rng.normal(0, 0.08), 0, 1)
    warm, cool = np.array([0.55, 1.0, 1.25]), np.array([0.95, 1.0, 0.95])
    hue = warm + grey * (cool - warm)
    reach = smooth_step((1.13 - distance) / 0.12) if malignant else cover
    absorb = (cover * pigment)[..., None] * hue
    absorb += (np.maximum(cover, 0.6 * reach * (fine > 0)) * fine)[..., None] * [0.9, 1.0, 0.95]
    lesion = skin * np.exp(-absorb)
    veil = 0.55 * np.clip(coarse - 0.6, 0, 1) * cover
    veil = veil * smooth_step(smooth_noise(rng, shape, size * 0.7) - 0.3)
    tint = np.array([118, 124, 142]) * np.exp(-0.5 * fine)[..., None]
    return lesion + veil[..., None] * (tint - lesion), distance < 1, pattern


def add_hairs(rng, image):
    """Return the image, (height, width, 3) float RGB, under none to many thin dark hairs."""
    height, width = image.shape[:2]
    short = min(height, width)
    shade = np.zeros((height, width), np.float32)
    count = int(rng.choice([0, 3, 8, 18], p=[0.35, 0.3, 0.25, 0.1]) * rng.uniform(0.7, 1.3))
    heading, steps = rng.uniform(0, np.pi), np.linspace(0, 1, 40)[:, None]
    for _ in range(count):
        start = rng.uniform(-0.1, 1.1, 2) * [width, height]
        turn = heading + rng.normal(0, 0.5)
        along = np.array([np.cos(turn), np.sin(turn)]) * rng.uniform(0.3, 1.1) * short
        bow = np.array([-along[1], along[0]]) * rng.normal(0, 0.25)
        path = start + steps * along + steps * (1 - steps) * bow * 2
        stroke = draw_lines((height, width), [path], short / 480 * rng.uniform(0.8, 2.4))
        shade = np.maximum(shade, stroke / 255 * rng.uniform(0.45, 0.85))
    shade = cv2.GaussianBlur(shade, (0, 0), 0.6 * short / 480)[..., None]
    return image * (1 - shade) + shade * np.array([52, 38, 32])


def add_ruler(rng, image):
    """Return the image, (height, width, 3) float RGB, with ruler marks along one side."""
    size = np.array(image.shape[1::-1])
    step, depth = min(size) * rng.uniform(0.03, 0.06), min(size) * rng.uniform(0.03, 0.05)
    side, marks = rng.integers(4), []
    for i in range(int(max(size) / step)):
        far = depth * (1.0 if i % 10 == 0 else 0.75 if i % 5 == 0 else 0.45)
        ends = np.array([[(i + 0.5) * step, 0], [(i + 0.5) * step, far]])
        ends = ends if side < 2 else ends[:, ::-1]
        marks.append(size - ends if side % 2 else ends)
    shade = draw_lines(image.shape[:2], marks, min(size) / 400) / np.float32(255)
    shade = 0.8 * cv2.GaussianBlur(shade, (0, 0), 0.7)[..., None]
    return image * (1 - shade) + shade * np.array([40, 40, 45])


def add_lens(rng, image):
    """Return the image, (height, width, 3) float RGB, as lit and framed by a dermatoscope."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    middle = np.array([height, width]) * rng.uniform(0.47, 0.53, 2)
    away = np.hypot(y - middle[0], x - middle[1]) / (np.hypot(height, width) / 2)
    tilt = rng.uniform(0, 2 * np.pi)
    slope = (np.cos(tilt) * (y / height - 0.5) + np.sin(tilt) * (x / width - 0.5))
    light = 1 - rng.uniform(0.05, 0.3) * away**2 + rng.uniform(0, 0.12) * slope
    if rng.random() < 0.22:
        rim = max(rng.uniform(0.8, 0.95), 1.08 * max(width, height) / np.hypot(height, width))
        light = light * (0.05 + 0.95 * smooth_step((rim - away) / 0.04))
    return image * light[..., None]


def draw_image(rng, malignant):
    """Return one picture, (height, width, 3) uint8 RGB, its lesion mask, bool, and the lesion's pattern."""
    image, mask, pattern = draw_lesion(rng, draw_skin(rng, draw_size(rng)), malignant)
    if rng.random() < 0.2:
        image = add_ruler(rng, image)
    image = add_lens(rng, add_hairs(rng, image))
    image = cv2.GaussianBlur(image.astype(np.float32), (0, 0), 0.45)
    image = image + rng.normal(0, 1.0, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), mask, pattern


def draw_labels(rng, count, period):
    """Return count labels (0 / 1), one malignant among every period images in a row."""
    labels = np.zeros(count + period, int)
    starts = np.arange(0, count, period)
    labels[starts + rng.integers(0, period, len(starts))] = 1
    return labels[:count]


def draw_table(rng, names, labels):
    """Return the table of one split: patients of 1 to 8 images, with gaps in what is known."""
    rows = []
    patients = rng.choice(10**6, len(names), replace=False)
    left = 0
    for name, label in zip(names, labels, strict=True):
        if left == 0:
            left = int(rng.choice(8, p=[0.3, 0.25, 0.15, 0.1, 0.08, 0.05, 0.04, 0.03])) + 1
            patient, patients = patients[0], patients[1:]
            sex = ["male", "female", np.nan][rng.choice(3, p=[0.50, 0.44, 0.06])]
            age = rng.normal(50, 14)
        left -= 1
        seen = 5 * round(np.clip(age + rng.normal(0, 2) + 3 * label, 15, 90) / 5)
        site = str(rng.choice(SITES, p=SITE_SHARES))
        rows.append([name, patient, sex, seen if rng.random() > 0.04 else np.nan,
                     site if rng.random() > 0.05 else np.nan, label])
    columns = ["image_name", "patient_id", "sex", "age_approx",
               "anatom_site_general_challenge", "target"]
    return pd.DataFrame(rows, columns=columns)


def main(args):
    """Write the images, masks and tables and return the exit status."""
    folders = [args.output_dir / "images", args.output_dir / "masks"]
    old = [args.output_dir / table for table in TABLES if (args.output_dir / table).exists()]
    old += [path for folder in folders for path in sorted(folder.glob("EX_*"))]
    if old and not args.overwrite:
        print(f"error: {old[0]} exists; pass --overwrite to replace it", file=sys.stderr)
        return 2
    for path in old:
        path.unlink()
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    tables = []
    for split, (count, period) in enumerate([(args.n_train, 5), (args.n_test, 4)]):
        names = [f"EX_{split * args.n_train + i:04d}" for i in range(count)]
        labels = draw_labels(np.random.default_rng([args.seed, split, 1]), count, period)
        table = draw_table(np.random.default_rng([args.seed, split, 2]), names, labels)
        # even numbers for training patients, odd ones for test patients: no patient in both
        table["patient_id"] = [f"IP_{2 * n + split + 1000000:07d}" for n in table["patient_id"]]
        tables.append(table.astype({"age_approx": "Int64"}).assign(pattern=""))
        for i, (name, label) in enumerate(zip(names, labels, strict=True)):
            # a generator for each picture: it does not change when more or fewer are made
            image, mask, tables[-1].loc[i, "pattern"] = draw_image(
                np.random.default_rng([args.seed, split, 3, i]), bool(label))
            cv2.imwrite(str(folders[0] / f"{name}.jpg"), image[..., ::-1],
                        [cv2.IMWRITE_JPEG_QUALITY, 86, cv2.IMWRITE_JPEG_OPTIMIZE, 1])
            cv2.imwrite(str(folders[1] / f"{name}.png"), mask.astype(np.uint8) * 255,
                        [cv2.IMWRITE_PNG_BILEVEL, 1, cv2.IMWRITE_PNG_COMPRESSION, 9])
    train, test = tables
    train.to_csv(args.output_dir / "train.csv", index=False)
    test.drop(columns=["target", "pattern"]).to_csv(args.output_dir / "test.csv", index=False)
    test[["image_name", "target", "pattern"]].to_csv(args.output_dir / "test_labels.csv", index=False)
    blank = test[["image_name", "target"]].assign(target=0)
    blank.to_csv(args.output_dir / "sample_submission.csv", index=False)
    print(f"wrote {len(train)} training and {len(test)} test images to {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
