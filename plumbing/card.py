"""A model card in Markdown with the fields that hubs of models ask for, filled from a run.

References:
    Mitchell et al., Model Cards for Model Reporting, FAT* 2019. The sections are those of Hugging Face's template.
"""

from pathlib import Path

from plumbing.html import number
from plumbing.runs import Run

SECTIONS = {"about": "What was trained", "scores": "Scores", "subgroups": "Subgroups", "calibration": "Calibration",
            "members": "Members", "checks": "Checks"}  # of report.py, by their name in the card  # fmt: skip
CARD = """---
license: other
license_name: see-the-card
library_name: pytorch
pipeline_tag: {pipeline}
tags: [attention-guided-cropping]
metrics: [{metric}]
model-index:
- name: "{name}"
  results:
  - task: {{type: {pipeline}}}
    dataset: {{name: "{data}", type: "{data}", split: held-out folds}}
    metrics: [{{type: {metric}, value: {value}, name: "{metric}, out of fold"}}]
---

# {name}

**Not for clinical use: nothing here has been validated on patients.**

## Model details

{about}

Licence of the weights it started from: {licence}. The licence of the training images is not known to this project; add
it before you pass the model on.

## Uses

Meant for research and competitions, on images like those it was trained on. Other cameras, sites and populations need a
validation of their own.

```bash
python predict.py --run runs/{name} IMAGES
```

## Training

{folds} folds, split by whole groups ({group}); training took {minutes} minutes.

{members}

## Evaluation

All scores are of held-out images.

{scores}

### Subgroups

{subgroups}

### Calibration

{calibration}

## Limits

* The best epoch of a fold was chosen on the fold it is scored on; `last_score` in `metrics.json` shows by how much that
  flatters.
* Scores hold for the shares of the classes in these data. What no column of the table names was not looked at.

## Checks

{checks}
"""


def licence_of(backbone: str, weights: str) -> str:
    """What is known of the licence of the weights that a backbone started from."""
    family, _, name = backbone.rpartition(":")
    if weights == "none":
        return f"{backbone}, from random weights: none"
    if weights != "imagenet":
        return f"{backbone}, from {Path(weights).name}: as its source says"
    if family != "timm":
        return f"{backbone}, weights of torchvision: not stated there"
    import timm

    return f"{backbone}: {timm.get_pretrained_cfg(name).license or 'not stated by timm'}"


def fill_card(run: Run, sections: dict[str, str], group: str | None) -> str:
    """The text of a card. sections: of report.py by title, in HTML, which Markdown takes as it is; group: column of
    the groups."""
    task, main = run.task, run.metrics.get("ranked", run.metrics["pooled"])
    runs = [run] if not run.is_blend else [member for member, _ in run.members() if not member.is_blend]
    started = [licence_of(one.config["args"]["backbone"], str(one.config["args"]["weights"])) for one in runs]
    seconds = sum(fold.get("seconds", 0) for one in runs for fold in one.metrics["folds"])
    facts = {
        "name": run.name, "pipeline": "image-classification" if task.probabilistic else "other",
        "metric": task.metric, "value": number(main[task.metric]), "data": Path(run.config["args"]["data_dir"]).name,
        "licence": "; ".join(dict.fromkeys(started)), "folds": len(run.folds), "minutes": f"{seconds / 60:.1f}",
        "group": f"groups are the values of `{group}`" if group else "every image is a group of its own",
    }  # fmt: skip
    none = "There is nothing to show."
    return CARD.format(**facts, **{key: sections.get(title) or none for key, title in SECTIONS.items()})
