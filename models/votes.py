"""What several networks answer to the same input: one answer, and how far they are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from models import heads
from models.catalog import Vote
from models.spec import Classification, HeadTask, MultiTask, Regression

# A vote is a softmax of sharpened logits: a member whose two best classes are within a thousandth splits its vote
# between them, so that what float32 rounds off can never move a whole one.
SHARPNESS = 1000.0
# What the mean probabilities count beside the votes: classes with as many votes are told apart by them.
CASTING_VOTE = 1e-4
LEAST = 1e-30


def output_names(task: HeadTask | MultiTask) -> tuple[str, ...]:
    """What `joined` gives for a task, in the graph's order."""
    names = heads.output_names(task)
    if isinstance(task, MultiTask):
        return (*names, *(f"uncertainty_{name}" for name in task.heads))
    return (*names, "uncertainty")


def joined(task: HeadTask | MultiTask, answers: Mapping[str, Tensor], vote: Vote) -> dict[str, Tensor]:
    """One answer from those of all members.

    answers: the outputs of a head of `task` by name, [members, batch, ...].

    Classes: `logits` float32 [batch, classes], the logarithm of the mean of the members' probabilities, or of each
    class's share of their votes, so that softmax gives these. `uncertainty` float32 [batch]: mutual information of the
    answer and the member that gives it, in nats: 0 when all answer the same distribution, however flat it is (Depeweg
    et al. 2018). Labels and two classes by a sigmoid: the same for each unit; `uncertainty` is their sum.
    Numbers: `value` is the mean. `uncertainty` float32 [batch, targets]: the deviation of the members' values.
    `deviation`, of a Gaussian: the root of the mean variance and the variance of the means (law of total variance).
    """
    match task:
        case MultiTask(several):
            return {
                f"{output}_{name}": value
                for name, one in several.items()
                for output, value in joined(one, _of_head(answers, one, name), vote).items()
            }
        case Classification():
            logits, uncertainty = agreed(answers["logits"].float().log_softmax(dim=-1), vote)
            return {"logits": logits, "uncertainty": uncertainty}
        case Regression():
            values = answers["value"].float()
            between = values.var(dim=0, correction=0)
            found = {"value": values.mean(dim=0), "uncertainty": between.sqrt()}
            if "deviation" in answers:
                found["deviation"] = (answers["deviation"].float().square().mean(dim=0) + between).sqrt()
            return found
        case _:
            units = answers["logits"].float()
            sides = torch.stack([-units, units], dim=-1)
            logarithms, uncertainty = agreed(torch.nn.functional.logsigmoid(sides), vote)
            return {"logits": logarithms[..., 1] - logarithms[..., 0], "uncertainty": uncertainty.sum(dim=-1)}


def agreed(log_probabilities: Tensor, vote: Vote) -> tuple[Tensor, Tensor]:
    """Logarithm of the joint probabilities [..., classes], and the mutual information [...].

    log_probabilities: float32 [members, ..., classes].
    """
    mean = torch.logsumexp(log_probabilities, dim=0) - math.log(log_probabilities.shape[0])
    uncertainty = (_entropy(mean) - _entropy(log_probabilities).mean(dim=0)).clamp(min=0.0)
    if vote == "mean":
        return mean, uncertainty
    votes = torch.softmax(SHARPNESS * log_probabilities, dim=-1).mean(dim=0)
    shares = (1.0 - CASTING_VOTE) * votes + CASTING_VOTE * mean.exp()
    return shares.clamp(min=LEAST).log(), uncertainty


def _entropy(log_probabilities: Tensor) -> Tensor:
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


def _of_head(answers: Mapping[str, Tensor], task: HeadTask, name: str) -> dict[str, Tensor]:
    return {output: answers[f"{output}_{name}"] for output in heads.output_names(task)}
