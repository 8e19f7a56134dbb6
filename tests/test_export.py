"""What export writes, used without this project: its program predicts as `predict` does."""
import importlib.util
import json
import os
import re
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import analyze
from analysis import loading, predict
from conftest import script
from engine import runtime
from engine.networks import Network, build_student
from finished_runs import RT, rows_of, runs  # noqa: F401: a fixture
from image_folders import write_pgm, write_tiff
from images import decode

needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime")


def save_pictures(folder):
    """One picture in each way that photographs come in; returns their files."""
    rng = np.random.RandomState(0)

    def picture(width, height):
        small = Image.fromarray(rng.randint(0, 256, (6, 6, 3)).astype(np.uint8))
        return small.resize((width, height), Image.BICUBIC)
    exif = Image.Exif()
    exif[274] = 6                                                       # turned by 270 degrees
    transparent = picture(61, 44)
    transparent.putalpha(Image.linear_gradient("L").resize((61, 44)))
    palette = picture(40, 71).quantize(16)
    palette.info["transparency"] = 3
    pictures = {
        "same.png": picture(32, 32), "tiny.png": picture(7, 5), "wide.png": picture(150, 41),
        "odd.png": picture(33, 64), "gray.png": picture(50, 60).convert("L"),
        "one_bit.png": picture(50, 60).convert("1"), "cmyk.tif": picture(45, 40).convert("CMYK"),
        "transparent.png": transparent, "palette.png": palette,
        "deep.png": Image.fromarray(rng.randint(0, 65536, (50, 60)).astype(np.uint16))}
    for name, image in pictures.items():
        image.save(folder / name)
    picture(60, 45).save(folder / "turned.jpg", exif=exif, quality=95)
    # Decoded at an eighth and a quarter, where the edges of the square are no whole pixels.
    noise = Image.fromarray(rng.randint(0, 256, (90, 75, 3)).astype(np.uint8))
    noise.resize((501, 607), Image.BICUBIC).save(folder / "large.jpg", exif=exif, quality=95)
    noise.resize((203, 167), Image.BICUBIC).save(folder / "larger.jpg", quality=95)
    # On their side and not compressed, which PIL 12 reads wrongly from a file that it maps.
    picture(60, 45).convert("L").save(folder / "turned.tif", exif=exif)
    picture(60, 45).convert("CMYK").save(folder / "turned_cmyk.tif", exif=exif)
    pictures["deep.png"].save(folder / "x_ray.tif", tiffinfo={262: 0})      # 0 is white
    deep = np.kron(rng.randint(0, 65536, (5, 6)), np.ones((8, 8), int)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "level.png", transparency=int(deep[9, 9]))
    write_pgm(folder / "states_white.pgm", deep % 1024, 1023)
    signed = deep.astype(np.int32) - 9000
    signed[9:20] = -1
    write_tiff(folder / "signed.tif", signed, orientation=3)
    write_tiff(folder / "unsigned.tif", deep.astype(np.uint32) * 60000)
    return [*pictures, "turned.jpg", "turned.tif", "turned_cmyk.tif", "x_ray.tif", "level.png",
            "large.jpg", "larger.jpg", "states_white.pgm", "signed.tif", "unsigned.tif"]


def test_what_a_program_needs_is_beside_the_network(runs, tmp_path, monkeypatch):
    """A size before the crop, classes in another order, a temperature of another network."""
    monkeypatch.setattr(predict, "ONNX", ("no_such_package",))
    script(analyze, monkeypatch, "eval", runs["deit-lt"], "--out", tmp_path / "x.csv")
    script(analyze, monkeypatch, "export", runs["deit-lt"], "--out", tmp_path / "m")
    model = json.loads((tmp_path / "m.json").read_text())
    kept = json.loads((runs["deit-lt"] / "calibration.json").read_text())
    assert model["temperature"] in [entry["temperature"] for entry in kept.values()]
    assert model["size"] == 37                                          # 32 / 0.875
    assert model["class_names"] == [f"class{k}" for k in range(10)] and model["white"] == 65535


