"""The built-in data set: drawn scenes with captions, questions, boxes and relations.

    dataset.py       draws the splits
    catalog.py       a catalog of products with queries and graded judgments
    writer.py        writes what is drawn as shards
    layout.py        decides what a scene contains and where each object stands
    objects.py       the sixteen object kinds and how each is drawn
    shapes.py        fills polygons, ellipses and curves with palette indices
    backgrounds.py   the eight backgrounds and how each is drawn
    render.py        renders a scene to pixels and measures the visible box of each object
    sounds.py        the sounds of a scene: tones of each kind, captions of what is heard
    sound_questions.py   questions about them
    text.py          captions, negative captions and questions with answers
    rng.py           random choices that are the same on every machine

Everything in a scene is a pure function of (seed, split, index).

May import `pretrain.data.vocabulary`, `pretrain.runtime.files` and `pretrain.errors`. Only `launch` may import this package.
"""
