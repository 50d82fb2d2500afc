"""What is wrong with a user's pictures, masks or lists, in one line."""


class DatasetError(ValueError):
    """Bad data. The message is one line that names the file or flag and says how to mend it."""
