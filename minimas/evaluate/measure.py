"""Measures a system on questions with known answers, at each point of a grid of channels, rounds, latent steps and
what is heard.

`evaluate` is what the command (__main__.py) calls, too. Before anything is loaded or asked it knows all settings, and
holds the file of records (runs/lock.py). The record of a question (records.py) is kept as soon as it is answered. At
the end all records are summed up in a Table (report.py).

A run that was killed continues when it is started again. It replays the same batches, so records match up to
rounding. They differ by rounding only where memory ran out and a batch was answered in pieces. With torchrun every
process answers its share of the batches and writes a part of its own; the first process merges the parts.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common import InputError, check_known, check_type, local_path, no_op, warn
from ..prompts import TASKS, Question
from ..runs.lock import Lock, held, share
from ..runs.outputs import output_path, writable_file
from ..runs.processes import Processes, join, launched, leave
from ..runs.rows import has_data_name
from ..settings import CompletedSettings, Settings, check_neighbours
from ..styles import Origin, Style, style_named
from .benchmarks import (
    BENCHMARKS,
    Example,
    benchmark_named,
    check_source,
    load_dataset,
    settings_for,
)
from .grade import graders_for, launch_graders, start_graders
from .records import (
    POINT,
    Key,
    Record,
    by_key,
    contents,
    gather,
    graded,
    line_of,
    make_header,
    read_lines,
    record_key,
)
from .report import Table, make_table
from .run_tests import check_tests

if TYPE_CHECKING:
    from ..system import System

# What needs torch is imported where it is used, after the outputs are held: a run that is refused ends at once.

Wait = Callable[[], object]  # returns when all processes of a run have called it
WAIT = timedelta(days=30)  # for the other processes of a run, whose shares may take as long
LISTED = {"channel": "latent, text or latent,text", "hear": "own, other, none or several of them"}
OURS = re.compile(r"\.(part\d+|partial|lock)$")  # ends of names of files beside the outputs of runs


def evaluate(
    system: "System | Origin",
    dataset: str | Path | Sequence[Example],
    *,
    settings: Settings | None = None,
    rounds: int | Iterable[int] | None = None,
    latent_steps: int | Iterable[int] | None = None,
    channel: str | Iterable[str] | None = None,
    hear: str | Iterable[str] | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    rollouts: int | None = None,
    batch_size: int | None = None,
    retry: bool | None = None,
    tools: str | Sequence[str] | None = None,
    date: str | None = None,
    protocol: str = "paper",
    graders: str | Sequence[str] | None = None,
    allow_code_execution: bool = False,
    limit: int | None = None,
    file: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    out: str | Path | None = None,
    regrade: bool = False,
    progress: bool = True,
) -> Table:
    """Ask a system all questions of a data set at each point of a grid, and judge its answers.

    system     a System; or an Origin, from which one is loaded when the first question is about to be asked
    dataset    a list of Examples from load_dataset; or the name of a benchmark or a local file, which is then loaded
               with `limit`, `file`, `columns` and `task`

    settings   a Settings object; what follows up to `date` are its fields. What is not chosen here, or is at its
               default in `settings`, is what the protocol of the data set says, else the style's default.
    rounds, latent_steps, channel, hear   one value or several; all combinations are measured
    protocol   paper, or released: the source of a benchmark's settings

    graders    of mathematics: one or several of math-verify, plain and released (grade.py)
    allow_code_execution   run the programs that agents write, in guarded processes

    out        a file of records: it is written while the run goes on, and a run with the same settings continues it.
               A System whose links were trained since, or that has a hook, is refused; other changes are not noticed:
               give each its own file. Without `out`, records are kept in memory only.
    regrade    grade the texts in `out` again, and ask no agent
    progress   show a bar on stderr

    In each process of torchrun this answers a share of the questions, and returns the whole Table.
    Raises InputError if something given cannot be used, another process writes `out`, or `out` holds another run.
    """
    check_arguments(dataset, settings, out, file, columns)
    run = planned(
        system,
        dataset,
        chosen(
            settings,
            rounds=rounds,
            latent_steps=latent_steps,
            channel=channel,
            hear=hear,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            rollouts=rollouts,
            batch_size=batch_size,
            retry=retry,
            tools=None if tools is None else several(tools),
            date=date,
        ),
        protocol=protocol,
        graders=graders,
        allow_code_execution=allow_code_execution,
        limit=limit,
        file=file,
        columns=columns,
        task=task,
    )
    measurement = measurement_of(run, out, file, regrade, progress)
    with held(measurement.locks, measurement.processes.rank):
        check_there(measurement)
        return measure(measurement)


def check_arguments(
    dataset: object,
    settings: Settings | None,
    out: str | Path | None,
    file: str | Path | None,
    columns: Mapping[str, str] | None,
) -> None:
    """InputError if an argument of `evaluate` or `compare` is of another type than they say."""
    examples = "a list of Examples from load_dataset, or the name of a benchmark or a file"
    check_type("the data set", dataset, Iterable | Path, examples)
    check_type("settings", settings, Settings | None, "a Settings object, as Settings(rounds=2)")
    check_type("out", out, str | Path | None, "a file's name or path")
    check_source(file, columns)


# The plan of a run


@dataclass(frozen=True)
class Data:
    """A data set: its name, its task (math, choice or code), and a function that gives its Examples.

    load   load(warn) -> Examples; it warns of what is left out
    """

    name: str
    task: str
    load: Callable[[Callable[[str], object]], list[Example]]


@dataclass(frozen=True)
class Run:
    """What is measured, settled before anything is loaded.

    origin   what the system is, or is to be, loaded from
    style    its Style
    system   the System, None if it has not been loaded
    data     what it is asked
    points   the completed Settings of each point of the grid
    graders  their names; the first one's verdicts are plotted
    """

    origin: Origin
    style: Style
    system: "System | None"
    data: Data
    points: list[CompletedSettings]
    graders: tuple[str, ...]


@dataclass(frozen=True)
class Measurement:
    """How a Run is carried out.

    run        what is measured
    out        the file of records, None to keep them in memory
    locks      what holds that file in the first process
    regrade    grade the texts in it again, and ask no agent
    progress   show a bar on stderr
    processes  how many there are, and which one this is
    """

    run: Run
    out: Path | None
    locks: list[Lock]
    regrade: bool
    progress: bool
    processes: Processes


def chosen(settings: Settings | None = None, **given: Any) -> dict[str, Any]:
    """{field: value} of what was chosen.

    These are the fields of `settings` that are not at their defaults, and above them what is given and not None.
    """
    values = {}
    for one in fields(Settings):
        value = getattr(settings or Settings(), one.name)
        if value != one.default:
            values[one.name] = value
    return values | {name: value for name, value in given.items() if value is not None}


def several(value: Any) -> tuple[Any, ...]:
    """One value or several as a tuple."""
    is_one = isinstance(value, str) or not isinstance(value, Iterable)
    return (value,) if is_one else tuple(value)


def planned(
    system: "System | Origin",
    dataset: str | Path | Sequence[Example],
    options: Mapping[str, Any],
    *,
    protocol: str = "paper",
    graders: str | Sequence[str] | None = None,
    allow_code_execution: bool = False,
    limit: int | None = None,
    file: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
) -> Run:
    """The Run that the arguments of `evaluate` describe; InputError if they describe none.

    options   {field of Settings: value}, as `chosen` makes it
    """
    loaded, origin, style, own_task = taken_apart(system)
    seed = options.get("seed", Settings.seed)
    data = data_for(dataset, own_task, seed, limit=limit, file=file, columns=columns, task=task)
    if loaded is not None and loaded.task != data.task:
        raise InputError(
            f"the system was loaded for task {loaded.task}, and these questions are of task {data.task}: "
            f"load it with task={data.task!r}"
        )
    task_asked = None if data.name in BENCHMARKS else data.task  # a benchmark has its own
    defaults = settings_for(data.name, str(origin.style), protocol, task_asked)
    kind = defaults.pop("grader")
    wanted = None if graders is None else several(graders)
    judges = tuple(dict.fromkeys(graders_for(kind, wanted, allow_code_execution)))
    points = grid(style, defaults | dict(options))
    return Run(origin, style, loaded, data, points, judges)


def taken_apart(system: "System | Origin") -> tuple["System | None", Origin, Style, str]:
    """(the System if it is loaded, its Origin, its Style, its task); InputError if it is something else."""
    if isinstance(system, Origin):
        style = style_named(system.style)
        return None, system, style, style.task
    from ..system import System

    check_type("the system", system, System, "a System: load it with load_mas_system")
    origin = system.origin or Origin(style="")  # put together by hand
    return system, origin, system.style, system.task


def data_for(
    dataset: str | Path | Sequence[Example],
    own_task: str,
    seed: int,
    *,
    limit: int | None,
    file: str | Path | None,
    columns: Mapping[str, str] | None,
    task: str | None,
) -> Data:
    """The data set of Examples, or of a name; InputError if Examples come with what only a name may have."""
    if isinstance(dataset, (str, Path)):
        return named_data(str(dataset), file, columns, task, limit, seed, own_task)
    if any(value is not None for value in (limit, file, columns, task)):
        raise InputError(
            "limit, file, columns and task are for a data set that is named: give them to load_dataset"
        )
    return data_of(list(dataset))


def named_data(
    name: str,
    file: str | Path | None,
    columns: Mapping[str, str] | None,
    task: str | None,
    limit: int | None,
    seed: int,
    own_task: str,
) -> Data:
    """The data set that load_dataset finds by its name. A local file is of own_task, the system's, by default."""
    if not name:
        raise InputError(
            "the data set has an empty name: expected a benchmark or a file (docs/evaluating.md)"
        )
    if name not in BENCHMARKS:
        task = task or own_task
    load = partial(load_dataset, name, file, columns, task, limit, seed)
    return Data(name, benchmark_named(name, task)["task"], load)