def test_the_program_makes_the_same_images(runs, tmp_path, monkeypatch):
    """Another resize, crop, ground, turn or white level in the program than in this project's
    reading, which differ by 2 of 255 where torch and PIL round otherwise."""
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    client = importlib.import_module("analysis.onnx_client")
    model = predict.Predictor(loading.load_alone(str(runs["vit"]), RT))
    names = save_pictures(tmp_path)
    rows = predict.predict(loading.load_alone(str(runs["vit"]), RT),
                           [str(tmp_path / name) for name in names], RT, topk=1)
    for name, row in zip(names, rows, strict=True):
        for white in (4095, 65535):
            x = torch.from_numpy(client.read(str(tmp_path / name), model.size, white))
            ours = decode.read_square(str(tmp_path / name), model.size, white=white) / 255
            assert (x - ours).abs().max() < 2.5 / 255, (name, white)
        with torch.no_grad():
            p = model(x[None]).softmax(dim=1)[0]
        assert f"class{int(p.argmax())}" == row["class"], name
        assert float(p.max()) == pytest.approx(row["probability"], abs=0.02), name
    Image.fromarray(np.zeros((9, 9), np.float32)).save(tmp_path / "float.tif")
    write_tiff(tmp_path / "signed_8.tif", np.zeros((9, 9), np.int8))
    for name in ("float.tif", "signed_8.tif"):
        with pytest.raises(ValueError, match="holds floating-point or signed"):
            client.read(str(tmp_path / name), 32, 65535)
    gray = Image.fromarray(np.full((9, 9), 4095, np.uint16))            # white, of 12 bits
    gray.save(tmp_path / "white.png")
    assert client.read(str(tmp_path / "white.png"), 32, 4095).min() == 1


@needs_onnx
def test_the_program_predicts_as_predict(runs, tmp_path, monkeypatch):
    """Classes in another order, a temperature left out, a program that needs this project."""
    monkeypatch.setattr(runtime, "has_bf16", lambda device: False)      # model.onnx is in float32
    script(analyze, monkeypatch, "eval", runs["deit-lt"], "--out", tmp_path / "x.csv")
    script(analyze, monkeypatch, "export", runs["deit-lt"], "--out", tmp_path / "model")
    pictures = ["wide.png", "palette.png", "turned.jpg"]
    save_pictures(tmp_path)
    script(analyze, monkeypatch, "predict", "--checkpoint", runs["deit-lt"], "--topk", 3, "--csv",
           tmp_path / "p.csv", *(tmp_path / picture for picture in pictures))
    (tmp_path / "bad.jpg").write_text("no picture")
    text = (tmp_path / "model.json").read_text()
    (tmp_path / "model.json").write_text(re.sub(r'"class(\d)', r'"\\u0142\1', text))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run([sys.executable, "model_predict.py", "bad.jpg", ".", *pictures],
                             cwd=tmp_path, capture_output=True, text=True,
                             env=env | {"PYTHONIOENCODING": "ascii"})
    assert process.stderr.startswith("bad.jpg: ") and len(process.stderr.splitlines()) == 2
    assert len(process.stdout.splitlines()) == len(pictures)
    rows = rows_of(tmp_path / "p.csv")
    for line, picture, row in zip(process.stdout.splitlines(), pictures, rows, strict=True):
        path, _, answers = line.partition(": ")
        assert path == picture
        for answer, r in zip(answers.split(", "), ("", " 2", " 3"), strict=True):
            name, percent = answer.removesuffix(" %").rsplit(" ", 1)
            assert name == row[f"class{r}"].replace("class", r"\u0142")     # no letter of ASCII
            assert float(percent) == pytest.approx(100 * float(row[f"probability{r}"]), abs=0.2)


@needs_onnx
def test_a_student_of_our_recipe_is_exported(tmp_path):
    """FastStem's padding or pooling in another way than torch's, any batch size lost."""
    torch.manual_seed(0)
    config = dict(method="deit-lt", model="micro", img_size=32, patch_size=8, drop_path=0,
                  stem="fast")
    net = build_student(config, 4, True).eval().requires_grad_(False)
    network = Network(net, "student", "", config, list("abcd"))
    lines = predict.export(network, str(tmp_path / "m"))
    assert sum("logits agree" in line for line in lines) == 2


def test_the_exported_white_is_the_networks(runs, tmp_path, monkeypatch):
    """65535 for a network of 12-bit images, which it would see sixteen times too dark."""
    monkeypatch.setattr(predict, "ONNX", ("no_such_package",))
    network = loading.load_alone(str(runs["vit"]), RT)
    network.white = 4095
    predict.export(network, str(tmp_path / "m"))
    assert json.loads((tmp_path / "m.json").read_text())["white"] == 4095
