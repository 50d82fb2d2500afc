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

PASCAL Context and COCO-Stuff go by one rule too. A class that VOC also has stands for the same words as there,
whatever it is called ('airplane', 'couch', 'tv'), so that it has one vector in all three sets. A name of several
words, or a compound that is no word of its own ('playingfield', 'waterdrops'), stands for its parts. The endings
-other and -stuff are left out: they tell labels apart, not meanings. A second spelling joins the first (drier, dryer;
donut, doughnut). One name is taken whole, 'hot dog' as hotdog, for neither of its parts is what it means. And 'table',
which is VOC's dining table in PASCAL Context and any other table in COCO-Stuff, stands for itself in both.
`OTHER_WORDS` lists every class for which this is not simply the name's own parts.
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


OTHER_WORDS: dict[str, tuple[str, ...]] = {
    "airplane": WORDS["aeroplane"],
    "couch": WORDS["sofa"],
    "dining table": WORDS["diningtable"],
    "motorcycle": WORDS["motorbike"],
    "tv": WORDS["tvmonitor"],
    "donut": ("donut", "doughnut"),
    "hair drier": ("hair", "drier", "dryer"),
    "hot dog": ("hotdog",),
    "playingfield": ("playing", "field"),
    "waterdrops": ("water", "drops"),
    "building-other": ("building",),
    "ceiling-other": ("ceiling",),
    "desk-stuff": ("desk",),
    "door-stuff": ("door",),
    "floor-other": ("floor",),
    "food-other": ("food",),
    "furniture-other": ("furniture",),
    "ground-other": ("ground",),
    "mirror-stuff": ("mirror",),
    "plant-other": ("plant",),
    "sky-other": ("sky",),
    "solid-other": ("solid",),
    "structural-other": ("structural",),
    "textile-other": ("textile",),
    "wall-other": ("wall",),
    "water-other": ("water",),
    "window-other": ("window",),
}
"""Classes of PASCAL Context and COCO-Stuff that VOC names otherwise, or whose words are not their name's parts."""


def words_for(name: str, table: Mapping[str, tuple[str, ...]] = WORDS) -> tuple[str, ...]:
    """The words of class `name`: of `table`, else of `OTHER_WORDS`, else its name's parts ('traffic-light': two)."""
    if name in table:
        return tuple(table[name])
    if name in OTHER_WORDS:
        return OTHER_WORDS[name]
    parts = [part for part in re.split(r"[\s_-]+", name) if part]
    return tuple(dict.fromkeys(parts)) or (name,)


def spellings(word: str) -> tuple[str, ...]:
    """The forms in which `word` is looked up, best first: as it is, lower case, Title Case."""
    return tuple(dict.fromkeys((word, word.lower(), word.title())))
