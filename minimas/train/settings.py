"""The settings of a training: what can be chosen, what each choice means, and its default.

Three defaults depend on the training, on what agents send in it, or on the style. `completed` fills them in and checks
all values.
Messages name a setting as the option of the command: --batch-size is batch_size.
"""

import math
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, get_args

from ..common import InputError, check_type, check_whole, is_number
from ..settings import CompletedSettings, Settings, as_python, setting, setting_of
from ..styles import Style

TRAININGS = ("inner", "outer", "system")
OUTER = ("outer", "system")  # trainings in which outer links learn
STEPS = 20000  # of one training
TEACHER_LATENTS = 80  # states that a given text sends at most, as in the released recipe
MAX_SEED = 10**12  # `permutation` multiplies it by a million, and torch takes 64 bits


@dataclass(frozen=True)
class TrainSettings:
    """How links are trained. None stands for the default of the training.

    How each link learns:
    steps             of the training: 20000; of a system's outer links: 0. 0 leaves links as they start
    inner_steps       of each inner link of a system; 0 leaves it at the ridge regression
    batch_size        rows at once in each process
    accumulate        batches per step
    lr                highest learning rate
    warm_up           steps in which the learning rate rises, before it follows a cosine down to 0
    clip              largest norm of a step's gradient
    max_length        positions of a prompt with its text; texts are cut to fit, down to one token; prompts never
    keep_activations  no activation checkpointing: faster, but takes more memory
    seed              of new links, and of the order of the rows
    date              the date that chat templates tell their agents
    save_every        steps between two saved states
    held_out          outer links: rows that are left out, the last ones; their loss is measured before the first step
                      and at each saved state
    best              outer links: keep those of the lowest own loss of these rows, beside the last ones

    What links start from:
    init              ridge: new links at a ridge regression, the default of outer links; inner links with steps=0 only
                      random: new links, the default of inner links
                      checkpoint: the links that are there
    ridge_rows        rows for the regression

    What they learn:
    mse               inner links: weight of the squared error besides the cosine
    rounds            outer links: rounds of recursion
    latents           outer links: `rollout`, agents think as at inference; or `teacher`, they send the states at the
                      tokens of given texts, as in the released recipe
    latent_steps      outer links: latents per turn; the style's, or 80 with latents="teacher", where rows that are held
                      out are measured with the style's
    supervise_all     outer links: weight of the loss in the other rounds; with rounds=1 there are none
    """

    steps: int | None = setting(
        None,
        f"0 writes the links as they start (default {STEPS}, system: 0)",
        least=0,
    )
    inner_steps: int = setting(
        0,
        "steps of each inner link, 0 takes the ridge regression",
        least=0,
        trainings=("system",),
    )
    batch_size: int = setting(2, "rows at once in each process", least=1)
    accumulate: int = setting(1, "batches per step", least=1)
    lr: float = setting(5e-4, "highest learning rate", above=0)
    warm_up: int = setting(10, "steps in which it rises, before a cosine takes it to 0", least=1)
    clip: float = setting(1.0, "largest norm of a step's gradient", above=0)
    max_length: int = setting(
        4096,  # as in the released recipe
        "positions of a prompt with its text; texts are cut to fit, prompts never",
        least=1,
    )
    keep_activations: bool = setting(
        False, "no activation checkpointing: faster, but takes more memory"
    )
    mse: float = setting(
        0.0,
        "inner links: weight of the squared error besides the cosine",
        least=0,
        trainings=("inner", "system"),
    )
    rounds: int = setting(3, "rounds of recursion", least=1, trainings=OUTER)
    latents: str = setting(
        "rollout",
        "agents think as at inference, or send the states at the tokens of given texts, as released",
        trainings=OUTER,
        choices=("rollout", "teacher"),
    )
    latent_steps: int | None = setting(
        None,
        f"latents per turn (default: the style's; with --latents teacher at most {TEACHER_LATENTS})",
        least=1,
        trainings=OUTER,
    )
    supervise_all: float = setting(
        0.0,
        "weight of the loss in other rounds",
        least=0,
        trainings=OUTER,
        metavar="WEIGHT",
    )
    init: str | None = setting(
        None,
        "how links start: at a ridge regression (default for outer; inner links with --steps 0 only), random "
        "(default for inner), or as the checkpoint's",
        trainings=("inner", "outer"),
        choices=("ridge", "random", "checkpoint"),
    )
    ridge_rows: int = setting(256, "rows for the regression", least=1)
    save_every: int = setting(100, "steps between two saved states", least=1)
    held_out: int = setting(
        0,
        "leave out the last HELD_OUT rows, and measure their loss with own, other and no latents before the first step "
        "and at each saved state",
        least=0,
        trainings=OUTER,
    )
    best: bool = setting(
        False,
        "with --held-out: keep the links of the lowest own loss in best/ beside the last ones",
        trainings=OUTER,
    )
    seed: int = setting_of(Settings, "seed")
    date: str = setting_of(Settings, "date")

    def completed(self, what: str, style: Style) -> "CompletedTrainSettings":
        """The same with the defaults of a training (inner, outer or system) of a Style.

        InputError names a setting that is out of range, or that this training has no use for.
        """
        self.check(what)
        if what in OUTER:
            check_edges("the style", style)
        values = {one.name: as_python(getattr(self, one.name)) for one in fields(TrainSettings)}
        if values["steps"] is None:
            values["steps"] = 0 if what == "system" else STEPS
        if values["init"] is None:
            values["init"] = "random" if what == "inner" else "ridge"
        if values["latent_steps"] is None:
            teacher = self.latents == "teacher"
            values["latent_steps"] = TEACHER_LATENTS if teacher else style.latent_steps
        settings = CompletedTrainSettings(**values)
        if what == "inner" and settings.init == "ridge" and settings.steps:
            raise InputError(
                "--init ridge gives an inner link weights on a scale that steps cannot improve: add --steps 0, or "
                "train it from --init random"
            )
        if what in OUTER:
            settings.of_the_recursion(style)  # refuse what is out of range now
        return settings

    def check(self, what: str) -> None:
        """InputError names the first setting that training `what` has no use for, or that is out of range."""
        for one in fields(TrainSettings):
            value = getattr(self, one.name)
            if value != one.default and what not in trainings_of(one):
                raise InputError(
                    f"{option_of(one.name)} means nothing for `train {what}`: leave it out"
                )
            check_value(one, value)
        if self.held_out == 1:
            raise InputError(
                "--held-out is 1, and each row hears another one: give 2 or more, or 0 to leave out none"
            )
        if self.best and not self.held_out:
            raise InputError(
                "--best goes by the loss of rows that are left out: give --held-out, too"
            )
        if abs(self.seed) > MAX_SEED:
            raise InputError(f"--seed is {self.seed}, expected a number below {MAX_SEED}")

    def for_training(self, what: str, **changes: Any) -> "TrainSettings":
        """The same for one training of a system: defaults stand where it has no use for a setting."""
        unused = {
            one.name: one.default for one in fields(TrainSettings) if what not in trainings_of(one)
        }
        return TrainSettings(**(vars(self) | unused | changes))