def data_of(examples: list[Example]) -> Data:
    """The data set of Examples; InputError unless all are of the same."""
    if not examples or not all(isinstance(example, Example) for example in examples):
        raise InputError(
            "the data set holds no Examples: expected a list from load_dataset, which takes rows as dicts, too, or a "
            "benchmark's name"
        )
    for example in examples:
        if not isinstance(example.question, str) or not isinstance(example.gold, str):
            raise InputError(
                f"the question and the answer of Example {example.id!r:.80} are {example.question!r:.80} and "
                f"{example.gold!r:.80}, expected texts"
            )
    kinds = list(dict.fromkeys((example.dataset, example.task) for example in examples))
    if len(kinds) > 1:
        named = " and ".join(f"{name or 'no data set'} ({task})" for name, task in kinds)
        raise InputError(f"the Examples are of {named}: evaluate those of one data set at a time")
    name, task = kinds[0]
    check_known("task", [task], TASKS)
    return Data(name, task, lambda _: examples)


def grid(style: Style, options: Mapping[str, Any]) -> list[CompletedSettings]:
    """The completed Settings of each point, of options with one value or several for those in POINT.

    InputError if a value is out of range.
    """
    common = {name: value for name, value in options.items() if name not in POINT}
    axes: dict[str, tuple] = {
        "channel": ("latent",),
        "rounds": (None,),
        "latent_steps": (None,),
        "hear": ("own",),
    }
    for name in POINT:
        if name in options:
            axes[name] = several(options[name])
        if not axes[name]:
            example = LISTED.get(name, "one number or more")
            raise InputError(f"--{name.replace('_', '-')} lists nothing, expected {example}")
    points = []
    for values in itertools.product(*(axes[name] for name in POINT)):
        place = dict(zip(POINT, values, strict=True))
        if place["channel"] != "latent":
            place["latent_steps"] = 0  # a text channel has none: one point for all their numbers
        points.append(Settings(**place, **common).completed(style))
    return list(dict.fromkeys(points))


