"""Configuration: dataclass schema <- YAML (and its `base:` file) <- `key=value` settings.

    load(Schema, "configs/pretrain/scenes.yaml", ["optim.lr=1e-3"]) -> Schema

All errors of a configuration are raised here, before anything is built: an unknown key (with the nearest valid one), a value
of the wrong type, an unknown component, a combination that a dataclass's `check()` refuses. Each is one ConfigError with one
line.

A schema field made by `component_field` holds the Config of a component that the registry finds by name: `loss.name=clip`
gives `loss` the fields of pretrain/losses/clip.py.

values.py          plain values, where each was set, and the text it was written as
reading.py         YAML files with their `base:`, key=value settings, and shipped configurations by name
merging.py         values of one file or command line over those of another
spelling.py        the numbers, truth values and null that text without quotes stands for
written.py         what a field takes of a value: text as it was written, numbers, or plain values of any type
schema.py          values -> dataclasses, and the error lines
numbers.py         checks of numbers against intervals
arguments.py       types of command-line options: numbers within an interval
saving.py          a configuration as plain values and as YAML
static_schema.py   the schema as it stands in the source: typos are found before torch is imported

May import nothing of this project but errors and printable.
"""

from pretrain.config.merging import merge
from pretrain.config.numbers import SEED, check_numbers
from pretrain.config.reading import find_config, load_values, parse_dotlist, read_yaml
from pretrain.config.saving import save, to_dict, to_yaml
from pretrain.config.schema import build, component_field, extra_components, load, read_text_field, text_field
from pretrain.config.values import notes
from pretrain.config.written import written_text

__all__ = [
    "SEED",
    "build",
    "check_numbers",
    "component_field",
    "extra_components",
    "find_config",
    "load",
    "load_values",
    "merge",
    "notes",
    "parse_dotlist",
    "read_text_field",
    "read_yaml",
    "save",
    "text_field",
    "to_dict",
    "to_yaml",
    "written_text",
]
