"""`torch.hub.load` from a folder that is not the repository's."""

from conftest import ROOT, run_as_process

SCRIPT = f"""
import torch
repository = {str(ROOT)!r}
load = lambda name, **options: torch.hub.load(repository, name, source="local", **options)
dann = load("dann", weights="svhn-mnist-modern")
images = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
images[:, :, 4:24, 12:16] = 255
predicted = dann.probabilities(images).argmax(1)
print([dann.classes[i] for i in predicted], list(dann.model(dann.preprocess(images)).shape))
x = torch.ones(2, requires_grad=True)
(3 * load("gradient_reversal")(x, 0.5)).sum().backward()
print(x.grad.tolist())
"""


def test_the_network_and_the_layer_from_elsewhere(tmp_path):
    done = run_as_process("-c", SCRIPT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['1', '1', '1'] [3, 10]", "[-1.5, -1.5]"]