# The files


def check_outputs(outputs: Mapping[str, Path], inputs: Mapping[str, str | Path | None]) -> None:
    """Check {option: file} of what a run writes, beside {option: file} of what it reads. The folder of --out is made.

    InputError if one cannot be written, has a name that runs use themselves, is one file with another, or would be
    taken for rows of a folder that is read.
    """
    taken: dict[Path, str] = {}
    for option, file in [*inputs.items(), *outputs.items()]:
        if not file:
            continue
        other = taken.setdefault(local_path(file).resolve(), option)
        if other != option:
            raise InputError(f"{option} and {other} are the same file, {file}: give another name")
    for option, file in outputs.items():
        check_outside(option, file, inputs)
        end = OURS.search(str(file))
        if end:
            raise InputError(
                f"{option} is {file}, but names that end in {end[0]} are those of files beside the outputs of runs: "
                "give another name"
            )
        writable_file(option, file, make_folder=option == "--out")


def check_outside(option: str, file: str | Path, inputs: Mapping[str, str | Path | None]) -> None:
    """InputError if an output would be taken for rows of a folder among the inputs, the next time that it is read."""
    output = local_path(file).resolve()
    for source, name in inputs.items():
        is_benchmark = source == "--dataset" and str(name) in BENCHMARKS
        if not name or is_benchmark:
            continue
        folder = local_path(name).resolve()
        if folder.is_dir() and has_data_name(output, folder):
            raise InputError(
                f"{option} {str(file)!r} lies in the folder {str(name)!r}, all of whose files {source} reads as rows: "
                "give a file outside of it"
            )


