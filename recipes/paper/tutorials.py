"""How OTOv2's authors train CIFAR-10, and what they report: tutorials 01, 03 and 04 of their release.

They are notebooks of github.com/tianyic/only_train_once, branch otov2_legacy_backup. All of them train for 300 epochs
by SGD without momentum and without clipping, in batches of 64, cropped and mirrored, with a tenth of the learning rate
from epochs 74, 149 and 224 on (counted from 0). Their accuracies are those of the last epoch, not of the best one.

What differs here: weights begin as the classes of our models initialise them, and "paper" penalises only as many ZIGs
as are to go. The tutorials penalise another 5 % of all ZIGs, for VGG16-BN another 21 %, until enough of them are zero.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from hf_oto import OTOTrainer
from hf_oto.paper import PaperDHSPG, Penalty

EPOCHS = 300
BATCH_SIZE = 64
LEARNING_RATE = 0.1
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class Tutorial(NamedTuple):
    """What a tutorial sets, and what it reports of a whole run.

    Attributes:
        group_sparsity: the target, which was met; of all ZIGs.
        start_epoch: the warm-up of OTOv2's own update ends here.
        epsilon, lam: see `hf_oto.paper.Penalty`.
        mixup: images are mixed in shares from Beta(mixup, mixup); 0: not.
        dense_accuracy: quoted there from github.com/kuangliu/pytorch-cifar, another training; None: not given.
    """

    group_sparsity: float
    weight_decay: float
    start_epoch: int
    epsilon: float
    lam: float
    mixup: float
    dense_accuracy: float | None
    accuracy: float
    macs_left: float
    params_left: float


TUTORIALS = {
    "resnet18": Tutorial(0.7, 1e-4, 50, 0.95, 1e-3, 0.0, 0.9302, 0.9286, 0.2026, 0.0879),
    "vgg16-bn": Tutorial(0.79, 5e-4, 50, 0.9, 5e-4, 0.2, None, 0.9327, 0.2660, 0.0503),
    "resnet50": Tutorial(0.8, 1e-3, 10, 0.95, 1e-3, 0.0, 0.9362, 0.9439, 0.0996, 0.0356),
}


class TutorialTrainer(OTOTrainer):
    """An `OTOTrainer` whose pruning mode "paper" has the constants of a tutorial; "scheduled" knows none of them."""

    def __init__(self, model: PreTrainedModel, args: Any, tutorial: Tutorial, **kwargs: Any) -> None:
        self.tutorial = tutorial
        super().__init__(model, args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As `OTOTrainer`, with penalty and warm-up of the tutorial."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if isinstance(optimizer, PaperDHSPG):
            start = max(1, self.state.max_steps * self.tutorial.start_epoch // EPOCHS)
            released = Penalty.released(SGD, self.tutorial.epsilon)
            optimizer.penalty = replace(released, lam=self.tutorial.lam)
            optimizer.schedule = replace(optimizer.schedule, events=(start,))
        return optimizer


def optimizer_and_schedule(model: PreTrainedModel, tutorial: Tutorial, total_steps: int) -> tuple[SGD, LambdaLR]:
    """SGD on all parameters, norms and biases too, and its learning rate; a shorter run has shorter quarters."""

    def factor(step: int) -> float:
        # the tutorials step their schedule before an epoch, so that each quarter of a run begins an epoch early
        return 0.1 ** (4 * (EPOCHS * step + total_steps) // (EPOCHS * total_steps))

    optimizer = SGD(model.parameters(), LEARNING_RATE, weight_decay=tutorial.weight_decay)
    return optimizer, LambdaLR(optimizer, factor)
