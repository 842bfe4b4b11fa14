"""Checks before hours are spent: each line is fine, or says what to do."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from stillroom.alignment import compare_vocabularies
from stillroom.config import ModelRef, Study, UserError
from stillroom.models import is_local, load_config, load_tokenizer
from stillroom.planning import plan_study
from stillroom.provenance import package_versions


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    subject: str
    fine: bool
    says: str


def examine(study: Study) -> list[Finding]:
    """Everything that can be known without loading weights or starting Ray."""
    findings = [_python(), *_models(study), *_plan(study), _accelerator(study)]
    return [finding for finding in findings if finding is not None]


def _python() -> Finding:
    versions = package_versions()
    absent = [name for name, version in versions.items() if version == "absent"]
    listed = ", ".join(f"{name} {version}" for name, version in versions.items() if version != "absent")
    return Finding("packages", not absent, f"missing: {', '.join(absent)}; run make install" if absent else listed)


def _models(study: Study) -> list[Finding]:
    findings, tokenizers = [], []
    for role, ref in (("teacher", study.teacher), ("student", study.student)):
        if ref.model.startswith("builtin:"):
            findings.append(Finding(role, True, f"{ref.model}, made on first use"))
            continue
        try:
            config = load_config(ref)
            tokenizers.append(load_tokenizer(ref))
            where = "local directory" if is_local(ref) else f"hub or cache, revision {ref.revision or 'not pinned'}"
            findings.append(Finding(role, True, f"{ref.model}: {config.model_type}, {where}"))
        except UserError as error:
            findings.append(Finding(role, False, str(error)))
    if len(tokenizers) == 2:
        findings.append(_vocabularies(tokenizers, study.teacher))
    return findings


def _vocabularies(tokenizers: list[object], teacher: ModelRef) -> Finding:
    figures = compare_vocabularies(*tokenizers)
    if figures["same"]:
        return Finding("tokenizers", True, "the same vocabulary: alignment is the identity")
    share = figures["mapped_ids"] / figures["teacher_size"]
    says = (
        f"different: {figures['shared_strings']:,} strings in common, {figures['same_ids']:,} ids that mean the same; "
        f"{share:.0%} of the teacher's ids have a student id of the same bytes"
    )
    return Finding("tokenizers", share > 0.2, says)


def _plan(study: Study) -> list[Finding]:
    try:
        plan = plan_study(study)
    except UserError as error:
        return [Finding("data", False, str(error))]
    assumed = [a for a in plan["assumptions"] if a.startswith("tokens per example")]
    findings = [Finding("data", not assumed, assumed[0] if assumed else f"{plan['corpus']['examples']:,} examples")]
    for subject, path, needed in (
        ("disk for teacher data", study.paths.store_path, plan["store_bytes"]["total"]),
        ("disk for students", study.paths.results, plan["disk_bytes"]["checkpoints"]),
    ):
        existing = next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        says = f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free at {existing}"
        findings.append(Finding(subject, free > needed, says if free > needed else says + "; free some or move it"))
    return findings


def _accelerator(study: Study) -> Finding:
    import torch

    count = torch.cuda.device_count()
    if count:
        names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)}))
        return Finding("accelerator", True, f"{count} × {names}")
    large = study.name == "paper"
    says = "no GPU: everything runs on the CPU" + ("; this study needs GPUs" if large else "")
    return Finding("accelerator", not large, says)


def print_findings(findings: list[Finding]) -> bool:
    """Print a line each; returns whether all are fine."""
    from rich.console import Console

    console = Console()
    for finding in findings:
        mark = "ok  " if finding.fine else "todo"
        console.print(f"{mark} {finding.subject}: {finding.says}", markup=False, highlight=False, soft_wrap=True)
    return all(finding.fine for finding in findings)