def measurement_of(
    run: Run,
    out: str | Path | None,
    file: str | Path | None,
    regrade: bool,
    progress: bool,
) -> Measurement:
    """The Measurement of a Run; the other arguments are those of `evaluate`.

    InputError if `out` cannot be written, or if it is None and the run needs a file.
    """
    processes = launched()
    if out is None:
        check_needs_no_file(regrade, processes)
        return Measurement(run, None, [], regrade, progress, processes)
    path = output_path(out)
    if not regrade:
        check_no_hooks(run)
    check_records_file(run, path, {"--dataset": run.data.name, "--file": file})
    return Measurement(run, path, [Lock("--out", path)], regrade, progress, processes)


def check_needs_no_file(regrade: bool, processes: Processes) -> None:
    """InputError if a run needs a file of records."""
    if regrade:
        raise InputError("regrade grades the records in a file: name it with out")
    if processes.world > 1:
        raise InputError(
            f"{processes.world} processes bring their records together in a file: name one with out"
        )


def check_there(measurement: Measurement) -> None:
    """InputError if a file is to be graded again that does not exist."""
    if measurement.regrade and measurement.out is not None and not measurement.out.exists():
        raise InputError(
            f"{measurement.out} is not there: --regrade grades the texts in it again, so give the file of a run"
        )


def check_continues(measurement: Measurement) -> None:
    """InputError if a file that is there holds the records of another Run. The questions are read for that."""
    if measurement.out is None or not measurement.out.exists():
        return
    examples = measurement.run.data.load(no_op)
    header = header_of(measurement, examples, questions_of(measurement.run, examples))
    contents(measurement.out, [], header, measurement.regrade)


def check_records_file(run: Run, out: Path, inputs: Mapping[str, str | Path | None]) -> None:
    """InputError if a run that reads `inputs` cannot write its records to a file."""
    if run.system is not None and run.system.origin is None:
        raise InputError(
            "it is not known from which files this System was loaded, so that its records could not say what they "
            "depend on: leave out `out`, or load it with load_mas_system"
        )
    if run.system is not None and run.system.trained:
        raise InputError(
            "the links of this System were trained after it was loaded, so that its records could not say which they "
            "are: leave out `out`, or train with `out` and load the System from there"
        )
    check_outputs({"--out": out}, inputs)


def check_no_hooks(run: Run) -> None:
    """InputError if a System that is about to be asked has a hook, which its records could not tell of."""
    if run.system is not None and has_hooks(run.system):
        raise InputError(
            "a module of this System has a hook, so that its records could not say what they depend on: leave out "
            "`out`, or remove the hook"
        )


def has_hooks(system: "System") -> bool:
    """Whether torch calls a hook in the forward of a module of a System."""
    from ..fast.hooks import has_hook_inside

    if any(has_hook_inside(link) for link in system.outer_links.values()):
        return True
    for agent in system.agents.values():
        if has_hook_inside(agent.model):
            return True
        if agent.inner_link is not None and has_hook_inside(agent.inner_link):
            return True
    return False


# The run


def measure(measurement: Measurement) -> Table:
    """Answer all questions at all points of the grid that have no record yet, or grade texts again -> the Table."""
    run = measurement.run
    rank = measurement.processes.rank
    device, wait = joined(measurement)
    examples = run.data.load(warn if rank == 0 else no_op)
    questions = questions_of(run, examples)
    if rank == 0 and run.data.task == "code":
        check_tests(examples, measurement.progress)
    answers = partial(answers_of, measurement, examples, questions, device)
    if measurement.out is None:
        records = by_key(answers())
    else:
        file = measurement.out.resolve()  # what a link leads to is written, and the link stays
        header = header_of(measurement, examples, questions)
        if not measurement.regrade:
            complete(file, header, answers, rank, wait)
        elif rank == 0:
            gather(file, header, partial(graded_again, examples, run.graders), measurement.progress)
        wait()  # until the file is whole
        records = by_key(read_lines(file)[1:])
    leave(measurement.processes)
    return table_of(measurement, records, len(examples))


