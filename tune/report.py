"""What a search leaves behind: trials.csv, best.yaml, Optuna's pictures, and report.html with everything in it."""

from __future__ import annotations

import csv
import html
import io
import shlex
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import TrialState
from rich import box
from rich.console import Console
from rich.table import Table

from cluster.files import write_text
from cluster.run.report import labelled, with_unit
from cluster.settings.config import TrainConfig, save_yaml
from tune.book import TrialRecord, best
from tune.folder import BEST_FILE, Search
from tune.progress import shown_value

TRIALS_FILE = "trials.csv"
REPORT_FILE = "report.html"
PICTURES = {
    "history": "Every trial's validation MAE, and the best so far",
    "importance": "How much each setting tells the better trials from the others (PED-ANOVA)",
    "parallel": "Each line a trial",
    "slice": "Validation MAE by setting",
}
"""Name of the picture and what it shows; Optuna draws them."""

EARLY = "Trials that were stopped early stand with the value they had then."


def names_of(trials: Sequence[TrialRecord]) -> list[str]:
    """The varied settings, in the order they first come."""
    return list(dict.fromkeys(name for trial in trials for name in trial.settings))


def write_trials(plan: Search, trials: Sequence[TrialRecord], unit: str) -> None:
    """trials.csv: a row a trial of the study, by number; its value has its unit in the header."""
    names = names_of(trials)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    value = labelled(f"val_mae_{plan.objective}", unit)
    writer.writerow(["number", "search", "state", value, "epochs", "best_epoch", "seconds", *names, "reason"])
    for trial in trials:
        facts = [trial.number, trial.search, trial.state, trial.value, trial.epochs, trial.best_epoch, trial.seconds]
        writer.writerow([*facts, *(trial.settings.get(name) for name in names), trial.reason])
    write_text(plan.folder / TRIALS_FILE, text.getvalue())


def write_best(plan: Search, trials: Sequence[TrialRecord]) -> None:
    """best.yaml: the settings of the best trial for a training of full length; nothing where no trial has a value."""
    leader = best(trials)
    if leader is None:
        return
    flat = plan.config.to_flat() | leader.settings | {"epochs": plan.options.full_epochs, "resume": False}
    config = TrainConfig.from_flat(flat)
    save_yaml(plan.folder / BEST_FILE, replace(config, run=replace(config.run, run_name=f"{plan.name}-best")))


def train_command(plan: Search) -> str:
    """The command that trains the best trial's settings at full length."""
    return f"crystalformer train --config {shlex.quote(str(plan.folder / BEST_FILE))}"


def table_of(plan: Search, trials: Sequence[TrialRecord], unit: str) -> str:
    """The trials as a table, the best first, those without a value last; plain text."""
    names = names_of(trials)
    shared = len({trial.search for trial in trials if trial.search}) > 1
    heading = f"val MAE {plan.objective}" + (f"\n{unit}" if unit not in ("", "1") else "")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ["trial", *(["search"] if shared else []), heading, "epochs", "time", "state", *names]:
        table.add_column(name, justify="left" if name in ("state", "search") else "right", no_wrap=True)
    for trial in sorted(trials, key=lambda t: (t.value is None, t.state == "failed", t.value or 0.0, t.number)):
        table.add_row(
            str(trial.number),
            *([trial.search] if shared else []),
            "" if trial.value is None else f"{trial.value:.4f}",
            str(trial.epochs),
            "" if trial.seconds is None else f"{trial.seconds:.0f} s",
            trial.state,
            *(shown_value(trial.settings[name]) if name in trial.settings else "" for name in names),
        )
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join(line for line in lines if line)


def summary(plan: Search, trials: Sequence[TrialRecord], unit: str) -> list[str]:
    """What the user is told at the end."""
    lines = [table_of(plan, trials, unit)]
    reasons = [f"trial {t.number} {t.state}: {t.reason}" for t in trials if t.reason]
    lines += reasons
    leader = best(trials)
    lines.append(f"run folder  {plan.folder}")
    if leader is None:
        lines.append("best trial  none: no trial has a value")
        return lines
    settings = " ".join(f"--{name} {_word(value)}" for name, value in leader.settings.items())
    lines += [
        f"best trial  {leader.number}: validation MAE {plan.objective} {with_unit(leader.value or 0.0, unit)} "
        f"in epoch {leader.best_epoch}",
        f"settings    {settings}",
        f"train it    {train_command(plan)}",
    ]
    return lines


def _word(value: Any) -> str:  # noqa: ANN401 - any setting's type
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return shown_value(value)


# Pictures ---------------------------------------------------------------------------------------------------------


