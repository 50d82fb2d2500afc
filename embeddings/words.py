"""Which words stand for a class.

The rule, the same for every class and fixed before any training: a class stands for the words of its name in
PASCAL VOC together with the words of the name that MS COCO gives to the same class, compounds taken apart
('diningtable': dining, table) and an abbreviation joined by its long form ('tv': tv, television); each word
counts once. The two data sets were named by different people, in British and in American English, so the
second name is the everyday synonym where there is one (aeroplane / airplane, sofa / couch) and the very same
word where there is none. No score and no distance between vectors had a say in it.

| VOC name    | COCO name    | words                   |
|-------------|--------------|-------------------------|
| aeroplane   | airplane     | aeroplane, airplane     |
| diningtable | dining table | dining, table           |
| motorbike   | motorcycle   | motorbike, motorcycle   |
| pottedplant | potted plant | potted, plant           |
| sofa        | couch        | sofa, couch             |
| tvmonitor   | tv           | tv, monitor, television |

The other fourteen VOC names are the same in both sets, and 'background' has no COCO name.
"""

import re
from collections.abc import Mapping

WORDS: dict[str, tuple[str, ...]] = {
    "background": ("background",),
    "aeroplane": ("aeroplane", "airplane"),
    "bicycle": ("bicycle",),
    "bird": ("bird",),
    "boat": ("boat",),
    "bottle": ("bottle",),
    "bus": ("bus",),
    "car": ("car",),
    "cat": ("cat",),
    "chair": ("chair",),
    "cow": ("cow",),
    "diningtable": ("dining", "table"),
    "dog": ("dog",),
    "horse": ("horse",),
    "motorbike": ("motorbike", "motorcycle"),
    "person": ("person",),
    "pottedplant": ("potted", "plant"),
    "sheep": ("sheep",),
    "sofa": ("sofa", "couch"),
    "train": ("train",),
    "tvmonitor": ("tv", "monitor", "television"),
}
"""Class name -> the words whose unit vectors are averaged for it, in the order of the masks' values."""


def words_for(name: str, table: Mapping[str, tuple[str, ...]] = WORDS) -> tuple[str, ...]:
    """The words of class `name`: its entry in `table`, else the parts of its name ('traffic-light': two)."""
    if name in table:
        return tuple(table[name])
    parts = [part for part in re.split(r"[\s_-]+", name) if part]
    return tuple(dict.fromkeys(parts)) or (name,)


def spellings(word: str) -> tuple[str, ...]:
    """The forms in which `word` is looked up, best first: as it is, lower case, Title Case."""
    return tuple(dict.fromkeys((word, word.lower(), word.title())))
