"""Make files/efficientad_step.safetensors and files/supersimplenet.safetensors, as they were made once.

    PYTHONPATH=tests/contract python tests/files/make_recordings.py EFFICIENTAD SUPERSIMPLENET

EFFICIENTAD: a copy of github.com/nelson1425/EfficientAD (Apache-2.0, at a44786c); SUPERSIMPLENET: one of
github.com/blaz-r/SuperSimpleNet (MIT, at 9c6867c). They need torchvision. Their networks and losses are run
in float64. In float32 the numbers of SuperSimpleNet depend on the order of sums by up to 5e-5, and those of
its gradients by 3e-4.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from test_parity import FILES, fill, places_of_norms, rand, sample
from torch import Tensor, nn


def efficientad(folder: str) -> dict[str, Tensor]:
    """Record the losses of a step, and for the small networks its gradients, and what Adam then does."""
    sys.path.insert(0, folder)
    import common  # type: ignore[import-not-found]

    found: dict[str, Tensor] = {}
    for size in ("small", "medium"):
        pdn = getattr(common, f"get_pdn_{size}")
        teacher, student, autoencoder = pdn(384), pdn(768), common.get_autoencoder(384)
        for network, base in ((teacher, 1000), (student, 2000), (autoencoder, 3000)):
            fill(network.parameters(), base)
        image, augmented, natural = (rand(seed, 1, 3, 256, 256) for seed in (1, 2, 3))
        with torch.no_grad():
            described = teacher(image)
            mean = 0.9 * described.mean((0, 2, 3), keepdim=True)
            std = 1.1 * described.std((0, 2, 3), keepdim=True)
        networks, images = (teacher, student, autoencoder), (image, augmented, natural)
        losses = [terms(networks, images, mean, std)]
        if size == "small":
            parameters = [*student.parameters(), *autoencoder.parameters()]
            optimizer = torch.optim.Adam(parameters, lr=1e-4, weight_decay=1e-5)
            losses[0].sum().backward()  # type: ignore[no-untyped-call]
            before = [parameter.detach().clone() for parameter in parameters]
            optimizer.step()
            found["small.gradient_norms"] = torch.stack([each.grad.norm() for each in parameters])
            found["small.gradients"] = torch.stack([sample(each.grad) for each in parameters])
            pairs = zip(parameters, before, strict=True)
            found["small.moved"] = torch.stack([sample(after.detach() - start) for after, start in pairs])
            losses.append(terms(networks, images, mean, std))
        found[f"{size}.losses"] = torch.stack(losses).detach()
    return found


def terms(networks: Sequence[nn.Module], images: Sequence[Tensor], mean: Tensor, std: Tensor) -> Tensor:
    """Follow the lines of EfficientAD's training loop."""
    teacher, student, autoencoder = networks
    image, augmented, natural = images
    with torch.no_grad():
        wanted, wanted_augmented = ((teacher(x) - mean) / std for x in (image, augmented))
    distance = (wanted - student(image)[:, :384]) ** 2
    hard = torch.mean(distance[distance >= torch.quantile(distance, q=0.999)])
    penalty = torch.mean(student(natural)[:, :384] ** 2)
    rebuilt = autoencoder(augmented)
    distances = wanted_augmented - rebuilt, rebuilt - student(augmented)[:, 384:]
    return torch.stack([hard, penalty, *(torch.mean(distance**2) for distance in distances)])


def supersimplenet(folder: str) -> dict[str, Tensor]:
    """Record features, maps and scores in evaluation mode, and losses and gradients in training mode."""
    import torchvision  # type: ignore[import-not-found]

    def untrained(build: Any) -> Any:
        return lambda weights: build(weights=None)

    for name in ("resnet18", "wide_resnet50_2"):
        setattr(torchvision.models, name, untrained(getattr(torchvision.models, name)))
    sys.path[0] = folder  # in the other one's place: both have a module of the name common
    sys.modules.pop("common", None)
    from common.loss import focal_loss  # type: ignore[import-not-found]
    from model.supersimplenet import SuperSimpleNet  # type: ignore[import-not-found]

    found: dict[str, Tensor] = {}
    for name in ("resnet18", "wide_resnet50_2"):
        for size in ((256, 256), (96, 160)):
            key = f"{name}.{size[0]}x{size[1]}."
            network = SuperSimpleNet(size, {"backbone": name})
            backbone, heads = network.feature_extractor.feature_extractor, network.discriminator
            named = list(backbone.named_parameters())
            fill((value for _, value in named), 5000, norms=places_of_norms(named))
            fill(network.feature_adaptor.parameters(), 6000)
            seg, dec = heads.get_params()
            fill([*seg, *dec], 7000, norms=(2, 7))
            network.eval()
            for norm in (each for each in backbone.modules() if isinstance(each, nn.BatchNorm2d)):
                norm.momentum, norm.training = 1.0, True
            with torch.no_grad():
                backbone(rand(12, 4, 3, *size))
                network.eval()
                features = network.feature_extractor(rand(11, 2, 3, *size))
                adapted = network.feature_adaptor(features)
                logits, scores = heads(adapted)
                maps = network.anomaly_map_generator(logits)
            found[key + "features_every16ch_every4px"] = features[:, ::16, ::4, ::4].to(torch.float32)
            found[key + "adapted_every16ch_every4px"] = adapted[:, ::16, ::4, ::4].to(torch.float32)
            found[key + "segmentation_logits"] = logits.to(torch.float32)
            found[key + "anomaly_map_every4px"] = maps[:, :, ::4, ::4].to(torch.float32)
            found[key + "score_logits"] = scores
            mask = rand(13, 2, 1, *features.shape[2:]) > 1.2
            mask[0] = False
            heads.train()
            for stop in (True, False):
                heads.stop_grad = stop
                network.zero_grad()
                logits, scores = heads(network.feature_adaptor(features))
                terms = (
                    torch.clip(logits[~mask] + 0.5, min=0).mean(),
                    torch.clip(-logits[mask] + 0.5, min=0).mean(),
                    focal_loss(torch.sigmoid(logits), mask),
                    focal_loss(torch.sigmoid(scores), torch.tensor([0.0, 1.0])),
                )
                total = torch.stack(terms).sum()
                total.backward()  # type: ignore[no-untyped-call]
                layers = (network.feature_adaptor.projection, heads.seg[0], heads.dec_head[0], heads.fc_score)
                norms = [layer.weight.grad.norm() for layer in layers]
                found[f"{key}train.stop_grad_{stop:d}"] = torch.stack([*terms, total, *norms]).detach()
    return found


def make(folders: list[str]) -> None:
    torch.set_default_dtype(torch.float64)
    Tensor.float = Tensor.double  # type: ignore[method-assign]  # their focal loss goes to float32 by it
    made = {"efficientad_step": efficientad(folders[0]), "supersimplenet": supersimplenet(folders[1])}
    for name, tensors in made.items():
        save_file(
            {key: value.contiguous() for key, value in tensors.items()},
            Path(FILES, f"{name}.safetensors"),
        )


if __name__ == "__main__":
    make(sys.argv[1:])