def write_report(plan: Search, study: Study, trials: Sequence[TrialRecord], unit: str) -> None:
    """All of a search's files, as far as its trials allow; what cannot be drawn is said in the page."""
    write_trials(plan, trials, unit)
    write_best(plan, trials)
    label = labelled(f"validation MAE {plan.objective}", unit)
    shown = _shown(study)
    missing = _missing(shown)
    for name in PICTURES:
        path = plan.folder / f"{name}.png"
        if name in missing:
            path.unlink(missing_ok=True)
        else:
            _picture(shown, name, label, str(path))
    write_text(plan.folder / REPORT_FILE, _page(plan, shown, trials, label, missing, unit))


def _shown(study: Study) -> Study:
    """The study as it is drawn. Optuna's pictures leave out all but completed trials, so the others become such.

    The value of one stopped early is that of its last epoch, by which it was compared. Numbers stay as they are.
    """
    shown = optuna.create_study(direction="minimize")
    for trial in study.get_trials(deepcopy=False):
        good = trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and trial.value is not None
        shown.add_trial(
            optuna.trial.create_trial(
                state=TrialState.COMPLETE if good else TrialState.FAIL,
                value=trial.value if good else None,
                params=trial.params,
                distributions=trial.distributions,
            )
        )
    return shown


def _missing(study: Study) -> dict[str, str]:
    """Pictures that these trials do not allow, and why."""
    values = {t.value for t in study.get_trials(deepcopy=False) if t.state is TrialState.COMPLETE}
    if not values:
        return dict.fromkeys(PICTURES, "no trial has a value")
    if len(values) < 2:
        return {"importance": "it needs two trials of different value"}
    return {}


def _drawers(plots: Any) -> dict[str, Callable[..., Any]]:  # noqa: ANN401 - either module of Optuna's plots
    return {
        "history": plots.plot_optimization_history,
        "importance": plots.plot_param_importances,
        "parallel": plots.plot_parallel_coordinate,
        "slice": plots.plot_slice,
    }


def _draw(plots: Any, study: Study, name: str, label: str) -> Any:  # noqa: ANN401 - axes or a plotly figure
    extra = {} if name == "importance" else {"target": _value, "target_name": label}
    return _drawers(plots)[name](study, **extra)


def _value(trial: optuna.trial.FrozenTrial) -> float:
    """The trial's value; Optuna writes our label only beside a function of ours."""
    return float(trial.value if trial.value is not None else "nan")


def _picture(study: Study, name: str, label: str, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as plots

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a setting with one value only has no range to draw
        axes = _draw(plots, study, name, label)
    first = axes.flat[0] if hasattr(axes, "flat") else axes
    first.figure.set_size_inches(max(8.0, 3.2 * getattr(axes, "size", 1)), 5.0)
    first.figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close("all")


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: .2em .7em; text-align: right; }
th { border-bottom: 1px solid #999; } tr.best { background: #e8f1f5; } pre { background: #f4f4f4; padding: .8em; }
"""


def _page(
    plan: Search, study: Study, trials: Sequence[TrialRecord], label: str, missing: dict[str, str], unit: str
) -> str:
    """One page with the table and Optuna's figures, which can be zoomed; nothing is loaded from elsewhere."""
    from optuna import visualization

    leader = best(trials)
    parts = [f"<h1>{html.escape(plan.name)}</h1>"]
    if leader is not None:
        best_line = f"Best: trial {leader.number}, {label} {leader.value:.4f} in epoch {leader.best_epoch}."
        parts.append(f"<p>{html.escape(best_line)}</p><pre>{html.escape(train_command(plan))}</pre>")
    parts.append(f"<p>{EARLY}</p>")
    script: bool | str = True
    for name, text in PICTURES.items():
        parts.append(f"<h2>{name.capitalize()}</h2><p>{html.escape(text)}.</p>")
        if name in missing:
            parts.append(f"<p>Not drawn: {html.escape(missing[name])}.</p>")
            continue
        figure = _draw(visualization, study, name, label)
        parts.append(figure.to_html(full_html=False, include_plotlyjs=script))
        script = False
    parts += ["<h2>Trials</h2>", _html_table(trials, leader, unit)]
    title = html.escape(plan.name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _html_table(trials: Sequence[TrialRecord], leader: TrialRecord | None, unit: str) -> str:
    names = names_of(trials)
    head = ["trial", "search", labelled("val MAE", unit), "epochs", "seconds", "state", *names, "reason"]
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(text)}</th>" for text in head) + "</tr>"]
    for trial in trials:
        value = "" if trial.value is None else f"{trial.value:.4f}"
        seconds = "" if trial.seconds is None else f"{trial.seconds:.1f}"
        settings = [shown_value(trial.settings[name]) if name in trial.settings else "" for name in names]
        cells = [
            str(trial.number),
            trial.search,
            value,
            str(trial.epochs),
            seconds,
            trial.state,
            *settings,
            trial.reason,
        ]
        mark = ' class="best"' if trial is leader else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])