def joined(measurement: Measurement) -> tuple[str | None, Wait]:
    """(the device of this process, a function that returns when all processes of the run have called it).

    They share the locks from then on.
    """
    device = measurement.run.origin.device if measurement.run.system is None else "cpu"
    backend = "gloo"  # since it is only used to wait
    device, wait = join(measurement.processes, device, backend, WAIT)
    if measurement.processes.world > 1:
        share(measurement.locks, measurement.processes.rank, wait)
    return device, wait


def questions_of(run: Run, examples: Sequence[Example]) -> list[Question]:
    """What agents read of Examples; InputError if a point of the grid needs more of them."""
    texts = [example.question for example in examples]
    fn_names = [example.fn_name for example in examples]
    questions = run.style.questions(texts, fn_names, run.data.name)
    for point in run.points:
        check_neighbours(questions, point)
    return questions


def header_of(
    measurement: Measurement, examples: Sequence[Example], questions: Sequence[Question]
) -> Record:
    """The first line of the file of a Run. To grade texts again no device is needed, and their dtype stands there."""
    run = measurement.run
    origin = replace(run.origin, device="cpu") if measurement.regrade else run.origin
    return make_header(
        origin, run.style, run.data.name, run.points[0], run.graders, examples, questions
    )


def answers_of(
    measurement: Measurement,
    examples: Sequence[Example],
    questions: Sequence[Question],
    device: str | None,
    finished: Collection[Key] = (),
) -> Iterator[Record]:
    """The records of this process's share of the questions, but those whose keys are in `finished`.

    Graders are started and a System is loaded only if one is missing.
    """
    from . import answering

    run = measurement.run
    batches = answering.share_of(run.points, len(examples), measurement.processes)
    if not any(answering.missing_in(batch, finished) for batch in batches):
        return iter(())
    launch_graders(run.graders)
    system = run.system
    if system is None:
        origin = replace(run.origin, device=device)
        system = answering.load(origin, run.style, run.points, run.data.task)
    start_graders(run.graders)  # which came up meanwhile
    shown = measurement.progress and measurement.processes.rank == 0
    return answering.answer_batches(
        system, batches, examples, questions, run.graders, finished, shown
    )


def complete(
    file: Path,
    header: Record,
    answers: Callable[[Collection[Key]], Iterator[Record]],
    rank: int,
    wait: Wait,
) -> None:
    """Add the records that are missing to the file of a run. All its processes call this, each with its own answers.

    header     the first line of the file
    answers    answers(finished) -> this process's records, but those whose keys are in `finished`
    wait       returns when all processes have called it
    """
    if rank == 0:
        gather(file, header)
    wait()  # until the file is whole
    finished = by_key(read_lines(file)[1:])
    wait()  # until every process has read it, so that the first may write to it
    append(own_file(file, rank), answers(finished.keys()))
    wait()  # until all processes have written theirs
    if rank == 0:
        gather(file, header)


def own_file(file: Path, rank: int) -> Path:
    """Where a process writes its records: the first one into the file of the run, each other one into a part of it."""
    return file if rank == 0 else file.with_name(f"{file.name}.part{rank}")


def append(file: Path, records: Iterable[Record]) -> None:
    """Write records to the end of a file, each as soon as it is there."""
    with open(file, "a", encoding="utf-8") as lines:
        for record in records:
            lines.write(line_of(record))
            lines.flush()


def graded_again(examples: Sequence[Example], graders: Sequence[str], record: Record) -> Record:
    """A record with new verdicts on its texts."""
    return graded(record, examples[record["index"]], graders)


def table_of(measurement: Measurement, records: Mapping[Key, Record], n: int) -> Table:
    """The Table of a finished run of n questions; InputError if records are missing."""
    run = measurement.run
    by_point = []
    missing = 0
    for point in run.points:
        keys = [record_key(vars(point), i) for i in range(n)]
        found = [records[key] for key in keys if key in records]
        missing += n - len(found)
        by_point.append(found)
    if not missing:
        return make_table(by_point, run.points, run.graders)
    found_out = f"{missing} of {n * len(run.points)} questions are not answered yet"
    if measurement.regrade:
        raise InputError(f"{found_out}: run without --regrade first")
    raise InputError(
        f"{found_out}, though this run answered all: something else has changed {measurement.out} or deleted files "
        "beside it, or processes on several machines do not share its folder. Start the same command again to answer "
        "them"
    )
