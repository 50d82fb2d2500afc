"""What `--recipe` stands for: values of flags that can be given one by one too, and that override it."""

RECIPES: dict[str, dict[int, dict]] = {
    "paper": {1: {}, 2: {}},
    "best": {
        1: {"lambda_": 0.0, "auxiliary_background": True},
        2: {
            "auxiliary_background": True,
            "teacher": "frozen",
            "rounds": 4,
            "keep": 0.3,
            "one_name": True,
            "picture_gate": 0.5,
            "keep_known": 0.5,
            "rare_power": 0.5,
            "num_clusters": 100,
            "imagenet_names": True,
            "weak_proportion": 1.0,
            "st_lambda": 1.0,
        },
    },
}
"""Recipe -> stage -> values. Those of "best" were chosen on seen classes held out as if unseen (see the README)."""


def spelt_out(recipe: str, stage: int) -> str:
    """The flags that a recipe stands for in a stage, as one would type them."""
    words = []
    for name, value in RECIPES[recipe][stage].items():
        flag = ("--no-" if value is False else "--") + name.strip("_").replace("_", "-")
        text = f"{value:g}" if isinstance(value, float) else str(value)
        words.append(flag if isinstance(value, bool) else f"{flag} {text}")
    return " ".join(words)