class CompletedTrainSettings(TrainSettings):
    """TrainSettings that leave nothing open: what a training works with."""

    steps: int
    init: str
    latent_steps: int

    def of_the_recursion(self, style: Style) -> CompletedSettings:
        """The settings under which agents recurse while outer links learn."""
        settings = Settings(rounds=self.rounds, latent_steps=self.latent_steps, date=self.date)
        return settings.completed(style)

    def of_inference(self, style: Style) -> CompletedSettings:
        """The settings under which rows that are held out are measured: agents think, also if they do not to learn."""
        latent_steps = style.latent_steps if self.latents == "teacher" else self.latent_steps
        settings = Settings(rounds=self.rounds, latent_steps=latent_steps, date=self.date)
        return settings.completed(style)


def chosen_settings(settings: TrainSettings | None) -> TrainSettings:
    """The settings that a caller gave, or the defaults for None; InputError if they are something else."""
    if settings is None:
        return TrainSettings()
    if not isinstance(settings, TrainSettings):
        raise InputError(
            f"settings is {settings!r:.80}, expected TrainSettings, such as TrainSettings(steps=200)"
        )
    return settings


# Fields


def option_of(name: str) -> str:
    """The option of a setting."""
    return "--" + name.replace("_", "-")


def trainings_of(one: Field) -> Sequence[str]:
    """The trainings that have a use for a setting."""
    return one.metadata["trainings"] or TRAININGS


def check_value(one: Field, value: Any) -> None:
    """InputError unless a setting has a value of its type, among its choices and in its range."""
    option = option_of(one.name)
    types = get_args(one.type) or (one.type,)
    if value is None and type(None) in types:
        return
    choices = one.metadata.get("choices")
    if choices and value not in choices:
        raise InputError(f"{option} is {value!r}, expected one of {', '.join(choices)}")
    least = one.metadata["least"]
    if int in types:
        check_whole(option, value, least)
    elif float in types:
        if not is_number(value):
            raise InputError(f"{option} is {value!r:.80}, expected a number")
        check_range(option, value, least, one.metadata["above"])
    elif bool in types:
        check_type(option, value, bool, "True or False")
    else:
        check_type(option, value, str, "a text")


def check_range(option: str, value: float, least: float | None, above: float | None) -> None:
    """InputError if a number is not finite, less than `least`, or not more than `above`; None sets no limit."""
    is_enough = (least is None or value >= least) and (above is None or value > above)
    if is_enough and value < math.inf:
        return
    expected = "a finite number"
    if least is not None:
        expected += f" from {least} up"
    if above is not None:
        expected += f" above {above}"
    raise InputError(f"{option} is {value!r:.80}, expected {expected}")


# What else is checked before anything is loaded


def check_role(role: str | None, style: Style) -> None:
    """InputError unless it is the role of an agent."""
    if role not in style.order:
        raise InputError(
            f"--role is {role!r}, expected the inner link's: one of {', '.join(style.order)}"
        )


def check_edges(name: str, style: Style) -> None:
    """InputError if nobody hears anybody."""
    if not style.edges:
        raise InputError(f"{name} has no edges, so that there is no outer link to train")


def roles_with_texts(
    what: str, role: str | None, settings: CompletedTrainSettings, style: Style
) -> Sequence[str]:
    """The roles whose texts a training uses."""
    if what == "inner" and role is not None and settings.init != "ridge":
        before = style.order[: style.order.index(role)]
        heard = [source for source in before if (source, role) in style.edges]
        return [*heard, role]
    if settings.latents == "teacher" or settings.init == "ridge":
        return style.order  # for a regression an agent reads its turns in all rounds
    return style.order[-1:]
