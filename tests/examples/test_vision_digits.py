"""The example that classifies images."""

import sys

import torch
from matplotlib.image import imread
from torch import nn

import vision_digits
from mor_layers.layers import PointwiseLayers


def test_it_learns_digits_with_few_patches_at_full_depth():
    torch.manual_seed(0)
    train_data, test_data = vision_digits.load()
    assert (len(train_data.labels), len(test_data.labels)) == (1347, 450)
    model = vision_digits.RecursiveClassifier()
    losses = list(vision_digits.train(model, train_data, epochs=8))
    assert losses[-1] < 0.5 < losses[0]
    assert vision_digits.accuracy(model, test_data) > 0.88
    _, output = model(test_data.images)
    assert model.depth_maps(output).shape == (450, 4, 4)
    for step, patches in enumerate((16, 10, 5)):  # of 16: all, two thirds, a third
        assert (output.depths > step).sum(dim=0).eq(patches).all()
    assert output.depths.float().std(dim=1).max() > 0  # depths are not those of a fixed mask


def test_a_depth_map_shows_each_patch_at_its_place():
    model = vision_digits.RecursiveClassifier()
    model.recursion.layers = PointwiseLayers(nn.Identity())
    with torch.no_grad():  # the brighter a patch the higher its score
        for parameter in (model.places, model.patches.weight, model.patches.bias):
            parameter.zero_()
        model.patches.weight[0] = 1.0
        for scorer in model.recursion.router.scorers.parameters():
            scorer.zero_()[..., 0] = 1.0
    images = torch.zeros(2, 8, 8)
    images[0, 2:4, 6:8] = 1.0
    images[1, 4:8, 0:4] = 1.0
    _, output = model(images)
    maps = model.depth_maps(output)
    assert maps[0, 1, 3] == 3
    assert (maps[1, 2:, :2] == 3).all()


def test_the_script_writes_a_picture(capsys, monkeypatch, tmp_path):
    picture = tmp_path / "depths.png"
    monkeypatch.setattr(sys, "argv", ["vision_digits.py", "1", str(picture)])
    vision_digits.main()
    assert capsys.readouterr().out.startswith("epoch   1  loss 2.")
    pixels = imread(picture)
    assert pixels.shape[:2] == (240, 1000)
    assert pixels.std() > 0.1
