"""finetune: aligned encoders -> cross-attention, and maps of what each word looked at.

    attention.py    multi-head attention: a fast path, and an exact one that returns the weights
    trace.py        what the exact path leaves behind
    places.py       where regions and words stand, told to the fusion
    context/        how a picture is attended to: dense | local | coarse_to_fine | pooled
    fusion/         who asks whom: cross | co | merged
    maps.py         a trace -> one map a word on the picture's grid: raw | rollout | gradcam | relevance
    model.py        encoder + fusion + a task's head
    mining.py       hard negatives, over all processes
    adapt.py        what of the encoders moves: freezing, another picture size, lora.py
    aligned.py      a task with the contrastive loss kept on
    wise.py         weights between the pretrained and the fine-tuned encoders
    tasks/          what is learned: one file a task
    config.py       the schema of a run, laid over what `init` brings
    recipe.py       a run assembled and trained by pretrain's one loop; __main__.py is what launchers start
    inference.py    load(RUN): a fine-tuned model, ready to answer; evaluate.py measures it
    export.py       its graphs for onnxruntime: image, text, and the head with the fusion; card.py is their model card

    attend.py       what each word looks at: maps of a model's own task; drawing.py draws them, words.py puts tokens together
    grounding.py    do maps find what words speak of: pointing game, attention lift, colours exchanged, with controls
                    phrases.py: which words name which objects; pointing.py: one map against boxes; probes.py: a batch

Imports pretrain, never launch. Floors, each importing only those before it: trace, attention, places, context, fusion, model,
tasks, config, inference, recipe; attend and grounding stand on inference; maps needs trace alone. Importing this package
makes its rooms known to pretrain.registry.
"""

from typing import TYPE_CHECKING, Any

from pretrain import registry

if TYPE_CHECKING:
    from finetune.loading import Finetuned, load

__all__ = ["Finetuned", "load"]

registry.add_root_package("finetune")


def __getattr__(name: str) -> Any:
    """`finetune.load(RUN)`, imported when it is asked for: the rooms below import this package first."""
    if name not in __all__:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    from finetune import loading

    return getattr(loading, name)
