"""Commands that look at what was made, and hand it on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stillroom.cli.options import AFTER, JsonOption, app, finish, following


@app.command(rich_help_panel=AFTER)
def inspect(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="folder of the teacher's data")],
    example: Annotated[
        str | None, typer.Argument(metavar="EXAMPLE", help="an example's id, or its first characters")
    ] = None,
    student: Annotated[
        str | None, typer.Option(metavar="MODEL", help="align with this student: a directory or hub id")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder of the corpus to take texts from, such as results/corpus")
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(
            metavar="STUDY", help="without EXAMPLE: show which of the layers kept the groups of this study compare"
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="file for the attention map [default: EXAMPLE.png]")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="predictions to show per token")] = 3,
    layer: Annotated[
        str, typer.Option(metavar="N|last", help="the teacher's layer whose norms and attention are shown")
    ] = "last",
    json: JsonOption = False,
) -> None:
    """Show what a store holds, or one example's tokens, alignment, predictions, norms and attention.

    Example: stillroom inspect offline_teacher_data
    """
    from stillroom.afterwards.inspection import (
        attention_figure,
        describe_example,
        describe_store,
        example_of,
        find_example,
        find_layer,
    )
    from stillroom.cli.printing import print_example, print_store
    from stillroom.config import ModelRef
    from stillroom.errors import UserError
    from stillroom.files import atomic_path
    from stillroom.offline_teacher_data.store import SignalStore
    from stillroom.studies import load_study

    if example is None:
        if picture:
            raise UserError("--picture needs an EXAMPLE, whose attention map it is")
        facts = describe_store(store, load_study(study) if study else None)
        if not json:
            print_store(facts)
        finish(json, facts, "", following("inspect", str(store), None, facts["ids"][0]))
        return
    opened = SignalStore.open(store)
    example_id = find_example(opened, example)
    shown = example_of(opened, opened.read(example_id, ()), corpus)
    reference = ModelRef(model=student) if student else None
    tap = find_layer(opened, layer)
    facts = describe_example(opened, example_id, shown, reference, top, tap)
    target, made = None, "The store has no attention map of this layer."
    if picture or tap in opened.layout.attention_layers:
        target = picture or Path(f"{example_id}.png")
        with atomic_path(target) as temporary:
            attention_figure(opened, example_id, shown, reference, tap).savefig(temporary, format="png")
        made = f"Attention map: {target}."
    if not json:
        print_example(facts)
    aligned = f"{following('inspect', str(store), None, example_id)} --student MODEL, to see the alignment"
    then = ("open it" if target else following("inspect", str(store), None)) if student else aligned
    finish(json, {**facts, "picture": target}, made, then)


@app.command(rich_help_panel=AFTER)
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="results folders of two studies or more")],
    json: JsonOption = False,
) -> None:
    """Set the results of several studies side by side: the same groups on another pair, other tasks or other seeds.

    Example: stillroom compare results other/results
    """
    from stillroom.analysis.side_by_side import side_by_side
    from stillroom.cli.printing import print_side_by_side
    from stillroom.folders import ResultsFolder

    facts = side_by_side(folders)
    if not json:
        print_side_by_side(facts)
    groups = {group: {name: row.plain for name, row in by_study.items()} for group, by_study in facts["groups"].items()}
    reports = " ".join(str(ResultsFolder(folder).report) for folder in folders)
    finish(json, {**facts, "groups": groups}, "", f"open {reports}")


@app.command(rich_help_panel=AFTER)
def export(
    trial: Annotated[Path, typer.Argument(metavar="TRIAL", help="folder of a finished trial")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a new folder")],
    adapter: Annotated[bool, typer.Option("--adapter", help="export only the LoRA layers, for use with peft")] = False,
    push: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="upload it to this model repository on the hub, made if absent"),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="with --push: a new repository is public")] = False,
    json: JsonOption = False,
) -> None:
    """Write a trained student as a Hugging Face model directory: weights, tokenizer, generation config, model card.

    Example: stillroom export results/knowledge_distillation_experiment/TRIAL my-student
    """
    from stillroom.afterwards.export import export_trial
    from stillroom.afterwards.export import push as push_folder

    path = export_trial(trial, folder, adapter)
    facts = {"folder": path, "files": sorted(p.name for p in path.iterdir())}
    then = f"read {path / 'README.md'}; AutoModelForCausalLM.from_pretrained({str(path)!r})"
    if push is None:
        finish(json, facts, f"{path}.", then)
        return
    address = push_folder(path, push, private=not public)
    finish(json, {**facts, "pushed": address}, f"{path}, uploaded to {address}.", then)
