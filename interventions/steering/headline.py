"""What an experiment found, in one sentence: the named channel at the strength chosen for it, beside its control."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from interventions.bundle.channels import Channel
from interventions.steering.result import Steering, chosen_strength, place_of, set_name
from interventions.steering.strengths import QUIET

FLIPS = 0.5
"""Share of the way to the counterfactual prompts' own P from which an edit turns the answer round."""

Verdict = Literal["good", "middling", "bad"]


class Headline(NamedTuple):
    """One set of channels at its chosen strength."""

    task: str
    size: str
    strength: float
    unsteered: float
    steered: float
    random_p95: float
    """95th percentile of random directions as long as the edit."""
    reach: float
    """P(counterfactual answer) of the counterfactual prompts themselves."""

    def share(self, p: float) -> float:
        """How much of the way from the unsteered prompts to their counterfactuals a P is."""
        way = self.reach - self.unsteered
        return (p - self.unsteered) / way if way > 0 else 0.0

    @property
    def verdict(self) -> Verdict:
        """good: it turns the answer round, random directions do next to nothing; bad: no more than they do."""
        if self.steered <= self.random_p95:
            return "bad"
        good = self.share(self.steered) > FLIPS and self.share(self.random_p95) <= QUIET
        return "good" if good else "middling"

    @property
    def words(self) -> str:
        """The finding as a sentence."""
        what = (
            f"{set_name(self.size)} of the sparse model at strength {self.strength:g}, chosen on other prompts, "
            f"{'takes' if self.size == '1' else 'take'} the dense model's P(counterfactual answer) on {self.task} from "
            f"{self.unsteered:.3f} to {self.steered:.3f}, where the counterfactual prompts have {self.reach:.3f}"
        )
        control = f"95 % of random directions as long give at most {self.random_p95:.3f}"
        if self.verdict == "bad":
            return f"Nothing was found: {what}, no more than random directions as long do ({self.random_p95:.3f})."
        if self.verdict == "good":
            return f"Found: {what}; {control}."
        why = "it does not turn the answer round" if self.share(self.steered) <= FLIPS else "they do something, too"
        return f"Found in part: {what}; {control}, and {why}."


def headline(result: Steering, channels: Mapping[str, Channel]) -> Headline | None:
    """The finding of an experiment, with the set of the channel's own size; None where it was not measured there."""
    channel = channels.get(str(result.experiment.get("channel")))
    own = str(len(channel.indices)) if channel else ""
    size = own if own in result.channels else min(result.channels, key=int)
    strength = chosen_strength(result, size)
    place, zero = place_of(result, strength), place_of(result, 0.0)
    if place is None or zero is None:
        return None
    random = result.random_own_p95.get(size, result.random_p95)
    curve = result.channels[size]
    return Headline(result.task, size, strength, curve[zero], curve[place], random[place], result.reach)
